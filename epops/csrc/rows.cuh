// A row on its way: where it comes from, what it becomes, where it goes.
#pragma once

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

  // v[i] to byte at + i * step of every row, as far as rows go.
  template <int kSteps>
  __device__ __forceinline__ void store(int at, int step, int row_bytes, const uint4 (&v)[kSteps]) const {
#pragma unroll 1
    for (uint32_t left = lanes; left != 0; left &= left - 1) {
      const uint64_t to = __shfl_sync(~0u, row, __ffs(left) - 1) + at;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (at + i * step < row_bytes) st_16(reinterpret_cast<void*>(to + i * step), v[i]);
      }
    }
  }
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

// A row as it is, 512 bytes a warp and step, kSteps of them in flight. `load` may run before it is known where the row
// goes.
template <int kSteps>
struct RowBytes {
  uint4 v[kSteps];

  __device__ __forceinline__ void load(const uint8_t* from, int row_bytes, int at0, const Team& t) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int at = at0 + i * t.parts * 512 + static_cast<int>(threadIdx.x % 32) * 16;
      if (at < row_bytes) v[i] = ld_no_allocate(from + at);
    }
  }
  __device__ __forceinline__ void store(int row_bytes, int at0, const Team& t, const Copies& sink) const {
    sink.store(at0 + static_cast<int>(threadIdx.x % 32) * 16, t.parts * 512, row_bytes, v);
  }
};

template <int kSteps>
__device__ __forceinline__ void copy_rest(const uint8_t* from, int row_bytes, int at0, const Team& t,
                                          const Copies& sink) {
#pragma unroll 1
  for (; at0 < row_bytes; at0 += kSteps * t.parts * 512) {
    RowBytes<kSteps> bytes;
    bytes.load(from, row_bytes, at0, t);
    bytes.store(row_bytes, at0, t, sink);
  }
}

__device__ __forceinline__ void copy_scales(const uint8_t* from, int64_t stride, int bytes, int num, int block0,
                                            const Copies& sink) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (; block0 < num; block0 += 32) {
    const bool has = block0 + lane < num;
    const uint32_t value = has ? load_scale(from, (block0 + lane) * stride, bytes) : 0;
    sink.scale(block0 + lane, has, value);
  }
}

template <class T, int kSteps>
__device__ __forceinline__ void quantize_row(const T* row, int hidden, const Quant& quant, const Team& t,
                                             const Copies& sink) {
  const int lane = threadIdx.x % 32;
  const float row_amax = quant.block == 0 ? warp_row_amax<T>(row, hidden) : 0.f;
#pragma unroll 1
  for (int at0 = t.part * 512; at0 < hidden; at0 += kSteps * t.parts * 512) {
    QuantLane<T> x[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) x[i].load(row, at0 + i * t.parts * 512 + lane * 16, hidden);
    uint4 q[kSteps];
    float scale[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) q[i] = x[i].finish(quant, row_amax, &scale[i]);
    sink.store(at0 + lane * 16, t.parts * 512, hidden, q);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int channel = at0 + i * t.parts * 512 + lane * 16;
      const bool first = quant.block == 0 ? channel == 0 : (channel & (quant.block - 1)) == 0;
      const int block = quant.block == 0 ? 0 : channel >> (31 - __clz(quant.block));
      sink.scale(block, first && channel < hidden, __float_as_uint(scale[i]));
    }
  }
}

// What a row is made from. By value: what lies in memory would be read again after every store.
struct RowSource {
  const uint8_t* row;
  const uint8_t* scales;
  int64_t scale_step;
  int hidden, row_bytes, num_scales, scale_bytes;
};

// A row from x, quantized where T is a number.
template <class T>
__device__ __forceinline__ void put_row(RowSource from, Quant quant, int part, int parts, Copies sink) {
  Team t{};
  t.part = part;
  t.parts = parts;
  if constexpr (sizeof(T) == 1) {
    copy_rest<4>(from.row, from.row_bytes, part * 512, t, sink);
    if (from.num_scales != 0 && part == parts - 1) {
      copy_scales(from.scales, from.scale_step, from.scale_bytes, from.num_scales, 0, sink);
    }
  } else {
    quantize_row<T, sizeof(T) == 4 ? 1 : 2>(reinterpret_cast<const T*>(from.row), from.hidden, quant, t, sink);
  }
}

template <class T>
__device__ __forceinline__ void row_from_x(const DispatchParams& p, int token, const Team& t, const Copies& sink) {
  RowSource from{};
  from.row = static_cast<const uint8_t*>(p.x) +
             static_cast<int64_t>(token) * (sizeof(T) == 1 ? p.row_bytes : p.hidden * sizeof(T));
  from.hidden = p.hidden;
  from.row_bytes = p.row_bytes;
  if constexpr (sizeof(T) == 1) {
    from.scales = static_cast<const uint8_t*>(p.x_scales) + token * p.scale_token_stride * p.wire_scale_bytes;
    from.scale_step = p.scale_block_stride;
    from.num_scales = p.num_scales;
    from.scale_bytes = p.wire_scale_bytes;
  }
  put_row<T>(from, p.quant, t.part, t.parts, sink);
}

}  // namespace epops
