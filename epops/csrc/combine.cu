// combine: a token's rows summed on their rank, one answer a (token, rank) sent back, answers summed in rank order.
//
// One kernel. Sending blocks: for each token of each peer read its rows here, weight and add them in float32 in the
// order of k, store the sum in the output's type into the slot (this rank, token) of the peer; the poster releases a
// flag a token. All blocks: own rows are summed the same way without travelling, then answers are added, rank 0 first,
// as their flags come; the scale, the addend and the cast are part of that pass. Gradients of routing weights may
// travel beside the answers.
#include "launch.cuh"
#include "sums.cuh"

namespace epops {
namespace {

using Ring = RingOf<4, 3>;

template <class In, class Out>
__device__ __forceinline__ void send_token(const CombineParams& p, const Op& op, const Team& t, const Route& route,
                                           int peer, int token, uint8_t* ring) {
  constexpr int kSteps = steps_of<In, Out>();
  const int lane = threadIdx.x % 32;
  const int row = route.row(peer, token, lane);
  if (__ballot_sync(~0u, row != -1) == 0) return;  // not a token of ours
  const TokenRows rows = token_rows(p, row);
  RowSums<In, kSteps, Ring> sums(p, t, ring);
  sums.start(rows, no_rows());
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
    sums.piece(sums.rows, values);
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
  const int lane = threadIdx.x % 32;
  const int own_row = route.row(p.ws.rank, token, lane);
  const int rank = route.rank(token, lane);
  const TokenRows own = token_rows(p, own_row);
  RowSums<In, kSteps, Ring> sums(p, t, ring);
  sums.start(own, no_rows());  // on their way while the answers are waited for
  const Answers answers = await_answers(p, op, rank, token, gone, failed);
#pragma unroll 1
  for (int piece = 0; t.part * 256 + piece * kSteps * sums.stride < p.hidden; ++piece) {
    const int channel = sums.first + piece * kSteps * sums.stride;
    add_answers<Out, kSteps, true>(p, answers, token, channel, sums.stride, [&](Raw8<Out>(&here)[kSteps]) {
      Eight values[kSteps];
      sums.piece(sums.rows, values);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) here[i].set(values[i]);
    });
  }
  cp_async_wait<0>();  // the ring is free for the next token
  if (t.part == 0) weight_gradients(p, op, answers, rank, own_row, token);
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
  const bool dead =
      threadIdx.x < p.ws.num_ranks && is_dead(p.ws, threadIdx.x);  // asked for with the words of the group
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
  if (threadIdx.x < p.ws.num_ranks) gone[threadIdx.x] = dead;
  if (op.overlaps) find_gone(p.ws, op, route, sends, gone);
  uint8_t* ring = rings + threadIdx.x / 32 * Ring::kBytes;
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
  const uint64_t shared_bytes = static_cast<uint64_t>(p.launch.num_threads / 32 - 1) * Ring::kBytes;
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
