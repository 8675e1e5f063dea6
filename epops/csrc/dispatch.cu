// dispatch: token rows to the ranks of their experts, grouped as they arrive.
//
// One kernel, for batches of many tokens; dispatch_lines.cu has few. Sending blocks: count the selections of their
// chunks of tokens, post the counts to all ranks, then send each row once a destination into the slot that belongs to
// (this rank, token) there, with its entries (slot, position in the chunk, weight a selection), and a flag a token. All
// blocks: wait for everybody's counts, from which every row's place follows, write what follows from counts alone, and
// copy each row to its places as its flag comes. Own rows never travel: they are read, and quantized, from x. A warp
// takes a token; rows pass through its stage in shared memory, which bulk copies fill and empty. Sending waits for no
// block of this rank, so blocks need not be resident together.
#include "landing.cuh"
#include "launch.cuh"
#include "rows.cuh"

namespace epops {
namespace {

// Shared memory: places, a barrier a warp, stages.
__host__ __device__ inline uint64_t stages_at(const DispatchParams& p) {
  return (4 * places_words(p) + 8 + p.launch.num_threads / 4 + 127) / 128 * 128;
}

constexpr uint32_t kNoEntry = 0xffffffffu;  // .x of an entry: slot << 20 | position; .y: the weight

// ---- a warp's stage
// ----------------------------------------------------------------------------------------------------------

// Room for a piece of a row, and for all its scales.
struct Stage {
  uint8_t *bytes, *scales;
  Arrival arrival;

  __device__ __forceinline__ Stage(uint8_t* shared, const DispatchParams& p) {
    const int warp = threadIdx.x / 32;
    bytes = shared + stages_at(p) + static_cast<uint64_t>(warp) * p.stage_bytes;
    scales = bytes + p.piece_bytes;
    arrival.barrier = reinterpret_cast<uint64_t*>(shared + (4 * places_words(p) + 7) / 8 * 8) + warp;
    arrival.parity = 0;
    if (threadIdx.x % 32 == 0) init_arrival(arrival.barrier);
  }
};

// A token's row from x, quantized where T is a number, through the stage to all of `sink`, and its scales; by one warp.
// `ahead` has the row's first steps; the stage is free before, and read from after.
template <class T>
__device__ __forceinline__ void row_from_x(const DispatchParams& p, Stage& stage, int token, Ahead<T>& ahead,
                                           const Copies& sink) {
  const int lane = threadIdx.x % 32;
  const float row_amax = row_amax_of<T>(p, token);
  const int shift = 31 - __clz(max(1, p.quant.block));  // blocks are powers of two
#pragma unroll 1
  for (int at0 = 0; at0 < p.row_bytes; at0 += p.piece_bytes) {
    const int end = min(at0 + p.piece_bytes, p.row_bytes);
    if (at0 != 0) bulk_wait_read();
    if constexpr (sizeof(T) == 1) {
      bulk_load(stage.bytes, static_cast<const uint8_t*>(p.x) + static_cast<int64_t>(token) * p.row_bytes + at0,
                end - at0, nullptr, nullptr, 0, stage.arrival);
      await_bulk(stage.arrival);
    } else {
      bool done = false;
      if constexpr (sizeof(T) == 2) {
        if (by_pairs<T>(p)) {
          bool plain = true;
#pragma unroll 1
          for (int at = at0; at < end; at += 1024) {
            const UsualPair<T> now = ahead.pair;
            const int next = min(at + 1024, end);  // a piece may have an odd number of steps
            if (next < p.row_bytes) ahead.pair.load(row_of_x<T>(p, token), next, next + 512, p.hidden);
            plain &= now.template finish<2>(p.quant, at, at + 512, at0, end, stage.bytes,
                                            reinterpret_cast<float*>(stage.scales));
          }
          done = __all_sync(~0u, plain);
          __syncwarp();  // other lanes may store there again
          if (!done) ahead.piece.load(p, token, at0 + lane * 16);
        }
      }
      if (!done) {
#pragma unroll 1
        for (int at = at0 + lane * 16; at - lane * 16 < end; at += 512) {
          const Piece<T> now = ahead.piece;
          ahead.piece.load(p, token, at + 512);
          float scale = 0.f;
          const uint4 v = now.finish(p, row_amax, &scale);
          if (at < end) *reinterpret_cast<uint4*>(stage.bytes + at - at0) = v;
          const bool first = p.quant.block == 0 ? at == 0 : (at & (p.quant.block - 1)) == 0;
          if (first && at < end) reinterpret_cast<float*>(stage.scales)[at >> shift] = scale;
        }
      }
      fence_before_bulk();
      __syncwarp();
    }
    bulk_store(sink.row + at0, sink.lanes, stage.bytes, end - at0);
    if (end < p.row_bytes) bulk_commit();
  }
  if constexpr (sizeof(T) == 1) {
#pragma unroll 1
    for (int b = lane; b < p.num_scales; b += 32) {
      ::epops::store_scale(stage.scales, b, p.wire_scale_bytes, given_scale(p, token, b));
    }
    fence_before_bulk();
    __syncwarp();
  }
}

// ---- sending
// --------------------------------------------------------------------------------------------------------------

// One token; `at` is where its selections lie in `slot` and `position`. Its row is on its way on return.
template <class T>
__device__ __forceinline__ void send_token(const DispatchParams& p, const Places& s, const Op& op, Stage& stage,
                                           int token, int at) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  Ahead<T> ahead;
  if constexpr (sizeof(T) > 1) ahead.load(p, token, 0, 512);  // few tokens go to no peer
  const bool selected = lane < p.top_k;
  const int packed = selected ? s.slot[at + lane] : -1;
  const int rank = packed >= 0 ? packed & 0xff : -1;
  uint2 mine = make_uint2(kNoEntry, 0);
  if (packed >= 0) {
    mine.x =
        static_cast<uint32_t>((packed >> 8) - rank * p.num_slots) << 20 | static_cast<uint32_t>(s.position[at + lane]);
    mine.y = __float_as_uint(p.topk_weights[static_cast<int64_t>(token) * p.top_k + lane]);
  }
  // Own entries carry the epoch and need no flag: [E].
  if (selected) {
    uint64_t* own = reinterpret_cast<uint64_t*>(entries(p.ws, me, op.parity, me, token));
    st_relaxed_sys(own + lane, tagged(op.epoch, rank == me ? mine.x : kNoEntry));
  }
  Copies sink{0, 0, 0, p.wire_scale_bytes, p.wire_scale_bytes, false};
#pragma unroll 1
  for (uint32_t left = __ballot_sync(~0u, rank >= 0 && rank != me && s.closed[rank] == 0); left != 0;) {
    const int peer = __shfl_sync(~0u, rank, __ffs(left) - 1);
    left &= ~__ballot_sync(~0u, rank == peer);
    if (selected) {
      entries(p.ws, peer, op.parity, me, token)[lane] = rank == peer ? mine : make_uint2(kNoEntry, 0);
    }
    const uint32_t free = sink.lanes + 1;  // lanes fill from 0
    if (1u << lane == free) {
      sink.row = reinterpret_cast<uint64_t>(record(p.ws, peer, op.parity, me, token, p.max_tokens, p.record_bytes));
    }
    sink.lanes |= free;
  }
  bulk_wait_read();  // the token before has left the stage
  if (sink.lanes != 0) {
    row_from_x<T>(p, stage, token, ahead, sink);
    // Records have room for scales in whole units of 16 bytes.
    if (p.num_scales != 0) {
      bulk_store(sink.row + p.row_bytes, sink.lanes, stage.scales, p.record_bytes - p.row_bytes);
    }
  }
  bulk_commit();
}

// Flags of tokens [first, first + count) to every peer: 1 a row came, 0 none does.
__device__ __forceinline__ void tell_peers(const DispatchParams& p, const Places& s, const Op& op, int first, int at,
                                           int count) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
#pragma unroll 1
  for (int i = lane; i < count * p.ws.num_ranks; i += 32) {
    const int token = i / p.ws.num_ranks, peer = i % p.ws.num_ranks;
    if (peer == me || s.takes_part[peer] == 0 || s.closed[peer] != 0) continue;
    uint32_t has = 0;
#pragma unroll 1
    for (int k = 0; k < p.top_k; ++k) {
      const int packed = s.slot[(at + token) * p.top_k + k];
      if (packed >= 0 && (packed & 0xff) == peer) has = 1;
    }
    st_relaxed_sys(flag(p.ws, peer, op.parity, me, first + token), tagged(op.epoch, has));
  }
}

// How chunks are cut among sending blocks: `parts` of them share a chunk, `range` tokens each.
struct Cut {
  int parts, range;

  __device__ __forceinline__ explicit Cut(const DispatchParams& p) {
    parts = max(1, p.launch.num_senders / p.num_chunks);
    range = (p.chunk_tokens + parts - 1) / parts;
  }
};

template <class T>
__device__ __forceinline__ void send_all(const DispatchParams& p, const Places& s, const Op& op, Stage& stage) {
  const int num_ranks = p.ws.num_ranks, keys = num_ranks * (p.num_slots + 1);
  const Cut cut(p);
  const int chunk0 = blockIdx.x / cut.parts, part = blockIdx.x % cut.parts;
  if (chunk0 >= p.num_chunks) return;
  if (threadIdx.x < 32) trace(2);
  if (blockIdx.x == 0) {
#pragma unroll 1
    for (int peer = threadIdx.x; peer < num_ranks; peer += blockDim.x) {
      if (s.takes_part[peer] != 0) post_header(p.ws, op, peer, p.num_tokens, p.call_hash, 0);
    }
  }
  const auto begin_of = [&](int chunk) { return min(chunk * p.chunk_tokens, p.num_tokens); };
  const auto first_of = [&](int chunk) { return min(begin_of(chunk) + part * cut.range, begin_of(chunk + 1)); };
#pragma unroll 1
  for (int chunk = chunk0; chunk < p.num_chunks; chunk += p.launch.num_senders) {
    if (chunk != chunk0) {  // more chunks than blocks: none is shared, and nothing comes before its tokens
      __syncthreads();
#pragma unroll 1
      for (int i = threadIdx.x; i < keys; i += blockDim.x) s.count[i] = 0;
      if (threadIdx.x < 2) s.words[kChunkBad + threadIdx.x] = 0;
      __syncthreads();
    }
    count_selections(p, s, begin_of(chunk), begin_of(chunk + 1), first_of(chunk));
    __syncthreads();
    if (part == 0) post_counts(p, s, op, chunk);
  }
  if (threadIdx.x < 32) trace(3);
#pragma unroll 1
  for (int peer = threadIdx.x; peer < num_ranks; peer += blockDim.x) {
    if (s.takes_part[peer] != 0 && !may_store(p.ws, op, peer)) {
      s.closed[peer] = 1;
      s.words[kFailed] = 1;
    }
  }
  __syncthreads();
  const int batch = kPlaceEntries / p.top_k / 32 * 32;  // tokens whose places fit
  const Outbox outbox{s.done, &s.words[kPosted]};
  const Team t = my_team(1);
  bool again = false;
#pragma unroll 1
  for (int chunk = chunk0; chunk < p.num_chunks; chunk += p.launch.num_senders) {
    const int first = first_of(chunk), last = min(first + cut.range, begin_of(chunk + 1));
#pragma unroll 1
    for (int base = first; base < last; base += batch) {
      const int num = min(batch, last - base);
      if (again) {
        __syncthreads();
        if (threadIdx.x == 0) s.words[kPosted] = 0;
        if (base == first) {
#pragma unroll 1
          for (int i = threadIdx.x; i < keys * (1 + p.tiles); i += blockDim.x) s.before[i] = 0;  // and the bits
        }
        __syncthreads();
      }
      again = true;
      place_tokens(p, s, base, base + num, base + num < last);  // ends with a block barrier
      if (threadIdx.x < 32) trace(4);
      if (t.poster) {
        outbox.post(num, 1, [&](int item, int count) { tell_peers(p, s, op, base + item, item, count); });
        trace(5);
      } else {
        int last_sent = -1;  // it has landed when the next one is on its way, or soon after
#pragma unroll 1
        for (int item = t.id; item < num; item += t.num_teams) {
          outbox.begin(item);
          send_token<T>(p, s, op, stage, base + item, item * p.top_k);
          bulk_wait<1>();
          if (last_sent >= 0) outbox.finish(last_sent);
          last_sent = item;
        }
        bulk_wait<0>();
        if (last_sent >= 0) outbox.finish(last_sent);
        if (threadIdx.x < 32) trace(6);
      }
    }
  }
}

// ---- receiving
// ------------------------------------------------------------------------------------------------------------

// What a peer wrote is data, not an address: a slot that is none counts as absent, and rows end at the capacity.
__device__ __forceinline__ Landing land(const DispatchParams& p, const Places& s, int source, int token,
                                        uint32_t entry) {
  return land(p, s, source, token, entry == kNoEntry ? -1 : static_cast<int>(entry >> 20),
              static_cast<int>(entry & 0xfffff));
}

template <class T>
__device__ __forceinline__ void receive_own(const DispatchParams& p, const Places& s, const Op& op, Stage& stage,
                                            int token) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  uint32_t entry = kNoEntry;
  float weight = 0.f;
  Ahead<T> ahead;
  // Where most tokens have an expert here, before it is known which.
  const bool early = sizeof(T) > 1 && p.ws.num_ranks <= p.top_k && token < p.num_tokens;
  if constexpr (sizeof(T) > 1) {
    if (early) ahead.load(p, token, 0, 512);
  }
  if (token < s.num_tokens[me] && lane < p.top_k) {
    weight = p.topk_weights[static_cast<int64_t>(token) * p.top_k + lane];
    // [E] every word for itself, from the warp of this rank that sent the token
    const uint64_t* words = reinterpret_cast<const uint64_t*>(entries(p.ws, me, op.parity, me, token));
    if (!wait_word(p.ws, words + lane, op.epoch, me, kPhaseRows, &entry)) {
      entry = kNoEntry;
      s.words[kFailed] = 1;
    }
  }
  __syncwarp();
  const Landing l = land(p, s, me, token, entry);
  bulk_wait_read();  // the token before has left the stage
  if (l.to_copy != 0) {
    if constexpr (sizeof(T) > 1) {
      if (!early) ahead.load(p, token, 0, 512);
    }
    const Copies sink = to_rows(p, l.row, l.to_copy);
    row_from_x<T>(p, stage, token, ahead, sink);
    store_scales(p, sink, stage.scales);
    fence_before_bulk();  // scales may have been read from the stage
  }
  bulk_commit();
  write_row_facts(p, l, me, token, weight);
}

__device__ __forceinline__ void receive_theirs(const DispatchParams& p, const Places& s, const Op& op, Stage& stage,
                                               int source, int token) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  uint32_t has = 0;
  if (lane == 0 && token < s.num_tokens[source] &&
      !wait_word(p.ws, flag(p.ws, me, op.parity, source, token), op.epoch, source, kPhaseRows, &has)) {
    has = 0;
    s.words[kFailed] = 1;
  }
  fence_before_bulk();
  bulk_wait_read();  // the token before has left the stage; what lane 0 acquired, the others may read
  has = __shfl_sync(~0u, has, 0);
  uint2 entry = make_uint2(kNoEntry, 0);
  const uint8_t* from = record(p.ws, me, op.parity, source, token, p.max_tokens, p.record_bytes);
  const int scale_room = p.record_bytes - p.row_bytes;
  if (has != 0) {  // the first piece is asked for before it is known where it goes
    bulk_load(stage.bytes, from, min(p.piece_bytes, p.row_bytes), stage.scales, from + p.row_bytes, scale_room,
              stage.arrival);
    if (lane < p.top_k) entry = ld_no_allocate8(entries(p.ws, me, op.parity, source, token) + lane);
  }
  const Landing l = land(p, s, source, token, entry.x);
  if (has != 0) {
    await_bulk(stage.arrival);
    const Copies sink = to_rows(p, l.row, l.to_copy);
#pragma unroll 1
    for (int at = 0; at < p.row_bytes && sink.lanes != 0; at += p.piece_bytes) {
      const int num = min(p.piece_bytes, p.row_bytes - at);
      if (at != 0) {
        bulk_commit();
        bulk_wait_read();
        bulk_load(stage.bytes, from + at, num, nullptr, nullptr, 0, stage.arrival);
        await_bulk(stage.arrival);
      }
      bulk_store(sink.row + at, sink.lanes, stage.bytes, num);
    }
    if (sink.lanes != 0) store_scales(p, sink, stage.scales);
    fence_before_bulk();  // scales may have been read from the stage
  }
  bulk_commit();
  write_row_facts(p, l, source, token, __uint_as_float(entry.y));
}

template <class T>
__device__ __forceinline__ void receive_all(const DispatchParams& p, const Places& s, const Op& op, const Team& t,
                                            Stage& stage) {
  // Peers send from the start of each of their blocks' ranges at once; tokens are taken in that order.
  const Cut cut(p);
  const int ranges = p.launch.dynamic ? p.num_chunks * cut.parts : 1;
  const int range = p.launch.dynamic ? cut.range : p.max_tokens;
  const int num_items = p.ws.num_ranks * ranges * range;
  Turns turns(p.launch, t, &control(p.ws, p.ws.rank)->work[op.parity]);
#pragma unroll 1
  for (int item = turns.take(); item < num_items; item = turns.take()) {
    const int step = item / (ranges * range), at = item % (ranges * range);
    const int inside = at % ranges % cut.parts * range + at / ranges;  // of the chunk, where there are ranges
    const int token = p.launch.dynamic ? at % ranges / cut.parts * p.chunk_tokens + inside : at;
    const int source = (p.ws.rank + (p.launch.dynamic ? step : step + 1)) % p.ws.num_ranks;  // own first, or last
    if (p.launch.dynamic && inside >= p.chunk_tokens) continue;
    if (token >= p.max_tokens) continue;
    if (source == p.ws.rank) {
      receive_own<T>(p, s, op, stage, token);
    } else {
      receive_theirs(p, s, op, stage, source, token);
    }
  }
}
template <class T>
__global__ void __launch_bounds__(kDispatchThreads, 1) dispatch_kernel(const __grid_constant__ DispatchParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ Op opened;
  const Places s = carve(reinterpret_cast<uint32_t*>(shared), p);
  Stage stage(shared, p);
  const bool sender = (p.launch.phases & 1) != 0 && blockIdx.x < p.launch.num_senders;
  const int keys = p.ws.num_ranks * (p.num_slots + 1);
  const uint64_t region = region_bytes(p.ws, p.max_tokens, p.record_bytes);
#pragma unroll 1
  for (int i = threadIdx.x; i < (2 + p.tiles) * keys; i += blockDim.x) s.count[i] = 0;
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
    const int64_t first = min(static_cast<int>(blockIdx.x) / Cut(p).parts * p.chunk_tokens, p.num_tokens);
    const int64_t num = min(static_cast<int64_t>(p.chunk_tokens), p.num_tokens - first) * p.top_k;
    const int width = p.idx64 ? 8 : 4;
    touched = touch(static_cast<const uint8_t*>(p.topk_idx) + first * p.top_k * width, num * width, threadIdx.x);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < p.num_experts; i += blockDim.x) {
    s.expert_slot[i] = pack_slot(p, p.expert_slot[i]);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < p.ws.num_ranks; i += blockDim.x) {
    const int64_t wanted = p.mask[i];
    s.takes_part[i] = !is_dead(p.ws, i) & (wanted != 0);
    s.lost[i] = s.closed[i] = 0;
    s.num_tokens[i] = 0;
  }
  begin_op(p.ws, region, &opened);
  __syncthreads();
  const Op op = opened;
  if (touched == 0x7fc0ffee && s.words[kFailed] == -1) return;  // never: it keeps the loads
  if (sender) {
    if (op.excluded) {
      send_nothing(p);
    } else {
      send_all<T>(p, s, op, stage);
    }
  }
  if ((p.launch.phases & 2) == 0) return;
  const Team t = my_team(1, 0);
  wait_counts(p, s, op, t);
  if (threadIdx.x < 32) trace(7);
  if (blockIdx.x == 0 && threadIdx.x < 32) write_facts(p, s, op);
  write_frame(p, s, threadIdx.x, blockDim.x, blockIdx.x, gridDim.x);
  if (threadIdx.x < 32) trace(8);
  receive_all<T>(p, s, op, t, stage);
  bulk_wait<0>();
  if (threadIdx.x < 32) trace(9);
  end_op(p.ws, op, region, &s.words[kFailed], [&] { zero_lost_sources(p, s); });
  if (threadIdx.x < 32) trace(10);
}

}  // namespace

#ifdef EPOPS_TRACE
int read_dispatch_trace(uint64_t* out) { return cudaMemcpyFromSymbol(out, trace_clock, sizeof(trace_clock)); }
#endif

uint64_t dispatch_shared_bytes(const DispatchParams& p) {
  return stages_at(p) + static_cast<uint64_t>(p.launch.num_threads / 32) * p.stage_bytes;
}

int launch_dispatch(const DispatchParams& p, void* stream) {
  return with_row_type(p.x_dtype, [&](auto row) {
    return launch_kernel(dispatch_kernel<decltype(row)>, p, p.launch, dispatch_shared_bytes(p),
                         static_cast<cudaStream_t>(stream));
  });
}

}  // namespace epops
