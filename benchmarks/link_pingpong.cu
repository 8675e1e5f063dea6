// How long until a peer GPU can use what a block has stored there, by how it is told: a ping-pong of blocks of two
// GPUs.
//
//     nvcc -std=c++17 -O3 -arch=sm_90a -Iepops/csrc -o pingpong benchmarks/link_pingpong.cu
//     CUDA_MODULE_LOADING=EAGER ./pingpong
//
// Each block of one GPU plays with the block of the same number on the other; what comes is compared with what was
// sent. The time is clock cycles of the first block at 1.98 GHz, halved. csrc/lines.cuh stands on what this shows.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "ptx.cuh"

using namespace epops;

#define CHECK(call)                                              \
  do {                                                           \
    const cudaError_t error = (call);                            \
    if (error != cudaSuccess) {                                  \
      std::printf("%s: %s\n", #call, cudaGetErrorString(error)); \
      std::exit(1);                                              \
    }                                                            \
  } while (0)

enum Way { kLines, kStoresFenceFlag, kBulkFenceFlag, kBulkFlag };
constexpr int kRounds = 220, kWarmUps = 19, kRoom = 64 << 10, kFlags = 8 << 20;

template <Way kWay>
__global__ void play(uint8_t* mine, uint8_t* theirs, int rank, int bytes, unsigned long long* found) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int thread = threadIdx.x, step = blockDim.x * 16;
  uint64_t* my_flag = reinterpret_cast<uint64_t*>(mine + kFlags + blockIdx.x * 256);
  uint64_t* their_flag = reinterpret_cast<uint64_t*>(theirs + kFlags + blockIdx.x * 256);
  mine += static_cast<size_t>(blockIdx.x) * kRoom;
  theirs += static_cast<size_t>(blockIdx.x) * kRoom;
  unsigned long long start = 0, wrong = 0;
  for (unsigned round = 1; round <= kRounds; ++round) {
    if (round == kWarmUps + 1) start = clock64();
    const uint4 word = make_uint4(round, round, round, round);
    for (int half = 0; half < 2; ++half) {
      if (half == rank) {  // sends
        if (kWay == kLines || kWay == kStoresFenceFlag) {
          for (int at = thread * 16; at < bytes; at += step) st_line(theirs + at, word);
        } else {
          for (int at = thread * 16; at < bytes; at += step) *reinterpret_cast<uint4*>(shared + at) = word;
          asm volatile("fence.proxy.async;" ::: "memory");
        }
        __syncthreads();
        if (thread == 0 && kWay != kLines) {
          if (kWay != kStoresFenceFlag) {
            const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(theirs), "r"(from),
                         "r"(bytes)
                         : "memory");
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
          }
          if (kWay != kBulkFlag) fence_acq_rel_sys();
          st_relaxed_sys(their_flag, round);
        }
      } else if (kWay == kLines) {
        for (int at = thread * 16; at < bytes; at += step) {
          while (!__all_sync(__activemask(), ld_line(mine + at).w == round)) {
          }
        }
      } else {
        if (thread == 0) {
          while (ld_relaxed_sys(my_flag) != round) {
          }
        }
        __syncthreads();
        for (int at = thread * 16; at < bytes; at += step) {
          const uint4 v = ld_line(mine + at);
          wrong += v.x != round || v.w != round;
        }
      }
      __syncthreads();
    }
  }
  if (thread == 0 && blockIdx.x == 0) found[0] = clock64() - start;
  if (wrong != 0) atomicAdd(&found[1], wrong);
}

int main() {
  uint8_t* memory[2];
  unsigned long long* found[2];
  for (int device = 0; device < 2; ++device) {
    CHECK(cudaSetDevice(device));
    CHECK(cudaDeviceEnablePeerAccess(1 - device, 0));
    CHECK(cudaMalloc(&memory[device], 16 << 20));
    CHECK(cudaMallocHost(&found[device], 16));
  }
  const auto measure = [&](auto kernel, const char* name, int blocks, int bytes) {
    for (int device = 0; device < 2; ++device) {
      CHECK(cudaSetDevice(device));
      CHECK(cudaMemset(memory[device], 0, 16 << 20));
      CHECK(cudaDeviceSynchronize());
      found[device][0] = found[device][1] = 0;
    }
    for (int device = 0; device < 2; ++device) {
      CHECK(cudaSetDevice(device));
      kernel<<<blocks, 512, 16 << 10>>>(memory[device], memory[1 - device], device, bytes, found[device]);
      CHECK(cudaGetLastError());
    }
    for (int device = 0; device < 2; ++device) {
      CHECK(cudaSetDevice(device));
      CHECK(cudaDeviceSynchronize());
    }
    std::printf("%-24s %3d blocks %6d bytes: %.2f us, %llu wrong\n", name, blocks, bytes,
                found[0][0] / 1980.0 / 2 / (kRounds - kWarmUps), found[0][1] + found[1][1]);
  };
  for (int blocks : {1, 16, 64, 128}) {
    for (int bytes : {512, 8192, 16384}) {
      measure(play<kLines>, "lines", blocks, bytes);
      measure(play<kStoresFenceFlag>, "stores, fence, flag", blocks, bytes);
      measure(play<kBulkFenceFlag>, "bulk copy, fence, flag", blocks, bytes);
      measure(play<kBulkFlag>, "bulk copy, flag", blocks, bytes);
    }
  }
}
