// combine of few tokens: answers travel as lines (lines.cuh), added up as soon as they are seen.
//
// One kernel. A warp has its part of every row that its team sums, the same lanes the same channels from the rows to
// the lines: first of peers' tokens, whose sums it stores to the peers, then of own tokens, to which it adds the lines
// that come. Nothing but the fate of a lost peer's answer is agreed on between warps. Rows come through a ring of
// shared memory, those of the next token while one is summed. The code is kept short, for each of its lines runs about
// once a launch, and fetching instructions takes longer than what they do.
#include "launch.cuh"
#include "lines.cuh"
#include "sums.cuh"

namespace epops {
namespace {

constexpr int kSteps = 2;   // of a row at once
constexpr int kPlaces = 8;  // rows of a ring
constexpr int kPlaceBytes = kSteps * 512;

// Which rows a warp has asked for, and which it has summed: of two tokens, piece by piece, kSteps steps each.
struct RowRing {
  uint8_t* ring;  // this lane's part
  int pieces;     // of a row
  int asked = 0, taken = 0;
  int token = 0, piece = 0, row = 0;  // what is asked for next

  // By all lanes: the next rows of `now` and, after those, of `next`, as many as there are places. `at(piece, i)` is
  // where this lane reads a row, -1 nowhere.
  template <class At>
  __device__ __forceinline__ void fill(const CombineParams& p, const TokenRows& now, const TokenRows& next, At at) {
#pragma unroll 1
    while (asked - taken < kPlaces - 1) {
      if (token == 0 && now.num == 0) token = 1;
      const int num = token == 0 ? now.num : next.num;
      if (token == 2 || num == 0) return;
      const int64_t number = __shfl_sync(~0u, token == 0 ? now.row : next.row, row);
      const uint8_t* from = static_cast<const uint8_t*>(p.y) + number * p.record_bytes;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int where = at(piece, i);
        if (where >= 0) cp_async_16(ring + asked % kPlaces * kPlaceBytes + i * 512, from + where);
      }
      cp_async_commit();
      ++asked;
      if (++row == num) {
        row = 0;
        if (++piece == pieces) {
          piece = 0;
          ++token;
        }
      }
    }
  }
  // The second token is now the first.
  __device__ __forceinline__ void advance() { token = max(0, token - 1); }
  // Until the next row is there; returns its place.
  __device__ __forceinline__ const uint8_t* take() {
    const int after = asked - taken - 1;
    if (after >= 6) {
      cp_async_wait<6>();
    } else if (after >= 3) {
      cp_async_wait<3>();
    } else {
      cp_async_wait<0>();
    }
    return ring + taken++ % kPlaces * kPlaceBytes;
  }
};

// Sixteen bytes at most of a line's lanes as those of the whole word that two lanes have half of.
__device__ __forceinline__ uint4 widened(uint4 v, bool second_half) {
  return second_half ? make_uint4(0, 0, v.x, v.y) : v;
}
__device__ __forceinline__ uint2 own_half(uint4 v, bool second_half) {
  return second_half ? make_uint2(v.z, v.w) : make_uint2(v.x, v.y);
}

template <class T>
__device__ __forceinline__ void add_to(Eight& sum, uint4 bits, float weight) {
  Raw8<T> raw;
  raw.w = bits;
  const Eight values = raw.floats();
  // A product with 1 is exact.
#pragma unroll
  for (int c = 0; c < 8; ++c) sum.v[c] = __fadd_rn(sum.v[c], __fmul_rn(values.v[c], weight));
}

// Where byte `at` of a record lies in its lines.
__device__ __forceinline__ int place_in_lines(int at) {
  const int step = at / kStepContent, inside = at % kStepContent, pair = inside / 240, word = inside % 240 / 16;
  const int low = at % 16;
  const int in_pair = word == 14 ? low / 8 * 128 + 112 + low % 8 : word / 7 * 128 + word % 7 * 16 + low;
  return step * kStepBytes + pair * 256 + in_pair;
}

// Gradients of a token's weights, lane k's that of selection k, into the words of the lines that lie behind the row.
template <class T, class PlaceOf>
__device__ __forceinline__ void put_gradients(const CombineParams& p, Raw8<T> (&words)[kSteps], int piece,
                                              PlaceOf place_of, int row_of_selection) {
  const int lane = threadIdx.x % 32;
  const float mine = lane < p.top_k ? weight_gradient(p, row_of_selection, lane) : 0.f;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int k = (place_of(piece, i) - p.record_bytes) / 4;
    const auto of = [&](int number) { return __float_as_uint(__shfl_sync(~0u, mine, number & 31)); };
    const uint4 four = make_uint4(of(k), of(k + 1), of(k + 2), of(k + 3));
    if (place_of(piece, i) >= p.record_bytes) words[i].w = four;
  }
}

// Gradients of an own token's weights, which came with the answers. By one warp.
__device__ __forceinline__ void weight_gradients_of_lines(const CombineParams& p, const Op& op, const Answers& answers,
                                                          int rank, int own_row, int token) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  bool came = rank == me;
#pragma unroll 1
  for (int i = 0; i < answers.num; ++i) {
    const int answered = __shfl_sync(~0u, answers.source, i);
    came = came || answered == rank;
  }
  if (lane >= p.top_k) return;
  float value = 0.f;
  if (rank == me) {
    value = weight_gradient(p, own_row, lane);
  } else if (rank >= 0 && came) {
    const uint8_t* from = lines(p.ws, me, op.parity, rank, token) + place_in_lines(p.record_bytes + 4 * lane);
    value = __uint_as_float(ld_relaxed_sys(reinterpret_cast<const uint32_t*>(from)));
  }
  p.grad_topk_weights[static_cast<int64_t>(token) * p.top_k + lane] = value;
}

template <class T>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_lines_kernel(const __grid_constant__ CombineParams p) {
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ int32_t failed;
  __shared__ Op opened;
  __shared__ uint8_t gone[kMaxRanks];                // as in combine.cu
  __shared__ int32_t lost[kCombineThreads / 32][2];  // a team's last waits in vain, even and odd
  if (threadIdx.x == 0) failed = 0;
  if (threadIdx.x < kCombineThreads / 32) lost[threadIdx.x][0] = lost[threadIdx.x][1] = 0;
  if (threadIdx.x < 32) trace(0);
  const Crew crew(p.launch);
  const Team t = my_team(p.launch.send_warps, 0);
  const LineSeat seat;
  const int lane = threadIdx.x % 32, me = p.ws.rank, others = p.ws.num_ranks - 1;
  const bool second_half = seat.first % 16 != 0, selects = lane < p.top_k;
  // Jobs of a team: answers, then own tokens.
  const int first = crew.block + t.id * crew.blocks, step = crew.blocks * t.num_teams;
  const auto count = [&](bool does, int all) {
    return does && t.id >= 0 && first < all ? (all - 1 - first) / step + 1 : 0;
  };
  const int num_sent = count(crew.sends, p.max_tokens * others);
  const int num_jobs = num_sent + count(crew.places, p.num_tokens);
  const int steps = line_steps(p.sent_bytes), batch = kSteps * t.parts;
  const auto number_of = [&](int job) { return first + (job < num_sent ? job : job - num_sent) * step; };
  const auto token_of = [&](int job) {
    return job < num_sent && others != 1 ? number_of(job) / others : number_of(job);
  };
  const auto rank_of = [&](int job) {  // that the job's token is of
    if (job >= num_sent) return me;
    const int rank = me + 1 + number_of(job) - token_of(job) * others;
    return rank >= p.ws.num_ranks ? rank - p.ws.num_ranks : rank;
  };
  // Byte of a row that this lane's 16 of a step begin with.
  const auto place_of = [&](int piece, int i) {
    return (t.part + (piece * kSteps + i) * t.parts) * kStepContent + (seat.first & ~15);
  };
  const auto place_in_row = [&](int piece, int i) {
    const int at = place_of(piece, i);
    return at < p.record_bytes ? at : -1;
  };
  RowRing ring;
  ring.ring = memory + threadIdx.x / 32 * kPlaces * kPlaceBytes + lane * 16;
  ring.pieces = (steps + batch - 1) / batch;  // alike in all warps of a team, which meet at each
  wait_for_earlier_kernels();
  if (threadIdx.x < 32) trace(1);
  let_next_kernel_launch();
  const Route route(p);
  // Words of the route are asked for before they are wanted: rows two jobs ahead, at first while those of the group
  // come.
  const auto ask_rows = [&](int job) {
    return job < num_jobs && selects ? ld_now(route.row_word(rank_of(job), token_of(job), lane)) : -1;
  };
  const auto ask_slots = [&](int job) {
    return job < num_jobs && selects ? ld_now(route.slot_word(token_of(job), lane)) : -1;
  };
  int ahead = ask_rows(0), ahead_of_that = ask_rows(1), slot = ask_slots(num_sent);
  const bool dead = threadIdx.x < p.ws.num_ranks && is_dead(p.ws, threadIdx.x);
  begin_op(p.ws, 0, &opened);
  if (threadIdx.x < p.ws.num_ranks) gone[threadIdx.x] = dead;
  __syncthreads();
  const Op op = opened;
  if (!op.excluded && blockIdx.x == 0 && threadIdx.x >= blockDim.x - 32) {
#pragma unroll 1
    for (int peer = lane; peer < p.ws.num_ranks; peer += 32) {
      if (route.takes_part(p.ws, peer)) {
        post_header(p.ws, op, peer, p.num_tokens, p.call_hash, route.good ? 0 : kBadRoute);
      }
    }
  }
  if (threadIdx.x < 32) trace(2);
  // Whether what the warps of the team have waited for has come, to all of them.
  int turn = 0;
  const auto agree = [&](bool came) {
    volatile int32_t* in_vain = &lost[t.id][++turn & 1];
    if (!came) *in_vain = turn;
    sync_team(t);
    if (*in_vain != turn) return true;
    failed = 1;
    return false;
  };
  TokenRows rows = no_rows(), next = no_rows();
  int word = -1, next_word = -1;
#pragma unroll 1
  for (int job = -2; job < num_jobs; ++job) {
    const bool own = job >= num_sent;
    const int token = token_of(max(job, 0)), rank = rank_of(max(job, 0));
    const bool goes = !own && job >= 0 && !op.excluded && gone[rank] == 0 && __any_sync(~0u, word != -1);
    const int rank_of_selection = own && selects ? route.rank_of(slot) : -1;
    Answers answers{0, -1, 0};
    if (own && job >= 0) {
      slot = ask_slots(job + 1);
      answers.num = distinct_ranks(rank_of_selection, &answers.source);
      if (answers.source >= 0 && answers.source != me && gone[answers.source] != 0) {
        answers.source = -1;
        failed = 1;
      }
      // An answer of which a part has not come counts as zero: where it has several pieces, all of it is waited for
      // first.
#pragma unroll 1
      for (int r = 0; steps > batch && r < answers.num; ++r) {
        const int source = __shfl_sync(~0u, answers.source, r);
        if (source < 0 || source == me) continue;
        const uint8_t* from = lines(p.ws, me, op.parity, source, token);
        if (!agree(await_lines(p.ws, op, from, p.sent_bytes, source, kPhaseAnswers)) && lane == r) answers.source = -1;
      }
    }
    const int pieces = own || goes ? ring.pieces : 0;
#pragma unroll 1
    for (int piece = 0; job >= 0 && piece < ring.pieces; ++piece) {
      Eight sums[kSteps] = {};
#pragma unroll 1
      for (int r = 0; r < rows.num; ++r) {
        ring.fill(p, rows, next, place_in_row);
        const uint8_t* from = ring.take();
        const float weight = __shfl_sync(~0u, rows.weight, r);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          add_to<T>(sums[i], *reinterpret_cast<const uint4*>(from + i * 512), weight);
        }
      }
      if (piece >= pieces) continue;  // nobody is there to have it
      Raw8<T> sum[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) sum[i].set(sums[i]);
      if (!own) {
        if (p.grad_row_weights != nullptr) put_gradients(p, sum, piece, place_of, word);
        uint8_t* to = lines(p.ws, rank, op.parity, me, token) + lane * 16;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const int number = t.part + (piece * kSteps + i) * t.parts;
          uint4 v = sum[i].w;
          if (seat.half) {
            const uint2 half = own_half(v, second_half);
            v = make_uint4(half.x, half.y, op.epoch, 0);
          }
          if (number < steps) st_line(to + number * kStepBytes, v);
        }
        continue;
      }
      if (piece == 0 && threadIdx.x < 32) trace(4);
      // Answers, rank 0 first.
#pragma unroll
      for (int i = 0; i < kSteps; ++i) sums[i] = Eight{};
#pragma unroll 1
      for (int r = 0; r < answers.num; ++r) {
        const int source = __shfl_sync(~0u, answers.source, r);
        if (source < 0) continue;
        uint4 v[kSteps];
        if (source == me) {
#pragma unroll
          for (int i = 0; i < kSteps; ++i) v[i] = sum[i].w;
        } else {
          const uint8_t* from = lines(p.ws, me, op.parity, source, token);
          if (!agree(read_lines(p.ws, op, from, p.sent_bytes, t.part + piece * batch, t.parts, source, kPhaseAnswers,
                                v))) {
            if (lane == r) answers.source = -1;
            continue;
          }
#pragma unroll
          for (int i = 0; i < kSteps; ++i) v[i] = widened(v[i], second_half);
        }
#pragma unroll
        for (int i = 0; i < kSteps; ++i) add_to<T>(sums[i], v[i], 1.f);
      }
      if (piece == 0 && threadIdx.x < 32) trace(5);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int at = place_of(piece, i);
        if (at >= p.record_bytes) continue;
        const int64_t in_result = static_cast<int64_t>(token) * p.record_bytes + at;
        if (p.out_scale != 1.f) {
#pragma unroll
          for (int c = 0; c < 8; ++c) sums[i].v[c] = __fmul_rn(sums[i].v[c], p.out_scale);
        }
        if (p.addend != nullptr) {
          const uint4 more = *reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(p.addend) + in_result);
          add_to<T>(sums[i], more, p.addend_scale);
        }
        sum[i].set(sums[i]);
        uint8_t* to = static_cast<uint8_t*>(p.out) + in_result;
        if (seat.half) {
          *reinterpret_cast<uint2*>(to + (second_half ? 8 : 0)) = own_half(sum[i].w, second_half);
        } else {
          sum[i].store(to);
        }
      }
    }
    if (job >= 0 && own && p.grad_row_weights != nullptr && t.part == 0) {
      weight_gradients_of_lines(p, op, answers, rank_of_selection, word, token);
    }
    if (job == 0 && threadIdx.x < 32) trace(3);
    if (job >= 0) ring.advance();
    rows = next;
    word = next_word;
    next_word = selects ? route.checked_row(ahead) : -1;
    next = token_rows(p, next_word);
    ahead = ahead_of_that;
    ahead_of_that = ask_rows(job + 4);
  }
  cp_async_wait<0>();
  if (threadIdx.x < 32) trace(6);
  if (blockIdx.x == 0 && threadIdx.x >= blockDim.x - 32) {
    close_headers(p, op, route.good, &failed, [&](int rank) { return route.takes_part(p.ws, rank); });
  }
  end_op(p.ws, op, 0, &failed, [&] {
    if (threadIdx.x == 0) p.status[0] |= op.excluded ? kExcluded : kTimeout;
  });
  if (threadIdx.x < 32) trace(7);
}

}  // namespace

#ifdef EPOPS_TRACE
int read_combine_lines_trace(uint64_t* out) { return cudaMemcpyFromSymbol(out, trace_clock, sizeof(trace_clock)); }
#endif

uint64_t combine_lines_shared_bytes(const CombineParams& p) {
  return static_cast<uint64_t>(p.launch.num_threads / 32) * kPlaces * kPlaceBytes;
}

int launch_combine_lines(const CombineParams& p, void* stream) {
  const auto run = [&](auto value) {
    return launch_kernel(combine_lines_kernel<decltype(value)>, p, p.launch, combine_lines_shared_bytes(p),
                         static_cast<cudaStream_t>(stream));
  };
  return p.out_dtype == kBf16 ? run(__nv_bfloat16{}) : run(__half{});
}

}  // namespace epops
