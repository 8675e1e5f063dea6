// dispatch of a middling number of tokens: every block keeps the rows that it sends in shared memory.
//
// One kernel, no counting on the sender (board.cuh). A team makes its one token's record, row and scales, in shared
// memory, and bulk copies take it to the peers; when the selections of all ranks are there, the same bytes go to this
// rank's own rows, so nothing is read or quantized twice. A record is told of by a flag as soon as it has landed,
// which the lane that sent it knows by itself: no fence has anything to wait for. Rows of peers pass through shared
// memory likewise, a warp each.
#include "board.cuh"
#include "launch.cuh"

namespace epops {
namespace {

constexpr int kKeptAlign = 128;

// Shared memory: the board, a barrier a stage, stages.
__host__ __device__ inline uint64_t stages_at(const DispatchParams& p) {
  return (4 * board_words(p) + 8 + 8 * p.num_stages + kKeptAlign - 1) / kKeptAlign * kKeptAlign;
}

// Which stage a warp works with. A kept row is in the stage of its team's first warp until it has been read; stages
// beyond those of kept rows belong to the first warps that have none.
struct Stage {
  uint8_t* bytes;  // null: none
  Arrival arrival;
  int turn;  // place among the block's stages when rows of peers are handed out, those that are free at once first

  __device__ __forceinline__ Stage(uint8_t* shared, const DispatchParams& p, int parts, int num_kept) {
    const int warp = threadIdx.x / 32;
    const bool keeps = warp % parts == 0 && warp / parts < num_kept;
    const int before = min(num_kept, (warp + parts - 1) / parts);  // warps before this one that keep a row
    const int index = keeps ? warp / parts : num_kept + warp - before;
    bytes = index < p.num_stages ? shared + stages_at(p) + static_cast<uint64_t>(index) * p.stage_bytes : nullptr;
    arrival.barrier = reinterpret_cast<uint64_t*>(shared + (4 * board_words(p) + 7) / 8 * 8) + index;
    arrival.parity = 0;
    turn = keeps ? p.num_stages - num_kept + index : index - num_kept;
    if (bytes != nullptr && threadIdx.x % 32 == 0) init_arrival(arrival.barrier);
  }
};

// This warp's part of a token's record: the row as it travels, then its scales. `ahead` has its first steps.
template <class T>
__device__ __forceinline__ void make_record(const DispatchParams& p, const Team& t, int token, Ahead<T>& ahead,
                                            uint8_t* to) {
  const int lane = threadIdx.x % 32;
  const float row_amax = row_amax_of<T>(p, token);
  const int num_steps = (p.row_bytes + 511) / 512;
  const int shift = 31 - __clz(max(1, p.quant.block));  // blocks are powers of two
  if constexpr (sizeof(T) == 2) {
    if (by_pairs<T>(p)) {
      const int last = num_steps * 512;
      bool plain = true;
#pragma unroll 1
      for (int step = t.part * 512; step < last; step += t.parts * 1024) {
        const UsualPair<T> now = ahead.pair;
        const int next = step + t.parts * 1024;
        if (next < last) ahead.pair.load(row_of_x<T>(p, token), next, next + t.parts * 512, p.hidden);
        const int step1 = step + t.parts * 512;
        float* scales = reinterpret_cast<float*>(to + p.row_bytes);
        plain &= step1 < last ? now.template finish<2>(p.quant, step, step1, 0, p.row_bytes, to, scales)
                              : now.template finish<1>(p.quant, step, step1, 0, p.row_bytes, to, scales);
      }
      if (__all_sync(~0u, plain)) return;
      __syncwarp();  // other lanes store there again
      ahead.piece.load(p, token, t.part * 512 + lane * 16);
    }
  }
#pragma unroll 1
  for (int number = t.part; number < num_steps; number += t.parts) {
    const int at = number * 512 + lane * 16;
    const Piece<T> now = ahead.piece;
    if (number + t.parts < num_steps) ahead.piece.load(p, token, at + t.parts * 512);
    float scale = 0.f;
    const uint4 v = now.finish(p, row_amax, &scale);
    if (at < p.row_bytes) *reinterpret_cast<uint4*>(to + at) = v;
    if constexpr (sizeof(T) > 1) {
      const bool first = p.quant.block == 0 ? at == 0 : (at & (p.quant.block - 1)) == 0;
      if (first && at < p.row_bytes) reinterpret_cast<float*>(to + p.row_bytes)[at >> shift] = scale;
    }
  }
  if (sizeof(T) == 1 && t.part == t.parts - 1) {
#pragma unroll 1
    for (int b = lane; b < p.num_scales; b += 32) {
      store_scale(to + p.row_bytes, b, p.wire_scale_bytes, given_scale(p, token, b));
    }
  }
}

// Lane i: the i-th of the peers that a token's row goes to, -1 none. All lanes call it.
__device__ __forceinline__ int peer_of_lane(int rank_of_selection, int me) {
  const int lane = threadIdx.x % 32;
  int peer = -1, num = 0;
#pragma unroll 1
  for (uint32_t left = __ballot_sync(~0u, rank_of_selection >= 0 && rank_of_selection != me); left != 0; ++num) {
    const int rank = __shfl_sync(~0u, rank_of_selection, __ffs(left) - 1);
    left &= ~__ballot_sync(~0u, rank_of_selection == rank);
    if (lane == num) peer = rank;
  }
  return peer;
}

// A record to the peers of the lanes, with its weights, by one warp. Returns the peer, or -1 where it cannot go.
__device__ __forceinline__ int send_record(const DispatchParams& p, const Board& s, const Op& op, int peer, int token,
                                           const uint8_t* kept, float weight) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  // A peer that has not opened this op may still read what lies where the record would go.
  if (peer >= 0 && !may_store(p.ws, op, peer)) {
    peer = -1;
    s.words[kFailed] = 1;
  }
  const uint32_t lanes = __ballot_sync(~0u, peer >= 0);
  const uint64_t to =
      peer >= 0 ? reinterpret_cast<uint64_t>(record(p.ws, peer, op.parity, me, token, p.max_tokens, p.record_bytes))
                : 0;
  if (lanes != 0) bulk_store(to, lanes, kept, p.record_bytes);
  bulk_commit();
#pragma unroll 1
  for (uint32_t left = lanes; left != 0; left &= left - 1) {
    const int owner = __shfl_sync(~0u, peer, __ffs(left) - 1);
    if (lane < p.top_k) entries(p.ws, owner, op.parity, me, token)[lane] = make_uint2(0, __float_as_uint(weight));
  }
  return peer;
}

// A record in a stage to its rows here, by one warp.
__device__ __forceinline__ void to_rows_from(const DispatchParams& p, const Landing& l, const uint8_t* record) {
  const Copies sink = to_rows(p, l.row, l.to_copy);
  bulk_store(sink.row, sink.lanes, record, p.row_bytes);
  store_scales(p, sink, record + p.row_bytes);
}

__device__ __forceinline__ void receive_theirs(const DispatchParams& p, const Board& s, const Op& op, Stage& stage,
                                               int source, int token) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  const Landing l = land_chosen(p, s, source, token);
  float weight = 0.f;
  if (l.locals != 0) {
    uint32_t came = 1;
    if (lane == 0 && !wait_word(p.ws, flag(p.ws, me, op.parity, source, token), op.epoch, source, kPhaseRows, &came)) {
      came = 0;
      s.words[kFailed] = 1;
    }
    fence_before_bulk();
    __syncwarp();  // what lane 0 acquired, the others may read
    came = __shfl_sync(~0u, came, 0);
    if (came != 0) {
      const bool copies = l.to_copy != 0;
      if (copies) {
        bulk_load(stage.bytes, record(p.ws, me, op.parity, source, token, p.max_tokens, p.record_bytes), p.record_bytes,
                  nullptr, nullptr, 0, stage.arrival);
      }
      if (lane < p.top_k) {
        weight = __uint_as_float(ld_no_allocate8(entries(p.ws, me, op.parity, source, token) + lane).y);
      }
      if (copies) {
        await_bulk(stage.arrival);
        to_rows_from(p, l, stage.bytes);
        bulk_commit();
      }
    }
  }
  write_row_facts(p, l, source, token, weight);
  fence_before_bulk();  // scales may have been read from the stage
  bulk_wait_read();
}

template <class T>
__global__ void __launch_bounds__(kKeptThreads, 1) dispatch_kept_kernel(const __grid_constant__ DispatchParams p) {
  extern __shared__ __align__(128) uint8_t memory[];
  const Board s = carve_board(reinterpret_cast<uint32_t*>(memory), p);
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  const int zeroed = p.ws.num_ranks * (p.num_slots + 1) * s.tiles + kNumWords;  // bits and words
#pragma unroll 1
  for (int i = threadIdx.x; i < zeroed; i += blockDim.x) s.bits[i] = 0;
  if (threadIdx.x < 32) trace(0);
  const Team t = my_team(p.launch.send_warps, 0);
  const int token = blockIdx.x + t.id * static_cast<int>(gridDim.x);  // of this team, its only one
  const int num_kept = (p.max_tokens - 1 - static_cast<int>(blockIdx.x)) / static_cast<int>(gridDim.x) + 1;
  const bool keeps = t.id >= 0 && token < p.max_tokens, here = keeps && token < p.num_tokens;
  Stage stage(memory, p, t.parts, p.max_tokens > static_cast<int>(blockIdx.x) ? num_kept : 0);
  uint8_t* kept = memory + stages_at(p) + static_cast<uint64_t>(t.id) * p.stage_bytes;
  wait_for_earlier_kernels();
  if (threadIdx.x < 32) trace(1);
  let_next_kernel_launch();
  // All that does not depend on what was loaded before is asked for in one go, and what does as soon as that has come.
  const bool first_warp = keeps && t.part == 0, a_rank = threadIdx.x < p.ws.num_ranks;
  int64_t expert = -1, expert_slot = -1, wanted = 0;
  float weight = 0.f;
  Ahead<T> ahead;
  if (here) {
    if (first_warp) expert = load_expert(p, token, lane, lane < p.top_k);
    ahead.load(p, token, t.part * 512, (t.part + t.parts) * 512);
  }
  if (a_rank) wanted = ld_now(p.mask + threadIdx.x);
  const bool dead = a_rank && is_dead(p.ws, threadIdx.x);
  const uint64_t region = region_bytes(p.ws, p.max_tokens, p.record_bytes);
  const Op op = begin_op(p.ws, region);
  if (first_warp && here && lane < p.top_k) {
    weight = ld_now(p.topk_weights + static_cast<int64_t>(token) * p.top_k + lane);
    if (expert >= 0 && expert < p.num_experts) expert_slot = ld_now(p.expert_slot + expert);
  }
  if (a_rank) {
    s.takes_part[threadIdx.x] = !dead & (wanted != 0);
    s.lost[threadIdx.x] = op.excluded || dead || wanted == 0;
  }
  __syncthreads();
  if (threadIdx.x == 0 && op.excluded) s.words[kBits] = kExcluded;
  if (threadIdx.x < 32) trace(2);
  if (blockIdx.x == 0 && threadIdx.x >= blockDim.x - 32 && !op.excluded) {
#pragma unroll 1
    for (int peer = lane; peer < p.ws.num_ranks; peer += 32) {
      if (s.takes_part[peer] != 0) post_header(p.ws, op, peer, p.num_tokens, p.call_hash, 0);
    }
  }
  // Sent, by teams.
  int peer = -1;
  if (keeps && !op.excluded) {
    if (t.part == 0) {
      const Seat seat{0, lane, lane < p.top_k};
      const Selection found = look_up(p, s.takes_part, seat, expert, [&](int) { return pack_slot(p, expert_slot); });
      post_selections(p, s, op, found, token);
      peer = peer_of_lane(found.rank, me);
    }
    if (here) {
      make_record<T>(p, t, token, ahead, kept);
      fence_before_bulk();
      if (t.parts == 1) {
        __syncwarp();
      } else {
        barrier_sync(2 + t.id, t.parts * 32);
      }
    }
    if (t.part == 0) peer = send_record(p, s, op, peer, token, kept, weight);
  }
  if (op.excluded) send_nothing(p);
  // Word to the peers that a record has landed, by the lane that sent it: at once where a block has one, for there is
  // nothing else to do until the selections come; else when own rows are on their way, too.
  const auto tell = [&] {
    if (peer < 0) return;
    fence_acq_rel_sys();
    st_relaxed_sys(flag(p.ws, peer, op.parity, me, token), tagged(op.epoch, 1));
  };
  const bool at_once = p.max_tokens <= 64;  // measured: 16 and 64 tokens gain by it, 128 lose
  if (first_warp && at_once) {
    bulk_wait<0>();
    tell();
  }
  if (threadIdx.x < 32) trace(3);
  wait_selections(p, s, op);
  if (threadIdx.x < 32) trace(4);
  // Own rows, and word to the peers.
  if (first_warp) {
    const Landing l = land_chosen(p, s, me, token);
    if (l.to_copy != 0) to_rows_from(p, l, kept);
    bulk_commit();
    if (!at_once) {
      bulk_wait<1>();
      tell();
    }
    if (threadIdx.x < 32) trace(5);
    write_row_facts(p, l, me, token, weight);
    fence_before_bulk();
    bulk_wait_read();
  }
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x >= blockDim.x - 32) write_facts(p, s, op);
  write_frame(p, s, threadIdx.x, blockDim.x);
  if (threadIdx.x < 32) trace(6);
  if (stage.bytes != nullptr) {
    const int others = (p.ws.num_ranks - 1) * p.max_tokens;
#pragma unroll 1
    for (int item = blockIdx.x + stage.turn * gridDim.x; item < others; item += gridDim.x * p.num_stages) {
      // Peers' first tokens first: they were sent first.
      const int source = (me + 1 + item % (p.ws.num_ranks - 1)) % p.ws.num_ranks;
      receive_theirs(p, s, op, stage, source, item / (p.ws.num_ranks - 1));
    }
  }
  bulk_wait<0>();
  if (threadIdx.x < 32) trace(7);
  end_op(p.ws, op, region, &s.words[kFailed], [&] { zero_lost_sources(p, s); });
  if (threadIdx.x < 32) trace(8);
}

}  // namespace

#ifdef EPOPS_TRACE
int read_dispatch_kept_trace(uint64_t* out) { return cudaMemcpyFromSymbol(out, trace_clock, sizeof(trace_clock)); }
#endif

uint64_t dispatch_kept_shared_bytes(const DispatchParams& p) {
  return stages_at(p) + static_cast<uint64_t>(p.num_stages) * p.stage_bytes;
}

int launch_dispatch_kept(const DispatchParams& p, void* stream) {
  return with_row_type(p.x_dtype, [&](auto row) {
    return launch_kernel(dispatch_kept_kernel<decltype(row)>, p, p.launch, dispatch_kept_shared_bytes(p),
                         static_cast<cudaStream_t>(stream));
  });
}

}  // namespace epops
