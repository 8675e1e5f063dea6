// Placement from selections alone, for a dispatch of few tokens: every rank posts where each selection of its tokens
// goes, every block reads the selections of all ranks and finds every row's place from one bit a (source, slot, token).
// Counts and positions are population counts, and no rank counts for another.
#pragma once

#include "landing.cuh"

namespace epops {

constexpr uint32_t kNoSlot = 0xffff, kBadSlot = 0xfffe, kRepeatedSlot = 0xfffd;  // selections that go nowhere

// Places, and what only this kernel has.
struct Board : Places {
  uint32_t* chosen;  // [R][M][pairs] two slots a word, as they were posted
  int pairs, tiles;  // words of a token; words of 32 tokens
};

__host__ __device__ inline int pairs_of(const DispatchParams& p) { return (p.top_k + 1) / 2; }

__host__ __device__ inline uint64_t board_words(const DispatchParams& p) {
  const uint64_t stride = p.num_slots + 1, num_ranks = p.ws.num_ranks, tiles = (p.max_tokens + 31) / 32;
  return num_ranks * stride * (1 + tiles) + 2 * stride + 3 * num_ranks + num_ranks * p.max_tokens * pairs_of(p) +
         kNumWords;
}

__device__ __forceinline__ Board carve_board(uint32_t* shared, const DispatchParams& p) {
  const int keys = p.ws.num_ranks * (p.num_slots + 1);
  Board s{};
  s.pairs = pairs_of(p);
  s.tiles = (p.max_tokens + 31) / 32;
  s.bits = shared;
  s.words = reinterpret_cast<int32_t*>(s.bits + keys * s.tiles);
  s.total = reinterpret_cast<uint32_t*>(s.words + kNumWords);
  s.start = reinterpret_cast<int32_t*>(s.total + keys);
  s.tally = s.start + p.num_slots + 1;
  s.num_tokens = s.tally + p.num_slots + 1;
  s.takes_part = s.num_tokens + p.ws.num_ranks;
  s.lost = reinterpret_cast<uint32_t*>(s.takes_part + p.ws.num_ranks);
  s.chosen = s.lost + p.ws.num_ranks;
  return s;
}

// Where a token's selections go, to every rank that takes part, this one too; by one warp.
__device__ __forceinline__ void post_selections(const DispatchParams& p, const Board& s, const Op& op,
                                                const Selection& found, int token) {
  const int lane = threadIdx.x % 32, me = p.ws.rank;
  const uint32_t nowhere = found.bad ? kBadSlot : found.repeated ? kRepeatedSlot : kNoSlot;
#pragma unroll 1
  for (int i = 1; i <= p.ws.num_ranks; ++i) {
    const int peer = (me + i) % p.ws.num_ranks;
    const uint32_t mine = found.rank == peer ? static_cast<uint32_t>(found.slot - peer * p.num_slots) : nowhere;
    const uint32_t next = __shfl_down_sync(~0u, mine, 1);
    if (lane % 2 == 0 && lane < p.top_k && s.takes_part[peer] != 0) {
      st_relaxed_sys(selections(p.ws, peer, op.parity, me) + token * s.pairs + lane / 2,
                     tagged(op.epoch, mine | (lane + 1 < p.top_k ? next : kNoSlot) << 16));
    }
  }
  if (token < p.num_tokens && lane < p.top_k) {
    p.route[32 + p.ws.num_ranks + static_cast<int64_t>(token) * p.top_k + lane] = found.slot;
  }
}

// Waits for every rank's selections and the hash of its call, words by threads, and marks them.
__device__ __forceinline__ void wait_selections(const DispatchParams& p, const Board& s, const Op& op) {
  constexpr int kAhead = 4;  // words on their way
  const int stride = p.num_slots + 1, words = p.max_tokens * s.pairs, keys = p.ws.num_ranks * stride;
  const int shift = (s.pairs & (s.pairs - 1)) == 0 ? 31 - __clz(s.pairs) : -1;
  WordWalk ahead(words + 1, blockDim.x), at(words + 1, blockDim.x);  // the last one is the hash
#pragma unroll 1
  while (at.source < p.ws.num_ranks) {
    const uint64_t* from[kAhead];
    uint64_t now[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a, ahead.next()) {
      from[a] = nullptr;
      if (ahead.source >= p.ws.num_ranks || op.excluded || s.takes_part[ahead.source] == 0) continue;
      if (ahead.word == words && ahead.source == p.ws.rank) continue;
      from[a] = ahead.word < words ? selections(p.ws, p.ws.rank, op.parity, ahead.source) + ahead.word
                                   : header(p.ws, p.ws.rank, op.parity, ahead.source) + 1;
      now[a] = ld_relaxed_sys(from[a]);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a, at.next()) {
      if (from[a] == nullptr) continue;
      uint32_t value = static_cast<uint32_t>(now[a]);
      // A peer whose call differs may have posted something else: its hash, seen by another thread, ends this wait.
      if (static_cast<uint32_t>(now[a] >> 32) != op.epoch &&
          !wait_slowly(p.ws, from[a], op.epoch, at.source, at.word < words ? kPhaseCounts : kPhaseHeader, &value,
                       &s.lost[at.source])) {
        lose_source(p, s, at.source);
        value = ~0u;
      } else if (at.word == words) {
        check_hash(p, s, op, at.source, value);
      }
      if (at.word == words) continue;
      s.chosen[at.source * words + at.word] = value;
      const int token = shift >= 0 ? at.word >> shift : at.word / s.pairs;
      uint32_t* bits = s.bits + token / 32 * keys + at.source * stride;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t slot = half == 0 ? value & 0xffff : value >> 16;
        if (slot < static_cast<uint32_t>(p.num_slots)) {
          atomicOr(&bits[slot], 1u << token % 32);
          if (p.layout == kRank) atomicOr(&bits[p.num_slots], 1u << token % 32);
        } else if (slot == kBadSlot || slot == kRepeatedSlot) {
          note_bad(p, s, at.source, slot == kRepeatedSlot, 1);
        }
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int slot = threadIdx.x; slot < stride; slot += blockDim.x) {
    uint32_t sum = 0;
#pragma unroll 1
    for (int source = 0; source < p.ws.num_ranks; ++source) {
      s.total[source * stride + slot] = sum;
      if (s.lost[source] != 0) continue;
#pragma unroll 4
      for (int tile = 0; tile < s.tiles; ++tile) sum += __popc(s.bits[tile * keys + source * stride + slot]);
    }
    s.tally[slot] = sum;
  }
#pragma unroll 1
  for (int source = threadIdx.x; source < p.ws.num_ranks; source += blockDim.x) {
    s.num_tokens[source] = s.lost[source] != 0 ? -1 : p.max_tokens;
  }
  __syncthreads();
  find_starts(p, s);
  __syncthreads();
}

// Lane k: where selection k of a token of `source` goes, from what wait_selections found.
__device__ __forceinline__ Landing land_chosen(const DispatchParams& p, const Board& s, int source, int token) {
  const int lane = threadIdx.x % 32;
  int slot = -1, position = 0;
  if (lane < p.top_k && s.num_tokens[source] >= 0) {
    const uint32_t both = s.chosen[(source * p.max_tokens + token) * s.pairs + lane / 2];
    slot = static_cast<int>(lane % 2 == 0 ? both & 0xffff : both >> 16);
    if (slot < p.num_slots) {
      const int keys = p.ws.num_ranks * (p.num_slots + 1);
      const uint32_t* bits = s.bits + source * (p.num_slots + 1) + (p.layout == kRank ? p.num_slots : slot);
#pragma unroll 4
      for (int tile = 0; tile < token / 32; ++tile) position += __popc(bits[tile * keys]);
      position += __popc(bits[token / 32 * keys] & ((1u << token % 32) - 1));
    }
  }
  return land(p, s, source, token, slot, position);
}

}  // namespace epops
