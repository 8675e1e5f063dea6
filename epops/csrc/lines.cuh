// Lines: 16 bytes over the link of which the last 4 are the op's epoch, so that data says for itself that it has come.
// No flag and no fence: a fence waits until the link has taken everything, 2 µs and more, which a few rows are not
// worth. A line costs a third more bytes than its data; larger batches send records and flags instead.
//
// The unit is a step: what a warp makes of a row at once, 16 bytes a lane. Lane i's line has the first 12 of them; the
// last 4 of all lanes, and the scales of the step, fill further lines, three words each.
#pragma once

#include "exchange.cuh"

namespace epops {

// Lines of a step with so many scales beyond one a lane.
__host__ __device__ inline int extra_lines(int num_scales) { return (32 + num_scales + 2) / 3; }
__host__ __device__ inline int step_bytes(int num_scales) { return (32 + extra_lines(num_scales)) * 16; }
// Lines of `num` words of 4 bytes.
__host__ __device__ inline int words_bytes(int num) { return (num + 2) / 3 * 16; }

struct Step {
  uint4 main, extra;

  // `scale` of lane n * lanes_a_scale is the step's n-th scale. All lanes call it, lanes beyond the row's end too.
  __device__ __forceinline__ void pack(uint4 v, uint32_t scale, int num_scales, int lanes_a_scale, uint32_t epoch) {
    const int lane = threadIdx.x % 32;
    main = make_uint4(v.x, v.y, v.z, epoch);
    uint32_t word[3];
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const int at = 3 * lane + c;
      word[c] = __shfl_sync(~0u, v.w, at & 31);
      if (num_scales != 0) {
        const uint32_t other = __shfl_sync(~0u, scale, (at - 32) * lanes_a_scale & 31);
        if (at >= 32) word[c] = other;
      }
    }
    extra = make_uint4(word[0], word[1], word[2], epoch);
  }
  // `here`: whether this lane's bytes are of the row.
  __device__ __forceinline__ void store(uint64_t to, bool here, int num_scales) const {
    const int lane = threadIdx.x % 32;
    if (here) st_relaxed_sys_16(reinterpret_cast<void*>(to + lane * 16), main);
    if (lane < extra_lines(num_scales)) st_relaxed_sys_16(reinterpret_cast<void*>(to + 512 + lane * 16), extra);
  }
  // The 16 bytes of this lane, and the scale of lane n * lanes_a_scale.
  __device__ __forceinline__ uint4 unpack(int num_scales, int lanes_a_scale, uint32_t* scale) const {
    const int lane = threadIdx.x % 32;
    const auto word = [&](int at) {
      const uint32_t a = __shfl_sync(~0u, extra.x, at / 3), b = __shfl_sync(~0u, extra.y, at / 3),
                     c = __shfl_sync(~0u, extra.z, at / 3);
      return at % 3 == 0 ? a : at % 3 == 1 ? b : c;
    };
    if (num_scales != 0) *scale = word(32 + lane / lanes_a_scale);
    return make_uint4(main.x, main.y, main.z, word(lane));
  }
};

// One line of this op, or false; see wait_slowly.
__device__ __forceinline__ bool wait_line(const Workspace& ws, const uint8_t* from, const Op& op, int peer, int phase,
                                          uint4* line) {
  uint32_t unused;
#pragma unroll 1
  while (line->w != op.epoch) {
    // The last 8 bytes are a tagged word as any other.
    if (!wait_slowly(ws, reinterpret_cast<const uint64_t*>(from) + 1, op.epoch, peer, phase, &unused, nullptr)) {
      *line = make_uint4(0, 0, 0, 0);
      return false;
    }
    *line = ld_relaxed_sys_16(from);
  }
  return true;
}

// A step of a peer's row. False in a lane whose lines do not come, which get zeros.
__device__ __forceinline__ void ask_step(const uint8_t* from, bool here, int num_scales, Step* step) {
  const int lane = threadIdx.x % 32;
  step->main = step->extra = make_uint4(0, 0, 0, 0);
  if (here) step->main = ld_relaxed_sys_16(from + lane * 16);
  if (lane < extra_lines(num_scales)) step->extra = ld_relaxed_sys_16(from + 512 + lane * 16);
}
__device__ __forceinline__ bool wait_step(const Workspace& ws, const uint8_t* from, const Op& op, int peer, int phase,
                                          bool here, int num_scales, Step* step) {
  const int lane = threadIdx.x % 32;
  bool came = true;
  if (here) came = wait_line(ws, from + lane * 16, op, peer, phase, &step->main);
  if (lane < extra_lines(num_scales)) came &= wait_line(ws, from + 512 + lane * 16, op, peer, phase, &step->extra);
  __syncwarp();
  return came;
}

// Words of 4 bytes, word i = get(i), by one warp.
template <class Get>
__device__ __forceinline__ void store_words(uint8_t* to, int num, const Op& op, Get get) {
#pragma unroll 1
  for (int i = threadIdx.x % 32 * 3; i < num; i += 96) {
    st_relaxed_sys_16(to + i / 3 * 16,
                      make_uint4(get(i), i + 1 < num ? get(i + 1) : 0, i + 2 < num ? get(i + 2) : 0, op.epoch));
  }
}
// put(i, word) for each; zeros, and false, where they do not come.
template <class Put>
__device__ __forceinline__ bool take_words(const Workspace& ws, const uint8_t* from, int num, const Op& op, int peer,
                                           int phase, Put put) {
  bool came = true;
#pragma unroll 1
  for (int i = threadIdx.x % 32 * 3; i < num; i += 96) {
    uint4 line = ld_relaxed_sys_16(from + i / 3 * 16);
    came &= wait_line(ws, from + i / 3 * 16, op, peer, phase, &line);
    put(i, line.x);
    if (i + 1 < num) put(i + 1, line.y);
    if (i + 2 < num) put(i + 2, line.z);
  }
  return came;
}

}  // namespace epops
