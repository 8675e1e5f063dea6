// The gradient of combine: each token's gradient to the rows that answered it, over a route that is known already.
//
// One kernel, dispatch without placement: the route on the sender says which ranks a token goes to, the route on the
// receiver which rows it belongs to. The receiver multiplies by the row's weight and, for the gradient of that weight,
// by the row. One warp a token throughout, so that the dot product has one fixed order.
#include "launch.cuh"
#include "route.cuh"
#include "team.cuh"
#include "values.cuh"

namespace epops {
namespace {

template <class G>
__device__ __forceinline__ void send_token(const ScatterParams& p, const Op& op, const Route& route,
                                           const uint8_t* gone, int token) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  int peer;
  const int num = distinct_ranks(route.rank(token, lane), &peer);
  const uint64_t mine =
      lane < num && peer != me && gone[peer] == 0
          ? reinterpret_cast<uint64_t>(record(p.ws, peer, op.parity, me, token, p.max_tokens, p.record_bytes))
          : 0;
  const G* from = static_cast<const G*>(p.grad_out) + static_cast<int64_t>(token) * p.hidden;
#pragma unroll 1
  for (int channel0 = 0; channel0 < p.hidden; channel0 += 512) {
    Raw8<G> raw[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int channel = channel0 + i * 256 + lane * 8;
      if (channel < p.hidden) raw[i].load(from + channel);
    }
#pragma unroll 1
    for (int n = 0; n < num; ++n) {
      const uint64_t to = __shfl_sync(~0u, mine, n);
      if (to == 0) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int channel = channel0 + i * 256 + lane * 8;
        if (channel < p.hidden) raw[i].store(reinterpret_cast<uint8_t*>(to) + channel * sizeof(G));
      }
    }
  }
}

template <class G, class Y>
__device__ __forceinline__ void receive_token(const ScatterParams& p, const Op& op, const Route& route, int source,
                                              int token, int row_of_selection) {
  const int lane = threadIdx.x % 32;
  uint32_t valid = __ballot_sync(~0u, row_of_selection >= 0);
  if (p.rank_layout) valid &= -valid;
  const uint8_t* from =
      source == p.ws.rank
          ? reinterpret_cast<const uint8_t*>(static_cast<const G*>(p.grad_out) + static_cast<int64_t>(token) * p.hidden)
          : record(p.ws, p.ws.rank, op.parity, source, token, p.max_tokens, p.record_bytes);
#pragma unroll 1
  for (; valid != 0; valid &= valid - 1) {
    const int row = __shfl_sync(~0u, row_of_selection, __ffs(valid) - 1);
    const float weight = p.row_weights != nullptr ? p.row_weights[row] : 1.f;
    float dot = 0.f;
#pragma unroll 2
    for (int channel = lane * 8; channel < p.hidden; channel += 256) {
      Raw8<G> raw;
      raw.load_fresh(from + channel * sizeof(G));
      Raw8<Y> y;
      const int64_t at = static_cast<int64_t>(row) * p.hidden + channel;
      if (p.grad_row_weights != nullptr) y.load(static_cast<const Y*>(p.y) + at);
      Eight wide = raw.floats(), spread;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        wide.v[c] = __fmul_rn(wide.v[c], p.out_scale);
        spread.v[c] = p.row_weights != nullptr ? __fmul_rn(wide.v[c], weight) : wide.v[c];
        spread.v[c] = __fmul_rn(spread.v[c], p.grad_scale);
      }
      Raw8<Y> out;
      out.set(spread);
      out.store(static_cast<Y*>(p.grad_y) + at);
      if (p.grad_row_weights != nullptr) {
        const Eight values = y.floats();
#pragma unroll
        for (int c = 0; c < 8; ++c) dot += values.v[c] * wide.v[c];
      }
    }
#pragma unroll 1
    for (int step = 16; step > 0; step >>= 1) dot += __shfl_xor_sync(~0u, dot, step);
    if (p.grad_row_weights != nullptr && lane == 0) p.grad_row_weights[row] = dot;
  }
}

// Flags of a block's items [first, first + count) to the peers that have a row of the token: others do not wait for it.
__device__ __forceinline__ void tell_peers(const ScatterParams& p, const Op& op, const Route& route,
                                           const uint8_t* gone, int first, int count) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int item = first; item < first + count; ++item) {
    const int token = item * p.launch.num_senders + static_cast<int>(blockIdx.x);
    int peer;
    const int num = distinct_ranks(route.rank(token, lane), &peer);
    if (lane < num && peer != p.ws.rank && gone[peer] == 0) {
      st_relaxed_sys(flag(p.ws, peer, op.parity, p.ws.rank, token), tagged(op.epoch, 1));
    }
  }
}

template <class G, class Y>
__global__ void __launch_bounds__(kCombineThreads, 1) scatter_kernel(const __grid_constant__ ScatterParams p) {
  __shared__ uint32_t done[kOutbox];
  __shared__ int32_t posted, failed;
  __shared__ uint8_t gone[kMaxRanks];  // 1: dead when the op began; 2: did not open it
#pragma unroll 1
  for (int i = threadIdx.x; i < kOutbox; i += blockDim.x) done[i] = 0;
  if (threadIdx.x == 0) posted = failed = 0;
  wait_for_earlier_kernels();
  let_next_kernel_launch();
  const uint64_t region = region_bytes(p.ws, p.max_tokens, p.record_bytes);
  const Op op = begin_op(p.ws, region);
  const Team t = my_team(1);
  const Route route(p);
  const int lane = threadIdx.x % 32, num_ranks = p.ws.num_ranks, me = p.ws.rank;
  const bool sends = (p.launch.phases & 1) != 0 && !op.excluded && blockIdx.x < p.launch.num_senders;
  if (sends && blockIdx.x == 0 && t.poster) {
#pragma unroll 1
    for (int peer = lane; peer < num_ranks; peer += 32) {
      if (route.takes_part(p.ws, peer)) {
        post_header(p.ws, op, peer, p.num_tokens, p.call_hash, route.good ? 0 : kBadRoute);
      }
    }
  }
  find_gone(p.ws, op, route, sends, gone);
  __syncthreads();
  if (threadIdx.x < num_ranks && gone[threadIdx.x] == 2) failed = 1;
  if (sends) {
    const Outbox outbox{done, &posted};
    const int num =
        p.num_tokens > static_cast<int>(blockIdx.x) ? (p.num_tokens - 1 - blockIdx.x) / p.launch.num_senders + 1 : 0;
    if (t.poster) {
      outbox.post(num, t.parts, [&](int first, int count) { tell_peers(p, op, route, gone, first, count); });
    } else if (t.id >= 0) {
#pragma unroll 1
      for (int item = t.id; item < num; item += t.num_teams) {
        outbox.begin(item);
        send_token<G>(p, op, route, gone, item * p.launch.num_senders + static_cast<int>(blockIdx.x));
        outbox.finish(item);
      }
    }
  }
  if ((p.launch.phases & 2) == 0) return;
  if (blockIdx.x == 0 && t.poster) {
    close_headers(p, op, route.good, &failed, [&](int rank) { return route.takes_part(p.ws, rank); });
  }
  if (t.id >= 0) {
    Turns turns(p.launch, t, &control(p.ws, me)->work[op.parity]);
#pragma unroll 1
    for (int item = turns.take(); item < p.max_tokens * num_ranks; item = turns.take()) {
      const int source = (me + item / p.max_tokens) % num_ranks, token = item % p.max_tokens;
      const int row = route.row(source, token, lane);
      if (__ballot_sync(~0u, row >= 0) == 0) continue;
      int came = 1;
      if (lane == 0 && source != me) {
        uint32_t unused;
        came = wait_word(p.ws, flag(p.ws, me, op.parity, source, token), op.epoch, source, kPhaseRows, &unused);
        if (came == 0) failed = 1;
      }
      __syncwarp();
      if (__shfl_sync(~0u, came, 0) != 0) receive_token<G, Y>(p, op, route, source, token, row);
    }
  }
  end_op(p.ws, op, region, &failed, [&] {
    if (threadIdx.x == 0) p.status[0] |= op.excluded ? kExcluded : kTimeout;
  });
}

template <class G>
int launch_to(const ScatterParams& p, cudaStream_t stream) {
  switch (p.y_dtype) {
    case kBf16:
      return launch_kernel(scatter_kernel<G, __nv_bfloat16>, p, p.launch, 0, stream);
    case kFp16:
      return launch_kernel(scatter_kernel<G, __half>, p, p.launch, 0, stream);
    default:
      return launch_kernel(scatter_kernel<G, float>, p, p.launch, 0, stream);
  }
}

}  // namespace

int launch_scatter(const ScatterParams& p, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (p.grad_dtype) {
    case kBf16:
      return launch_to<__nv_bfloat16>(p, on);
    case kFp16:
      return launch_to<__half>(p, on);
    default:
      return launch_to<float>(p, on);
  }
}

}  // namespace epops
