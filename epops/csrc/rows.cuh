// A row on its way: where it comes from, what it becomes, where it goes.
#pragma once

#include "bulk.cuh"
#include "team.cuh"
#include "values.cuh"

namespace epops {

__device__ __forceinline__ void store_scale(uint8_t* to, int64_t index, int bytes, uint32_t value) {
  if (bytes == 4) {
    reinterpret_cast<uint32_t*>(to)[index] = value;
  } else {
    to[index] = static_cast<uint8_t>(value);
  }
}

__device__ __forceinline__ uint32_t load_scale(const uint8_t* from, int64_t index, int bytes) {
  return bytes == 4 ? *reinterpret_cast<const volatile uint32_t*>(from + 4 * index)
                    : *reinterpret_cast<const volatile uint8_t*>(from + index);
}

// The same bytes to several places: slots of peers, or rows of the result. The lanes of `lanes` hold one address each.
struct Copies {
  uint64_t row, scales;
  uint32_t lanes;
  int scale_bytes;     // of one scale there, 4 or 1
  int64_t scale_step;  // bytes from scale to scale
  bool exponent;       // float32 arrives, UE8M0 is kept

  __device__ __forceinline__ void scale(int block, bool has, uint32_t value) const {
    if (exponent) value = value >> 23 & 0xff;
#pragma unroll 1
    for (uint32_t left = lanes; left != 0; left &= left - 1) {
      const uint64_t to = __shfl_sync(~0u, scales, __ffs(left) - 1);
      if (has) store_scale(reinterpret_cast<uint8_t*>(to + block * scale_step), 0, scale_bytes, value);
    }
  }
};

__device__ __forceinline__ Copies to_rows(const DispatchParams& p, int row, uint32_t lanes) {
  return Copies{reinterpret_cast<uint64_t>(p.rows) + static_cast<int64_t>(row) * p.row_bytes,
                reinterpret_cast<uint64_t>(p.scales) + row * p.out_scale_row_stride * p.out_scale_bytes,
                lanes,
                p.out_scale_bytes,
                p.out_scale_block_stride * p.out_scale_bytes,
                p.x_dtype != kBytes && p.quant.format == kUe8m0};
}

// Sixteen bytes a lane of a row of x, and their scale.
template <class T>
struct Piece {
  QuantLane<T> raw;
  __device__ __forceinline__ void load(const DispatchParams& p, int token, int channel) {
    raw.load(static_cast<const T*>(p.x) + static_cast<int64_t>(token) * p.hidden, channel, p.hidden);
  }
  __device__ __forceinline__ uint4 finish(const DispatchParams& p, float row_amax, float* scale) const {
    return raw.finish(p.quant, row_amax, scale);
  }
};
template <>
struct Piece<uint8_t> {
  uint4 v;
  __device__ __forceinline__ void load(const DispatchParams& p, int token, int at) {
    v = make_uint4(0, 0, 0, 0);
    if (at < p.row_bytes) {
      v = *reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(p.x) + static_cast<int64_t>(token) * p.row_bytes +
                                          at);
    }
  }
  __device__ __forceinline__ uint4 finish(const DispatchParams&, float, float*) const { return v; }
};

// The quantizer takes two steps of a row at a time.
template <class T>
__device__ __forceinline__ bool by_pairs(const DispatchParams& p) {
  return sizeof(T) == 2 && p.quant.usual != 0;
}

template <class T>
__device__ __forceinline__ const T* row_of_x(const DispatchParams& p, int token) {
  return static_cast<const T*>(p.x) + static_cast<int64_t>(token) * p.hidden;
}

// What of a row is asked for before it is wanted: two steps, or one.
template <class T>
struct Ahead {
  UsualPair<T> pair;
  Piece<T> piece;
  // Steps that begin at these channels.
  __device__ __forceinline__ void load(const DispatchParams& p, int token, int step0, int step1) {
    if (by_pairs<T>(p)) {
      pair.load(row_of_x<T>(p, token), step0, step1, p.hidden);
    } else {
      piece.load(p, token, step0 + threadIdx.x % 32 * 16);
    }
  }
};
template <>
struct Ahead<float> {
  Piece<float> piece;
  __device__ __forceinline__ void load(const DispatchParams& p, int token, int step0, int) {
    piece.load(p, token, step0 + threadIdx.x % 32 * 16);
  }
};
template <>
struct Ahead<uint8_t> {
  Piece<uint8_t> piece;
  __device__ __forceinline__ void load(const DispatchParams& p, int token, int step0, int) {
    piece.load(p, token, step0 + threadIdx.x % 32 * 16);
  }
};

template <class T>
__device__ __forceinline__ float row_amax_of(const DispatchParams& p, int token) {
  if constexpr (sizeof(T) > 1) {
    if (p.quant.block == 0) {
      return warp_row_amax<T>(static_cast<const T*>(p.x) + static_cast<int64_t>(token) * p.hidden, p.hidden);
    }
  }
  return 0.f;
}

__device__ __forceinline__ uint32_t given_scale(const DispatchParams& p, int token, int i) {
  return load_scale(static_cast<const uint8_t*>(p.x_scales),
                    token * p.scale_token_stride + static_cast<int64_t>(i) * p.scale_block_stride, p.wire_scale_bytes);
}

// Scales of a row, as they travel, from shared memory to every place of `sink`, by one warp.
__device__ __forceinline__ void store_scales(const DispatchParams& p, const Copies& sink, const uint8_t* scales) {
  if (p.num_scales == 0) return;
  const int bytes = p.num_scales * sink.scale_bytes;
  const bool dense = sink.scale_step == sink.scale_bytes && !sink.exponent && sink.scale_bytes == p.wire_scale_bytes;
  if (dense && bytes % 16 == 0 && p.out_scale_row_stride * sink.scale_bytes % 16 == 0) {
    bulk_store(sink.scales, sink.lanes, scales, bytes);
    return;
  }
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int block = 0; block < p.num_scales; block += 32) {
    const bool has = block + lane < p.num_scales;
    sink.scale(block + lane, has, has ? load_scale(scales, block + lane, p.wire_scale_bytes) : 0);
  }
}

}  // namespace epops
