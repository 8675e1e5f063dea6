// Pieces of a tensor with any strides as streams of bytes, and copies between them and memory without gaps.
#pragma once

#include <type_traits>

#include "params.h"
#include "ptx.cuh"

namespace epops {

constexpr int kOuterDims = kMaxDims - 1;
constexpr int kWarps = kAllToAllThreads / 32 - 1;  // the last one posts
constexpr int kDataThreads = kWarps * 32;
constexpr uint32_t kSelfChunk = 64 << 10;

// Places of a tensor that a stream runs over, row by row; a row is one run of memory.
struct Box {
  uint64_t base;
  uint64_t bytes;              // of the stream
  uint32_t n[kOuterDims];      // places a dim, outermost first
  uint32_t limit[kOuterDims];  // those that exist; the others are left out
  uint32_t run, run_limit;     // elements of a row, likewise
  uint32_t rows;               // 2 stands for all numbers above
  uint32_t step;               // 16 bytes at most: addresses, rows and limits are multiples of it
  uint32_t plain;              // one run without limits, in steps of 16 bytes
};

// ---- boxes: which places, and where byte i of a stream lies
// ----------------------------------------------------------

// `along_s` and `along_g` steps of the two dims from `base`; of them the first `limit_s` and `limit_g` exist. Not a
// call: in a function of its own, parameters of the kernel would be read from memory.
__device__ __forceinline__ void make_box(const AllToAllParams& p, const int64_t* stride, Box* box, uint64_t base,
                                         int64_t along_s, int64_t along_g, int64_t limit_s, int64_t limit_g) {
  const int last = p.num_dims - 1;
  uint64_t bytes = p.element_bytes, together = base;
  uint32_t rows = 1, whole = 1;
#pragma unroll 1
  for (int d = 0; d <= last; ++d) {
    int64_t n = p.size[d], limit = n;
    if (d == p.scatter_at) n = along_s * p.scatter_unit, limit = limit_s * p.scatter_unit;
    if (d == p.gather_at) n = along_g * p.gather_unit, limit = limit_g * p.gather_unit;
    bytes *= static_cast<uint64_t>(n);
    whole &= limit == n;
    if (d == last) {
      box->run = static_cast<uint32_t>(n);
      box->run_limit = static_cast<uint32_t>(limit);
      if (rows > 1) together |= static_cast<uint64_t>(n) * p.element_bytes;
      if (limit < n) together |= static_cast<uint64_t>(limit) * p.element_bytes;
    } else {
      box->n[d] = static_cast<uint32_t>(n);
      box->limit[d] = static_cast<uint32_t>(limit);
      if (n > 1) {
        rows = 2;
        together |= static_cast<uint64_t>(stride[d]);
      }
    }
  }
  box->base = base;
  box->bytes = bytes;
  box->rows = rows;
  const uint32_t low = static_cast<uint32_t>(together & 15);
  box->step = low == 0 ? 16 : low & (~low + 1);
  box->plain = low == 0 && rows == 1 && whole != 0;
}

// Steps of a row, and what a division by them is made with.
struct Run {
  uint32_t steps, inverse;

  // The row that step `index` lies in: the product is less than the quotient by less than one, so it is one short at
  // most.
  __device__ __forceinline__ uint32_t row_of(uint32_t index) const {
    const uint32_t row = __umulhi(index, inverse);
    return row + (index - row * steps >= steps ? 1 : 0);
  }
};

template <int kStep>
__device__ __forceinline__ Run run_steps(const AllToAllParams& p, const Box& b) {
  const uint32_t steps = static_cast<uint32_t>(static_cast<uint64_t>(b.run) * p.element_bytes / kStep);
  return {steps, b.rows > 1 && steps != 0 ? 0xffffffffu / steps : 0};
}

// Address of step `index` of a stream, 0 where there is none. `run` as of run_steps<kStep>.
template <int kStep>
__device__ __forceinline__ uint64_t locate(const AllToAllParams& p, const int64_t* stride, const Box& b, Run run,
                                           uint32_t index) {
  uint32_t row = 0, column = index;
  if (b.rows > 1) {
    row = run.row_of(index);
    column = index - row * run.steps;
  }
  const uint64_t at = static_cast<uint64_t>(column) * kStep;
  bool there = at < static_cast<uint64_t>(b.run_limit) * p.element_bytes;
  uint64_t address = b.base + at;
  if (b.rows > 1) {
#pragma unroll 1
    for (int d = p.num_dims - 2; d >= 0; --d) {
      uint32_t i = row;
      if (d > 0) {
        row = row / b.n[d];
        i -= row * b.n[d];
      }
      there &= i < b.limit[d];
      address += i * stride[d];
    }
  } else {
#pragma unroll 1
    for (int d = p.num_dims - 2; d >= 0; --d) there &= b.limit[d] != 0;
  }
  return there ? address : 0;
}

template <int kStep>
__device__ __forceinline__ uint64_t load_step(uint64_t address) {
  if constexpr (kStep == 8) return *reinterpret_cast<const uint64_t*>(address);
  if constexpr (kStep == 4) return *reinterpret_cast<const uint32_t*>(address);
  if constexpr (kStep == 2) return *reinterpret_cast<const uint16_t*>(address);
  if constexpr (kStep == 1) return *reinterpret_cast<const uint8_t*>(address);
}

template <int kStep>
__device__ __forceinline__ void store_step(uint64_t address, uint64_t value) {
  if constexpr (kStep == 8) *reinterpret_cast<uint64_t*>(address) = value;
  if constexpr (kStep == 4) *reinterpret_cast<uint32_t*>(address) = static_cast<uint32_t>(value);
  if constexpr (kStep == 2) *reinterpret_cast<uint16_t*>(address) = static_cast<uint16_t>(value);
  if constexpr (kStep == 1) *reinterpret_cast<uint8_t*>(address) = static_cast<uint8_t>(value);
}

// Sixteen bytes of a stream from and to a box, the unit that crosses the wire. `steps`: those that the stream still
// has.
template <int kStep>
__device__ __forceinline__ uint4 read_unit(const AllToAllParams& p, const int64_t* stride, const Box& b, Run run,
                                           uint32_t unit, uint32_t steps = 16 / kStep) {
  if constexpr (kStep == 16) {
    return ld_no_allocate(reinterpret_cast<const void*>(locate<16>(p, stride, b, run, unit)));
  } else {
    uint64_t low = 0, high = 0;
#pragma unroll kStep == 8 ? 2 : 4
    for (int i = 0; i < 16 / kStep; ++i) {
      const uint64_t from = i < steps ? locate<kStep>(p, stride, b, run, unit * (16 / kStep) + i) : 0;
      const uint64_t value = from != 0 ? load_step<kStep>(from) : 0;
      (i * kStep < 8 ? low : high) |= value << (i * kStep % 8 * 8);
    }
    return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                      static_cast<uint32_t>(high >> 32));
  }
}

template <int kStep>
__device__ __forceinline__ void write_unit(const AllToAllParams& p, const int64_t* stride, const Box& b, Run run,
                                           uint32_t unit, uint4 v, uint32_t steps = 16 / kStep) {
  if constexpr (kStep == 16) {
    const uint64_t to = locate<16>(p, stride, b, run, unit);
    if (to != 0) st_16(reinterpret_cast<void*>(to), v);
  } else {
    const uint64_t low = static_cast<uint64_t>(v.y) << 32 | v.x, high = static_cast<uint64_t>(v.w) << 32 | v.z;
#pragma unroll kStep == 8 ? 2 : 4
    for (int i = 0; i < 16 / kStep; ++i) {
      const uint64_t to = i < steps ? locate<kStep>(p, stride, b, run, unit * (16 / kStep) + i) : 0;
      if (to != 0) store_step<kStep>(to, (i * kStep < 8 ? low : high) >> (i * kStep % 8 * 8));
    }
  }
}

// The last unit of a stream, by elements.
inline __device__ __noinline__ uint4 read_rest(const AllToAllParams& p, const int64_t* stride, const Box& b,
                                               uint32_t unit) {
  const uint32_t steps = static_cast<uint32_t>(b.bytes % 16) / p.element_bytes;
  switch (p.element_bytes) {
    case 8:
      return read_unit<8>(p, stride, b, run_steps<8>(p, b), unit, steps);
    case 4:
      return read_unit<4>(p, stride, b, run_steps<4>(p, b), unit, steps);
    case 2:
      return read_unit<2>(p, stride, b, run_steps<2>(p, b), unit, steps);
    default:
      return read_unit<1>(p, stride, b, run_steps<1>(p, b), unit, steps);
  }
}

inline __device__ __noinline__ void write_rest(const AllToAllParams& p, const int64_t* stride, const Box& b,
                                               uint32_t unit, uint4 v) {
  const uint32_t steps = static_cast<uint32_t>(b.bytes % 16) / p.element_bytes;
  switch (p.element_bytes) {
    case 8:
      return write_unit<8>(p, stride, b, run_steps<8>(p, b), unit, v, steps);
    case 4:
      return write_unit<4>(p, stride, b, run_steps<4>(p, b), unit, v, steps);
    case 2:
      return write_unit<2>(p, stride, b, run_steps<2>(p, b), unit, v, steps);
    default:
      return write_unit<1>(p, stride, b, run_steps<1>(p, b), unit, v, steps);
  }
}

// ---- copies: whole units first to last by the threads of a block
// -----------------------------------------------------

// kDeep loads of a thread are on their way at once. All addresses come before them, and what would be too much is read
// twice and not stored: a branch between loads would wait for each.
template <class From, class To, class Load, class Store>
__device__ __forceinline__ void copy_units(uint32_t first, uint32_t last, From from, To to, Load load, Store store) {
  constexpr int kDeep = 8;
  uint32_t at = first + threadIdx.x;
  if (last - first > kDataThreads) {
#pragma unroll 1
    for (; at < last; at += kDeep * kDataThreads) {
      uint64_t source[kDeep], target[kDeep];
#pragma unroll
      for (int i = 0; i < kDeep; ++i) {
        const uint32_t unit = at + i * kDataThreads;
        source[i] = from(unit < last ? unit : at);
        target[i] = to(unit < last ? unit : at);
        if (unit >= last) target[i] = 0;
      }
      uint4 v[kDeep];
#pragma unroll
      for (int i = 0; i < kDeep; ++i) v[i] = load(source[i]);
#pragma unroll
      for (int i = 0; i < kDeep; ++i) {
        if (target[i] != 0) store(target[i], v[i]);
      }
    }
  } else if (at < last) {
    const uint64_t target = to(at);
    const uint4 v = load(from(at));
    if (target != 0) store(target, v);
  }
}

// Units of a chunk: [first, last) whole ones, and whether the stream's last, smaller one follows them.
struct Units {
  uint32_t first, last;
  bool rest;
};

struct InLine {  // units that follow one another from unit `first` at `base`
  uint64_t base;
  uint32_t first;
  __device__ __forceinline__ uint64_t operator()(uint32_t unit) const { return base + (unit - first) * 16ull; }
};

__device__ __forceinline__ uint4 load_plain(uint64_t from) {
  return ld_no_allocate(reinterpret_cast<const void*>(from));
}
__device__ __forceinline__ uint4 load_ring(uint64_t from) {
  return ld_relaxed_sys_16(reinterpret_cast<const void*>(from));
}
__device__ __forceinline__ void store_plain(uint64_t to, uint4 v) { st_16(reinterpret_cast<void*>(to), v); }

// Where units [first, last) lie one behind the other in a box of 16-byte steps, false where they do not: long rows are
// copied without asking for each unit's row.
__device__ __forceinline__ bool in_line(const AllToAllParams& p, const int64_t* stride, const Box& b, Run run,
                                        const Units& u, InLine* line) {
  if (b.plain) {
    *line = {b.base, 0};
    return true;
  }
  const uint32_t row = b.rows > 1 ? run.row_of(u.first) : 0, end = u.last - row * run.steps;
  if (u.first >= u.last || end > run.steps || end * 16ull > static_cast<uint64_t>(b.run_limit) * p.element_bytes) {
    return false;
  }
  *line = {locate<16>(p, stride, b, run, u.first), u.first};
  return line->base != 0;
}

// One unit after the other, where a unit has several steps or its words are tagged.
template <class Get, class Put>
__device__ __forceinline__ void copy_singly(uint32_t first, uint32_t last, Get get, Put put) {
#pragma unroll 1
  for (uint32_t unit = first + threadIdx.x; unit < last; unit += kDataThreads) put(unit, get(unit));
}

__device__ __forceinline__ Units units_of(uint64_t bytes, uint32_t chunk, uint32_t chunk_size) {
  const uint64_t from = static_cast<uint64_t>(chunk) * chunk_size;
  const uint64_t to = from + chunk_size < bytes ? from + chunk_size : bytes;
  return {static_cast<uint32_t>(from / 16), static_cast<uint32_t>(to / 16), to % 16 != 0};
}

// `with(step)` for the steps of a box.
template <class With>
__device__ __forceinline__ void for_step(uint32_t step, With with) {
  switch (step) {
    case 16:
      with(std::integral_constant<int, 16>{});
      break;
    case 8:
      with(std::integral_constant<int, 8>{});
      break;
    case 4:
      with(std::integral_constant<int, 4>{});
      break;
    case 2:
      with(std::integral_constant<int, 2>{});
      break;
    default:
      with(std::integral_constant<int, 1>{});
  }
}

// Units of a box through `put`, and from `get` into a box, singly.
template <class Put>
__device__ __forceinline__ void read_box(const AllToAllParams& p, const Box& b, Units u, Put put) {
  for_step(b.step, [&](auto step) {
    constexpr int kStep = decltype(step)::value;
    const Run run = run_steps<kStep>(p, b);
    copy_singly(u.first, u.last, [&](uint32_t unit) { return read_unit<kStep>(p, p.x_stride, b, run, unit); }, put);
  });
  if (u.rest && threadIdx.x == kDataThreads - 1) put(u.last, read_rest(p, p.x_stride, b, u.last));
}

template <class Get>
__device__ __forceinline__ void write_box(const AllToAllParams& p, const Box& b, Units u, Get get) {
  for_step(b.step, [&](auto step) {
    constexpr int kStep = decltype(step)::value;
    const Run run = run_steps<kStep>(p, b);
    copy_singly(u.first, u.last, get,
                [&](uint32_t unit, uint4 v) { write_unit<kStep>(p, p.out_stride, b, run, unit, v); });
  });
  if (u.rest && threadIdx.x == kDataThreads - 1) write_rest(p, p.out_stride, b, u.last, get(u.last));
}

// From x to a slot of the ring.
__device__ __forceinline__ void fill_slot(const AllToAllParams& p, const Box& b, Units u, uint8_t* slot) {
  const InLine to{reinterpret_cast<uint64_t>(slot), u.first};
  const auto put = [&](uint32_t unit, uint4 v) { store_plain(to(unit), v); };
  if (b.step != 16) {
    read_box(p, b, u, put);
    return;
  }
  const Run run = run_steps<16>(p, b);
  InLine from;
  if (in_line(p, p.x_stride, b, run, u, &from)) {
    copy_units(u.first, u.last, from, to, load_plain, store_plain);
  } else {
    copy_units(
        u.first, u.last, [&](uint32_t unit) { return locate<16>(p, p.x_stride, b, run, unit); }, to, load_plain,
        store_plain);
  }
  if (u.rest && threadIdx.x == kDataThreads - 1) put(u.last, read_rest(p, p.x_stride, b, u.last));
}

// From a slot of the ring to the result.
__device__ __forceinline__ void empty_slot(const AllToAllParams& p, const Box& b, Units u, const uint8_t* slot) {
  const InLine from{reinterpret_cast<uint64_t>(slot), u.first};
  const auto get = [&](uint32_t unit) { return load_ring(from(unit)); };
  if (b.step != 16) {
    write_box(p, b, u, get);
    return;
  }
  const Run run = run_steps<16>(p, b);
  InLine to;
  if (in_line(p, p.out_stride, b, run, u, &to)) {
    copy_units(u.first, u.last, from, to, load_ring, store_plain);
  } else {
    copy_units(
        u.first, u.last, from, [&](uint32_t unit) { return locate<16>(p, p.out_stride, b, run, unit); }, load_ring,
        store_plain);
  }
  if (u.rest && threadIdx.x == kDataThreads - 1) write_rest(p, p.out_stride, b, u.last, get(u.last));
}

// From x to the result; where either side has smaller steps, by those.
__device__ __forceinline__ void copy_own(const AllToAllParams& p, const Box& from, const Box& to, Units u) {
  if (from.step == 16 && to.step == 16) {
    const Run run_from = run_steps<16>(p, from), run_to = run_steps<16>(p, to);
    InLine source, target;
    if (in_line(p, p.x_stride, from, run_from, u, &source) && in_line(p, p.out_stride, to, run_to, u, &target)) {
      copy_units(u.first, u.last, source, target, load_plain, store_plain);
    } else {
      copy_units(
          u.first, u.last, [&](uint32_t unit) { return locate<16>(p, p.x_stride, from, run_from, unit); },
          [&](uint32_t unit) { return locate<16>(p, p.out_stride, to, run_to, unit); }, load_plain, store_plain);
    }
  } else {
    for_step(from.step < to.step ? from.step : to.step, [&](auto step) {
      constexpr int kStep = decltype(step)::value;
      if constexpr (kStep < 16) {
        const Run run_from = run_steps<kStep>(p, from), run_to = run_steps<kStep>(p, to);
        copy_singly(
            u.first, u.last, [&](uint32_t unit) { return read_unit<kStep>(p, p.x_stride, from, run_from, unit); },
            [&](uint32_t unit, uint4 v) { write_unit<kStep>(p, p.out_stride, to, run_to, unit, v); });
      }
    });
  }
  if (u.rest && threadIdx.x == kDataThreads - 1) {
    write_rest(p, p.out_stride, to, u.last, read_rest(p, p.x_stride, from, u.last));
  }
}

inline __device__ __noinline__ void clear_box(const AllToAllParams& p, const Box& b) {
  if (b.bytes == 0) return;
  const uint64_t chunks = (b.bytes + kSelfChunk - 1) / kSelfChunk;
#pragma unroll 1
  for (uint64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    write_box(p, b, units_of(b.bytes, static_cast<uint32_t>(chunk), kSelfChunk),
              [](uint32_t) { return make_uint4(0, 0, 0, 0); });
  }
}

}  // namespace epops
