// dispatch of few tokens: selections and rows travel as lines (lines.cuh), seen as soon as they come.
//
// One kernel, no counting on the sender (board.cuh). A team of warps makes a token's record, row and scales and
// weights, in shared memory and stores it to the peers; when the selections of all ranks are there, bulk copies take
// the same bytes to this rank's own rows, and rows of peers pass through shared memory likewise. Where tokens are more,
// some blocks only send and the others do all the rest: a multiprocessor's own reads wait behind what it has for a busy
// link.
#include "board.cuh"
#include "launch.cuh"
#include "lines.cuh"

namespace epops {
namespace {

constexpr int kStageAlign = 128;
constexpr int kBatch = 8;  // steps of a record read at once

// Shared memory: the board, then `num_stages` records a team.
__host__ __device__ inline uint64_t stages_at(const DispatchParams& p) {
  return (4 * board_words(p) + kStageAlign - 1) / kStageAlign * kStageAlign;
}

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

// What a team asks for ahead: a token's selections and its row's first steps. Every warp looks the selections up for
// itself.
template <class T>
struct Asked {
  int64_t expert = -1, slot = -1;
  float weight = 0.f;
  Ahead<T> ahead;

  __device__ __forceinline__ void ask(const DispatchParams& p, const Team& t, int token) {
    const int lane = threadIdx.x % 32;
    expert = load_expert(p, token, lane, lane < p.top_k);
    ahead.load(p, token, t.part * 512, (t.part + t.parts) * 512);
    if (t.part == 0 && lane < p.top_k) weight = ld_now(p.topk_weights + static_cast<int64_t>(token) * p.top_k + lane);
  }
  __device__ __forceinline__ void ask_slot(const DispatchParams& p) {
    slot = expert >= 0 && expert < p.num_experts ? ld_now(p.expert_slot + expert) : -1;
  }
  __device__ __forceinline__ Selection find(const DispatchParams& p, const Board& s) const {
    const int lane = threadIdx.x % 32;
    return look_up(p, s.takes_part, Seat{0, lane, lane < p.top_k}, expert, [&](int) { return pack_slot(p, slot); });
  }
};

// This warp's part of a record and, by the first warp, its weights. The team meets before it is read.
template <class T>
__device__ __forceinline__ void make_all(const DispatchParams& p, const Team& t, int token, Asked<T>& asked,
                                         uint8_t* record) {
  make_record<T>(p, t, token, asked.ahead, record);
  const int lane = threadIdx.x % 32;
  if (t.part == 0 && lane < p.top_k) reinterpret_cast<float*>(record + p.record_bytes)[lane] = asked.weight;
}

__device__ __forceinline__ void send_record(const DispatchParams& p, const Team& t, const Op& op, int peer, int token,
                                            const uint8_t* record) {
#pragma unroll 1
  for (uint32_t left = __ballot_sync(~0u, peer >= 0); left != 0; left &= left - 1) {
    const int owner = __shfl_sync(~0u, peer, __ffs(left) - 1);
    send_lines(lines(p.ws, owner, op.parity, p.ws.rank, token), record, p.sent_bytes, t.part, t.parts, op.epoch);
  }
}

// A record to its rows here, by one warp, and what else is written for them.
__device__ __forceinline__ void place_record(const DispatchParams& p, const Landing& l, int source, int token,
                                             const uint8_t* record) {
  const int lane = threadIdx.x % 32;
  if (l.to_copy != 0) {
    const Copies sink = to_rows(p, l.row, l.to_copy);
    bulk_store(sink.row, sink.lanes, record, p.row_bytes);
    store_scales(p, sink, record + p.row_bytes);
    bulk_commit();
  }
  float weight = 0.f;
  if (l.locals != 0 && lane < p.top_k) {
    weight = *reinterpret_cast<const volatile float*>(record + p.record_bytes + 4 * lane);
  }
  write_row_facts(p, l, source, token, weight);
}

template <class T>
__global__ void __launch_bounds__(kLineThreads, 1) dispatch_lines_kernel(const __grid_constant__ DispatchParams p) {
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ Op opened;
  const Board s = carve_board(memory, p);
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  const int zeroed = p.ws.num_ranks * (p.num_slots + 1) * s.tiles + kNumWords;  // bits and words
#pragma unroll 1
  for (int i = threadIdx.x; i < zeroed; i += blockDim.x) s.bits[i] = 0;
  if (threadIdx.x < 32) trace(0);
  const Crew crew(p.launch);
  const Team t = my_team(p.launch.send_warps, 0);
  const int first = t.id < 0 ? p.max_tokens : crew.block + t.id * crew.blocks, step = crew.blocks * t.num_teams;
  const auto stage = [&](int team, int number) {
    return memory + stages_at(p) + (team * p.num_stages + number) * p.stage_bytes;
  };
  // Selections are posted by warps from the last one on: those that are in no team come first. They, headers and rows
  // come from blocks that send, the first ones of the grid: peers wait for nothing from a block that another kernel
  // may keep from running.
  const int num_warps = blockDim.x / 32, post_step = crew.blocks * num_warps;
  int posted = crew.block + (num_warps - 1 - static_cast<int>(threadIdx.x / 32)) * crew.blocks;
  if (!crew.sends) posted = p.max_tokens;
  wait_for_earlier_kernels();
  if (threadIdx.x < 32) trace(1);
  let_next_kernel_launch();
  // All that does not depend on what was loaded before is asked for in one go, and what does as soon as that has come.
  const bool a_rank = threadIdx.x < p.ws.num_ranks;
  int64_t wanted = 0, posted_expert = -1, posted_slot = -1;
  Asked<T> asked;
  if (posted < p.num_tokens) posted_expert = load_expert(p, posted, lane, lane < p.top_k);
  if (first < p.num_tokens) asked.ask(p, t, first);
  if (a_rank) wanted = ld_now(p.mask + threadIdx.x);
  const bool dead = a_rank && is_dead(p.ws, threadIdx.x);
  begin_op(p.ws, 0, &opened);
  const auto slot_of_expert = [&](int64_t expert) {
    return expert >= 0 && expert < p.num_experts ? ld_now(p.expert_slot + expert) : -1;
  };
  posted_slot = slot_of_expert(posted_expert);
  asked.ask_slot(p);
  if (a_rank) {
    s.takes_part[threadIdx.x] = !dead & (wanted != 0);
    s.lost[threadIdx.x] = dead || wanted == 0;
  }
  __syncthreads();
  const Op op = opened;
  if (op.excluded) {  // all sources count as lost
    if (a_rank) s.lost[threadIdx.x] = 1;
    if (threadIdx.x == 0) s.words[kBits] = kExcluded;
  }
  if (threadIdx.x < 32) trace(2);
  if (blockIdx.x == 0 && static_cast<int>(threadIdx.x / 32) == num_warps - 2 && !op.excluded) {
#pragma unroll 1
    for (int peer = lane; peer < p.ws.num_ranks; peer += 32) {
      if (s.takes_part[peer] != 0) post_header(p.ws, op, peer, p.num_tokens, p.call_hash, 0);
    }
  }
#pragma unroll 1
  for (; posted < p.max_tokens && !op.excluded; posted += post_step) {
    const Seat seat{0, lane, lane < p.top_k};
    const Selection found =
        look_up(p, s.takes_part, seat, posted_expert, [&](int) { return pack_slot(p, posted_slot); });
    post_selections(p, s, op, found, posted);
    const int next = posted + post_step;
    posted_expert = next < p.num_tokens ? load_expert(p, next, lane, lane < p.top_k) : -1;
    posted_slot = slot_of_expert(posted_expert);
  }
  // Records made and sent. A block that places keeps them.
  int made = 0, sent = 0;
#pragma unroll 1
  for (int token = first; token < p.num_tokens && !op.excluded; token += step, ++made) {
    const Selection found = asked.find(p, s);
    Asked<T> now = asked;
    const bool more = token + step < p.num_tokens;
    if (more) asked.ask(p, t, token + step);
    const bool local = crew.places && __any_sync(~0u, found.rank == me);
    const int peer = crew.sends ? peer_of_lane(found.rank, me) : -1;
    if (local || __any_sync(~0u, peer >= 0)) {  // alike in all warps of the team
      uint8_t* record = stage(t.id, crew.places ? made : sent++ % p.num_stages);
      make_all<T>(p, t, token, now, record);
      fence_before_bulk();
      sync_team(t);  // and the record before, whose stage comes next, has been sent
      if (token == first && threadIdx.x < 32) trace(3);
      send_record(p, t, op, peer, token, record);
    }
    if (more) asked.ask_slot(p);
  }
  if (op.excluded && crew.sends) send_nothing(p);
  if (threadIdx.x < 32) trace(4);
  if (crew.places) {
    wait_selections(p, s, op);
    if (threadIdx.x < 32) trace(5);
    // Own rows are placed by warps that are in no team, or else by those of their team; then a team places rows of
    // peers. Of the latter a stage is read by the bulk copies of one warp, which waits for them before the team fills
    // it again. What else is written is left to the last warp where another one is in no team either.
    const int num_kept = p.num_stages - p.num_land, busy = t.num_teams * t.parts, spare = num_warps - busy;
    const int warp = threadIdx.x / 32, placing = spare > 1 ? spare - 1 : spare;
    const bool is_spare = t.id < 0, last_warp = warp == num_warps - 1;
    const bool all_frame = spare <= 1 || p.alignment > 1;
    const int own_end = placing == 0 ? num_kept : is_spare && warp - busy < placing ? t.num_teams * num_kept : 0;
    const int own_step = is_spare ? placing : t.parts;
    int own = is_spare ? warp - busy : t.part;
    const int others = p.ws.num_ranks - 1;
    const int theirs_end = is_spare ? 0 : others * p.max_tokens;
    int theirs = first, landed = 0;
    if (all_frame) {
      write_frame(p, s, threadIdx.x, blockDim.x, crew.block, crew.blocks);
    } else if (last_warp) {
      write_frame(p, s, threadIdx.x % 32, 32, crew.block, crew.blocks);
    }
#pragma unroll 1
    while (own < own_end || theirs < theirs_end) {
      int source = me, token;
      const uint8_t* record;
      bool places = true;
      if (own < own_end) {
        const int team = is_spare ? own % t.num_teams : t.id, number = is_spare ? own / t.num_teams : own;
        token = crew.block + team * crew.blocks + number * step;
        record = stage(team, number);
        own += own_step;
        if (token >= p.max_tokens) continue;
      } else {
        // Peers' first tokens first: they were sent first.
        token = others == 1 ? theirs : theirs / others;
        source = me + 1 + theirs - token * others;
        if (source >= p.ws.num_ranks) source -= p.ws.num_ranks;
        theirs += step;
        places = t.part == landed % p.num_land % t.parts;
        record = stage(t.id, num_kept + landed % p.num_land);
      }
      const Landing l = land_chosen(p, s, source, token);
      if (source != me && l.locals != 0) {
        const uint8_t* from = lines(p.ws, me, op.parity, source, token);
        uint8_t* to = const_cast<uint8_t*>(record);
        bool came = true;
        if (landed >= p.num_land) {
          fence_before_bulk();  // scales may have been read from it
          bulk_wait_read();
          sync_team(t);
        }
#pragma unroll 1
        for (int at = t.part; came && at < line_steps(p.sent_bytes); at += kBatch * t.parts) {
          uint4 v[kBatch];
          came = read_lines(p.ws, op, from, p.sent_bytes, at, t.parts, source, kPhaseRows, v);
          keep_lines(to, p.sent_bytes, at, t.parts, v);
        }
        if (!came) s.words[kFailed] = 1;
        fence_before_bulk();
        sync_team(t);
        ++landed;
        if (landed == 1 && threadIdx.x < 32) trace(8);
      }
      if (places) place_record(p, l, source, token, record);
    }
    if (threadIdx.x < 32) trace(9);
    if (last_warp && blockIdx.x == gridDim.x - 1) write_facts(p, s, op);
  }
  bulk_wait<0>();
  if (threadIdx.x < 32) trace(10);
  end_op(p.ws, op, 0, &s.words[kFailed], [&] { zero_lost_sources(p, s); });
  if (threadIdx.x < 32) trace(11);
}

}  // namespace

#ifdef EPOPS_TRACE
int read_dispatch_lines_trace(uint64_t* out) { return cudaMemcpyFromSymbol(out, trace_clock, sizeof(trace_clock)); }
#endif

uint64_t dispatch_lines_shared_bytes(const DispatchParams& p) {
  const int teams = p.launch.num_threads / 32 / p.launch.send_warps;
  return stages_at(p) + static_cast<uint64_t>(teams) * p.num_stages * p.stage_bytes;
}

int launch_dispatch_lines(const DispatchParams& given, void* stream) {
  DispatchParams p = given;
  const uint32_t num_lines = static_cast<uint32_t>(p.max_tokens) * chosen_lines(p.top_k);
  p.lines_inverse = num_lines > 1 ? 0xffffffffu / num_lines + 1 : 0;
  return with_row_type(p.x_dtype, [&](auto row) {
    return launch_kernel(dispatch_lines_kernel<decltype(row)>, p, p.launch, dispatch_lines_shared_bytes(p),
                         static_cast<cudaStream_t>(stream));
  });
}

}  // namespace epops
