// Placement from selections alone, for a dispatch of few tokens: every rank posts where each selection of its tokens
// goes, every block reads the selections of all ranks and finds every row's place from one bit a (source, slot, token).
// Counts and positions are population counts, and no rank counts for another.
#pragma once

#include "landing.cuh"

namespace epops {

// Selections that go nowhere; others are slots of the rank that is told, in 12 bits.
constexpr uint32_t kNoSlot = 0xfff, kBadSlot = 0xffe, kRepeatedSlot = 0xffd;
constexpr int kLineSlots = 8;  // to 96 bits, before the epoch

// Places, and what only this kernel has.
struct Board : Places {
  uint4* chosen;     // [R][M][lines] eight slots a line, as they were posted
  int lines, tiles;  // lines of a token; words of 32 tokens
};

__host__ __device__ inline uint64_t board_words(const DispatchParams& p) {
  const uint64_t stride = p.num_slots + 1, num_ranks = p.ws.num_ranks, tiles = (p.max_tokens + 31) / 32;
  const uint64_t words = num_ranks * stride * (1 + tiles) + 2 * stride + 3 * num_ranks + kNumWords;
  return 4 * num_ranks * p.max_tokens * chosen_lines(p.top_k) + (words + 3) / 4 * 4;
}

__device__ __forceinline__ Board carve_board(uint8_t* shared, const DispatchParams& p) {
  const int keys = p.ws.num_ranks * (p.num_slots + 1);
  Board s{};
  s.lines = chosen_lines(p.top_k);
  s.tiles = (p.max_tokens + 31) / 32;
  s.chosen = reinterpret_cast<uint4*>(shared);
  s.bits = reinterpret_cast<uint32_t*>(s.chosen + p.ws.num_ranks * p.max_tokens * s.lines);
  s.words = reinterpret_cast<int32_t*>(s.bits + keys * s.tiles);
  s.total = reinterpret_cast<uint32_t*>(s.words + kNumWords);
  s.start = reinterpret_cast<int32_t*>(s.total + keys);
  s.tally = s.start + p.num_slots + 1;
  s.num_tokens = s.tally + p.num_slots + 1;
  s.takes_part = s.num_tokens + p.ws.num_ranks;
  s.lost = reinterpret_cast<uint32_t*>(s.takes_part + p.ws.num_ranks);
  return s;
}

// Where a token's selections go, to every rank that takes part, this one too; by one warp, lane k with selection k.
__device__ __forceinline__ void post_selections(const DispatchParams& p, const Board& s, const Op& op,
                                                const Selection& found, int token) {
  const int lane = threadIdx.x % 32, me = p.ws.rank, place = lane % kLineSlots;
  const uint32_t nowhere = found.bad ? kBadSlot : found.repeated ? kRepeatedSlot : kNoSlot;
#pragma unroll 1
  for (int i = 1; i <= p.ws.num_ranks; ++i) {
    const int peer = (me + i) % p.ws.num_ranks;
    if (s.takes_part[peer] == 0) continue;
    const uint32_t mine = found.rank == peer ? static_cast<uint32_t>(found.slot - peer * p.num_slots) : nowhere;
    // Slot i of a line has its bits 12 i to 12 i + 11.
    const int word = place * 12 / 32, shift = place * 12 % 32;
    const uint64_t bits = static_cast<uint64_t>(mine) << shift;
    uint32_t x = word == 0 ? static_cast<uint32_t>(bits) : 0;
    uint32_t y = word == 1 ? static_cast<uint32_t>(bits) : word == 0 ? static_cast<uint32_t>(bits >> 32) : 0;
    uint32_t z = word == 2 ? static_cast<uint32_t>(bits) : word == 1 ? static_cast<uint32_t>(bits >> 32) : 0;
#pragma unroll
    for (int step = 1; step < kLineSlots; step <<= 1) {
      x |= __shfl_xor_sync(~0u, x, step);
      y |= __shfl_xor_sync(~0u, y, step);
      z |= __shfl_xor_sync(~0u, z, step);
    }
    if (place == 0 && lane < p.top_k) {
      st_line(selections(p.ws, peer, op.parity, me) + (token * s.lines + lane / kLineSlots) * 16,
              make_uint4(x, y, z, op.epoch));
    }
  }
  if (token < p.num_tokens && lane < p.top_k) {
    p.route[32 + p.ws.num_ranks + static_cast<int64_t>(token) * p.top_k + lane] = found.slot;
  }
}

// Slot k of a line of four words, or what stands for none.
__device__ __forceinline__ uint32_t slot_of(const uint32_t* words, int k) {
  return __funnelshift_r(words[k * 12 / 32], words[k * 12 / 32 + 1], k * 12 % 32) & 0xfff;
}

// Lines of all ranks, numbered one after the other: number i is this one.
struct LineOf {
  uint32_t source, line;
  __device__ __forceinline__ LineOf(const DispatchParams& p, uint32_t i, uint32_t num_lines) {
    source = num_lines == 1 ? i : p.ws.num_ranks == 1 ? 0 : __umulhi(i, p.lines_inverse);
    line = i - source * num_lines;
  }
};

// A line of `source` that was not there at once; one of no selections where it does not come. A peer whose call differs
// may have posted something else: then its hash, which is not `hash`, ends the wait.
inline __device__ __noinline__ uint4 wait_line(const Workspace& ws, uint32_t* lost, int32_t* words, uint32_t epoch,
                                               uint32_t hash, int source, const uint8_t* from) {
  const uint4 none = make_uint4(~0u, ~0u, ~0u, 0);
  uint64_t start = 0;
#pragma unroll 1
  for (uint32_t spin = 1;; ++spin) {
    const uint4 now = ld_line(from);
    if (now.w == epoch) return now;
    if (static_cast<int32_t>(now.w - epoch) > 0) {  // the others are in a later op: they went on without this rank
      report(ws, kExcluded, source, kPhaseCounts, epoch);
      break;
    }
    if (spin % 64 != 0) continue;
    if (*static_cast<const volatile uint32_t*>(&lost[source]) != 0) break;
    const uint64_t theirs = ld_relaxed_sys(header(ws, ws.rank, epoch & 1, source) + 1);
    if (source != ws.rank && static_cast<uint32_t>(theirs >> 32) == epoch && static_cast<uint32_t>(theirs) != hash) {
      disagree(ws, lost, words, epoch, source);
      return none;
    }
    if (is_over(ws, epoch, source, kPhaseCounts, &start)) break;
  }
  lose_source(ws, lost, words, source);
  return none;
}

// The hash of a peer's call that was not there at once, or is another than `hash`.
inline __device__ __noinline__ void see_hash(const Workspace& ws, uint32_t* lost, int32_t* words, uint32_t epoch,
                                             uint32_t hash, int peer) {
  uint32_t theirs = 0;
  const uint64_t* word = header(ws, ws.rank, epoch & 1, peer) + 1;
  if (!wait_slowly(ws, word, epoch, peer, kPhaseHeader, &theirs, &lost[peer])) {
    lose_source(ws, lost, words, peer);
  } else if (theirs != hash) {
    disagree(ws, lost, words, epoch, peer);
  }
}

// A line has selections that counted as -1.
inline __device__ __noinline__ void note_odd(uint4 line, int32_t* words, bool own) {
#pragma unroll 1
  for (int k = 0; k < kLineSlots; ++k) {
    const uint32_t slot = line.x & 0xfff;
    line.x = __funnelshift_r(line.x, line.y, 12);
    line.y = __funnelshift_r(line.y, line.z, 12);
    line.z >>= 12;
    if (slot != kBadSlot && slot != kRepeatedSlot) continue;
    note_bad(words, own, slot == kRepeatedSlot, 1);
  }
}

// From the bits: rows of each slot from sources before, and where each slot's group starts. By the whole block.
__device__ __forceinline__ void find_places(const DispatchParams& p, const Board& s) {
  const int stride = p.num_slots + 1, keys = p.ws.num_ranks * stride, lane = threadIdx.x % 32;
  const bool at_once = stride <= static_cast<int>(blockDim.x);  // a thread a slot
  __shared__ int32_t sums[kLineThreads / 32];
#pragma unroll 1
  for (int slot = threadIdx.x; slot < stride; slot += blockDim.x) {
    uint32_t sum = 0;
#pragma unroll 1
    for (int source = 0; source < p.ws.num_ranks; ++source) {
      const uint32_t* bits = s.bits + source * stride + slot;
      s.total[source * stride + slot] = sum;
      if (s.lost[source] != 0) continue;
#pragma unroll 4
      for (int tile = 0; tile < s.tiles; ++tile) sum += __popc(bits[tile * keys]);
    }
    s.tally[slot] = sum;
  }
#pragma unroll 1
  for (int source = threadIdx.x; source < p.ws.num_ranks; source += blockDim.x) {
    s.num_tokens[source] = s.lost[source] != 0 ? -1 : p.max_tokens;
  }
  if (!at_once) {
    __syncthreads();
    find_starts(p, s);
    __syncthreads();
    return;
  }
  const int slot = threadIdx.x, tally = slot < stride ? s.tally[slot] : 0;
  int width = slot < p.num_slots ? tally : 0;
  if (p.alignment > 1) width = (width + p.alignment - 1) / p.alignment * p.alignment;
  int end = width;
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const int other = __shfl_up_sync(~0u, end, step);
    if (lane >= step) end += other;
  }
  if (lane == 31) sums[threadIdx.x / 32] = end;
  __syncthreads();
  if (slot - lane < stride) {
    const int of_warp = lane < static_cast<int>(threadIdx.x / 32) ? sums[lane] : 0;
    end += static_cast<int>(__reduce_add_sync(~0u, static_cast<unsigned>(of_warp)));
    const int start = end - width;
    int kept = 0;
    if (slot < p.num_slots) {
      s.start[slot] = p.layout == kBatched ? slot * p.ws.num_ranks * p.max_tokens : start;
      kept = p.layout == kExpert ? min(tally, max(0, p.capacity - start)) : p.layout == kRank ? 0 : tally;
    } else if (slot == p.num_slots) {
      s.start[slot] = start;  // the last aligned end
      kept = p.layout == kRank ? min(tally, p.capacity) : 0;
    }
    kept = static_cast<int>(__reduce_add_sync(~0u, static_cast<unsigned>(kept)));
    if (lane == 0) atomicAdd(&s.words[kRowsKept], kept);
  }
  __syncthreads();
}

// Waits for every rank's selections and the hash of its call, lines by threads, marks them, and finds where each slot's
// group starts.
__device__ __forceinline__ void wait_selections(const DispatchParams& p, const Board& s, const Op& op) {
  const uint32_t num_lines = p.max_tokens * s.lines, all = p.ws.num_ranks * num_lines;
  const int stride = p.num_slots + 1, keys = p.ws.num_ranks * stride, peer = threadIdx.x;
  const bool hashes = peer < p.ws.num_ranks && peer != p.ws.rank && !op.excluded && s.takes_part[peer] != 0;
  const auto place_of = [&](uint32_t i) -> const uint8_t* {
    const LineOf at(p, i, num_lines);
    if (i >= all || op.excluded || s.takes_part[at.source] == 0) return nullptr;
    return selections(p.ws, p.ws.rank, op.parity, at.source) + at.line * 16;
  };
  // Keeps a line and marks its selections, a bit each.
  const auto keep = [&](uint32_t i, const uint8_t* from, uint4 line) {
    if (from == nullptr) return;
    const LineOf at(p, i, num_lines);
    if (line.w != op.epoch) line = wait_line(p.ws, s.lost, s.words, op.epoch, p.call_hash, at.source, from);
    s.chosen[i] = line;
    const uint32_t token = s.lines == 1 ? at.line : at.line / s.lines, bit = 1u << token % 32;
    uint32_t* bits = s.bits + token / 32 * keys + at.source * stride;
    const uint32_t of_line[4] = {line.x, line.y, line.z, line.w};
    bool any = false, odd = false;
#pragma unroll
    for (int k = 0; k < kLineSlots; ++k) {
      const uint32_t slot = slot_of(of_line, k);
      const bool here = slot < static_cast<uint32_t>(p.num_slots);
      if (here) atomicOr(&bits[slot], bit);
      any |= here;
      odd |= slot == kBadSlot || slot == kRepeatedSlot;
    }
    if (any && p.layout == kRank) atomicOr(&bits[p.num_slots], bit);
    if (odd) note_odd(line, s.words, at.source == static_cast<uint32_t>(p.ws.rank));
  };
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < all; i += 2 * blockDim.x) {  // two on their way
    const uint32_t next = i + blockDim.x;
    const uint8_t *from = place_of(i), *from_next = place_of(next);
    uint4 line = make_uint4(0, 0, 0, 0), line_next = line;
    if (from != nullptr) line = ld_line(from);
    if (from_next != nullptr) line_next = ld_line(from_next);
#pragma unroll 1
    for (int a = 0; a < 2; ++a) {
      keep(a == 0 ? i : next, from, line);
      from = from_next;
      line = line_next;
    }
  }
  if (threadIdx.x < 32) trace(6);
  if (hashes) see_hash(p.ws, s.lost, s.words, op.epoch, p.call_hash, peer);
  __syncthreads();
  if (threadIdx.x < 32) trace(7);
  find_places(p, s);
}

// Lane k: where selection k of a token of `source` goes, from what wait_selections found.
__device__ __forceinline__ Landing land_chosen(const DispatchParams& p, const Board& s, int source, int token) {
  const int lane = threadIdx.x % 32;
  int slot = -1, position = 0;
  if (lane < p.top_k && s.num_tokens[source] >= 0) {
    const int line = (source * p.max_tokens + token) * s.lines + lane / kLineSlots;
    slot = static_cast<int>(slot_of(reinterpret_cast<const uint32_t*>(s.chosen + line), lane % kLineSlots));
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
