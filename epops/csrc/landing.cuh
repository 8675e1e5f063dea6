// The receiver's half after placement: what is written for a row besides its bytes, and the end of lost sources.
#pragma once

#include "placement.cuh"
#include "rows.cuh"

namespace epops {

// A rank that the others have taken out stores nothing on them; its own route says that nothing was sent.
__device__ __forceinline__ void send_nothing(const DispatchParams& p) {
  int32_t* send_slot = p.route + 32 + p.ws.num_ranks;
  const int64_t num = static_cast<int64_t>(p.num_tokens) * p.top_k;
#pragma unroll 1
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < num; i += p.launch.num_senders * blockDim.x)
    send_slot[i] = -1;
}

// Lane k: where selection k of a token of `source` goes. What a peer wrote is data, not an address: a slot that is none
// counts as absent, and rows end at the capacity.
struct Landing {
  int slot, row;     // row: -1 not here, -2 no room
  uint32_t locals;   // lanes with a slot of this rank
  uint32_t to_copy;  // lanes whose rows the bytes go to
};

__device__ __forceinline__ Landing land(const DispatchParams& p, const Places& s, int source, int token, int slot,
                                        int position) {
  Landing l;
  l.slot = slot;
  const bool local = slot >= 0 && slot < p.num_slots;
  l.row = local ? row_of(p, s, source * p.num_chunks + token / p.chunk_tokens, slot, position) : -1;
  l.locals = __ballot_sync(~0u, local);
  l.to_copy = __ballot_sync(~0u, l.row >= 0);
  if (p.layout == kRank) l.to_copy &= -l.to_copy;  // all selections of a token name one row
  return l;
}

__device__ __forceinline__ void write_row_facts(const DispatchParams& p, const Landing& l, int source, int token,
                                                float weight) {
  const int lane = threadIdx.x % 32;
  const bool selected = lane < p.top_k, local = (l.locals >> lane & 1) != 0;
  const int64_t pair = static_cast<int64_t>(source) * p.max_tokens + token;
  if (selected) {
    p.route[32 + p.ws.num_ranks + static_cast<int64_t>(p.num_tokens) * p.top_k + pair * p.top_k + lane] = l.row;
  }
  if (p.layout == kRank) {
    const int64_t to = __shfl_sync(~0u, l.row, l.locals != 0 ? __ffs(l.locals) - 1 : 0);
    if (l.locals != 0 && to >= 0) {
      if (selected) {
        p.row_weights[to * p.top_k + lane] = local ? weight : 0.f;
        p.row_expert[to * p.top_k + lane] = local ? l.slot : -1;
      }
      if (lane == 0) p.row_source[to] = static_cast<int>(pair);
    }
  } else if (l.row >= 0) {
    p.row_weights[l.row] = weight;
    p.row_expert[l.row] = l.slot;
    p.row_source[l.row] = static_cast<int>(pair);
  }
}

// A source was lost between its counts and its last row: all its rows count as zero, by the whole block.
__device__ __forceinline__ void zero_lost_sources(const DispatchParams& p, const Places& s) {
  const int stride = p.num_slots + 1;
#pragma unroll 1
  for (int source = 0; source < p.ws.num_ranks; ++source) {
    if (s.num_tokens[source] < 0 || !is_dead(p.ws, source)) continue;
    const int first = source * p.num_chunks * stride, next = first + p.num_chunks * stride;
    const int slots = p.layout == kRank ? 1 : p.num_slots;
#pragma unroll 1
    for (int i = 0; i < slots; ++i) {
      const int slot = p.layout == kRank ? p.num_slots : i;
      const int before = s.total[first + slot];
      const int after = source + 1 < p.ws.num_ranks ? s.total[next + slot] : s.tally[slot];
      const int start = p.layout == kRank ? 0 : s.start[slot];
#pragma unroll 1
      for (int row = start + before + threadIdx.x / 32; row < min(start + after, p.capacity); row += blockDim.x / 32) {
        zero_row(p, row);
        if (threadIdx.x % 32 == 0) clear_row_facts(p, row);
      }
    }
    int32_t* recv_row = p.route + 32 + p.ws.num_ranks + static_cast<int64_t>(p.num_tokens) * p.top_k;
    const int64_t width = static_cast<int64_t>(p.max_tokens) * p.top_k;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) recv_row[source * width + i] = -1;
  }
  if (threadIdx.x == 0) p.status[0] |= kTimeout;
}

}  // namespace epops
