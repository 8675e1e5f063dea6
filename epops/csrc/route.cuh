// A route as combine and the gradients read it; every number in it is checked before it becomes an address.
#pragma once

#include "exchange.cuh"

namespace epops {

// The host has checked that the tensor is as long as the call says.
struct Route {
  const int32_t* mask;       // (R,)
  const int32_t* send_slot;  // (T, K)
  const int32_t* recv_row;   // (R, M, K)
  int max_tokens, top_k, num_rows, num_slots, num_global;
  bool good;

  template <class Params>
  __device__ __forceinline__ explicit Route(const Params& p) {
    const int32_t* r = p.route;
    // Loaded together: `&` and no `&&`.
    good = (r[0] == 0x45504f31) & (r[1] == 1) & (r[3] == p.num_tokens) & (r[4] == p.max_tokens) & (r[5] == p.top_k) &
           (r[6] == p.ws.num_ranks) & (r[7] == p.num_slots) & (r[10] == p.ws.rank);
    mask = r + 32;
    send_slot = r + 32 + p.ws.num_ranks;
    recv_row = send_slot + static_cast<int64_t>(p.num_tokens) * p.top_k;
    max_tokens = p.max_tokens;
    top_k = p.top_k;
    num_rows = p.num_rows;
    num_slots = p.num_slots;
    num_global = p.ws.num_ranks * p.num_slots;
  }
  // Whether a rank took part in the dispatch, and does not count as lost since.
  __device__ __forceinline__ bool takes_part(const Workspace& ws, int rank) const {
    return !good || (mask[rank] != 0) & !is_dead(ws, rank);
  }
  // Where those words lie that follow, and what they are worth once the route is known to be good.
  __device__ __forceinline__ const int32_t* row_word(int source, int token, int k) const {
    return recv_row + (static_cast<int64_t>(source) * max_tokens + token) * top_k + k;
  }
  __device__ __forceinline__ const int32_t* slot_word(int token, int k) const {
    return send_slot + static_cast<int64_t>(token) * top_k + k;
  }
  __device__ __forceinline__ int checked_row(int row) const { return good && row >= -2 && row < num_rows ? row : -1; }
  __device__ __forceinline__ int rank_of(int slot) const {
    return good && slot >= 0 && slot < num_global ? slot / num_slots : -1;
  }
  // Lane k: row of selection k of `token` of `source`: -1 none, -2 dropped.
  __device__ __forceinline__ int row(int source, int token, int k) const {
    return k < top_k ? checked_row(*row_word(source, token, k)) : -1;
  }
  // Lane k: rank of selection k of own `token`, -1 none.
  __device__ __forceinline__ int rank(int token, int k) const { return k < top_k ? rank_of(*slot_word(token, k)) : -1; }
};

// Ranks that nothing is stored at: dead ones, and, where rows lie where those of the op before did, such as have not
// opened this op. By all threads of a block, after the rank has posted its headers.
__device__ __forceinline__ void find_gone(const Workspace& ws, const Op& op, const Route& route, bool sends,
                                          uint8_t* gone) {
#pragma unroll 1
  for (int rank = threadIdx.x; rank < ws.num_ranks; rank += blockDim.x) {
    gone[rank] = is_dead(ws, rank);
    if (sends && gone[rank] == 0 && route.takes_part(ws, rank) && !may_store(ws, op, rank)) gone[rank] = 2;
  }
}

// Ranks that take part in a token, ascending: lane i holds the i-th. Returns how many. All lanes call it.
__device__ __forceinline__ int distinct_ranks(int rank_of_selection, int* rank_of_lane) {
  const int lane = threadIdx.x % 32;
  unsigned left = rank_of_selection >= 0 ? static_cast<unsigned>(rank_of_selection) : ~0u;
  int num = 0;
  *rank_of_lane = -1;
#pragma unroll 1
  for (unsigned least = __reduce_min_sync(~0u, left); least != ~0u; least = __reduce_min_sync(~0u, left)) {
    if (lane == num) *rank_of_lane = static_cast<int>(least);
    ++num;
    if (left == least) left = ~0u;
  }
  return num;
}

}  // namespace epops
