// combine of few tokens: every answer is made in shared memory, and a bulk copy takes it to its token's rank.
//
// One kernel. A team makes the answer to one token of a peer, starts its copy, sums a token of its own from the rows
// that are here while the copy is under way, and tells the peer when it has landed: the lane that started it knows, so
// that no fence has anything to wait for. Own sums wait in the result, rounded as answers are; in the end answers are
// added as their flags come. Which of this kernel and combine.cu's a rank runs is its own affair: records, flags and
// headers are the same.
#include "bulk.cuh"
#include "launch.cuh"
#include "sums.cuh"

namespace epops {
namespace {

using Ring = RingOf<4, 3>;
constexpr int kSteps = 2;     // of a sum at once
constexpr int kAddSteps = 4;  // of answers at once

__host__ __device__ inline int slot_bytes(const CombineParams& p) { return (p.record_bytes + 127) / 128 * 128; }
__host__ __device__ inline int num_rings(const CombineParams& p) { return p.launch.num_threads / 32; }

// The rows of a token added up; `put(channel, sum)` gets eight channels a lane, rounded.
template <class T, class Put>
__device__ __forceinline__ void sum_rows(const CombineParams& p, const Team& t, RowSums<T, kSteps, Ring>& sums,
                                         const TokenRows& rows, Put put) {
#pragma unroll 1
  for (int piece = 0; piece < sums.pieces; ++piece) {
    Eight values[kSteps];
    sums.piece(rows, values);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int channel = sums.first + (piece * kSteps + i) * sums.stride;
      Raw8<T> sum;
      sum.set(values[i]);
      if (channel < p.hidden) put(channel, sum);
    }
  }
}

__device__ __forceinline__ void sync_team(const Team& t) {
  if (t.parts == 1) {
    __syncwarp();
  } else {
    barrier_sync(2 + t.id, t.parts * 32);
  }
}

template <class T>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_kept_kernel(const __grid_constant__ CombineParams p) {
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ int32_t failed;
  __shared__ uint8_t gone[kMaxRanks];  // as in combine.cu
  if (threadIdx.x == 0) failed = 0;
  if (threadIdx.x < 32) trace(0);
  const Team t = my_team(p.launch.send_warps, 0);
  const int lane = threadIdx.x % 32, me = p.ws.rank, others = p.ws.num_ranks - 1, all = p.max_tokens * others;
  uint8_t* ring = memory + threadIdx.x / 32 * Ring::kBytes;
  uint8_t* slot = memory + num_rings(p) * Ring::kBytes + t.id * slot_bytes(p);
  // Item i is the answer number i, token by token over all peers, and own token i.
  const int step = static_cast<int>(gridDim.x) * t.num_teams;
  const int first = t.id < 0 ? max(all, p.max_tokens) : static_cast<int>(blockIdx.x + t.id * gridDim.x);
  const auto peer_of = [&](int item) { return (me + 1 + item % others) % p.ws.num_ranks; };
  wait_for_earlier_kernels();
  if (threadIdx.x < 32) trace(1);
  let_next_kernel_launch();
  const Route route(p);
  // Words of the route that an item needs, asked for an item ahead; the first ones while those of the group come.
  int sent = -1, own = -1;
  const auto ask = [&](int item) {
    sent = item < all && lane < p.top_k ? ld_now(route.row_word(peer_of(item), item / others, lane)) : -1;
    own = item < p.num_tokens && lane < p.top_k ? ld_now(route.row_word(me, item, lane)) : -1;
  };
  ask(first);
  int slot_of_selection = first < p.num_tokens && lane < p.top_k ? ld_now(route.slot_word(first, lane)) : -1;
  const bool dead = threadIdx.x < p.ws.num_ranks && is_dead(p.ws, threadIdx.x);
  const uint64_t region = region_bytes(p.ws, p.max_tokens, p.record_bytes);
  const Op op = begin_op(p.ws, region);
  // The rows of an item, of its answer and then of its own token, are asked for in one go. What is sent is seen to
  // later.
  RowSums<T, kSteps, Ring> sums(p, t, ring);
  const auto start = [&] {
    sent = lane < p.top_k ? route.checked_row(sent) : -1;
    own = lane < p.top_k ? route.checked_row(own) : -1;
    sums.start(token_rows(p, sent), token_rows(p, own));
  };
  start();
  const bool last_warp = threadIdx.x >= blockDim.x - 32;
  if (!op.excluded && blockIdx.x == 0 && last_warp) {
#pragma unroll 1
    for (int peer = lane; peer < p.ws.num_ranks; peer += 32) {
      if (route.takes_part(p.ws, peer)) {
        post_header(p.ws, op, peer, p.num_tokens, p.call_hash, route.good ? 0 : kBadRoute);
      }
    }
  }
  if (threadIdx.x < p.ws.num_ranks) gone[threadIdx.x] = dead;
  if (op.overlaps) find_gone(p.ws, op, route, !op.excluded, gone);
  __syncthreads();
  if (threadIdx.x < p.ws.num_ranks && gone[threadIdx.x] == 2) failed = 1;
  if (threadIdx.x < 32) trace(2);
#pragma unroll 1
  for (int item = first; item < max(all, p.num_tokens); item += step) {
    const bool sends = item < all && __ballot_sync(~0u, sent != -1) != 0;
    const int peer = sends ? peer_of(item) : me, token = sends ? item / others : 0;
    const bool goes = sends && !op.excluded && gone[peer] == 0;
    if (goes) {
      sum_rows<T>(p, t, sums, sums.rows, [&](int channel, const Raw8<T>& sum) {
        *reinterpret_cast<uint4*>(slot + channel * sizeof(T)) = sum.w;
      });
      fence_before_bulk();
      sync_team(t);
      if (t.part == 0) {
        const uint8_t* to = record(p.ws, peer, op.parity, me, token, p.max_tokens, p.record_bytes);
        bulk_store(reinterpret_cast<uint64_t>(to), 1, slot, p.record_bytes);
        bulk_commit();
        if (p.grad_row_weights != nullptr && lane < p.top_k) {
          entries(p.ws, peer, op.parity, me, token)[lane] =
              make_uint2(__float_as_uint(weight_gradient(p, sent, lane)), 0);
        }
      }
      if (item == first && threadIdx.x < 32) trace(3);
    } else if (sends) {
      sums.start_again(sums.then);  // nobody is there to have it
    }
    ask(item + step);
    if (item < p.num_tokens) {
      T* to = static_cast<T*>(p.out) + static_cast<int64_t>(item) * p.hidden;
      sum_rows<T>(p, t, sums, sums.then, [&](int channel, const Raw8<T>& sum) { sum.store(to + channel); });
      if (item == first && threadIdx.x < 32) trace(4);
    }
    start();
    if (goes) {
      if (t.part == 0) {
        bulk_wait<0>();  // has landed
        // [B] released to the warps at the peer that wait for this token
        if (lane == 0) {
          fence_acq_rel_sys();
          st_relaxed_sys(flag(p.ws, peer, op.parity, me, token), tagged(op.epoch, 1));
        }
      }
      sync_team(t);  // the slot is free for the next answer
    }
  }
  cp_async_wait<0>();
  if (threadIdx.x < 32) trace(5);
#pragma unroll 1
  for (int token = first; token < p.num_tokens; token += step) {
    const int rank = lane < p.top_k ? route.rank_of(slot_of_selection) : -1;
    const int next = token + step;
    slot_of_selection = next < p.num_tokens && lane < p.top_k ? ld_now(route.slot_word(next, lane)) : -1;
    Answers answers = await_answers(p, op, rank, token, gone, &failed);
    if (token == first && threadIdx.x < 32) trace(6);
    // Every lane reads what it wrote itself.
    if (answers.source == me) {
      answers.place = reinterpret_cast<uint64_t>(static_cast<const T*>(p.out) + static_cast<int64_t>(token) * p.hidden);
    }
    const int stride = t.parts * 256;
#pragma unroll 1
    for (int channel = t.part * 256 + lane * 8; channel - lane * 8 < p.hidden; channel += kAddSteps * stride) {
      add_answers<T, kAddSteps, false>(p, answers, token, channel, stride, [](auto&) {});
    }
    if (p.grad_row_weights != nullptr && t.part == 0) {
      weight_gradients(p, op, answers, rank, route.row(me, token, lane), token);
    }
  }
  if (threadIdx.x < 32) trace(7);
  if (blockIdx.x == 0 && last_warp) {
    close_headers(p, op, route.good, &failed, [&](int rank) { return route.takes_part(p.ws, rank); });
  }
  end_op(p.ws, op, region, &failed, [&] {
    if (threadIdx.x == 0) p.status[0] |= op.excluded ? kExcluded : kTimeout;
  });
  if (threadIdx.x < 32) trace(8);
}

}  // namespace

#ifdef EPOPS_TRACE
int read_combine_kept_trace(uint64_t* out) { return cudaMemcpyFromSymbol(out, trace_clock, sizeof(trace_clock)); }
#endif

uint64_t combine_kept_shared_bytes(const CombineParams& p) {
  const int teams = p.launch.num_threads / 32 / p.launch.send_warps;
  return static_cast<uint64_t>(num_rings(p)) * Ring::kBytes + static_cast<uint64_t>(teams) * slot_bytes(p);
}

int launch_combine_kept(const CombineParams& p, void* stream) {
  const auto run = [&](auto value) {
    return launch_kernel(combine_kept_kernel<decltype(value)>, p, p.launch, combine_kept_shared_bytes(p),
                         static_cast<cudaStream_t>(stream));
  };
  return p.out_dtype == kBf16 ? run(__nv_bfloat16{}) : run(__half{});
}

}  // namespace epops
