// The gradient of combine: each token's gradient to the rows that answered it, over a route that is known already.
//
// One kernel, dispatch without placement: the route on the sender says which ranks a token goes to, the route on the receiver
// which rows it belongs to. The receiver multiplies by the row's weight and, for the gradient of that weight, by the row.
// One warp a token throughout, so that the dot product has one fixed order.
#include "exchange.cuh"
#include "group.cuh"
#include "launch.cuh"
#include "route.cuh"
#include "values.cuh"

namespace epops {
namespace {

template <class G>
__device__ __forceinline__ void send_token(const ScatterParams& p, const Op& op, const Route& route, int token,
                                           uint32_t bit, uint32_t* present) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  int peer;
  const int num = distinct_ranks(route.rank(token, lane), &peer);
  if (lane < num) atomicOr(&present[peer], bit);
  const uint64_t mine = lane < num && peer != me ? reinterpret_cast<uint64_t>(record(p.ws, peer, op.parity, me, token,
                                                                                    p.max_tokens, p.record_bytes))
                                                 : 0;
  const G* from = static_cast<const G*>(p.grad_out) + static_cast<int64_t>(token) * p.hidden;
  for (int channel0 = 0; channel0 < p.hidden; channel0 += 512) {
    Raw8<G> raw[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int channel = channel0 + i * 256 + lane * 8;
      if (channel < p.hidden) raw[i].load(from + channel);
    }
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
__device__ __forceinline__ void receive_token(const ScatterParams& p, const Op& op, const Route& route, int source, int token,
                                              int row_of_selection) {
  const int lane = threadIdx.x % 32;
  uint32_t valid = __ballot_sync(~0u, row_of_selection >= 0);
  if (p.rank_layout) valid &= -valid;
  const uint8_t* from =
      source == p.ws.rank
          ? reinterpret_cast<const uint8_t*>(static_cast<const G*>(p.grad_out) + static_cast<int64_t>(token) * p.hidden)
          : record(p.ws, p.ws.rank, op.parity, source, token, p.max_tokens, p.record_bytes);
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
    for (int step = 16; step > 0; step >>= 1) dot += __shfl_xor_sync(~0u, dot, step);
    if (p.grad_row_weights != nullptr && lane == 0) p.grad_row_weights[row] = dot;
  }
}

template <class G, class Y>
__global__ void __launch_bounds__(kCombineThreads, 1) scatter_kernel(const __grid_constant__ ScatterParams p) {
  __shared__ int failed, bits;
  __shared__ int32_t given[2 * kMaxGroups];
  if (threadIdx.x == 0) failed = 0;
  wait_for_earlier_kernels();
  let_next_kernel_launch();
  const Op op = begin_op(p.ws);
  const Group g = my_group(p.launch);
  const Route route(p);
  const int lane = threadIdx.x % 32, num_ranks = p.ws.num_ranks, me = p.ws.rank;
  __syncthreads();
  if ((p.launch.phases & 1) != 0 && !op.excluded && blockIdx.x < p.launch.num_senders) {
    extern __shared__ uint32_t presents[];  // [2][kMaxGroups][R]
    for (int i = threadIdx.x; i < 2 * kMaxGroups * num_ranks; i += blockDim.x) presents[i] = 0;
    if (blockIdx.x == 0) {
      for (int peer = threadIdx.x; peer < num_ranks; peer += blockDim.x) {
        if (!is_dead(p.ws, peer)) post_header(p.ws, op, peer, p.num_tokens, p.call_hash, route.good ? 0 : kBadRoute);
      }
    }
    __syncthreads();
    const int num_chunks = (p.num_tokens + g.chunk_tokens - 1) / g.chunk_tokens;
    const int step = p.launch.num_senders * (blockDim.x / g.num_threads);
    int turn = 0;
    for (int chunk = blockIdx.x + g.id * p.launch.num_senders; chunk < num_chunks; chunk += step, ++turn) {
      uint32_t* present = presents + ((turn & 1) * kMaxGroups + g.id) * num_ranks;
      const int token = chunk * g.chunk_tokens + g.token;
      if (token < p.num_tokens) send_token<G>(p, op, route, token, 1u << g.token, present);
      group_sync(g);
      for (int peer = g.thread; peer < num_ranks; peer += g.num_threads) {
        const bool any = present[peer] != 0;
        present[peer] = 0;  // used again two chunks from here, with a group barrier in between
        if (!any || peer == me || is_dead(p.ws, peer)) continue;
        // [C] releases all that this group stored; only chunks that the peer has a row of are waited for there.
        fence_acq_rel_sys();
        st_relaxed_sys(flag(p.ws, peer, op.parity, me, chunk), tagged(op.epoch, 1));
      }
    }
  }
  if ((p.launch.phases & 2) == 0) return;
  const int num_chunks = (p.max_tokens + g.chunk_tokens - 1) / g.chunk_tokens;
  Turns turns(p.launch, g, &control(p.ws, me)->work[op.parity], given);
  for (int item = turns.take(g); item < num_chunks * num_ranks; item = turns.take(g)) {
    const int source = (me + item / num_chunks) % num_ranks, chunk = item % num_chunks;
    const int token = chunk * g.chunk_tokens + g.token;
    const int row = token < p.max_tokens ? route.row(source, token, lane) : -1;
    if (__ballot_sync(~0u, row >= 0) == 0) continue;
    bool came = true;
    if (lane == 0 && source != me) {
      uint32_t unused;
      came = !is_dead(p.ws, source) &&
             wait_word(p.ws, flag(p.ws, me, op.parity, source, chunk), op.epoch, source, kPhaseRows, &unused);
      if (!came) failed = 1;
    }
    __syncwarp();
    if (__shfl_sync(~0u, came, 0)) receive_token<G, Y>(p, op, route, source, token, row);
  }
  __syncthreads();
  close_headers(p, op, route.good, &bits, &failed);
  end_op(p.ws, op, &failed, [&] {
    if (threadIdx.x == 0) p.status[0] |= op.excluded ? kExcluded : kTimeout;
  });
}

template <class G>
int launch_to(const ScatterParams& p, cudaStream_t stream) {
  const uint64_t shared_bytes = 2ull * kMaxGroups * p.ws.num_ranks * 4;
  switch (p.y_dtype) {
    case kBf16:
      return launch_kernel(scatter_kernel<G, __nv_bfloat16>, p, p.launch, shared_bytes, stream);
    case kFp16:
      return launch_kernel(scatter_kernel<G, __half>, p, p.launch, shared_bytes, stream);
    default:
      return launch_kernel(scatter_kernel<G, float>, p, p.launch, shared_bytes, stream);
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
