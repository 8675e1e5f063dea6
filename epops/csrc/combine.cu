// combine: a token's rows summed on their rank, one answer a (token, rank) sent back, answers summed in rank order.
//
// One kernel. Sending blocks: for each token of each peer read its rows here, weight and add them in float32 in the
// order of k, store the sum in the output's type into the slot (this rank, token) of the peer; the poster releases a
// flag a token. All blocks: own rows are summed the same way without travelling, then answers are added, rank 0 first,
// as their flags come; the scale, the addend and the cast are part of that pass. Gradients of routing weights may
// travel beside the answers.
#include "launch.cuh"
#include "route.cuh"
#include "team.cuh"
#include "values.cuh"

namespace epops {
namespace {

constexpr int kRowsAhead = 4;  // rows of a token in one step
constexpr int kStages = 3;     // steps on their way to shared memory, a warp
constexpr int kStageBytes = kRowsAhead * 1024;
constexpr int kWarpBytes = kStages * kStageBytes;

// Rows of one token here: lane i holds the i-th row, in the order of k, and its weight.
struct TokenRows {
  int row;
  float weight;
  int num;
};

__device__ __forceinline__ TokenRows token_rows(const CombineParams& p, int row_of_selection) {
  const int lane = threadIdx.x % 32;
  uint32_t valid = __ballot_sync(~0u, row_of_selection >= 0);
  if (p.rank_layout) valid &= -valid;  // one row, whatever K is
  TokenRows rows{-1, 1.f, __popc(valid)};
#pragma unroll 1
  for (int i = 0; valid != 0; ++i, valid &= valid - 1) {
    const int row = __shfl_sync(~0u, row_of_selection, __ffs(valid) - 1);
    if (lane == i) rows.row = row;
  }
  if (p.row_weights != nullptr && rows.row >= 0) rows.weight = p.row_weights[rows.row];
  return rows;
}

// Sums a token's rows piece by piece, a piece being 256 channels a warp, kSteps of them at once. Rows come through
// shared memory, kStages - 1 steps ahead, so that enough bytes are on their way whatever the registers hold. A step is
// up to kRowsAhead rows of one piece. A lane reads only what it asked for itself.
template <class In, int kSteps>
struct RowSums {
  const CombineParams& p;
  const TokenRows& rows;
  uint8_t* ring;                          // this warp's, kWarpBytes
  int first, stride, batches, num_steps;  // first channel of the lane; channels from piece to piece

  __device__ __forceinline__ RowSums(const CombineParams& p, const TokenRows& rows, const Team& t, uint8_t* ring)
      : p(p), rows(rows), ring(ring) {
    static_assert(kSteps * 8 * sizeof(In) <= 32, "a row of a step has 1024 bytes in the ring");
    first = t.part * 256 + static_cast<int>(threadIdx.x % 32) * 8;
    stride = t.parts * 256;
    batches = (rows.num + kRowsAhead - 1) / kRowsAhead;
    const int begin = t.part * 256;
    const int pieces = begin < p.hidden ? (p.hidden - begin + kSteps * stride - 1) / (kSteps * stride) : 0;
    num_steps = pieces * batches;
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) ask(step);
  }
  __device__ __forceinline__ uint8_t* place(int step, int r, int i) const {
    return ring + step % kStages * kStageBytes + r * 1024 + i * 512 * static_cast<int>(sizeof(In) / 2) +
           threadIdx.x % 32 * 8 * sizeof(In);
  }
  __device__ __forceinline__ void ask(int step) const {
    if (step < num_steps) {
      const int piece = step / batches, row0 = step % batches * kRowsAhead;
#pragma unroll
      for (int r = 0; r < kRowsAhead; ++r) {
        if (row0 + r >= rows.num) break;
        const int64_t row = __shfl_sync(~0u, rows.row, row0 + r);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const int channel = first + (piece * kSteps + i) * stride;
          if (channel >= p.hidden) continue;
          const uint8_t* from = static_cast<const uint8_t*>(p.y) + (row * p.hidden + channel) * sizeof(In);
          cp_async_16(place(step, r, i), from);
          if constexpr (sizeof(In) == 4) cp_async_16(place(step, r, i) + 16, from + 16);
        }
      }
    }
    cp_async_commit();
  }
  // sums[i]: channels [first + (piece * kSteps + i) * stride, + 8). Pieces must be taken in order. Products and sums
  // are rounded one by one, as the reference's are.
  __device__ __forceinline__ void piece(int number, Eight (&sums)[kSteps]) const {
    const bool weighted = p.row_weights != nullptr;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int c = 0; c < 8; ++c) sums[i].v[c] = 0.f;
    }
#pragma unroll 1
    for (int batch = 0; batch < batches; ++batch) {
      const int step = number * batches + batch;
      ask(step + kStages - 1);
      cp_async_wait<kStages - 1>();
#pragma unroll
      for (int r = 0; r < kRowsAhead; ++r) {
        if (batch * kRowsAhead + r >= rows.num) break;
        const float weight = __shfl_sync(~0u, rows.weight, batch * kRowsAhead + r);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          Raw8<In> raw;
          raw.load(place(step, r, i));
          const Eight values = raw.floats();
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            sums[i].v[c] = __fadd_rn(sums[i].v[c], weighted ? __fmul_rn(values.v[c], weight) : values.v[c]);
          }
        }
      }
    }
  }
};

__device__ __forceinline__ float weight_gradient(const CombineParams& p, int row, int k) {
  if (row < 0) return 0.f;
  return p.grad_row_weights[p.rank_layout ? static_cast<int64_t>(row) * p.top_k + k : row];
}

template <class In, class Out>
constexpr int steps_of() {
  return sizeof(In) == 4 || sizeof(Out) == 4 ? 1 : 2;
}

template <class In, class Out>
__device__ __forceinline__ void send_token(const CombineParams& p, const Op& op, const Team& t, const Route& route,
                                           int peer, int token, uint8_t* ring) {
  constexpr int kSteps = steps_of<In, Out>();
  const int lane = threadIdx.x % 32;
  const int row = route.row(peer, token, lane);
  if (__ballot_sync(~0u, row != -1) == 0) return;  // not a token of ours
  const TokenRows rows = token_rows(p, row);
  const RowSums<In, kSteps> sums(p, rows, t, ring);
  uint8_t* to = record(p.ws, peer, op.parity, p.ws.rank, token, p.max_tokens, p.record_bytes);
  if (p.grad_row_weights != nullptr && t.part == 0) {
    const uint32_t mine = lane < p.top_k ? __float_as_uint(weight_gradient(p, row, lane)) : 0;
    if (lane < p.top_k) {
      entries(p.ws, peer, op.parity, p.ws.rank, token)[lane] = make_uint2(mine, 0);
    }
  }
#pragma unroll 1
  for (int piece = 0; t.part * 256 + piece * kSteps * sums.stride < p.hidden; ++piece) {
    Eight values[kSteps];
    sums.piece(piece, values);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int channel = sums.first + (piece * kSteps + i) * sums.stride;
      Raw8<Out> out;
      out.set(values[i]);
      if (channel < p.hidden) out.store(to + channel * sizeof(Out));
    }
  }
  cp_async_wait<0>();  // the ring is free for the next token
}

template <class In, class Out>
__device__ __forceinline__ void send_all(const CombineParams& p, const Op& op, const Team& t, const Route& route,
                                         const Outbox& outbox, uint8_t* ring, const uint8_t* gone) {
  const int others = p.ws.num_ranks - 1, all = p.max_tokens * others;
  // Token by token over all peers, and over blocks: what a peer adds up first is sent first.
  const int num = all > static_cast<int>(blockIdx.x) ? (all - 1 - blockIdx.x) / p.launch.num_senders + 1 : 0;
  const auto token_of = [&](int item) { return (item * p.launch.num_senders + static_cast<int>(blockIdx.x)) / others; };
  const auto peer_of = [&](int item) {
    return (p.ws.rank + 1 + (item * p.launch.num_senders + static_cast<int>(blockIdx.x)) % others) % p.ws.num_ranks;
  };
  if (t.poster) {
    outbox.post(num, t.parts, [&](int first, int count) {
      if (threadIdx.x % 32 >= count) return;
      const int item = first + threadIdx.x % 32;
      // [B] released to the warps at the peer that wait for this token
      if (gone[peer_of(item)] == 0) {
        st_relaxed_sys(flag(p.ws, peer_of(item), op.parity, p.ws.rank, token_of(item)), tagged(op.epoch, 1));
      }
    });
    trace(4);
  } else if (t.id >= 0) {
#pragma unroll 1
    for (int item = t.id; item < num; item += t.num_teams) {
      outbox.begin(item);
      if (gone[peer_of(item)] == 0) {
        send_token<In, Out>(p, op, t, route, peer_of(item), token_of(item), ring);
      }
      outbox.finish(item);
    }
    if (threadIdx.x < 32) trace(3);
  }
}

template <class In, class Out>
__device__ __forceinline__ void receive_token(const CombineParams& p, const Op& op, const Team& t, const Route& route,
                                              int token, uint8_t* ring, const uint8_t* gone, int* failed) {
  constexpr int kSteps = steps_of<In, Out>();
  constexpr int kAnswers = 2;  // on their way at once
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  const int own_row = route.row(me, token, lane);
  const int rank = route.rank(token, lane);
  const TokenRows own = token_rows(p, own_row);
  const RowSums<In, kSteps> sums(p, own, t, ring);  // on their way while the answers are waited for
  int source;
  const int num = distinct_ranks(rank, &source);
  uint32_t unused;
  if (source >= 0 && source != me &&
      (gone[source] != 0 ||
       !wait_word(p.ws, flag(p.ws, me, op.parity, source, token), op.epoch, source, kPhaseAnswers, &unused))) {
    source = -1;  // an answer that does not come counts as zero
    *failed = 1;
  }
  __syncwarp();  // what one lane acquired, the others may read
  const uint64_t answer =
      source >= 0 && source != me
          ? reinterpret_cast<uint64_t>(record(p.ws, me, op.parity, source, token, p.max_tokens, p.record_bytes))
          : 0;
#pragma unroll 1
  for (int piece = 0; t.part * 256 + piece * kSteps * sums.stride < p.hidden; ++piece) {
    const int channel = sums.first + piece * kSteps * sums.stride;
    Raw8<Out> raw[kAnswers][kSteps];
    const auto load_answers = [&](int first) {
#pragma unroll
      for (int r = 0; r < kAnswers; ++r) {
        const uint64_t from = first + r < num ? __shfl_sync(~0u, answer, first + r) : 0;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          if (from != 0 && channel + i * sums.stride < p.hidden) {
            raw[r][i].load_fresh(reinterpret_cast<const uint8_t*>(from) + (channel + i * sums.stride) * sizeof(Out));
          } else {
            raw[r][i].zero();
          }
        }
      }
    };
    load_answers(0);
    Raw8<Out> addend[kSteps];
    if (p.addend != nullptr) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int at = channel + i * sums.stride;
        if (at < p.hidden)
          addend[i].load(static_cast<const Out*>(p.addend) + static_cast<int64_t>(token) * p.hidden + at);
      }
    }
    Raw8<Out> here[kSteps];
    {
      Eight values[kSteps];
      sums.piece(piece, values);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) here[i].set(values[i]);  // rounded as an answer is
    }
    Eight total[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int c = 0; c < 8; ++c) total[i].v[c] = 0.f;
    }
#pragma unroll 1
    for (int first = 0; first < num; first += kAnswers) {
      if (first != 0) load_answers(first);
#pragma unroll
      for (int r = 0; r < kAnswers; ++r) {
        if (first + r >= num) break;
        const bool mine = __shfl_sync(~0u, source, first + r) == me;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const Eight values = mine ? here[i].floats() : raw[r][i].floats();
#pragma unroll
          for (int c = 0; c < 8; ++c) total[i].v[c] = __fadd_rn(total[i].v[c], values.v[c]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int at = channel + i * sums.stride;
      if (at >= p.hidden) continue;
      if (p.out_scale != 1.f) {
#pragma unroll
        for (int c = 0; c < 8; ++c) total[i].v[c] = __fmul_rn(total[i].v[c], p.out_scale);
      }
      if (p.addend != nullptr) {
        const Eight extra = addend[i].floats();
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const float value = p.addend_scale == 1.f ? extra.v[c] : __fmul_rn(extra.v[c], p.addend_scale);
          total[i].v[c] = __fadd_rn(total[i].v[c], value);
        }
      }
      Raw8<Out> out;
      out.set(total[i]);
      out.store(static_cast<Out*>(p.out) + static_cast<int64_t>(token) * p.hidden + at);
    }
  }
  cp_async_wait<0>();  // the ring is free for the next token
  if (p.grad_row_weights != nullptr && t.part == 0) {
    // The rank of selection k is lost when its answer is: find it among those that came.
    bool came = rank == me;
#pragma unroll 1
    for (int i = 0; i < num; ++i) {
      const int answered = __shfl_sync(~0u, source, i);
      came = came || answered == rank;
    }
    if (lane < p.top_k) {
      float value = 0.f;
      if (rank >= 0 && came && rank == me) {
        value = weight_gradient(p, own_row, lane);
      } else if (rank >= 0 && came) {
        value = __uint_as_float(ld_no_allocate8(entries(p.ws, me, op.parity, rank, token) + lane).x);
      }
      p.grad_topk_weights[static_cast<int64_t>(token) * p.top_k + lane] = value;
    }
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_kernel(const __grid_constant__ CombineParams p) {
  extern __shared__ __align__(16) uint8_t rings[];
  __shared__ uint32_t done[kOutbox];
  __shared__ int32_t posted, failed;
  __shared__ uint8_t gone[kMaxRanks];  // 1: dead when the op began; a wait notices later deaths; 2: did not open it
#pragma unroll 1
  for (int i = threadIdx.x; i < kOutbox; i += blockDim.x) done[i] = 0;
  if (threadIdx.x == 0) posted = failed = 0;
  if (threadIdx.x < 32) trace(0);
  wait_for_earlier_kernels();
  if (threadIdx.x < 32) trace(1);
  let_next_kernel_launch();
  uint32_t touched = 0;
  if (p.launch.dynamic == 0 && threadIdx.x < 3) {
    // The first lines of the route that this block will want, while the first words of the group come.
    const int64_t at = static_cast<int64_t>(p.num_tokens) * p.top_k;
    const int others = p.ws.num_ranks - 1, me = p.ws.rank;
    const int64_t token = others == 0 ? 0 : min(static_cast<int>(blockIdx.x) / others, p.max_tokens - 1);
    const int64_t peer = others == 0 ? 0 : (me + 1 + blockIdx.x % others) % p.ws.num_ranks;
    const int64_t own = min(static_cast<int>(blockIdx.x), p.num_tokens);
    const int64_t words[3] = {at + (peer * p.max_tokens + token) * p.top_k, at + me * int64_t{p.max_tokens} * p.top_k,
                              own * p.top_k};
    const int64_t word = threadIdx.x == 0   ? words[0]
                         : threadIdx.x == 1 ? words[1] + min(own, token) * p.top_k
                                            : words[2];
    touched = touch(p.route + 32 + p.ws.num_ranks + word, 4, 0);
  }
  const uint64_t region = region_bytes(p.ws, p.max_tokens, p.record_bytes);
  const Op op = begin_op(p.ws, region);
  const Team sending = my_team(p.launch.send_warps), t = my_team(p.launch.recv_warps);
  const Route route(p);
  const bool sends = (p.launch.phases & 1) != 0 && !op.excluded && blockIdx.x < p.launch.num_senders;
  const bool last_warp = threadIdx.x >= blockDim.x - 32;
  if (sends && blockIdx.x == 0 && last_warp) {
#pragma unroll 1
    for (int peer = threadIdx.x % 32; peer < p.ws.num_ranks; peer += 32) {
      if (route.takes_part(p.ws, peer)) {
        post_header(p.ws, op, peer, p.num_tokens, p.call_hash, route.good ? 0 : kBadRoute);
      }
    }
  }
  find_gone(p.ws, op, route, sends, gone);
  uint8_t* ring = rings + threadIdx.x / 32 * kWarpBytes;
  __syncthreads();
  if (threadIdx.x < p.ws.num_ranks && gone[threadIdx.x] == 2) failed = 1;
  if (touched == 0x7fc0ffee && failed == -1) return;  // never: it keeps the loads
  if (threadIdx.x < 32) trace(2);
  if (sends) send_all<In, Out>(p, op, sending, route, Outbox{done, &posted}, ring, gone);
  if ((p.launch.phases & 2) == 0) return;
  if (t.id >= 0) {
    Turns turns(p.launch, t, &control(p.ws, p.ws.rank)->work[op.parity]);
#pragma unroll 1
    for (int token = turns.take(); token < p.num_tokens; token = turns.take()) {
      receive_token<In, Out>(p, op, t, route, token, ring, gone, &failed);
    }
  }
  if (blockIdx.x == 0 && last_warp) {  // the poster, or a warp that may have had a token to receive
    close_headers(p, op, route.good, &failed, [&](int rank) { return route.takes_part(p.ws, rank); });
  }
  if (threadIdx.x < 32) trace(6);
  end_op(p.ws, op, region, &failed, [&] {
    if (threadIdx.x == 0) p.status[0] |= op.excluded ? kExcluded : kTimeout;
  });
  if (threadIdx.x < 32) trace(7);
}

template <class In>
int launch_to(const CombineParams& p, cudaStream_t stream) {
  const uint64_t shared_bytes = static_cast<uint64_t>(p.launch.num_threads / 32 - 1) * kWarpBytes;
  switch (p.out_dtype) {
    case kBf16:
      return launch_kernel(combine_kernel<In, __nv_bfloat16>, p, p.launch, shared_bytes, stream);
    case kFp16:
      return launch_kernel(combine_kernel<In, __half>, p, p.launch, shared_bytes, stream);
    default:
      return launch_kernel(combine_kernel<In, float>, p, p.launch, shared_bytes, stream);
  }
}

}  // namespace

#ifdef EPOPS_TRACE
int read_combine_trace(uint64_t* out) { return cudaMemcpyFromSymbol(out, trace_clock, sizeof(trace_clock)); }
#endif

int launch_combine(const CombineParams& p, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (p.in_dtype) {
    case kBf16:
      return launch_to<__nv_bfloat16>(p, on);
    case kFp16:
      return launch_to<__half>(p, on);
    default:
      return launch_to<float>(p, on);
  }
}

}  // namespace epops
