// Records as lines of 128 bytes that say for themselves that they have come.
//
// Eight lanes store a line with one instruction: 120 bytes of the record and the op's epoch. Such a store crosses
// NVLink whole, and a load of the same lanes sees all of it or nothing of it (NCCL's protocol LL128 stands on the
// same), so there is no flag, no fence and no wait until anything has landed: a row can be used as soon as it is seen.
// What lies at the epochs' places is never anything else, see Workspace.
//
// A warp takes steps of four lines. The 16-byte words of a record lie one a lane; the last lane of eight has half a
// word beside the epoch, so that two lines have 15 words.
#pragma once

#include "exchange.cuh"

namespace epops {

// What this lane has of a step.
struct LineSeat {
  int first;  // byte of the step's content
  bool half;  // 8 bytes and the epoch, else 16

  __device__ __forceinline__ LineSeat() {
    const int lane = threadIdx.x % 32, in_line = lane % 8;
    half = in_line == 7;
    first = lane / 16 * 240 + (half ? 224 + lane / 8 % 2 * 8 : (lane / 8 % 2 * 7 + in_line) * 16);
  }
};

// Lines of `token` of rank `source` in the memory of `owner`.
__device__ __forceinline__ uint8_t* lines(const Workspace& ws, int owner, int parity, int source, int token) {
  const int64_t pair = parity * (ws.num_ranks - 1) + (source < owner ? source : source - 1);
  return reinterpret_cast<uint8_t*>(ws.base[owner] + ws.lines_offset) + (pair * ws.line_tokens + token) * ws.line_bytes;
}

// Steps first, first + stride, … of a record in shared memory to a peer's lines, by one warp. `bytes` is a multiple of
// 16.
__device__ __forceinline__ void send_lines(uint8_t* to, const uint8_t* record, int bytes, int first, int stride,
                                           uint32_t epoch) {
  const LineSeat seat;
  const int steps = line_steps(bytes);
  to += threadIdx.x % 32 * 16;
#pragma unroll 4
  for (int step = first; step < steps; step += stride) {
    const int at = step * kStepContent + seat.first;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (at < bytes) {
      if (seat.half) {
        const uint2 part = *reinterpret_cast<const uint2*>(record + at);
        v.x = part.x, v.y = part.y;
      } else {
        v = *reinterpret_cast<const uint4*>(record + at);
      }
    }
    if (seat.half) v.z = epoch;
    st_line(to + step * kStepBytes, v);
  }
}

// is_over, by all lanes of a warp, for the warp.
__device__ __forceinline__ bool warp_is_over(const Workspace& ws, const Op& op, int peer, int phase, uint64_t* start) {
  bool over = false;
  if (threadIdx.x % 32 == 0) over = is_over(ws, op.epoch, peer, phase, start);
  return __shfl_sync(~0u, over, 0);
}

// Waits for all lines of a record, by one warp, and reads nothing else of them. False: they do not come.
__device__ __forceinline__ bool await_lines(const Workspace& ws, const Op& op, const uint8_t* from, int bytes,
                                            int source, int phase) {
  constexpr int kTag = 120, kLine = 128;
  const int num = line_steps(bytes) * (kStepBytes / kLine);
  uint64_t start = 0;
  uint32_t spin = 0;
#pragma unroll 1
  for (int line = threadIdx.x % 32; line - static_cast<int>(threadIdx.x % 32) < num;) {
    const bool came =
        line >= num || ld_relaxed_sys(reinterpret_cast<const uint32_t*>(from + line * kLine + kTag)) == op.epoch;
    if (__all_sync(~0u, came)) {
      line += 32;
    } else if (++spin % 64 == 0 && warp_is_over(ws, op, source, phase, &start)) {
      return false;
    }
  }
  return true;
}

// Steps first, first + stride, … of a record, kSteps of them at most, as far as it has so many, by one warp, which
// waits for them. False: they do not come, and `v` means nothing. Rows of a source that has gone lost count as zero,
// see end_op.
template <int kSteps>
__device__ __forceinline__ bool read_lines(const Workspace& ws, const Op& op, const uint8_t* from, int bytes, int first,
                                           int stride, int source, int phase, uint4 (&v)[kSteps]) {
  const bool tells = threadIdx.x % 8 == 7;
  const int steps = line_steps(bytes);
  from += threadIdx.x % 32 * 16;
  uint32_t missing = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (first + i * stride < steps) {
      v[i] = ld_line(from + (first + i * stride) * kStepBytes);
      missing |= 1u << i;
    }
  }
  uint64_t start = 0;
#pragma unroll 1
  for (uint32_t spin = 1;; ++spin) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if ((missing >> i & 1) != 0 && __all_sync(~0u, !tells || v[i].z == op.epoch)) missing &= ~(1u << i);
    }
    if (missing == 0) return true;
    if (spin % 64 == 0 && warp_is_over(ws, op, source, phase, &start)) return false;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if ((missing >> i & 1) != 0) v[i] = ld_line(from + (first + i * stride) * kStepBytes);
    }
  }
}

// What read_lines has read to the same place of a record in shared memory.
template <int kSteps>
__device__ __forceinline__ void keep_lines(uint8_t* record, int bytes, int first, int stride,
                                           const uint4 (&v)[kSteps]) {
  const LineSeat seat;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int at = (first + i * stride) * kStepContent + seat.first;
    if (at >= bytes) continue;
    if (seat.half) {
      *reinterpret_cast<uint2*>(record + at) = make_uint2(v[i].x, v[i].y);
    } else {
      *reinterpret_cast<uint4*>(record + at) = v[i];
    }
  }
}

}  // namespace epops
