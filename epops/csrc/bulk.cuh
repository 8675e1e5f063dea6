// Rows through shared memory by the bulk copies of sm_90: one lane moves a whole row, and no register holds it. Where
// there are none (sm_80), the warp copies 16 bytes a lane, at once.
#pragma once

#include "ptx.cuh"

namespace epops {

// What a stage is waited for with: one load at a time.
struct Arrival {
  uint64_t* barrier;  // shared
  uint32_t parity;
};

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// By addresses in shared memory. A barrier of `count` arrivals a phase; by one thread, before a barrier of the block.
__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// By one thread: an arrival, which releases what the thread did before.
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// By one thread: an arrival, and `bytes` that bulk copies of this phase bring.
__device__ __forceinline__ void arrive_and_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// By one thread: `bytes` (a multiple of 16) of `from` to shared memory.
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// Until the phase of this parity is over; any threads, each for itself.
__device__ __forceinline__ void await_parity(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\tagain:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@!done bra "
      "again;\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Whether it is over, by one look.
__device__ __forceinline__ bool is_over(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  asm volatile(
      "{\n\t.reg .pred done;\n\tmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n\tselp.u32 %0, 1, 0, "
      "done;\n\t}"
      : "=r"(over)
      : "r"(barrier), "r"(parity)
      : "memory");
  return over != 0;
}

// Between loads of shared memory by this thread and bulk copies to the same place that another thread starts after an
// arrival of this one.
__device__ __forceinline__ void fence_before_refill() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ uint4 ld_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void st_shared_16(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
#endif

// By one thread, before a barrier of the block.
__device__ __forceinline__ void init_arrival(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  init_barrier(shared_address(barrier), 1);
#endif
}

// Between what this thread did to memory by loads and stores and bulk copies that follow, its own or, after a barrier,
// another thread's.
__device__ __forceinline__ void fence_before_bulk() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

// `bytes` of `from` to `shared`, and `more_bytes` of `more` to `more_shared` (multiples of 16, either may be 0), by all
// lanes of a warp; await_bulk before they are used.
__device__ __forceinline__ void bulk_load(void* shared, const void* from, uint32_t bytes, void* more_shared,
                                          const void* more, uint32_t more_bytes, const Arrival& arrival) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x % 32 == 0) {
    const uint32_t barrier = shared_address(arrival.barrier);
    arrive_and_expect(barrier, bytes + more_bytes);
    if (bytes != 0) bulk_copy(shared_address(shared), from, bytes, barrier);
    if (more_bytes != 0) bulk_copy(shared_address(more_shared), more, more_bytes, barrier);
  }
#else
  const auto copy = [](void* to, const void* source, uint32_t num) {
    for (uint32_t at = threadIdx.x % 32 * 16; at < num; at += 512) {
      *reinterpret_cast<uint4*>(static_cast<uint8_t*>(to) + at) =
          ld_no_allocate(static_cast<const uint8_t*>(source) + at);
    }
  };
  copy(shared, from, bytes);
  copy(more_shared, more, more_bytes);
#endif
  __syncwarp();
}

__device__ __forceinline__ void await_bulk(Arrival& arrival) {
#if __CUDA_ARCH__ >= 900
  await_parity(shared_address(arrival.barrier), arrival.parity);
  arrival.parity ^= 1;
#endif
  __syncwarp();
}

// `bytes` (a multiple of 16) of `shared` to the place `to` of every lane in `lanes`, by all lanes of a warp.
__device__ __forceinline__ void bulk_store(uint64_t to, uint32_t lanes, const void* shared, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  if (lanes >> threadIdx.x % 32 & 1) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(shared)),
                 "r"(bytes)
                 : "memory");
  }
#else
  for (; lanes != 0; lanes &= lanes - 1) {
    uint8_t* place = reinterpret_cast<uint8_t*>(__shfl_sync(~0u, to, __ffs(lanes) - 1));
    for (uint32_t at = threadIdx.x % 32 * 16; at < bytes; at += 512) {
      st_16(place + at, *reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(shared) + at));
    }
  }
#endif
}

// Stores that this lane started since the last call are one group.
__device__ __forceinline__ void bulk_commit() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Until all but the last kPending groups of this lane have landed; what they wrote counts as this lane's own stores.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
#endif
  __syncwarp();
}

// Until shared memory has been read by all groups of all lanes of the warp, and may be filled again.
__device__ __forceinline__ void bulk_wait_read() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
  __syncwarp();
}

}  // namespace epops
