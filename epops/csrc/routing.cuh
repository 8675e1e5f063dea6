// The sender's half of placement: which slot each selection goes to, and its position among this rank's rows for that
// slot.
//
// Tokens are counted in chunks, whose sizes follow from the call's, so that all ranks know them; receivers add the
// chunks up. A sending block counts the chunk of its own tokens, where several share one, with those before its own,
// and needs nothing from another block: no kernel and no grid barrier comes before the first byte. Within its tokens,
// one bit a token and key gives the order.
#pragma once

#include "team.cuh"

namespace epops {

// A key is a (rank, slot) pair, and one more for each rank, (rank, L): its rows in the rank layout, one a token.
struct Places {
  uint32_t* total;       // [R * chunks][L + 1] rows for a slot from sources and chunks before
  uint32_t* count;       // [keys] selections of the chunk at hand
  uint32_t* before;      // [keys] those of its tokens before the ones at hand
  uint32_t* bits;        // [keys * tiles] which of 32 tokens of a tile have the key
  int32_t* start;        // [L + 1] first row of each slot's group
  int32_t* tally;        // [L + 1] rows of each slot, from all ranks
  int32_t* num_tokens;   // [R] T of each source, -1 where nothing of it counts
  int32_t* takes_part;   // [R]
  int32_t* expert_slot;  // [E] slot << 8 | rank, -1 none
  int32_t* slot;         // [kPlaceEntries] of the tokens at hand: global slot << 8 | rank, or -1
  int32_t* position;     // [kPlaceEntries]
  uint32_t* lost;        // [R] nonzero: nothing of this source counts
  uint32_t* closed;      // [R] nonzero: nothing is stored there
  uint32_t* done;        // [kOutbox]
  int32_t* words;        // single words: see enum Word
};
enum Word { kFailed = 0, kBits, kNumBad, kNumRepeated, kChunkBad, kChunkRepeated, kRowsKept, kPosted, kNumWords };

__host__ __device__ inline uint64_t places_words(const DispatchParams& p) {
  const uint64_t num_ranks = p.ws.num_ranks, stride = p.num_slots + 1;
  return num_ranks * stride * (2 + p.tiles + p.num_chunks) + 2 * stride + 4 * num_ranks + p.num_experts +
         2 * kPlaceEntries + kOutbox + kNumWords;
}

__device__ __forceinline__ Places carve(uint32_t* shared, const DispatchParams& p) {
  const int num_ranks = p.ws.num_ranks, keys = num_ranks * (p.num_slots + 1);
  Places s;
  s.count = shared;
  s.before = s.count + keys;
  s.bits = s.before + keys;
  s.total = s.bits + keys * p.tiles;
  s.start = reinterpret_cast<int32_t*>(s.total + keys * p.num_chunks);
  s.tally = s.start + p.num_slots + 1;
  s.num_tokens = s.tally + p.num_slots + 1;
  s.takes_part = s.num_tokens + num_ranks;
  s.expert_slot = s.takes_part + num_ranks;
  s.slot = s.expert_slot + p.num_experts;
  s.position = s.slot + kPlaceEntries;
  s.lost = reinterpret_cast<uint32_t*>(s.position + kPlaceEntries);
  s.closed = s.lost + num_ranks;
  s.done = s.closed + num_ranks;
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

// All lanes of a warp call it, each with the expert of its selection, or -1; `packed_slot(expert)` is slot << 8 | rank.
template <class PackedSlot>
__device__ __forceinline__ Selection look_up(const DispatchParams& p, const int32_t* takes_part, const Seat& seat,
                                             int64_t wide, PackedSlot packed_slot) {
  Selection found;
  found.bad = wide < -1 || wide >= p.num_experts;
  const int expert = found.bad ? -1 : static_cast<int>(wide);
  const int packed = expert >= 0 ? packed_slot(expert) : -1;
  found.repeated = false;
#pragma unroll 1
  for (int back = 1; back < p.top_k; ++back) {
    const int other = __shfl_up_sync(~0u, expert, back);
    found.repeated |= seat.k >= back & expert >= 0 & other == expert;
  }
  found.slot = found.key = -1;
  found.leader = false;
  found.rank = -1;
  if (packed >= 0 && !found.repeated && takes_part[packed & 0xff] != 0) {
    found.rank = packed & 0xff;
    found.slot = packed >> 8;
    found.key = found.slot + found.rank;  // rank * (L + 1) + slot within the rank
    found.leader = true;
  }
  return found;
}

__device__ __forceinline__ Selection look_up(const DispatchParams& p, const Places& s, const Seat& seat, int64_t wide) {
  Selection found = look_up(p, s.takes_part, seat, wide, [&](int expert) { return s.expert_slot[expert]; });
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

// slot << 8 | rank of an expert, -1 none.
__device__ __forceinline__ int pack_slot(const DispatchParams& p, int64_t slot) {
  const bool there = slot >= 0 && slot < static_cast<int64_t>(p.ws.num_ranks) * p.num_slots;
  return there ? static_cast<int>(slot) << 8 | static_cast<int>(slot) / p.num_slots : -1;
}

// Counts selections of tokens [begin, end) into `count`, those of tokens before `first` into `before` too.
__device__ __forceinline__ void count_selections(const DispatchParams& p, const Places& s, int begin, int end,
                                                 int first) {
  const int warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const int tokens_a_warp = 32 / p.top_k;
  const Seat seat = my_seat(p.top_k);
  const int step = num_warps * tokens_a_warp;
  int bad = 0, repeated = 0;
  int token = begin + warp * tokens_a_warp + seat.token;
  int64_t next = load_expert(p, token, seat.k, seat.taken && token < end);
#pragma unroll 1
  for (int token0 = begin + warp * tokens_a_warp; token0 < end; token0 += step, token += step) {
    const int64_t expert = next;  // with the one after on its way
    next = load_expert(p, token + step, seat.k, seat.taken && token + step < end);
    const Selection found = look_up(p, s, seat, expert);
    bad += found.bad;
    repeated += found.repeated;
    if (found.leader) {
      atomicAdd(&s.count[found.key], 1u);
      if (token < first) atomicAdd(&s.before[found.key], 1u);
    }
    if (p.layout == kRank && found.slot >= 0) {  // expert_counts are by slot in every layout
      atomicAdd(&s.count[found.slot + found.rank], 1u);
    }
  }
  if (bad != 0) atomicAdd(&s.words[kChunkBad], bad);
  if (repeated != 0) atomicAdd(&s.words[kChunkRepeated], repeated);
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

// How a chunk's counts lie in tagged words: by slots, the chunk's tokens for the rank last, two to a word where 16 bits
// hold each; then its bad and repeated selections. From sizes alone, as peers read them.
struct CountWords {
  int paired;     // 1: two to a word
  int first_bad;  // words before bad selections
  int words;

  __device__ __forceinline__ explicit CountWords(const DispatchParams& p) {
    paired = static_cast<int64_t>(p.chunk_tokens) * p.top_k < 1 << 16;
    first_bad = (p.num_slots + 1 + paired) >> paired;
    words = first_bad + 2;
  }
};

// A chunk's counts to every rank, this one too, by the whole block: they travel before any row, each word for itself.
__device__ __forceinline__ void post_counts(const DispatchParams& p, const Places& s, const Op& op, int chunk) {
  const CountWords layout(p);
#pragma unroll 1
  for (int i = threadIdx.x; i < p.ws.num_ranks * layout.words; i += blockDim.x) {
    const int peer = i / layout.words, word = i % layout.words;
    if (s.takes_part[peer] == 0) continue;
    uint32_t value;
    if (word < layout.first_bad) {
      const int slot = word << layout.paired;
      const uint32_t* from = s.count + peer * (p.num_slots + 1) + slot;
      value = from[0];
      if (layout.paired != 0 && slot < p.num_slots) value |= from[1] << 16;
    } else {
      value = static_cast<uint32_t>(s.words[kChunkBad + word - layout.first_bad]);
    }
    st_relaxed_sys(&counts(p.ws, peer, op.parity, p.ws.rank, chunk)[word], tagged(op.epoch, value));
  }
}

}  // namespace epops
