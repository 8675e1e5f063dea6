// dispatch: token rows to the ranks of their experts, grouped as they arrive.
//
// One kernel. Sending blocks: count selections, post counts and header to the peers, then store each row once a destination
// into the slot that belongs to (this rank, token) there, with its entries (slot, position, weight a selection), and release
// one flag a chunk of tokens. All blocks: wait for everybody's counts, from which every row's place follows, write what
// follows from counts alone, and copy each chunk to its rows as its flag comes. Own rows never travel: they are read, and
// quantized, from x. Sending waits for nothing, so blocks need not be resident together.
#include "group.cuh"
#include "launch.cuh"
#include "placement.cuh"
#include "values.cuh"

namespace epops {
namespace {

constexpr uint32_t kNoEntry = 0xffffffffu;  // .x of an entry: slot << 20 | position; .y: the weight

// ---- where a row goes: slots of peers, or rows of the result. All lanes of a warp call `store` and `scale` ---------------

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

struct ToPeers {
  const DispatchParams& p;
  uint64_t address;  // lane i: of the record at the i-th peer
  int num;

  __device__ __forceinline__ void store(int at, bool in_row, uint4 v) const {
    for (int i = 0; i < num; ++i) {
      const uint64_t to = __shfl_sync(~0u, address, i);
      if (in_row) st_16(reinterpret_cast<void*>(to + at), v);
    }
  }
  __device__ __forceinline__ void scale(int block, bool has, uint32_t value) const {
    for (int i = 0; i < num; ++i) {
      const uint64_t to = __shfl_sync(~0u, address, i);
      if (has) store_scale(reinterpret_cast<uint8_t*>(to + p.row_bytes), block, p.wire_scale_bytes, value);
    }
  }
};

struct ToRows {
  const DispatchParams& p;
  int row;         // lane k: row of selection k, negative without
  uint32_t valid;  // lanes that have one

  __device__ __forceinline__ void store(int at, bool in_row, uint4 v) const {
    for (uint32_t left = valid; left != 0; left &= left - 1) {
      const int64_t to = __shfl_sync(~0u, row, __ffs(left) - 1);
      if (in_row) st_16(p.rows + to * p.row_bytes + at, v);
    }
  }
  __device__ __forceinline__ void scale(int block, bool has, uint32_t value) const {
    // float32 travels where this op quantizes; UE8M0 is its exponent
    if (p.x_dtype != kBytes && p.quant.format == kUe8m0) value = value >> 23 & 0xff;
    for (uint32_t left = valid; left != 0; left &= left - 1) {
      const int64_t to = __shfl_sync(~0u, row, __ffs(left) - 1);
      if (has) {
        store_scale(p.scales, to * p.out_scale_row_stride + block * p.out_scale_block_stride, p.out_scale_bytes, value);
      }
    }
  }
};

// ---- where a row comes from -----------------------------------------------------------------------------------------------

// A row as it is, 512 bytes a warp and step, kSteps of them in flight.
template <int kSteps, class Sink>
__device__ __forceinline__ void copy_row(const uint8_t* from, int row_bytes, const Group& g, const Sink& sink) {
  const int lane = threadIdx.x % 32;
  for (int at0 = g.part * 512; at0 < row_bytes; at0 += kSteps * g.parts * 512) {
    uint4 v[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int at = at0 + i * g.parts * 512 + lane * 16;
      if (at < row_bytes) v[i] = ld_no_allocate(from + at);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int at = at0 + i * g.parts * 512 + lane * 16;
      if (at - lane * 16 < row_bytes) sink.store(at, at < row_bytes, v[i]);
    }
  }
}

template <class Sink>
__device__ __forceinline__ void copy_scales(const DispatchParams& p, const uint8_t* from, int64_t stride, const Group& g,
                                            const Sink& sink) {
  if (g.part != g.parts - 1) return;
  const int lane = threadIdx.x % 32;
  for (int block0 = 0; block0 < p.num_scales; block0 += 32) {
    const bool has = block0 + lane < p.num_scales;
    const uint32_t value = has ? load_scale(from, (block0 + lane) * stride, p.wire_scale_bytes) : 0;
    sink.scale(block0 + lane, has, value);
  }
}

template <class T, int kSteps, class Sink>
__device__ __forceinline__ void quantize_row(const DispatchParams& p, const T* row, const Group& g, const Sink& sink) {
  const int lane = threadIdx.x % 32;
  const float row_amax = p.quant.block == 0 ? warp_row_amax<T>(row, p.hidden) : 0.f;
  for (int at0 = g.part * 512; at0 < p.hidden; at0 += kSteps * g.parts * 512) {
    QuantLane<T> x[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) x[i].load(row, at0 + i * g.parts * 512 + lane * 16, p.hidden);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int channel = at0 + i * g.parts * 512 + lane * 16;
      if (channel - lane * 16 >= p.hidden) break;
      float scale;
      const uint4 q = x[i].finish(p.quant, row_amax, &scale);
      sink.store(channel, channel < p.hidden, q);
      const bool first = p.quant.block == 0 ? channel == 0 : channel % p.quant.block == 0;
      sink.scale(p.quant.block == 0 ? 0 : channel / p.quant.block, first && channel < p.hidden, __float_as_uint(scale));
    }
  }
}

// A token's row from x, quantized where T is a number.
template <class T, class Sink>
__device__ __forceinline__ void row_from_x(const DispatchParams& p, int token, const Group& g, const Sink& sink) {
  if constexpr (sizeof(T) == 1) {
    copy_row<4>(static_cast<const uint8_t*>(p.x) + static_cast<int64_t>(token) * p.row_bytes, p.row_bytes, g, sink);
    if (p.num_scales != 0) {
      const uint8_t* scales = static_cast<const uint8_t*>(p.x_scales) + token * p.scale_token_stride * p.wire_scale_bytes;
      copy_scales(p, scales, p.scale_block_stride, g, sink);
    }
  } else {
    quantize_row<T, sizeof(T) == 4 ? 1 : 2>(p, static_cast<const T*>(p.x) + static_cast<int64_t>(token) * p.hidden, g, sink);
  }
}

// ---- sending --------------------------------------------------------------------------------------------------------------

// One token by the warps of its group; `at` is where its selections lie in `slot` and `position`.
template <class T>
__device__ __forceinline__ void send_token(const DispatchParams& p, const Places& s, const Op& op, const Group& g, int token,
                                           int at, uint32_t* present) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  const bool selected = lane < p.top_k;
  const int slot = selected ? s.slot[at + lane] : -1;
  const int rank = slot >= 0 ? slot / p.num_slots : -1;
  uint2 mine = make_uint2(kNoEntry, 0);
  if (g.part == 0 && slot >= 0) {
    mine.x = static_cast<uint32_t>(slot % p.num_slots) << 20 | static_cast<uint32_t>(s.position[at + lane]);
    mine.y = __float_as_uint(p.topk_weights[static_cast<int64_t>(token) * p.top_k + lane]);
  }
  ToPeers sink{p, 0, 0};
  for (uint32_t left = __ballot_sync(~0u, rank >= 0); left != 0;) {
    const int peer = __shfl_sync(~0u, rank, __ffs(left) - 1);
    left &= ~__ballot_sync(~0u, rank == peer);
    if (g.part == 0) {
      if (selected) entries(p.ws, peer, op.parity, me, token)[lane] = rank == peer ? mine : make_uint2(kNoEntry, 0);
      if (lane == 0) atomicOr(&present[peer], 1u << g.token);
    }
    if (peer != me) {
      if (lane == sink.num) {
        sink.address =
            reinterpret_cast<uint64_t>(record(p.ws, peer, op.parity, me, token, p.max_tokens, p.record_bytes));
      }
      ++sink.num;
    }
  }
  if (sink.num != 0) row_from_x<T>(p, token, g, sink);
}

template <class T>
__device__ __forceinline__ void send_all(const DispatchParams& p, const Places& s, const Op& op, const Group& g) {
  const int num_ranks = p.ws.num_ranks;
  const int num_chunks = (p.num_tokens + g.chunk_tokens - 1) / g.chunk_tokens;
  const int chunks_a_block = (num_chunks + p.launch.num_senders - 1) / p.launch.num_senders;
  const int first = min(blockIdx.x * chunks_a_block * g.chunk_tokens, p.num_tokens);
  const int last = min(first + chunks_a_block * g.chunk_tokens, p.num_tokens);
  if (first == last && blockIdx.x >= num_ranks && blockIdx.x != 0) return;
  count_selections(p, s, first);
  __syncthreads();
  for (int step = blockIdx.x; step < num_ranks; step += p.launch.num_senders) {
    const int peer = (p.ws.rank + 1 + step) % num_ranks;
    if (!is_dead(p.ws, peer)) post_counts(p, s, op, peer);
  }
  const int num_groups = blockDim.x / g.num_threads;
  const int batch = kPlaceEntries / p.top_k / 32 * 32;  // tokens whose places fit; a multiple of every chunk
  int turn = 0;
  for (int base = first; base < last; base += batch) {
    const int batch_last = min(base + batch, last);
    place_tokens(p, s, base, batch_last);  // ends with a block barrier
    for (int chunk0 = base + g.id * g.chunk_tokens; chunk0 < batch_last; chunk0 += num_groups * g.chunk_tokens) {
      uint32_t* present = s.present + ((turn & 1) * kMaxGroups + g.id) * num_ranks;
      const int token = chunk0 + g.token;
      if (token < batch_last) send_token<T>(p, s, op, g, token, (token - base) * p.top_k, present);
      group_sync(g);
      // [A] releases, to the group at the peer that waits for this chunk, all that this group stored.
      for (int peer = g.thread; peer < num_ranks; peer += g.num_threads) {
        const uint32_t bits = present[peer];
        present[peer] = 0;  // used again two chunks from here, with a group barrier in between
        if (is_dead(p.ws, peer)) continue;
        fence_acq_rel_sys();
        st_relaxed_sys(flag(p.ws, peer, op.parity, p.ws.rank, chunk0 / g.chunk_tokens), tagged(op.epoch, bits));
      }
      ++turn;
    }
    __syncthreads();
  }
}

// A rank that the others have taken out stores nothing on them; its own route says that nothing was sent.
__device__ __forceinline__ void send_nothing(const DispatchParams& p) {
  int32_t* send_slot = p.route + 32 + p.ws.num_ranks;
  const int64_t num = static_cast<int64_t>(p.num_tokens) * p.top_k;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < num; i += p.launch.num_senders * blockDim.x) send_slot[i] = -1;
}

// ---- receiving ------------------------------------------------------------------------------------------------------------

// Token `token` of rank `source` to its rows.
template <class T>
__device__ __forceinline__ void receive_token(const DispatchParams& p, const Places& s, const Op& op, const Group& g,
                                              int source, int token, bool here) {
  const int lane = threadIdx.x % 32;
  const bool selected = lane < p.top_k;
  uint2 entry = make_uint2(kNoEntry, 0);
  if (here && selected) entry = ld_no_allocate8(entries(p.ws, p.ws.rank, op.parity, source, token) + lane);
  // What a peer wrote is data, not an address: a slot that is none counts as absent, and rows end at the capacity.
  const int slot = static_cast<int>(entry.x >> 20);
  const bool local = entry.x != kNoEntry && slot < p.num_slots;
  const int row = local ? row_of(p, s, source, slot, static_cast<int>(entry.x & 0xfffff)) : -1;
  const uint32_t locals = __ballot_sync(~0u, local);
  if (g.part == 0) {
    const int64_t pair = static_cast<int64_t>(source) * p.max_tokens + token;
    if (selected) {
      p.route[32 + p.ws.num_ranks + static_cast<int64_t>(p.num_tokens) * p.top_k + pair * p.top_k + lane] = row;
    }
    if (p.layout == kRank) {
      const int to = __shfl_sync(~0u, row, locals != 0 ? __ffs(locals) - 1 : 0);
      if (locals != 0 && to >= 0) {
        if (selected) {
          p.row_weights[static_cast<int64_t>(to) * p.top_k + lane] = local ? __uint_as_float(entry.y) : 0.f;
          p.row_expert[static_cast<int64_t>(to) * p.top_k + lane] = local ? slot : -1;
        }
        if (lane == 0) p.row_source[to] = static_cast<int>(pair);
      }
    } else if (row >= 0) {
      p.row_weights[row] = __uint_as_float(entry.y);
      p.row_expert[row] = slot;
      p.row_source[row] = static_cast<int>(pair);
    }
  }
  uint32_t valid = __ballot_sync(~0u, row >= 0);
  if (p.layout == kRank) valid &= -valid;  // all selections of a token name one row
  if (valid == 0) return;
  const ToRows sink{p, row, valid};
  if (source == p.ws.rank) {
    row_from_x<T>(p, token, g, sink);
  } else {
    const uint8_t* from = record(p.ws, p.ws.rank, op.parity, source, token, p.max_tokens, p.record_bytes);
    copy_row<4>(from, p.row_bytes, g, sink);
    if (p.num_scales != 0) copy_scales(p, from + p.row_bytes, 1, g, sink);
  }
}

// One chunk of one source. `first` waits for it: every warp for itself, or the group's first warp for all.
__device__ __forceinline__ uint32_t wait_chunk(const DispatchParams& p, const Places& s, const Op& op, const Group& g,
                                               int source, int chunk) {
  if (chunk * g.chunk_tokens >= s.num_tokens[source]) return 0;  // -1: nothing of this source
  uint32_t present = 0;
  if (!wait_word(p.ws, flag(p.ws, p.ws.rank, op.parity, source, chunk), op.epoch, source, kPhaseRows, &present)) {
    present = 0;
    s.words[kFailed] = 1;
  }
  return present;
}

template <class T>
__device__ __forceinline__ void receive_all(const DispatchParams& p, const Places& s, const Op& op, const Group& g) {
  const int num_ranks = p.ws.num_ranks, lane = threadIdx.x % 32;
  const int num_chunks = (p.max_tokens + g.chunk_tokens - 1) / g.chunk_tokens;
  // Peers send from the start of each of their blocks' ranges at once; chunks are taken in that order.
  const int ranges = p.launch.dynamic ? min(p.launch.num_senders, num_chunks) : 1;
  const int range = (num_chunks + ranges - 1) / ranges;
  const int num_items = num_ranks * ranges * range;
  Turns turns(p.launch, g, &control(p.ws, p.ws.rank)->work[op.parity], &s.words[kItem]);
  for (int item = turns.take(g); item < num_items; item = turns.take(g)) {
    const int step = item / (ranges * range), at = item % (ranges * range);
    const int chunk = at % ranges * range + at / ranges;
    const int source = (p.ws.rank + (p.launch.dynamic ? step : step + 1)) % num_ranks;  // own rows while others travel, or last
    if (chunk >= num_chunks) continue;
    uint32_t present = 0;
    if (lane == 0) present = wait_chunk(p, s, op, g, source, chunk);
    __syncwarp();  // what lane 0 acquired, the others may read
    present = __shfl_sync(~0u, present, 0);
    const int token = chunk * g.chunk_tokens + g.token;
    if (token < p.max_tokens) receive_token<T>(p, s, op, g, source, token, (present >> g.token & 1) != 0);
  }
}

// A source was lost between its counts and its last row: all its rows count as zero, by the whole block.
__device__ __forceinline__ void zero_lost_sources(const DispatchParams& p, const Places& s) {
  const int stride = p.num_slots + 1;
  for (int source = 0; source < p.ws.num_ranks; ++source) {
    if (s.num_tokens[source] < 0 || !is_dead(p.ws, source)) continue;
    const int slots = p.layout == kRank ? 1 : p.num_slots;
    for (int i = 0; i < slots; ++i) {
      const int slot = p.layout == kRank ? p.num_slots : i;
      const int before = s.total[source * stride + slot];
      const int after = source + 1 < p.ws.num_ranks ? s.total[(source + 1) * stride + slot] : s.tally[slot];
      const int start = p.layout == kRank ? 0 : s.start[slot];
      for (int row = start + before + threadIdx.x / 32; row < min(start + after, p.capacity); row += blockDim.x / 32) {
        zero_row(p, row);
        if (threadIdx.x % 32 == 0) clear_row_facts(p, row);
      }
    }
    int32_t* recv_row = p.route + 32 + p.ws.num_ranks + static_cast<int64_t>(p.num_tokens) * p.top_k;
    const int64_t width = static_cast<int64_t>(p.max_tokens) * p.top_k;
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) recv_row[source * width + i] = -1;
  }
  if (threadIdx.x == 0) p.status[0] |= kTimeout;
}

template <class T>
__global__ void __launch_bounds__(kDispatchThreads, 1) dispatch_kernel(const __grid_constant__ DispatchParams p) {
  extern __shared__ uint32_t shared[];
  const Places s = carve(shared, p.ws.num_ranks, p.num_slots, p.num_experts);
  const int keys = p.ws.num_ranks * (p.num_slots + 1);
  for (int i = threadIdx.x; i < 3 * keys; i += blockDim.x) s.total[i] = 0;
  for (int i = threadIdx.x; i < 2 * kMaxGroups * p.ws.num_ranks; i += blockDim.x) s.present[i] = 0;
  if (threadIdx.x < kNumWords) s.words[threadIdx.x] = 0;
  wait_for_earlier_kernels();
  let_next_kernel_launch();
  const Op op = begin_op(p.ws);
  for (int i = threadIdx.x; i < p.num_experts; i += blockDim.x) {
    s.expert_slot[i] = static_cast<int32_t>(p.expert_slot[i]);
  }
  for (int i = threadIdx.x; i < p.ws.num_ranks; i += blockDim.x) {
    s.takes_part[i] = p.mask[i] != 0 && !is_dead(p.ws, i) ? 1 : 0;
  }
  __syncthreads();
  const Group g = my_group(p.launch);
  if ((p.launch.phases & 1) != 0 && blockIdx.x < p.launch.num_senders) {
    if (op.excluded) {
      send_nothing(p);
    } else {
      send_all<T>(p, s, op, g);
    }
  }
  if ((p.launch.phases & 2) == 0) return;
  __syncthreads();
  wait_counts(p, s, op);
  if (blockIdx.x == 0 && threadIdx.x < 32) write_facts(p, s, op);
  write_frame(p, s);
  receive_all<T>(p, s, op, g);
  end_op(p.ws, op, &s.words[kFailed], [&] { zero_lost_sources(p, s); });
}

template <class T>
int launch(const DispatchParams& p, cudaStream_t stream) {
  return launch_kernel(dispatch_kernel<T>, p, p.launch, dispatch_shared_bytes(p), stream);
}

}  // namespace

uint64_t dispatch_shared_bytes(const DispatchParams& p) {
  return 4 * places_words(p.ws.num_ranks, p.num_slots, p.num_experts);
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
