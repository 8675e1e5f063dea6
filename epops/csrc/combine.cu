// combine: a token's rows summed on their rank, one answer a (token, rank) sent back, answers summed in rank order.
//
// One kernel. Sending blocks: for each token of each peer read its rows here, weight and add them in float32 in the order of
// k, store the sum in the output's type into the slot (this rank, token) of the peer, release one flag a chunk. All blocks:
// own rows are summed the same way without travelling, then answers are added, rank 0 first, as their flags come; the
// scale, the addend and the cast are part of that pass. Gradients of routing weights may travel beside the answers.
#include "exchange.cuh"
#include "group.cuh"
#include "launch.cuh"
#include "route.cuh"
#include "values.cuh"

namespace epops {
namespace {

constexpr int kRowsAhead = 4;  // rows of a token in flight

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
  for (int i = 0; valid != 0; ++i, valid &= valid - 1) {
    const int row = __shfl_sync(~0u, row_of_selection, __ffs(valid) - 1);
    if (lane == i) rows.row = row;
  }
  if (p.row_weights != nullptr && rows.row >= 0) rows.weight = p.row_weights[rows.row];
  return rows;
}

// sums[i] = sum over rows of weight * row, channels [channel + i * stride, + 8). Products and sums are rounded one by one,
// as the reference's are.
template <class In, int kSteps>
__device__ __forceinline__ void sum_rows(const CombineParams& p, const TokenRows& rows, int channel, int stride,
                                         Eight (&sums)[kSteps]) {
  const bool weighted = p.row_weights != nullptr;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int c = 0; c < 8; ++c) sums[i].v[c] = 0.f;
  }
  for (int first = 0; first < rows.num; first += kRowsAhead) {
    Raw8<In> raw[kRowsAhead][kSteps];
#pragma unroll
    for (int r = 0; r < kRowsAhead; ++r) {
      if (first + r >= rows.num) break;
      const In* from = static_cast<const In*>(p.y) + __shfl_sync(~0u, rows.row, first + r) * static_cast<int64_t>(p.hidden);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (channel + i * stride < p.hidden) raw[r][i].load_fresh(from + channel + i * stride);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsAhead; ++r) {
      if (first + r >= rows.num) break;
      const float weight = __shfl_sync(~0u, rows.weight, first + r);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (channel + i * stride >= p.hidden) continue;
        const Eight values = raw[r][i].floats();
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          sums[i].v[c] = __fadd_rn(sums[i].v[c], weighted ? __fmul_rn(values.v[c], weight) : values.v[c]);
        }
      }
    }
  }
}

__device__ __forceinline__ float weight_gradient(const CombineParams& p, int row, int k) {
  if (row < 0) return 0.f;
  return p.grad_row_weights[p.rank_layout ? static_cast<int64_t>(row) * p.top_k + k : row];
}

template <class In, class Out>
__device__ __forceinline__ void send_token(const CombineParams& p, const Op& op, const Group& g, const Route& route, int peer,
                                           int token) {
  const int lane = threadIdx.x % 32;
  const int row = route.row(peer, token, lane);
  if (__ballot_sync(~0u, row != -1) == 0) return;  // not a token of ours
  if (p.grad_row_weights != nullptr && g.part == 0 && lane < p.top_k) {
    entries(p.ws, peer, op.parity, p.ws.rank, token)[lane] =
        make_uint2(__float_as_uint(weight_gradient(p, row, lane)), 0);
  }
  const TokenRows rows = token_rows(p, row);
  uint8_t* to = record(p.ws, peer, op.parity, p.ws.rank, token, p.max_tokens, p.record_bytes);
  constexpr int kSteps = sizeof(In) == 4 || sizeof(Out) == 4 ? 1 : 2;  // pieces of 256 channels in flight a warp
  const int stride = g.parts * 256;
  for (int channel0 = g.part * 256; channel0 < p.hidden; channel0 += kSteps * stride) {
    const int channel = channel0 + lane * 8;
    Eight sums[kSteps];
    sum_rows<In, kSteps>(p, rows, channel, stride, sums);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (channel + i * stride >= p.hidden) continue;
      Raw8<Out> out;
      out.set(sums[i]);
      out.store(to + (channel + i * stride) * sizeof(Out));
    }
  }
}

template <class In, class Out>
__device__ __forceinline__ void send_all(const CombineParams& p, const Op& op, const Group& g, const Route& route) {
  const int others = p.ws.num_ranks - 1;
  if (others == 0) return;
  const int num_chunks = (p.max_tokens + g.chunk_tokens - 1) / g.chunk_tokens;
  const int step = p.launch.num_senders * (blockDim.x / g.num_threads);
  // Chunk by chunk over all peers: what a peer adds up first is sent first.
  for (int item = blockIdx.x + g.id * p.launch.num_senders; item < num_chunks * others; item += step) {
    const int chunk = item / others, peer = (p.ws.rank + 1 + item % others) % p.ws.num_ranks;
    const int token = chunk * g.chunk_tokens + g.token;
    if (token < p.max_tokens) send_token<In, Out>(p, op, g, route, peer, token);
    group_sync(g);
    if (g.thread == 0 && !is_dead(p.ws, peer)) {
      // [B] releases, to the warps at the peer that wait for this chunk, all that this group stored.
      fence_acq_rel_sys();
      st_relaxed_sys(flag(p.ws, peer, op.parity, p.ws.rank, chunk), tagged(op.epoch, 1));
    }
  }
}

template <class In, class Out>
__device__ __forceinline__ void receive_token(const CombineParams& p, const Op& op, const Group& g, const Route& route,
                                              int token, int chunk, int* failed) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  const int rank = route.rank(token, lane);
  int source;
  const int num = distinct_ranks(rank, &source);
  const int own_row = route.row(me, token, lane);
  const TokenRows own = token_rows(p, own_row);
  bool waited = false;
  constexpr int kSteps = sizeof(In) == 4 || sizeof(Out) == 4 ? 1 : 2;  // pieces of 256 channels in flight a warp
  const int stride = g.parts * 256;
  for (int channel0 = g.part * 256; channel0 < p.hidden; channel0 += kSteps * stride) {
    const int channel = channel0 + lane * 8;
    Raw8<Out> here[kSteps];
    {
      Eight sums[kSteps];
      sum_rows<In, kSteps>(p, own, channel, stride, sums);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) here[i].set(sums[i]);
    }
    if (!waited) {  // with the own rows of the first pieces already on their way
      uint32_t unused;
      if (source >= 0 && source != me &&
          (is_dead(p.ws, source) ||
           !wait_word(p.ws, flag(p.ws, me, op.parity, source, chunk), op.epoch, source, kPhaseAnswers, &unused))) {
        source = -1;  // an answer that does not come counts as zero
        *failed = 1;
      }
      __syncwarp();  // what one lane acquired, the others may read
      waited = true;
    }
    Eight total[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int c = 0; c < 8; ++c) total[i].v[c] = 0.f;
    }
    for (int first = 0; first < num; first += 2) {
      Raw8<Out> raw[2][kSteps];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int from = first + r < num ? __shfl_sync(~0u, source, first + r) : -1;
        if (from < 0) {
          for (int i = 0; i < kSteps; ++i) raw[r][i].zero();
        } else if (from == me) {
          for (int i = 0; i < kSteps; ++i) raw[r][i] = here[i];
        } else {
          const uint8_t* at = record(p.ws, me, op.parity, from, token, p.max_tokens, p.record_bytes);
#pragma unroll
          for (int i = 0; i < kSteps; ++i) {
            if (channel + i * stride < p.hidden) raw[r][i].load_fresh(at + (channel + i * stride) * sizeof(Out));
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (first + r >= num) break;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const Eight values = raw[r][i].floats();
#pragma unroll
          for (int c = 0; c < 8; ++c) total[i].v[c] = __fadd_rn(total[i].v[c], values.v[c]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int at = channel + i * stride;
      if (at >= p.hidden) continue;
      if (p.out_scale != 1.f) {
#pragma unroll
        for (int c = 0; c < 8; ++c) total[i].v[c] = __fmul_rn(total[i].v[c], p.out_scale);
      }
      const int64_t index = static_cast<int64_t>(token) * p.hidden + at;
      if (p.addend != nullptr) {
        Raw8<Out> addend;
        addend.load(static_cast<const Out*>(p.addend) + index);
        const Eight extra = addend.floats();
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const float value = p.addend_scale == 1.f ? extra.v[c] : __fmul_rn(extra.v[c], p.addend_scale);
          total[i].v[c] = __fadd_rn(total[i].v[c], value);
        }
      }
      Raw8<Out> out;
      out.set(total[i]);
      out.store(static_cast<Out*>(p.out) + index);
    }
  }
  if (p.grad_row_weights != nullptr && g.part == 0 && waited) {
    // The rank of selection k is lost when its answer is: find it among those that came.
    bool came = rank == me;
    for (int i = 0; i < num; ++i) {
      const int answered = __shfl_sync(~0u, source, i);
      came = came || answered == rank;
    }
    if (lane < p.top_k) {
      float value = 0.f;
      if (rank >= 0 && came) {
        value = rank == me ? weight_gradient(p, own_row, lane)
                           : __uint_as_float(ld_no_allocate8(entries(p.ws, me, op.parity, rank, token) + lane).x);
      }
      p.grad_topk_weights[static_cast<int64_t>(token) * p.top_k + lane] = value;
    }
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_kernel(const __grid_constant__ CombineParams p) {
  __shared__ int failed, bits;
  __shared__ int32_t given[2 * kMaxGroups];
  if (threadIdx.x == 0) failed = 0;
  wait_for_earlier_kernels();
  let_next_kernel_launch();
  const Op op = begin_op(p.ws);
  const Group g = my_group(p.launch);
  const Route route(p);
  __syncthreads();
  if ((p.launch.phases & 1) != 0 && !op.excluded && blockIdx.x < p.launch.num_senders) {
    if (blockIdx.x == 0) {
      for (int peer = threadIdx.x; peer < p.ws.num_ranks; peer += blockDim.x) {
        if (!is_dead(p.ws, peer)) post_header(p.ws, op, peer, p.num_tokens, p.call_hash, route.good ? 0 : kBadRoute);
      }
    }
    send_all<In, Out>(p, op, g, route);
  }
  if ((p.launch.phases & 2) == 0) return;
  const int num_chunks = (p.num_tokens + g.chunk_tokens - 1) / g.chunk_tokens;
  Turns turns(p.launch, g, &control(p.ws, p.ws.rank)->work[op.parity], given);
  for (int chunk = turns.take(g); chunk < num_chunks; chunk = turns.take(g)) {
    const int token = chunk * g.chunk_tokens + g.token;
    if (token < p.num_tokens) receive_token<In, Out>(p, op, g, route, token, chunk, &failed);
  }
  __syncthreads();
  close_headers(p, op, route.good, &bits, &failed);
  end_op(p.ws, op, &failed, [&] {
    if (threadIdx.x == 0) p.status[0] |= op.excluded ? kExcluded : kTimeout;
  });
}

template <class In>
int launch_to(const CombineParams& p, cudaStream_t stream) {
  switch (p.out_dtype) {
    case kBf16:
      return launch_kernel(combine_kernel<In, __nv_bfloat16>, p, p.launch, 0, stream);
    case kFp16:
      return launch_kernel(combine_kernel<In, __half>, p, p.launch, 0, stream);
    default:
      return launch_kernel(combine_kernel<In, float>, p, p.launch, 0, stream);
  }
}

}  // namespace

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
