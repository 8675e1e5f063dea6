// dispatch of few tokens: selections and rows travel as words that carry the epoch, so nothing waits for a fence.
//
// One kernel, no counting on the sender. Each token's team posts where its selections go, 16 bits each, to every rank,
// and stores its row as lines, once a destination. Every block reads the selections of all ranks and finds every row's
// place from one bit a (source, slot, token): counts and positions are population counts. Teams then put rows where
// they belong as their lines come. dispatch.cu has the path for many tokens.
#include "landing.cuh"
#include "launch.cuh"
#include "lines.cuh"

namespace epops {
namespace {

constexpr uint32_t kNoSlot = 0xffff, kBadSlot = 0xfffe, kRepeatedSlot = 0xfffd;  // selections that go nowhere

// Places, and what only this kernel has.
struct Board : Places {
  uint32_t* chosen;  // [R][M][pairs] two slots a word, as they were posted
  int pairs, tiles;  // words of a token; words of 32 tokens
};

__host__ __device__ inline int pairs_of(const DispatchParams& p) { return (p.top_k + 1) / 2; }

__host__ __device__ inline uint64_t board_words(const DispatchParams& p) {
  const uint64_t stride = p.num_slots + 1, num_ranks = p.ws.num_ranks, tiles = (p.max_tokens + 31) / 32;
  return num_ranks * stride * (1 + tiles) + 2 * stride + 3 * num_ranks + num_ranks * p.max_tokens * pairs_of(p) +
         kNumWords;
}

__device__ __forceinline__ Board carve_board(uint32_t* shared, const DispatchParams& p) {
  const int keys = p.ws.num_ranks * (p.num_slots + 1);
  Board s{};
  s.pairs = pairs_of(p);
  s.tiles = (p.max_tokens + 31) / 32;
  s.bits = shared;
  s.words = reinterpret_cast<int32_t*>(s.bits + keys * s.tiles);
  s.total = reinterpret_cast<uint32_t*>(s.words + kNumWords);
  s.start = reinterpret_cast<int32_t*>(s.total + keys);
  s.tally = s.start + p.num_slots + 1;
  s.num_tokens = s.tally + p.num_slots + 1;
  s.takes_part = s.num_tokens + p.ws.num_ranks;
  s.lost = reinterpret_cast<uint32_t*>(s.takes_part + p.ws.num_ranks);
  s.chosen = s.lost + p.ws.num_ranks;
  return s;
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

// What a token's lines are made of: steps of the row, with the scales that were made from it; scales that came with x;
// weights.
struct Shape {
  int scales_a_step, lanes_a_scale, step_bytes, scales_at, weights_at;

  __device__ __forceinline__ explicit Shape(const DispatchParams& p) {
    const bool made = p.x_dtype != kBytes;
    lanes_a_scale = made && p.quant.block != 0 ? p.quant.block / 16 : 32;
    scales_a_step = made ? 32 / lanes_a_scale : 0;
    step_bytes = epops::step_bytes(scales_a_step);
    scales_at = (p.row_bytes + 511) / 512 * step_bytes;
    weights_at = scales_at + (made ? 0 : words_bytes(p.num_scales));
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

// Where a token's selections go, to every rank that takes part, this one too; by one warp.
__device__ __forceinline__ void post_selections(const DispatchParams& p, const Board& s, const Op& op,
                                                const Selection& found, int token) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  const uint32_t nowhere = found.bad ? kBadSlot : found.repeated ? kRepeatedSlot : kNoSlot;
#pragma unroll 1
  for (int i = 1; i <= p.ws.num_ranks; ++i) {
    const int peer = (me + i) % p.ws.num_ranks;
    const uint32_t mine = found.rank == peer ? static_cast<uint32_t>(found.slot - peer * p.num_slots) : nowhere;
    const uint32_t next = __shfl_down_sync(~0u, mine, 1);
    if (lane % 2 == 0 && lane < p.top_k && s.takes_part[peer] != 0) {
      st_relaxed_sys(selections(p.ws, peer, op.parity, me) + token * s.pairs + lane / 2,
                     tagged(op.epoch, mine | (lane + 1 < p.top_k ? next : kNoSlot) << 16));
    }
  }
  if (token < p.num_tokens && lane < p.top_k) {
    p.route[32 + p.ws.num_ranks + static_cast<int64_t>(token) * p.top_k + lane] = found.slot;
  }
}

// One token by the warps of its team. `expert` and `piece` were asked for before.
template <class T>
__device__ __forceinline__ void send_token(const DispatchParams& p, const Board& s, const Op& op, const Team& t,
                                           const Shape& shape, int token, int64_t expert, Piece<T>& piece) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  const Seat seat{0, lane, lane < p.top_k};
  const Selection found =
      look_up(p, s.takes_part, seat, expert, [&](int known) { return pack_slot(p, p.expert_slot[known]); });
  if (t.part == 0) post_selections(p, s, op, found, token);
  // Lanes fill from 0 with the addresses at the peers that get the row.
  uint64_t to = 0;
  int num = 0;
#pragma unroll 1
  for (uint32_t left = __ballot_sync(~0u, found.rank >= 0 && found.rank != me); left != 0;) {
    const int peer = __shfl_sync(~0u, found.rank, __ffs(left) - 1);
    left &= ~__ballot_sync(~0u, found.rank == peer);
    if (lane == num) {
      to = reinterpret_cast<uint64_t>(lines_of(p.ws, peer, op.parity, me, token, p.line_bytes));
    }
    ++num;
  }
  if (num == 0) return;
  const float row_amax = row_amax_of<T>(p, token);
  const int num_steps = (p.row_bytes + 511) / 512;
#pragma unroll 1
  for (int number = t.part; number < num_steps; number += t.parts) {
    const int at = number * 512 + lane * 16;
    if (number != t.part) piece.load(p, token, at);
    float scale = 0.f;
    const uint4 v = piece.finish(p, row_amax, &scale);
    Step step;
    step.pack(v, __float_as_uint(scale), shape.scales_a_step, shape.lanes_a_scale, op.epoch);
#pragma unroll 1
    for (int i = 0; i < num; ++i) {
      step.store(__shfl_sync(~0u, to, i) + number * shape.step_bytes, at < p.row_bytes, shape.scales_a_step);
    }
  }
  if (t.part != t.parts - 1) return;
#pragma unroll 1
  for (int i = 0; i < num; ++i) {
    uint8_t* lines = reinterpret_cast<uint8_t*>(__shfl_sync(~0u, to, i));
    store_words(lines + shape.weights_at, p.top_k, op,
                [&](int k) { return __float_as_uint(p.topk_weights[static_cast<int64_t>(token) * p.top_k + k]); });
    if (p.x_dtype == kBytes) {
      store_words(lines + shape.scales_at, p.num_scales, op, [&](int b) { return given_scale(p, token, b); });
    }
  }
}

// Waits for every rank's selections and the hash of its call, words by threads, and marks them.
__device__ __forceinline__ void wait_selections(const DispatchParams& p, const Board& s, const Op& op) {
  constexpr int kAhead = 4;  // words on their way
  const int stride = p.num_slots + 1, words = p.max_tokens * s.pairs, of_source = words + 1;
  const int all = p.ws.num_ranks * of_source;
#pragma unroll 1
  for (int i0 = threadIdx.x; i0 < all; i0 += kAhead * blockDim.x) {
    const uint64_t* from[kAhead];
    uint64_t now[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int i = i0 + a * static_cast<int>(blockDim.x), source = i / of_source, word = i % of_source;
      from[a] = nullptr;
      if (i >= all || op.excluded || s.takes_part[source] == 0 || (word == words && source == p.ws.rank)) continue;
      from[a] = word < words ? selections(p.ws, p.ws.rank, op.parity, source) + word
                             : header(p.ws, p.ws.rank, op.parity, source) + 1;
      now[a] = ld_relaxed_sys(from[a]);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (from[a] == nullptr) continue;
      const int i = i0 + a * static_cast<int>(blockDim.x), source = i / of_source, word = i % of_source;
      uint32_t value = static_cast<uint32_t>(now[a]);
      // A peer whose call differs may have posted something else: its hash, seen by another thread, ends this wait.
      if (static_cast<uint32_t>(now[a] >> 32) != op.epoch &&
          !wait_slowly(p.ws, from[a], op.epoch, source, word < words ? kPhaseCounts : kPhaseHeader, &value,
                       &s.lost[source])) {
        lose_source(p, s, source);
        value = ~0u;
      } else if (word == words) {
        check_hash(p, s, op, source, value);
        continue;
      }
      if (word == words) continue;
      s.chosen[source * words + word] = value;
      const int token = word / s.pairs;
      uint32_t* bits = s.bits + source * stride * s.tiles + token / 32;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t slot = half == 0 ? value & 0xffff : value >> 16;
        if (slot < static_cast<uint32_t>(p.num_slots)) {
          atomicOr(&bits[slot * s.tiles], 1u << token % 32);
          if (p.layout == kRank) atomicOr(&bits[p.num_slots * s.tiles], 1u << token % 32);
        } else if (slot == kBadSlot || slot == kRepeatedSlot) {
          note_bad(p, s, source, slot == kRepeatedSlot, 1);
        }
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int slot = threadIdx.x; slot < stride; slot += blockDim.x) {
    uint32_t sum = 0;
#pragma unroll 1
    for (int source = 0; source < p.ws.num_ranks; ++source) {
      s.total[source * stride + slot] = sum;
      if (s.lost[source] != 0) continue;
#pragma unroll 4
      for (int tile = 0; tile < s.tiles; ++tile) sum += __popc(s.bits[(source * stride + slot) * s.tiles + tile]);
    }
    s.tally[slot] = sum;
  }
#pragma unroll 1
  for (int source = threadIdx.x; source < p.ws.num_ranks; source += blockDim.x) {
    s.num_tokens[source] = s.lost[source] != 0 ? -1 : p.max_tokens;
  }
  __syncthreads();
  find_starts(p, s);
  __syncthreads();
}

template <class T>
__device__ __forceinline__ void receive_token(const DispatchParams& p, const Board& s, const Op& op, const Team& t,
                                              const Shape& shape, int source, int token) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  int slot = -1, position = 0;
  if (lane < p.top_k && s.num_tokens[source] >= 0) {
    const uint32_t both = s.chosen[(source * p.max_tokens + token) * s.pairs + lane / 2];
    slot = static_cast<int>(lane % 2 == 0 ? both & 0xffff : both >> 16);
    if (slot < p.num_slots) {
      const int key = source * (p.num_slots + 1) + (p.layout == kRank ? p.num_slots : slot);
      const uint32_t* bits = s.bits + key * s.tiles;
#pragma unroll 1
      for (int tile = 0; tile < token / 32; ++tile) position += __popc(bits[tile]);
      position += __popc(bits[token / 32] & ((1u << token % 32) - 1));
    }
  }
  const Landing l = land(p, s, source, token, slot, position);
  float weight = 0.f;
  if (l.locals != 0) {
    const Copies sink = to_rows(p, l.row, l.to_copy);
    const uint8_t* from = source == me ? nullptr : lines_of(p.ws, me, op.parity, source, token, p.line_bytes);
    const float row_amax = source == me && l.to_copy != 0 ? row_amax_of<T>(p, token) : 0.f;
    const int num_steps = l.to_copy != 0 ? (p.row_bytes + 511) / 512 : 0;
    bool came = true;
#pragma unroll 1
    for (int number = t.part; number < num_steps; number += t.parts) {
      const int at = number * 512 + lane * 16;
      const bool here = at < p.row_bytes;
      uint4 v[1];
      uint32_t scale = 0;
      if (source == me) {
        Piece<T> piece;
        piece.load(p, token, at);
        float made = 0.f;
        v[0] = piece.finish(p, row_amax, &made);
        scale = __float_as_uint(made);
      } else {
        const uint8_t* step_from = from + number * shape.step_bytes;
        Step step;
        ask_step(step_from, here, shape.scales_a_step, &step);
        came &= wait_step(p.ws, step_from, op, source, kPhaseRows, here, shape.scales_a_step, &step);
        v[0] = step.unpack(shape.scales_a_step, shape.lanes_a_scale, &scale);
      }
      sink.store(at, 512, p.row_bytes, v);
      if (shape.scales_a_step != 0) {
        const bool first = p.quant.block == 0 ? at == 0 : lane % shape.lanes_a_scale == 0;
        sink.scale(number * shape.scales_a_step + lane / shape.lanes_a_scale, first && here, scale);
      }
    }
    if (p.num_scales != 0 && shape.scales_a_step == 0 && l.to_copy != 0 && t.part == t.parts - 1) {
      if (source == me) {
        copy_scales(static_cast<const uint8_t*>(p.x_scales) + token * p.scale_token_stride * p.wire_scale_bytes,
                    p.scale_block_stride, p.wire_scale_bytes, p.num_scales, 0, sink);
      } else {
#pragma unroll 1
        for (uint32_t left = sink.lanes; left != 0; left &= left - 1) {
          uint8_t* to = reinterpret_cast<uint8_t*>(__shfl_sync(~0u, sink.scales, __ffs(left) - 1));
          came &= take_words(
              p.ws, from + shape.scales_at, p.num_scales, op, source, kPhaseRows,
              [&](int b, uint32_t value) { store_scale(to + b * sink.scale_step, 0, sink.scale_bytes, value); });
          __syncwarp();
        }
      }
    }
    if (t.part == 0) {
      if (source == me) {
        if (lane < p.top_k) weight = p.topk_weights[static_cast<int64_t>(token) * p.top_k + lane];
      } else {
        uint4 line = make_uint4(0, 0, 0, 0);
        if (lane * 3 < p.top_k) {
          const uint8_t* at = from + shape.weights_at + lane * 16;
          line = ld_relaxed_sys_16(at);
          came &= wait_line(p.ws, at, op, source, kPhaseRows, &line);
        }
        __syncwarp();
        const uint32_t a = __shfl_sync(~0u, line.x, lane / 3), b = __shfl_sync(~0u, line.y, lane / 3),
                       c = __shfl_sync(~0u, line.z, lane / 3);
        weight = __uint_as_float(lane % 3 == 0 ? a : lane % 3 == 1 ? b : c);
      }
    }
    if (!came) s.words[kFailed] = 1;
  }
  if (t.part == 0) write_row_facts(p, l, source, token, weight);
}

template <class T>
__global__ void __launch_bounds__(kDispatchThreads, 1) dispatch_lines_kernel(const __grid_constant__ DispatchParams p) {
  extern __shared__ uint32_t shared[];
  const Board s = carve_board(shared, p);
  const int zeroed = p.ws.num_ranks * (p.num_slots + 1) * s.tiles + kNumWords;  // bits and words
#pragma unroll 1
  for (int i = threadIdx.x; i < zeroed; i += blockDim.x) s.bits[i] = 0;
  if (threadIdx.x < 32) trace(0);
  const Team sending = my_team(p.launch.send_warps, 0);
  const bool sender = (p.launch.phases & 1) != 0 && blockIdx.x < p.launch.num_senders && sending.id >= 0;
  const Shape shape(p);
  wait_for_earlier_kernels();
  if (threadIdx.x < 32) trace(1);
  let_next_kernel_launch();
  const int lane = threadIdx.x % 32;
  int token = blockIdx.x + sending.id * p.launch.num_senders;
  int64_t expert = -1;
  Piece<T> piece;
  if (sender && token < p.num_tokens) {  // what is needed of the first token, while the first words of the group come
    expert = load_expert(p, token, lane, lane < p.top_k);
    piece.load(p, token, sending.part * 512 + lane * 16);
  }
  const Op op = begin_op(p.ws, 0);
#pragma unroll 1
  for (int i = threadIdx.x; i < p.ws.num_ranks; i += blockDim.x) {
    const int64_t wanted = p.mask[i];
    s.takes_part[i] = !is_dead(p.ws, i) & (wanted != 0);
    s.lost[i] = op.excluded || s.takes_part[i] == 0;
  }
  __syncthreads();
  if (threadIdx.x == 0 && op.excluded) s.words[kBits] = kExcluded;
  if (threadIdx.x < 32) trace(2);
  if ((p.launch.phases & 1) != 0 && blockIdx.x == 0 && threadIdx.x >= blockDim.x - 32 && !op.excluded) {
#pragma unroll 1
    for (int peer = lane; peer < p.ws.num_ranks; peer += 32) {
      if (s.takes_part[peer] != 0) post_header(p.ws, op, peer, p.num_tokens, p.call_hash, 0);
    }
  }
  if (sender && !op.excluded) {
#pragma unroll 1
    while (token < p.max_tokens) {
      send_token<T>(p, s, op, sending, shape, token, expert, piece);
      token += sending.num_teams * p.launch.num_senders;
      expert = -1;
      if (token < p.num_tokens) {
        expert = load_expert(p, token, lane, lane < p.top_k);
        piece.load(p, token, sending.part * 512 + lane * 16);
      }
    }
  }
  if (op.excluded && (p.launch.phases & 1) != 0 && blockIdx.x < p.launch.num_senders) send_nothing(p);
  if (threadIdx.x < 32) trace(3);
  if ((p.launch.phases & 2) == 0) return;
  wait_selections(p, s, op);
  if (threadIdx.x < 32) trace(4);
  const Team t = my_team(p.launch.recv_warps, 0);
  // Where a block has several teams, the first one's token is a peer's: it goes on to wait for that.
  const int apart = t.num_teams > 1 ? t.parts * 32 : 0;
  const int thread = static_cast<int>(threadIdx.x) - apart;
  if (thread >= 0) {
    if (blockIdx.x == 0 && thread < 32) write_facts(p, s, op);
    write_frame(p, s, thread, static_cast<int>(blockDim.x) - apart);
  }
  if (threadIdx.x < 32) trace(5);
  if (t.id >= 0) {
#pragma unroll 1
    for (int item = blockIdx.x + t.id * gridDim.x; item < p.ws.num_ranks * p.max_tokens;
         item += gridDim.x * t.num_teams) {
      const int source = (p.ws.rank + 1 + item / p.max_tokens) % p.ws.num_ranks;  // own rows last
      receive_token<T>(p, s, op, t, shape, source, item % p.max_tokens);
    }
  }
  if (threadIdx.x < 32) trace(6);
  end_op(p.ws, op, 0, &s.words[kFailed], [&] { zero_lost_sources(p, s); });
  if (threadIdx.x < 32) trace(7);
}

}  // namespace

#ifdef EPOPS_TRACE
int read_dispatch_lines_trace(uint64_t* out) { return cudaMemcpyFromSymbol(out, trace_clock, sizeof(trace_clock)); }
#endif

uint64_t dispatch_lines_shared_bytes(const DispatchParams& p) { return 4 * board_words(p); }

int launch_dispatch_lines(const DispatchParams& p, void* stream) {
  return with_row_type(p.x_dtype, [&](auto row) {
    return launch_kernel(dispatch_lines_kernel<decltype(row)>, p, p.launch, dispatch_lines_shared_bytes(p),
                         static_cast<cudaStream_t>(stream));
  });
}

}  // namespace epops
