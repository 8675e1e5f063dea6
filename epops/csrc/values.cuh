// Sixteen bytes of a row and the numbers in them: loads, stores, and the quantizer of the quantizing dispatch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "params.h"
#include "ptx.cuh"

namespace epops {

struct Eight {
  float v[8];
};

template <class T>
__device__ __forceinline__ float2 to_floats(uint32_t pair);
template <>
__device__ __forceinline__ float2 to_floats<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 to_floats<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<__half2*>(&pair));
}

template <class T>
__device__ __forceinline__ uint32_t from_floats(float a, float b);
template <>
__device__ __forceinline__ uint32_t from_floats<__nv_bfloat16>(float a, float b) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t from_floats<__half>(float a, float b) {
  __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<uint32_t*>(&pair);
}

__device__ __forceinline__ __nv_bfloat162 larger(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2_nan(a, b); }
__device__ __forceinline__ __half2 larger(__half2 a, __half2 b) { return __hmax2_nan(a, b); }
__device__ __forceinline__ __nv_bfloat162 magnitude(__nv_bfloat162 a) { return __habs2(a); }
__device__ __forceinline__ __half2 magnitude(__half2 a) { return __habs2(a); }
template <class T>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using type = __half2;
};

// Eight elements as they lie in memory: one 16-byte word of 2-byte elements, two of float.
template <class T>
struct Raw8 {
  uint4 w;
  __device__ __forceinline__ uint4& word(int) { return w; }
  __device__ __forceinline__ void load(const void* p) { w = *reinterpret_cast<const uint4*>(p); }
  __device__ __forceinline__ void load_fresh(const void* p) { w = ld_no_allocate(p); }
  __device__ __forceinline__ void zero() { w = make_uint4(0, 0, 0, 0); }
  // Largest magnitude, found two at a time in the type of the elements, where it is exact.
  __device__ __forceinline__ float amax() const {
    using Pair = typename PairOf<T>::type;
    const auto pair = [](uint32_t bits) { return magnitude(*reinterpret_cast<const Pair*>(&bits)); };
    Pair top = larger(larger(pair(w.x), pair(w.y)), larger(pair(w.z), pair(w.w)));
    const float2 both = to_floats<T>(*reinterpret_cast<uint32_t*>(&top));
    return max_nan(both.x, both.y);
  }
  __device__ __forceinline__ void store(void* p) const { st_16(p, w); }
  __device__ __forceinline__ Eight floats() const {
    const float2 a = to_floats<T>(w.x), b = to_floats<T>(w.y), c = to_floats<T>(w.z), d = to_floats<T>(w.w);
    return Eight{{a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y}};
  }
  __device__ __forceinline__ void set(const Eight& e) {
    w = make_uint4(from_floats<T>(e.v[0], e.v[1]), from_floats<T>(e.v[2], e.v[3]), from_floats<T>(e.v[4], e.v[5]),
                   from_floats<T>(e.v[6], e.v[7]));
  }
};

template <>
struct Raw8<float> {
  uint4 w[2];
  __device__ __forceinline__ uint4& word(int half) { return w[half]; }
  __device__ __forceinline__ void load(const void* p) {
    w[0] = reinterpret_cast<const uint4*>(p)[0];
    w[1] = reinterpret_cast<const uint4*>(p)[1];
  }
  __device__ __forceinline__ void load_fresh(const void* p) {
    w[0] = ld_no_allocate(p);
    w[1] = ld_no_allocate(static_cast<const uint8_t*>(p) + 16);
  }
  __device__ __forceinline__ void zero() { w[0] = w[1] = make_uint4(0, 0, 0, 0); }
  __device__ __forceinline__ float amax() const {
    const Eight all = floats();
    float top = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) top = max_nan(top, fabsf(all.v[i]));
    return top;
  }
  __device__ __forceinline__ void store(void* p) const {
    st_16(p, w[0]);
    st_16(static_cast<uint8_t*>(p) + 16, w[1]);
  }
  __device__ __forceinline__ Eight floats() const {
    return Eight{{__uint_as_float(w[0].x), __uint_as_float(w[0].y), __uint_as_float(w[0].z), __uint_as_float(w[0].w),
                  __uint_as_float(w[1].x), __uint_as_float(w[1].y), __uint_as_float(w[1].z), __uint_as_float(w[1].w)}};
  }
  __device__ __forceinline__ void set(const Eight& e) {
    w[0] =
        make_uint4(__float_as_uint(e.v[0]), __float_as_uint(e.v[1]), __float_as_uint(e.v[2]), __float_as_uint(e.v[3]));
    w[1] =
        make_uint4(__float_as_uint(e.v[4]), __float_as_uint(e.v[5]), __float_as_uint(e.v[6]), __float_as_uint(e.v[7]));
  }
};

// How quotients are computed: as products with the inverse; by a correctly rounded reciprocal and one correction, which
// give the correctly rounded quotient; or the same of numbers so small that the correction would underflow, made larger
// first.
enum Way : int { kByProduct, kByQuotient, kWidened };

constexpr float kWider = 0x1p100f;
constexpr float kLeastPlain = 0x1p-80f, kMostPlain = 0x1p120f;  // scales that `divide` is right for

// One block's scale from its largest magnitude, and what values are multiplied by.
struct Scale {
  float value, inverse;
  Way way;
};

// a / b correctly rounded, from the correctly rounded reciprocal of b (Markstein); away from underflow. -0 / b is -0:
// so what is left over is subtracted the way round that makes it -0 too.
__device__ __forceinline__ float divide(float a, float b, float reciprocal) {
  const float guess = __fmul_rn(a, reciprocal);
  const float over = __fmaf_rn(guess, b, -a);
  return __fmaf_rn(-over, reciprocal, guess);
}

__device__ __forceinline__ Scale make_scale(float amax, const Quant& q) {
  if (!q.eps_on_scale) amax = max_nan(amax, q.eps);
  Scale s;
  s.way = q.math == kDivide ? kByQuotient : kByProduct;
  if (q.math == kReciprocal || q.math == kReciprocalExact) {
    s.inverse = q.math == kReciprocal ? __fmul_rn(__frcp_rn(amax), q.top) : __fdiv_rn(q.top, amax);
    s.value = __frcp_rn(s.inverse);
  } else {
    // What torch computes on CUDA where a tensor is divided by a number.
    s.value = __fmul_rn(amax, q.top_inverse);
    s.inverse = q.math == kReciprocalAmax ? __fmul_rn(__frcp_rn(amax), q.top) : 0.f;
  }
  if (q.eps_on_scale) s.value = max_nan(s.value, q.eps);
  if (q.format != kFloat32) {
    const uint32_t bits = __float_as_uint(s.value);
    int exponent = static_cast<int>(bits >> 23 & 0xff) + ((bits & 0x7fffff) != 0 ? 1 : 0);
    exponent = min(max(exponent, 1), 254);
    s.value = __uint_as_float(static_cast<uint32_t>(exponent) << 23);
  }
  const bool given = q.math >= kReciprocal;
  if (!given || q.eps_on_scale || q.format != kFloat32) s.inverse = __frcp_rn(s.value);
  return s;
}

// What `divide` is not right for: a scale of hardly more than zeros, without an eps; and infinity, 0 and NaN, by which
// dividing is multiplying by the reciprocal.
__device__ __forceinline__ void choose_way(Scale& s) {
  if (s.way != kByQuotient || (s.value > kLeastPlain && s.value <= kMostPlain)) return;
  if (!(s.value > 0.f && s.value < 1.f)) {
    s.way = kByProduct;
    return;
  }
  s.way = kWidened;
  s.value = __fmul_rn(s.value, kWider);
  s.inverse = __frcp_rn(s.value);
}

template <Way kWay>
__device__ __forceinline__ float quotient(float x, const Scale& s) {
  if (kWay == kByProduct) return __fmul_rn(x, s.inverse);
  if (kWay == kByQuotient) return divide(x, s.value, s.inverse);
  return divide(__fmul_rn(x, kWider), s.value, s.inverse);
}

// Two numbers that have been cast with saturation, as the cast without it has them: e4m3 has NaN for what is too large,
// e5m2 infinity.
template <__nv_fp8_interpretation_t kKind>
__device__ __forceinline__ uint32_t unsaturated(uint32_t pair, float2 from) {
  constexpr float kLargest = kKind == __NV_E4M3 ? 464.f : 61439.996f;  // that is rounded to a number
  constexpr uint32_t kBeyond = kKind == __NV_E4M3 ? 0x7f : 0x7c;
  if (fabsf(from.x) > kLargest) pair = (pair & ~0x7fu) | kBeyond;
  if (fabsf(from.y) > kLargest) pair = (pair & ~0x7f00u) | kBeyond << 8;
  return pair;
}

template <Way kWay, __nv_fp8_interpretation_t kKind>
__device__ __forceinline__ uint32_t pack_fp8(float a, float b, float c, float d, const Scale& s, bool saturate) {
  const float2 first = make_float2(quotient<kWay>(a, s), quotient<kWay>(b, s));
  const float2 last = make_float2(quotient<kWay>(c, s), quotient<kWay>(d, s));
  uint32_t low = __nv_cvt_float2_to_fp8x2(first, __NV_SATFINITE, kKind);
  uint32_t high = __nv_cvt_float2_to_fp8x2(last, __NV_SATFINITE, kKind);
  if (!saturate) {
    low = unsaturated<kKind>(low, first);
    high = unsaturated<kKind>(high, last);
  }
  return low | high << 16;
}

template <Way kWay, __nv_fp8_interpretation_t kKind>
__device__ __forceinline__ uint4 pack_fp8(const Eight& a, const Eight& b, const Scale& s, bool saturate) {
  return make_uint4(pack_fp8<kWay, kKind>(a.v[0], a.v[1], a.v[2], a.v[3], s, saturate),
                    pack_fp8<kWay, kKind>(a.v[4], a.v[5], a.v[6], a.v[7], s, saturate),
                    pack_fp8<kWay, kKind>(b.v[0], b.v[1], b.v[2], b.v[3], s, saturate),
                    pack_fp8<kWay, kKind>(b.v[4], b.v[5], b.v[6], b.v[7], s, saturate));
}

// Sixteen channels a lane. `load` and `finish` are apart so that several loads are in flight before the first is used.
template <class T>
struct QuantLane {
  Raw8<T> raw[2];

  __device__ __forceinline__ void load(const void* row, int channel, int hidden) {
    const T* p = static_cast<const T*>(row) + channel;
    if (channel < hidden) {
      raw[0].load(p);
      raw[1].load(p + 8);
    } else {
      raw[0].zero();
      raw[1].zero();
    }
  }
  __device__ __forceinline__ float amax() const { return max_nan(raw[0].amax(), raw[1].amax()); }
  // All 32 lanes call it; `row_amax` is used where a scale covers the whole row.
  __device__ __forceinline__ uint4 finish(const Quant& q, float row_amax, float* scale) const {
    if (q.usual) {  // the same without its choices, which cost as much as the numbers do
      float top = amax();
#pragma unroll
      for (int step = 4; step > 0; step >>= 1) top = max_nan(top, __shfl_xor_sync(~0u, top, step));
      Scale s{__fmul_rn(max_nan(top, q.eps), q.top_inverse), 0.f, kByQuotient};
      s.inverse = __frcp_rn(s.value);
      if (__all_sync(~0u, s.value > kLeastPlain && s.value <= kMostPlain)) {
        *scale = s.value;
        return pack_fp8<kByQuotient, __NV_E4M3>(raw[0].floats(), raw[1].floats(), s, true);  // nothing is too large
      }
    }
    float top = row_amax;
    if (q.block != 0) {
      top = amax();
      for (int step = q.block / 32; step > 0; step >>= 1) top = max_nan(top, __shfl_xor_sync(~0u, top, step));
    }
    Scale s = make_scale(top, q);
    *scale = s.value;
    choose_way(s);
    const Eight a = raw[0].floats(), b = raw[1].floats();
    // One branch a step: a choice a number would cost as much as the numbers. The cast saturates, which is the clamp.
    const bool saturate = q.clamp != 0;
    if (s.way == kWidened) {
      return q.e5m2 ? pack_fp8<kWidened, __NV_E5M2>(a, b, s, saturate)
                    : pack_fp8<kWidened, __NV_E4M3>(a, b, s, saturate);
    }
    if (s.way == kByQuotient) {
      return q.e5m2 ? pack_fp8<kByQuotient, __NV_E5M2>(a, b, s, saturate)
                    : pack_fp8<kByQuotient, __NV_E4M3>(a, b, s, saturate);
    }
    return q.e5m2 ? pack_fp8<kByProduct, __NV_E5M2>(a, b, s, saturate)
                  : pack_fp8<kByProduct, __NV_E4M3>(a, b, s, saturate);
  }
};

// 1 / s correctly rounded, for kLeastPlain < s <= kMostPlain: what __frcp_rn does there, without its branch to the
// rest.
__device__ __forceinline__ float reciprocal_of_plain(float s) {
  float guess;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(s));
  const float over = __fmaf_rn(s, guess, -1.f);
  return __fmaf_rn(guess, -over, guess);
}

// Two steps of 512 channels of a row at once, for the usual quantizer of 2-byte elements: the bits are QuantLane's, but
// nothing branches, and the maxima of both steps go through the same shuffles, two to a word. Eight lanes have a block,
// half of each of its two lines a lane; lanes of odd blocks begin with the second, so that what 16 lanes store at a
// time lies in different banks.
template <class T>
struct UsualPair {
  Raw8<T> raw[2][2];

  static __device__ __forceinline__ int first_place() {
    const int lane = threadIdx.x % 32, block = lane / 8;
    return block * 128 + (block & 1) * 64 + lane % 8 * 8;
  }
  // Steps that begin at these channels. What lies beyond the row is its last channels again, which change no maximum.
  __device__ __forceinline__ void load(const T* row, int step0, int step1, int hidden) {
    const int place = first_place();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      raw[0][half].load(row + min(step0 + (place ^ half * 64), hidden - 8));
      raw[1][half].load(row + min(step1 + (place ^ half * 64), hidden - 8));
    }
  }
  // Channels below `end` to `bytes`, whose first is channel `begin`, and their scales to `scales`, whose first is the
  // row's; with one step, only the first. All 32 lanes call it. False: what was stored is not right, and QuantLane has
  // to do it.
  template <int kSteps>
  __device__ __forceinline__ bool finish(const Quant& q, int step0, int step1, int begin, int end, uint8_t* bytes,
                                         float* scales) const {
    using Pair = typename PairOf<T>::type;
    const auto as_pair = [](uint32_t bits) { return *reinterpret_cast<const Pair*>(&bits); };
    const auto as_bits = [](Pair pair) { return *reinterpret_cast<const uint32_t*>(&pair); };
    uint32_t tops[2] = {0, 0};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const uint4 a = raw[s][0].w, b = raw[s][1].w;
      const auto one = [&](uint32_t x, uint32_t y) { return larger(magnitude(as_pair(x)), magnitude(as_pair(y))); };
      tops[s] = as_bits(larger(larger(one(a.x, a.y), one(a.z, a.w)), larger(one(b.x, b.y), one(b.z, b.w))));
    }
    Pair top = larger(as_pair(__byte_perm(tops[0], tops[1], 0x5410)), as_pair(__byte_perm(tops[0], tops[1], 0x7632)));
#pragma unroll
    for (int step = 4; step > 0; step >>= 1) top = larger(top, as_pair(__shfl_xor_sync(~0u, as_bits(top), step)));
    const float2 amax = to_floats<T>(as_bits(top));
    const int place = first_place(), lane = threadIdx.x % 32;
    bool plain = true;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int step = s == 0 ? step0 : step1;
      Scale scale{__fmul_rn(max_nan(s == 0 ? amax.x : amax.y, q.eps), q.top_inverse), 0.f, kByQuotient};
      plain = plain && scale.value > kLeastPlain && scale.value <= kMostPlain;
      scale.inverse = reciprocal_of_plain(scale.value);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = step + (place ^ half * 64);
        const Eight v = raw[s][half].floats();
        const uint2 packed = make_uint2(pack_fp8<kByQuotient, __NV_E4M3>(v.v[0], v.v[1], v.v[2], v.v[3], scale, true),
                                        pack_fp8<kByQuotient, __NV_E4M3>(v.v[4], v.v[5], v.v[6], v.v[7], scale, true));
        if (at < end) *reinterpret_cast<uint2*>(bytes + (at - begin)) = packed;
      }
      if (lane % 8 == 0 && step + lane * 16 < end) scales[(step + lane * 16) / 128] = scale.value;
    }
    return plain;
  }
};

// Largest magnitude of a whole row, by one warp.
template <class T>
__device__ __forceinline__ float warp_row_amax(const void* row, int hidden) {
  float top = 0.f;
  for (int channel = (threadIdx.x % 32) * 16; channel < (hidden + 511) / 512 * 512; channel += 512) {
    QuantLane<T> lane;
    lane.load(row, channel, hidden);
    top = max_nan(top, lane.amax());
  }
  for (int step = 16; step > 0; step >>= 1) top = max_nan(top, __shfl_xor_sync(~0u, top, step));
  return top;
}

}  // namespace epops
