// dispatch: token rows to the ranks of their experts, grouped as they arrive.
//
// One kernel. Sending blocks: count selections, post counts and header to the peers, then store each row once a
// destination into the slot that belongs to (this rank, token) there, with its entries (slot, position, weight a
// selection); the poster releases a flag a token. All blocks: wait for everybody's counts, from which every row's place
// follows, write what follows from counts alone, and copy each row to its places as its flag comes. Own rows never
// travel: they are read, and quantized, from x. Sending waits for nothing, so blocks need not be resident together.
#include "launch.cuh"
#include "placement.cuh"
#include "values.cuh"

namespace epops {
namespace {

constexpr uint32_t kNoEntry = 0xffffffffu;  // .x of an entry: slot << 20 | position; .y: the weight

// ---- where a row goes: slots of peers, or rows of the result. All lanes of a warp call `store` and `scale`
// ---------------

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

// ---- where a row comes from
// -----------------------------------------------------------------------------------------------

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

// ---- sending
// --------------------------------------------------------------------------------------------------------------

// One token by the warps of its team; `at` is where its selections lie in `slot` and `position`.
template <class T>
__device__ __forceinline__ void send_token(const DispatchParams& p, const Places& s, const Op& op, const Team& t,
                                           int token, int at) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  const bool selected = lane < p.top_k;
  const int packed = selected ? s.slot[at + lane] : -1;
  const int rank = packed >= 0 ? packed & 0xff : -1;
  uint2 mine = make_uint2(kNoEntry, 0);
  if (t.part == 0) {
    if (packed >= 0) {
      mine.x = static_cast<uint32_t>((packed >> 8) - rank * p.num_slots) << 20 |
               static_cast<uint32_t>(s.position[at + lane]);
      mine.y = __float_as_uint(p.topk_weights[static_cast<int64_t>(token) * p.top_k + lane]);
    }
    // Own entries carry the epoch and need no flag: [E].
    if (selected) {
      uint64_t* own = reinterpret_cast<uint64_t*>(entries(p.ws, me, op.parity, me, token));
      st_relaxed_sys(own + lane, tagged(op.epoch, rank == me ? mine.x : kNoEntry));
    }
  }
  Copies sink{0, 0, 0, p.wire_scale_bytes, p.wire_scale_bytes, false};
#pragma unroll 1
  for (uint32_t left = __ballot_sync(~0u, rank >= 0 && rank != me); left != 0;) {
    const int peer = __shfl_sync(~0u, rank, __ffs(left) - 1);
    left &= ~__ballot_sync(~0u, rank == peer);
    if (t.part == 0 && selected) {
      entries(p.ws, peer, op.parity, me, token)[lane] = rank == peer ? mine : make_uint2(kNoEntry, 0);
    }
    const uint32_t free = sink.lanes + 1;  // lanes fill from 0
    if (1u << lane == free) {
      sink.row = reinterpret_cast<uint64_t>(record(p.ws, peer, op.parity, me, token, p.max_tokens, p.record_bytes));
      sink.scales = sink.row + p.row_bytes;
    }
    sink.lanes |= free;
  }
  if (sink.lanes != 0) row_from_x<T>(p, token, t, sink);
}

// Flags of tokens [first, first + count) to every peer: 1 a row came, 0 none does.
__device__ __forceinline__ void tell_peers(const DispatchParams& p, const Places& s, const Op& op, int first, int at,
                                           int count) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
#pragma unroll 1
  for (int i = lane; i < count * p.ws.num_ranks; i += 32) {
    const int token = i / p.ws.num_ranks, peer = i % p.ws.num_ranks;
    if (peer == me || s.takes_part[peer] == 0) continue;
    uint32_t has = 0;
#pragma unroll 1
    for (int k = 0; k < p.top_k; ++k) {
      const int packed = s.slot[(at + token) * p.top_k + k];
      if (packed >= 0 && (packed & 0xff) == peer) has = 1;
    }
    st_relaxed_sys(flag(p.ws, peer, op.parity, me, first + token), tagged(op.epoch, has));
  }
}

template <class T>
__device__ __forceinline__ void send_all(const DispatchParams& p, const Places& s, const Op& op, const Team& t) {
  const int num_ranks = p.ws.num_ranks;
  const int tokens_a_block = (p.num_tokens + p.launch.num_senders - 1) / p.launch.num_senders;
  const int first = min(static_cast<int>(blockIdx.x) * tokens_a_block, p.num_tokens);
  const int last = min(first + tokens_a_block, p.num_tokens);
  if (first == last && blockIdx.x >= num_ranks && blockIdx.x != 0) return;
  if (threadIdx.x < 32) trace(2);
  count_selections(p, s, first);
  __syncthreads();
  if (threadIdx.x < 32) trace(3);
#pragma unroll 1
  for (int step = blockIdx.x; step < num_ranks; step += p.launch.num_senders) {
    const int peer = (p.ws.rank + 1 + step) % num_ranks;
    if (s.takes_part[peer] != 0) post_counts(p, s, op, peer);
  }
  __syncthreads();                                      // `total` has been read, by the poster's warp too
  const int batch = kPlaceEntries / p.top_k / 32 * 32;  // tokens whose places fit
  const Outbox outbox{s.done, &s.words[kPosted]};
#pragma unroll 1
  for (int base = first; base < last; base += batch) {
    const int num = min(batch, last - base);
    place_tokens(p, s, base, base + num, base + num < last);  // ends with a block barrier
    if (threadIdx.x < 32) trace(4);
    if (t.poster) {
      outbox.post(num, t.parts, [&](int item, int count) { tell_peers(p, s, op, base + item, item, count); });
      trace(5);
    } else if (t.id >= 0) {
#pragma unroll 1
      for (int item = t.id; item < num; item += t.num_teams) {
        outbox.begin(item);
        send_token<T>(p, s, op, t, base + item, item * p.top_k);
        outbox.finish(item);
      }
      if (threadIdx.x < 32) trace(6);
    }
    if (base + batch < last) {
      __syncthreads();
      if (threadIdx.x == 0) s.words[kPosted] = 0;
    }
  }
}

// A rank that the others have taken out stores nothing on them; its own route says that nothing was sent.
__device__ __forceinline__ void send_nothing(const DispatchParams& p) {
  int32_t* send_slot = p.route + 32 + p.ws.num_ranks;
  const int64_t num = static_cast<int64_t>(p.num_tokens) * p.top_k;
#pragma unroll 1
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < num; i += p.launch.num_senders * blockDim.x)
    send_slot[i] = -1;
}

// ---- receiving
// ------------------------------------------------------------------------------------------------------------

// Lane k: where selection k of a token of `source` goes. What a peer wrote is data, not an address: a slot that is none
// counts as absent, and rows end at the capacity.
struct Landing {
  int slot, row;     // row: -1 not here, -2 no room
  uint32_t locals;   // lanes with a slot of this rank
  uint32_t to_copy;  // lanes whose rows the bytes go to
};

__device__ __forceinline__ Landing land(const DispatchParams& p, const Places& s, int source, uint32_t entry) {
  Landing l;
  l.slot = static_cast<int>(entry >> 20);
  const bool local = entry != kNoEntry && l.slot < p.num_slots;
  l.row = local ? row_of(p, s, source, l.slot, static_cast<int>(entry & 0xfffff)) : -1;
  l.locals = __ballot_sync(~0u, local);
  l.to_copy = __ballot_sync(~0u, l.row >= 0);
  if (p.layout == kRank) l.to_copy &= -l.to_copy;  // all selections of a token name one row
  return l;
}

__device__ __forceinline__ void write_row_facts(const DispatchParams& p, const Landing& l, int source, int token,
                                                float weight) {
  const int lane = threadIdx.x % 32;
  const bool selected = lane < p.top_k, local = (l.locals >> lane & 1) != 0;
  const int64_t pair = static_cast<int64_t>(source) * p.max_tokens + token;
  if (selected) {
    p.route[32 + p.ws.num_ranks + static_cast<int64_t>(p.num_tokens) * p.top_k + pair * p.top_k + lane] = l.row;
  }
  if (p.layout == kRank) {
    const int64_t to = __shfl_sync(~0u, l.row, l.locals != 0 ? __ffs(l.locals) - 1 : 0);
    if (l.locals != 0 && to >= 0) {
      if (selected) {
        p.row_weights[to * p.top_k + lane] = local ? weight : 0.f;
        p.row_expert[to * p.top_k + lane] = local ? l.slot : -1;
      }
      if (lane == 0) p.row_source[to] = static_cast<int>(pair);
    }
  } else if (l.row >= 0) {
    p.row_weights[l.row] = weight;
    p.row_expert[l.row] = l.slot;
    p.row_source[l.row] = static_cast<int>(pair);
  }
}

template <class T>
__device__ __forceinline__ void receive_own(const DispatchParams& p, const Places& s, const Op& op, const Team& t,
                                            int token) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  uint32_t entry = kNoEntry;
  float weight = 0.f;
  if (token < s.num_tokens[me] && lane < p.top_k) {
    if (t.part == 0) weight = p.topk_weights[static_cast<int64_t>(token) * p.top_k + lane];
    // [E] every word for itself, from the warp of this rank that sent the token
    const uint64_t* words = reinterpret_cast<const uint64_t*>(entries(p.ws, me, op.parity, me, token));
    if (!wait_word(p.ws, words + lane, op.epoch, me, kPhaseRows, &entry)) {
      entry = kNoEntry;
      s.words[kFailed] = 1;
    }
  }
  __syncwarp();
  const Landing l = land(p, s, me, entry);
  if (l.to_copy != 0) row_from_x<T>(p, token, t, to_rows(p, l.row, l.to_copy));
  if (t.part == 0) write_row_facts(p, l, me, token, weight);
}

__device__ __forceinline__ void receive_theirs(const DispatchParams& p, const Places& s, const Op& op, const Team& t,
                                               int source, int token) {
  const int lane = threadIdx.x % 32;
  uint2 entry = make_uint2(kNoEntry, 0);
  uint32_t has = 0;
  if (lane == 0 && token < s.num_tokens[source] &&
      !wait_word(p.ws, flag(p.ws, p.ws.rank, op.parity, source, token), op.epoch, source, kPhaseRows, &has)) {
    has = 0;
    s.words[kFailed] = 1;
  }
  __syncwarp();  // what lane 0 acquired, the others may read
  has = __shfl_sync(~0u, has, 0);
  const uint8_t* from = record(p.ws, p.ws.rank, op.parity, source, token, p.max_tokens, p.record_bytes);
  RowBytes<4> bytes;
  if (has != 0) {
    if (lane < p.top_k) entry = ld_no_allocate8(entries(p.ws, p.ws.rank, op.parity, source, token) + lane);
    bytes.load(from, p.row_bytes, t.part * 512, t);
  }
  // Scales too are asked for before it is known where they go.
  const bool scaled = p.num_scales != 0 && t.part == t.parts - 1 && has != 0;
  uint32_t scale[2] = {0, 0};
  if (scaled) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i * 32 + lane < p.num_scales) scale[i] = load_scale(from + p.row_bytes, i * 32 + lane, p.wire_scale_bytes);
    }
  }
  const Landing l = land(p, s, source, entry.x);
  if (l.to_copy != 0) {
    const Copies sink = to_rows(p, l.row, l.to_copy);
    bytes.store(p.row_bytes, t.part * 512, t, sink);
    copy_rest<4>(from, p.row_bytes, t.part * 512 + 4 * t.parts * 512, t, sink);
    if (scaled) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i * 32 < p.num_scales) sink.scale(i * 32 + lane, i * 32 + lane < p.num_scales, scale[i]);
      }
      if (p.num_scales > 64) copy_scales(from + p.row_bytes, 1, p.wire_scale_bytes, p.num_scales, 64, sink);
    }
  }
  if (t.part == 0) write_row_facts(p, l, source, token, __uint_as_float(entry.y));
}

template <class T>
__device__ __forceinline__ void receive_all(const DispatchParams& p, const Places& s, const Op& op, const Team& t) {
  if (t.id < 0) return;
  // Peers send from the start of each of their blocks' ranges at once; tokens are taken in that order.
  const int ranges = p.launch.dynamic ? min(p.launch.num_senders, p.max_tokens) : 1;
  const int range = (p.max_tokens + ranges - 1) / ranges;
  const int num_items = p.ws.num_ranks * ranges * range;
  Turns turns(p.launch, t, &control(p.ws, p.ws.rank)->work[op.parity]);
#pragma unroll 1
  for (int item = turns.take(); item < num_items; item = turns.take()) {
    const int step = item / (ranges * range), at = item % (ranges * range);
    const int token = at % ranges * range + at / ranges;
    const int source = (p.ws.rank + (p.launch.dynamic ? step : step + 1)) % p.ws.num_ranks;  // own first, or last
    if (token >= p.max_tokens) continue;
    if (source == p.ws.rank) {
      receive_own<T>(p, s, op, t, token);
    } else {
      receive_theirs(p, s, op, t, source, token);
    }
  }
}

// A source was lost between its counts and its last row: all its rows count as zero, by the whole block.
__device__ __forceinline__ void zero_lost_sources(const DispatchParams& p, const Places& s) {
  const int stride = p.num_slots + 1;
#pragma unroll 1
  for (int source = 0; source < p.ws.num_ranks; ++source) {
    if (s.num_tokens[source] < 0 || !is_dead(p.ws, source)) continue;
    const int slots = p.layout == kRank ? 1 : p.num_slots;
#pragma unroll 1
    for (int i = 0; i < slots; ++i) {
      const int slot = p.layout == kRank ? p.num_slots : i;
      const int before = s.total[source * stride + slot];
      const int after = source + 1 < p.ws.num_ranks ? s.total[(source + 1) * stride + slot] : s.tally[slot];
      const int start = p.layout == kRank ? 0 : s.start[slot];
#pragma unroll 1
      for (int row = start + before + threadIdx.x / 32; row < min(start + after, p.capacity); row += blockDim.x / 32) {
        zero_row(p, row);
        if (threadIdx.x % 32 == 0) clear_row_facts(p, row);
      }
    }
    int32_t* recv_row = p.route + 32 + p.ws.num_ranks + static_cast<int64_t>(p.num_tokens) * p.top_k;
    const int64_t width = static_cast<int64_t>(p.max_tokens) * p.top_k;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) recv_row[source * width + i] = -1;
  }
  if (threadIdx.x == 0) p.status[0] |= kTimeout;
}

template <class T>
__global__ void __launch_bounds__(kDispatchThreads, 1) dispatch_kernel(const __grid_constant__ DispatchParams p) {
  extern __shared__ uint32_t shared[];
  const Places s = carve(shared, p.ws.num_ranks, p.num_slots, p.num_experts, p.tiles);
  const bool sender = (p.launch.phases & 1) != 0 && blockIdx.x < p.launch.num_senders;
  const int keys = p.ws.num_ranks * (p.num_slots + 1);
#pragma unroll 1
  for (int i = threadIdx.x; i < (2 + p.tiles) * keys; i += blockDim.x) s.total[i] = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < kOutbox; i += blockDim.x) s.done[i] = 0;
  if (threadIdx.x < kNumWords) s.words[threadIdx.x] = 0;
  if (threadIdx.x < 32) trace(0);
  wait_for_earlier_kernels();
  if (threadIdx.x < 32) trace(1);
  let_next_kernel_launch();
  uint32_t touched = 0;
  if (sender) {
    // What will be read soon, while the first words of the group come.
    const int tokens_a_block = (p.num_tokens + p.launch.num_senders - 1) / p.launch.num_senders;
    const int first = blockIdx.x * tokens_a_block;
    touched = touch(p.topk_idx, static_cast<int64_t>(p.num_tokens) * p.top_k * (p.idx64 ? 8 : 4), threadIdx.x);
    if (tokens_a_block <= 4 && first < p.num_tokens) {
      const int num = min(tokens_a_block, p.num_tokens - first);
      const int64_t row = p.x_dtype == kBytes ? p.row_bytes : static_cast<int64_t>(p.hidden) * sizeof(T);
      touched |= touch(static_cast<const uint8_t*>(p.x) + first * row, num * row, threadIdx.x);
      touched |= touch(p.topk_weights + static_cast<int64_t>(first) * p.top_k, static_cast<int64_t>(num) * p.top_k * 4,
                       threadIdx.x);
    }
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < p.num_experts; i += blockDim.x) {
    const int64_t slot = p.expert_slot[i];
    const bool there = slot >= 0 && slot < static_cast<int64_t>(p.ws.num_ranks) * p.num_slots;
    s.expert_slot[i] = there ? static_cast<int32_t>(slot) << 8 | static_cast<int32_t>(slot) / p.num_slots : -1;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < p.ws.num_ranks; i += blockDim.x) {
    const int64_t wanted = p.mask[i];
    s.takes_part[i] = !is_dead(p.ws, i) & (wanted != 0);
    s.lost[i] = 0;
    s.num_tokens[i] = 0;
  }
  const Op op = begin_op(p.ws);
  __syncthreads();
  if (touched == 0x7fc0ffee && s.words[kFailed] == -1) return;  // never: it keeps the loads
  if (sender) {
    if (op.excluded) {
      send_nothing(p);
    } else {
      send_all<T>(p, s, op, my_team(p.launch.send_warps));
    }
  }
  if ((p.launch.phases & 2) == 0) return;
  const Team t = my_team(p.launch.recv_warps);
  if (!t.poster) {
    wait_counts(p, s, op, t);
    if (threadIdx.x < 32) trace(7);
    // Where a block has several teams, the first one's token is a peer's: it goes on to wait for that.
    const int apart = p.launch.dynamic == 0 && t.num_teams > 1 ? t.parts * 32 : 0;
    const int thread = static_cast<int>(threadIdx.x) - apart;
    if (thread >= 0) {
      if (blockIdx.x == 0 && thread < 32) write_facts(p, s, op);
      write_frame(p, s, thread, t.num_threads - apart);
    }
    if (threadIdx.x < 32) trace(8);
    receive_all<T>(p, s, op, t);
    if (threadIdx.x < 32) trace(9);
  }
  end_op(p.ws, op, &s.words[kFailed], [&] { zero_lost_sources(p, s); });
  if (threadIdx.x < 32) trace(10);
}

template <class T>
int launch(const DispatchParams& p, cudaStream_t stream) {
  return launch_kernel(dispatch_kernel<T>, p, p.launch, dispatch_shared_bytes(p), stream);
}

}  // namespace

#ifdef EPOPS_TRACE
int read_dispatch_trace(uint64_t* out) { return cudaMemcpyFromSymbol(out, trace_clock, sizeof(trace_clock)); }
#endif

uint64_t dispatch_shared_bytes(const DispatchParams& p) {
  return 4 * places_words(p.ws.num_ranks, p.num_slots, p.num_experts, p.tiles);
}

int launch_dispatch(const DispatchParams& p, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (p.x_dtype) {
    case kBf16:
      return launch<__nv_bfloat16>(p, on);
    case kFp16:
      return launch<__half>(p, on);
    case kFp32:
      return launch<float>(p, on);
    default:
      return launch<uint8_t>(p, on);
  }
}

}  // namespace epops
