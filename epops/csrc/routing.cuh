// The sender's half of placement: which slot each selection goes to, and its position among this rank's rows for that
// slot.
//
// Every sending block counts all selections of its rank, and those before its own tokens: a few kilobytes from the L2
// instead of a kernel or a grid barrier before the first byte moves. Within its tokens, one bit a token and key gives
// the order.
#pragma once

#include "team.cuh"

namespace epops {

// A key is a (rank, slot) pair, and one more for each rank, (rank, L): its rows in the rank layout, one a token.
struct Places {
  uint32_t* total;       // [keys] selections of all tokens of this rank
  uint32_t* before;      // [keys] those of tokens before the ones at hand
  uint32_t* bits;        // [keys * tiles] which of 32 tokens of a tile have the key
  int32_t* start;        // [L + 1] first row of each slot's group
  int32_t* tally;        // [L + 1] rows of each slot, from all ranks
  int32_t* num_tokens;   // [R] T of each source
  int32_t* takes_part;   // [R]
  int32_t* expert_slot;  // [E] slot << 8 | rank, -1 none
  int32_t* slot;         // [kPlaceEntries] of the tokens at hand: global slot << 8 | rank, or -1
  int32_t* position;     // [kPlaceEntries]
  uint32_t* lost;        // [R] nonzero: nothing of this source counts
  int32_t* hashes;       // [R] of each source's call
  uint32_t* done;        // [kOutbox]
  int32_t* words;        // single words: see enum Word
};
enum Word { kFailed = 0, kBits, kNumBad, kNumRepeated, kKept, kPosted, kNumWords };

__host__ __device__ inline uint64_t places_words(int num_ranks, int num_slots, int num_experts, int tiles) {
  const uint64_t keys = static_cast<uint64_t>(num_ranks) * (num_slots + 1);
  return (2 + tiles) * keys + 2 * (num_slots + 1) + 4 * num_ranks + num_experts + 2 * kPlaceEntries + kOutbox +
         kNumWords;
}

__device__ __forceinline__ Places carve(uint32_t* shared, int num_ranks, int num_slots, int num_experts, int tiles) {
  const int keys = num_ranks * (num_slots + 1);
  Places s;
  s.total = shared;
  s.before = s.total + keys;
  s.bits = s.before + keys;
  s.start = reinterpret_cast<int32_t*>(s.bits + keys * tiles);
  s.tally = s.start + num_slots + 1;
  s.num_tokens = s.tally + num_slots + 1;
  s.takes_part = s.num_tokens + num_ranks;
  s.expert_slot = s.takes_part + num_ranks;
  s.slot = s.expert_slot + num_experts;
  s.position = s.slot + kPlaceEntries;
  s.lost = reinterpret_cast<uint32_t*>(s.position + kPlaceEntries);
  s.hashes = reinterpret_cast<int32_t*>(s.lost + num_ranks);
  s.done = reinterpret_cast<uint32_t*>(s.hashes + num_ranks);
  s.words = reinterpret_cast<int32_t*>(s.done + kOutbox);
  return s;
}

struct Selection {
  int slot;  // global slot, -1 none
  int rank;
  int key;      // where it counts, -1 nowhere
  bool leader;  // the one lane of its (token, key) that counts
  bool bad, repeated;
};

__device__ __forceinline__ int64_t load_expert(const DispatchParams& p, int token, int k, bool active) {
  if (!active) return -1;
  const int64_t at = static_cast<int64_t>(token) * p.top_k + k;
  return p.idx64 ? static_cast<const int64_t*>(p.topk_idx)[at] : static_cast<const int32_t*>(p.topk_idx)[at];
}

// A warp looks at whole tokens: lane l at selection l % K of its token l / K, where that is one of its 32 / K.
struct Seat {
  int token, k;
  bool taken;
};

__device__ __forceinline__ Seat my_seat(int top_k) {
  const int lane = threadIdx.x % 32;
  Seat seat{lane / top_k, 0, false};
  seat.k = lane - seat.token * top_k;
  seat.taken = seat.token < 32 / top_k;
  return seat;
}

// All lanes of a warp call it, each with the expert of its selection, or -1.
__device__ __forceinline__ Selection look_up(const DispatchParams& p, const Places& s, const Seat& seat, int64_t wide) {
  Selection found;
  found.bad = wide < -1 || wide >= p.num_experts;
  const int expert = found.bad ? -1 : static_cast<int>(wide);
  found.repeated = false;
#pragma unroll 1
  for (int back = 1; back < p.top_k; ++back) {
    const int other = __shfl_up_sync(~0u, expert, back);
    found.repeated |= seat.k >= back & expert >= 0 & other == expert;
  }
  found.slot = found.key = -1;
  found.leader = false;
  found.rank = -1;
  if (expert >= 0 && !found.repeated) {
    const int packed = s.expert_slot[expert];
    if (packed >= 0 && s.takes_part[packed & 0xff] != 0) {
      found.rank = packed & 0xff;
      found.slot = packed >> 8;
      found.key = found.slot + found.rank;  // rank * (L + 1) + slot within the rank
      found.leader = true;
    }
  }
  if (p.layout == kRank) {  // one row a rank: its first selection counts, and the others share the row
#pragma unroll 1
    for (int back = 1; back < p.top_k; ++back) {
      const int other = __shfl_up_sync(~0u, found.rank, back);
      if (seat.k >= back && other == found.rank) found.leader = false;
    }
    if (found.rank >= 0) found.key = found.rank * (p.num_slots + 1) + p.num_slots;
  }
  return found;
}

// Counts all selections of this rank into `total`, those of tokens before `first` into `before`.
__device__ __forceinline__ void count_selections(const DispatchParams& p, const Places& s, int first) {
  const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const int tokens_a_warp = 32 / p.top_k;
  const Seat seat = my_seat(p.top_k);
  const int step = num_warps * tokens_a_warp;
  int bad = 0, repeated = 0;
  int token = warp * tokens_a_warp + seat.token;
  int64_t next = load_expert(p, token, seat.k, seat.taken && token < p.num_tokens);
#pragma unroll 1
  for (int token0 = warp * tokens_a_warp; token0 < p.num_tokens; token0 += step, token += step) {
    const int64_t expert = next;  // with the one after on its way
    next = load_expert(p, token + step, seat.k, seat.taken && token + step < p.num_tokens);
    const Selection found = look_up(p, s, seat, expert);
    bad += found.bad;
    repeated += found.repeated;
    if (found.leader) {
      atomicAdd(&s.total[found.key], 1u);
      if (token < first) atomicAdd(&s.before[found.key], 1u);
    }
    if (p.layout == kRank && found.slot >= 0) {  // expert_counts are by slot in every layout
      atomicAdd(&s.total[found.slot + found.rank], 1u);
    }
  }
  if (bad != 0) {
    atomicAdd(&s.words[kNumBad], bad);
    atomicOr(&s.words[kBits], kBadIndex);
  }
  if (repeated != 0) {
    atomicAdd(&s.words[kNumRepeated], repeated);
    atomicOr(&s.words[kBits], kDuplicate);
  }
}

// Slots and positions of tokens [first, last) into `slot` and `position`; writes the route's send_slot. `before` moves
// on, unless nothing is placed after `last`.
__device__ __forceinline__ void place_tokens(const DispatchParams& p, const Places& s, int first, int last, bool more) {
  const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const int tokens_a_warp = 32 / p.top_k;
  const Seat seat = my_seat(p.top_k);
  int32_t* send_slot = p.route + 32 + p.ws.num_ranks;
  const int round = min(p.tiles * 32, num_warps * tokens_a_warp);  // one step a warp
#pragma unroll 1
  for (int begin = first; begin < last; begin += round) {
    const int inside = warp * tokens_a_warp + seat.token, token = begin + inside;
    const bool active = seat.taken && inside < round && token < last;
    const Selection found = look_up(p, s, seat, load_expert(p, token, seat.k, active));
    const int tile = inside / 32;
    const uint32_t bit = 1u << (inside & 31);
    uint32_t* bits = s.bits + found.key * p.tiles;
    if (found.leader) atomicOr(&bits[tile], bit);
    __syncthreads();
    if (active) {
      int position = 0;
      if (found.key >= 0) {
        position = s.before[found.key] + __popc(bits[tile] & (bit - 1));
#pragma unroll 1
        for (int i = 0; i < tile; ++i) position += __popc(bits[i]);
      }
      const int at = (token - first) * p.top_k + seat.k;
      s.slot[at] = found.slot < 0 ? -1 : found.slot << 8 | found.rank;
      s.position[at] = position;
      send_slot[static_cast<int64_t>(token) * p.top_k + seat.k] = found.slot;
    }
    if (!more && begin + round >= last) break;
    // The first token of each key moves it on for the round after.
    bool mine = found.leader && (bits[tile] & -bits[tile]) == bit;
    uint32_t all = 0;
    if (mine) {
#pragma unroll 1
      for (int i = 0; i < p.tiles; ++i) {
        mine = mine && (i >= tile || bits[i] == 0);
        all += __popc(bits[i]);
      }
    }
    __syncthreads();
    if (mine) {
      s.before[found.key] += all;
#pragma unroll 1
      for (int i = 0; i < p.tiles; ++i) bits[i] = 0;
    }
    __syncthreads();
  }
  __syncthreads();
}

// Counts and header to peer `peer`, by the whole block: they travel before any row, each word for itself.
__device__ __forceinline__ void post_counts(const DispatchParams& p, const Places& s, const Op& op, int peer) {
  uint64_t* words = counts(p.ws, peer, op.parity, p.ws.rank);
  const int num = p.num_slots + (p.layout == kRank ? 1 : 0);
#pragma unroll 1
  for (int i = threadIdx.x; i < num; i += blockDim.x) {
    st_relaxed_sys(&words[i], tagged(op.epoch, s.total[peer * (p.num_slots + 1) + i]));
  }
  if (threadIdx.x == 0) post_header(p.ws, op, peer, p.num_tokens, p.call_hash, s.words[kBits]);
}

}  // namespace epops
