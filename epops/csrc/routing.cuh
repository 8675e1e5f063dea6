// The sender's half of placement: which slot each selection goes to, and its position among this rank's rows for that slot.
//
// Every sending block counts all selections of its rank, and those before its own tokens: a few kilobytes from the L2 instead
// of a kernel or a grid barrier before the first byte moves. Within its tokens, one bit a token and key gives the order.
#pragma once

#include "team.cuh"

namespace epops {

// A key is a (rank, slot) pair, and one more for each rank, (rank, L): its rows in the rank layout, one a token.
struct Places {
  uint32_t* total;   // [keys] selections of all tokens of this rank
  uint32_t* before;  // [keys] those of tokens before the ones at hand
  uint32_t* bits;    // [keys] which of 32 tokens have the key
  int32_t* start;    // [L + 1] first row of each slot's group
  int32_t* tally;    // [L + 1] rows of each slot, from all ranks
  int32_t* num_tokens;  // [R] T of each source
  int32_t* takes_part;  // [R]
  int32_t* expert_slot;  // [E]
  int32_t* slot;      // [kPlaceEntries] of the tokens at hand: global slot or -1
  int32_t* position;  // [kPlaceEntries]
  uint32_t* lost;     // [R] nonzero: nothing of this source counts
  int32_t* hashes;    // [R] of each source's call
  uint32_t* done;     // [kOutbox]
  int32_t* words;     // single words: see enum Word
};
enum Word { kFailed = 0, kBits, kNumBad, kNumRepeated, kKept, kPosted, kNumWords };

__host__ __device__ inline uint64_t places_words(int num_ranks, int num_slots, int num_experts) {
  const uint64_t keys = static_cast<uint64_t>(num_ranks) * (num_slots + 1);
  return 3 * keys + 2 * (num_slots + 1) + 4 * num_ranks + num_experts + 2 * kPlaceEntries + kOutbox + kNumWords;
}

__device__ __forceinline__ Places carve(uint32_t* shared, int num_ranks, int num_slots, int num_experts) {
  const int keys = num_ranks * (num_slots + 1);
  Places s;
  s.total = shared;
  s.before = s.total + keys;
  s.bits = s.before + keys;
  s.start = reinterpret_cast<int32_t*>(s.bits + keys);
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
  int slot;     // global slot, -1 none
  int key;      // where it counts, -1 nowhere
  bool leader;  // the one lane of its (token, key) that counts
  bool bad, repeated;
};

__device__ __forceinline__ int64_t load_expert(const DispatchParams& p, int token, int k, bool active) {
  if (!active) return -1;
  const int64_t at = static_cast<int64_t>(token) * p.top_k + k;
  return p.idx64 ? static_cast<const int64_t*>(p.topk_idx)[at] : static_cast<const int32_t*>(p.topk_idx)[at];
}

// All lanes of a warp call it, with the expert of selection l % K of the warp's token l / K in lane l.
__device__ __forceinline__ Selection look_up(const DispatchParams& p, const Places& s, int64_t expert) {
  const int lane = threadIdx.x % 32;
  Selection found;
  found.bad = expert < -1 || expert >= p.num_experts;
  const bool named = expert >= 0 && !found.bad;
  // Two 16-bit halves would not do: an expert number may need 24 bits, and the token of the warp needs 5.
  const uint32_t token_tag = static_cast<uint32_t>(lane / p.top_k) << 24;
  uint32_t same = __match_any_sync(~0u, named ? token_tag | static_cast<uint32_t>(expert) : 0x80000000u | lane);
  found.repeated = named && __ffs(same) - 1 != lane;
  found.slot = -1;
  if (named && !found.repeated) {
    const int slot = s.expert_slot[expert];
    if (slot >= 0 && slot < p.ws.num_ranks * p.num_slots && s.takes_part[slot / p.num_slots] != 0) found.slot = slot;
  }
  found.key = -1;
  found.leader = false;
  const int rank = found.slot / p.num_slots;
  if (p.layout == kRank) {
    same = __match_any_sync(~0u, found.slot >= 0 ? token_tag | static_cast<uint32_t>(rank) : 0x80000000u | lane);
    if (found.slot >= 0) {
      found.key = rank * (p.num_slots + 1) + p.num_slots;
      found.leader = __ffs(same) - 1 == lane;
    }
  } else if (found.slot >= 0) {
    found.key = rank * (p.num_slots + 1) + found.slot % p.num_slots;
    found.leader = true;
  }
  return found;
}

// Counts all selections of this rank into `total`, those of tokens before `first` into `before`.
__device__ __forceinline__ void count_selections(const DispatchParams& p, const Places& s, int first) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const int tokens_a_warp = 32 / p.top_k;
  constexpr int kAhead = 8;  // indices in flight a lane
  const int step = num_warps * tokens_a_warp;
  const bool in_use = lane / p.top_k < tokens_a_warp;
  int bad = 0, repeated = 0;
  for (int token0 = warp * tokens_a_warp; token0 < p.num_tokens; token0 += kAhead * step) {
    int64_t expert[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int token = token0 + i * step + lane / p.top_k;
      expert[i] = load_expert(p, token, lane % p.top_k, in_use && token < p.num_tokens);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (token0 + i * step >= p.num_tokens) break;
      const Selection found = look_up(p, s, expert[i]);
      bad += found.bad;
      repeated += found.repeated;
      if (found.leader) {
        atomicAdd(&s.total[found.key], 1u);
        if (token0 + i * step + lane / p.top_k < first) atomicAdd(&s.before[found.key], 1u);
      }
      if (p.layout == kRank && found.slot >= 0) {  // expert_counts are by slot in every layout
        atomicAdd(&s.total[found.slot / p.num_slots * (p.num_slots + 1) + found.slot % p.num_slots], 1u);
      }
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

// Slots and positions of tokens [first, last) into `slot` and `position`; writes the route's send_slot. `before` moves on.
__device__ __forceinline__ void place_tokens(const DispatchParams& p, const Places& s, int first, int last) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const int tokens_a_warp = 32 / p.top_k;
  int32_t* send_slot = p.route + 32 + p.ws.num_ranks;
  if (last - first == 1) {  // `before` is its position
    if (warp == 0) {
      const Selection found = look_up(p, s, load_expert(p, first, lane, lane < p.top_k));
      if (lane < p.top_k) {
        s.slot[lane] = found.slot;
        s.position[lane] = found.key < 0 ? 0 : s.before[found.key];
        send_slot[static_cast<int64_t>(first) * p.top_k + lane] = found.slot;
      }
    }
    __syncthreads();
    return;
  }
  for (int tile = first; tile < last; tile += 32) {
    const int tile_last = min(tile + 32, last);
    // One step a warp where 32 warps are there; with fewer, the steps of a tile run one after another three times over.
    for (int pass = 0; pass < 3; ++pass) {
      for (int token0 = tile + warp * tokens_a_warp; token0 < tile_last; token0 += num_warps * tokens_a_warp) {
        const int token = token0 + lane / p.top_k, k = lane % p.top_k;
        const bool active = lane / p.top_k < tokens_a_warp && token < tile_last;
        const Selection found = look_up(p, s, load_expert(p, token, k, active));
        const uint32_t bit = 1u << ((token - tile) & 31);
        if (pass == 0) {
          if (found.leader) atomicOr(&s.bits[found.key], bit);
        } else if (pass == 1) {
          if (active) {
            const int at = (token - first) * p.top_k + k;
            s.slot[at] = found.slot;
            s.position[at] = found.key < 0 ? 0 : s.before[found.key] + __popc(s.bits[found.key] & (bit - 1));
            send_slot[static_cast<int64_t>(token) * p.top_k + k] = found.slot;
          }
        } else if (found.leader) {
          const uint32_t all = s.bits[found.key];
          if ((all & -all) == bit) {  // the first token of the key moves it on; the others see its bit or zero
            s.before[found.key] += __popc(all);
            s.bits[found.key] = 0;
          }
        }
      }
      __syncthreads();
    }
  }
}

// Counts and header to peer `peer`, by the whole block: they travel before any row, each word for itself.
__device__ __forceinline__ void post_counts(const DispatchParams& p, const Places& s, const Op& op, int peer) {
  uint64_t* words = counts(p.ws, peer, op.parity, p.ws.rank);
  const int num = p.num_slots + (p.layout == kRank ? 1 : 0);
  for (int i = threadIdx.x; i < num; i += blockDim.x) {
    st_relaxed_sys(&words[i], tagged(op.epoch, s.total[peer * (p.num_slots + 1) + i]));
  }
  if (threadIdx.x == 0) post_header(p.ws, op, peer, p.num_tokens, p.call_hash, s.words[kBits]);
}

}  // namespace epops
