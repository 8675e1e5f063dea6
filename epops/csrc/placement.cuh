// The receiver's half of placement: from everybody's counts to the first row of each (source, slot).
#pragma once

#include "routing.cuh"

namespace epops {

// A wait for a word of `source` has ended without it. By pointers: a struct by reference would lie in memory.
__device__ __forceinline__ void lose_source(const Workspace& ws, uint32_t* lost, int32_t* words, int source) {
  *const_cast<volatile uint32_t*>(&lost[source]) = 1;
  words[kFailed] = 1;
  if (ld_relaxed_sys(&control(ws, ws.rank)->excluded) != 0) {
    atomicOr(&words[kBits], kExcluded);
  } else if (is_dead(ws, source)) {
    atomicOr(&words[kBits], kTimeout);
  }
}
__device__ __forceinline__ void lose_source(const DispatchParams& p, const Places& s, int source) {
  lose_source(p.ws, s.lost, s.words, source);
}

__device__ __forceinline__ void disagree(const Workspace& ws, uint32_t* lost, int32_t* words, uint32_t epoch,
                                         int source) {
  *const_cast<volatile uint32_t*>(&lost[source]) = 1;
  atomicOr(&words[kBits], kDisagree);
  report(ws, kDisagree, source, kPhaseHeader, epoch);
}
__device__ __forceinline__ void check_hash(const DispatchParams& p, const Places& s, const Op& op, int source,
                                           uint32_t hash) {
  if (hash != p.call_hash) disagree(p.ws, s.lost, s.words, op.epoch, source);
}

// Selections of a source that counted as -1: its bits are everybody's, their number its own.
__device__ __forceinline__ void note_bad(int32_t* words, bool own, bool repeated, int num) {
  atomicOr(&words[kBits], repeated ? kDuplicate : kBadIndex);
  if (own) atomicAdd(&words[repeated ? kNumRepeated : kNumBad], num);
}

// Where each slot's group starts, from `tally`, by the first warp, a lane several slots in a row.
__device__ __forceinline__ void find_starts(const DispatchParams& p, const Places& s) {
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x, each = (p.num_slots + 31) / 32;
    const int first = min(lane * each, p.num_slots), last = min(first + each, p.num_slots);
    int sum = 0, kept = 0;
#pragma unroll 1
    for (int slot = first; slot < last; ++slot) {
      s.start[slot] = sum;
      const int tally = s.tally[slot];
      sum += p.alignment == 1 ? tally : (tally + p.alignment - 1) / p.alignment * p.alignment;
    }
    int end = sum;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const int other = __shfl_up_sync(~0u, end, step);
      if (lane >= step) end += other;
    }
#pragma unroll 1
    for (int slot = first; slot < last; ++slot) {
      const int start = end - sum + s.start[slot];
      s.start[slot] = p.layout == kBatched ? slot * p.ws.num_ranks * p.max_tokens : start;
      kept += p.layout == kExpert ? min(s.tally[slot], max(0, p.capacity - start)) : s.tally[slot];
    }
    kept = static_cast<int>(__reduce_add_sync(~0u, static_cast<unsigned>(kept)));
    if (lane == 31) {
      s.start[p.num_slots] = end;  // the last aligned end
      if (p.layout == kRank) kept = min(s.tally[p.num_slots], p.capacity);
      s.words[kRowsKept] = kept;
    }
  }
}

// Walks words 0, 1, … of all sources, one of `threads` threads each, without a division a word.
struct WordWalk {
  int source, word;
  int words, step_source, step_word;

  __device__ __forceinline__ WordWalk(int words, int threads) : words(words) {
    source = static_cast<int>(threadIdx.x) / words;
    word = static_cast<int>(threadIdx.x) % words;
    step_source = threads / words;
    step_word = threads % words;
  }
  __device__ __forceinline__ void next() {
    source += step_source;
    word += step_word;
    if (word >= words) {
      word -= words;
      ++source;
    }
  }
};

// Waits for the header and counts of every rank, words by threads. On return `total` has the rows for a slot from
// sources and chunks before, `tally` the rows of a slot, `start` the first row of its group; kBits gathers every rank's
// bits. By all warps but the poster.
__device__ __forceinline__ void wait_counts(const DispatchParams& p, const Places& s, const Op& op, const Team& t) {
  constexpr int kAhead = 9;   // words on their way: all that a thread has, of 256 experts on two ranks
  constexpr int kSummed = 8;  // chunks summed at once
  const CountWords layout(p);
  const int stride = p.num_slots + 1, words = layout.words;
  const int of_source = 2 + p.num_chunks * words;
#pragma unroll 1
  for (int source = threadIdx.x; source < p.ws.num_ranks; source += t.num_threads) {
    if (op.excluded || s.takes_part[source] == 0) s.lost[source] = 1;
    if (op.excluded) atomicOr(&s.words[kBits], kExcluded);
  }
  WordWalk ahead(of_source, t.num_threads), at(of_source, t.num_threads);
  const uint32_t by_words = 0xffffffffu / words + 1;  // x / words is the high half of x * by_words for small x
#pragma unroll 1
  while (at.source < p.ws.num_ranks) {
    uint64_t now[kAhead];
    uint32_t asked = 0;
    const auto place_of = [&](const WordWalk& walk) {
      const uint32_t word = walk.word - 2, chunk = __umulhi(word, by_words);
      return walk.word < 2 ? header(p.ws, p.ws.rank, op.parity, walk.source) + walk.word
                           : counts(p.ws, p.ws.rank, op.parity, walk.source, chunk) + (word - chunk * words);
    };
#pragma unroll
    for (int a = 0; a < kAhead; ++a, ahead.next()) {
      if (ahead.source >= p.ws.num_ranks || op.excluded || s.takes_part[ahead.source] == 0) continue;
      now[a] = ld_relaxed_sys(place_of(ahead));
      asked |= 1u << a;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a, at.next()) {
      if ((asked >> a & 1) == 0) continue;
      const int source = at.source;
      const uint32_t chunk = __umulhi(at.word - 2, by_words);
      const int word = at.word - 2 - static_cast<int>(chunk) * words;
      uint32_t value = static_cast<uint32_t>(now[a]);
      // A peer whose call differs may have sent other counts: its hash, seen by another thread, ends this wait.
      if (static_cast<uint32_t>(now[a] >> 32) != op.epoch &&
          !wait_slowly(p.ws, place_of(at), op.epoch, source, at.word < 2 ? kPhaseHeader : kPhaseCounts, &value,
                       &s.lost[source])) {
        lose_source(p, s, source);
      } else if (at.word == 0) {
        s.num_tokens[source] = static_cast<int>(min(value, static_cast<uint32_t>(p.max_tokens)));
      } else if (at.word == 1) {
        check_hash(p, s, op, source, value);
      } else if (word < layout.first_bad) {
        const int slot = word << layout.paired;
        const uint32_t most = static_cast<uint32_t>(p.max_tokens);
        uint32_t* to = s.total + (source * p.num_chunks + chunk) * stride + slot;
        to[0] = min(layout.paired != 0 ? value & 0xffff : value, most);
        if (layout.paired != 0 && slot < p.num_slots) to[1] = min(value >> 16, most);
      } else if (value != 0) {
        note_bad(s.words, source == p.ws.rank, word > layout.first_bad, static_cast<int>(value));
      }
    }
  }
  team_sync(t);
#pragma unroll 1
  for (int slot = threadIdx.x; slot < stride; slot += t.num_threads) {
    uint32_t sum = 0;
#pragma unroll 1
    for (int source = 0; source < p.ws.num_ranks; ++source) {
      uint32_t* at = s.total + source * p.num_chunks * stride + slot;
      const int num = s.lost[source] == 0 ? p.num_chunks : 0;  // whose counts count
#pragma unroll 1
      for (int chunk = 0; chunk < p.num_chunks; chunk += kSummed) {
        uint32_t now[kSummed];
#pragma unroll
        for (int a = 0; a < kSummed; ++a) now[a] = chunk + a < num ? at[(chunk + a) * stride] : 0;
#pragma unroll
        for (int a = 0; a < kSummed; ++a) {
          if (chunk + a < p.num_chunks) at[(chunk + a) * stride] = sum;
          sum += now[a];
        }
      }
    }
    s.tally[slot] = sum;
  }
#pragma unroll 1
  for (int source = threadIdx.x; source < p.ws.num_ranks; source += t.num_threads) {
    if (s.lost[source] != 0) s.num_tokens[source] = -1;
  }
  team_sync(t);
  find_starts(p, s);
  team_sync(t);
}

// A row's number from its chunk (of all ranks'), slot and position; -2 where it found no room.
__device__ __forceinline__ int row_of(const DispatchParams& p, const Places& s, int chunk, int slot, int position) {
  const int stride = p.num_slots + 1;
  const int64_t row = p.layout == kRank ? int64_t{s.total[chunk * stride + p.num_slots]} + position
                                        : int64_t{s.start[slot]} + s.total[chunk * stride + slot] + position;
  return row < p.capacity ? static_cast<int>(row) : -2;
}

__device__ __forceinline__ void clear_row_facts(const DispatchParams& p, int row) {
  const int width = p.layout == kRank ? p.top_k : 1;
#pragma unroll 1
  for (int k = 0; k < width; ++k) {
    p.row_weights[static_cast<int64_t>(row) * width + k] = 0.f;
    p.row_expert[static_cast<int64_t>(row) * width + k] = -1;
  }
  p.row_source[row] = -1;
}

__device__ __forceinline__ void zero_row(const DispatchParams& p, int row) {  // by one warp
  const int lane = threadIdx.x % 32;
  uint8_t* to = p.rows + static_cast<int64_t>(row) * p.row_bytes;
#pragma unroll 1
  for (int at = lane * 16; at < p.row_bytes; at += 512) st_16(to + at, make_uint4(0, 0, 0, 0));
#pragma unroll 1
  for (int b = lane; b < p.num_scales; b += 32) {
    const int64_t at = row * p.out_scale_row_stride + b * p.out_scale_block_stride;
    if (p.out_scale_bytes == 4) {
      reinterpret_cast<uint32_t*>(p.scales)[at] = 0;
    } else {
      p.scales[at] = 0;
    }
  }
}

// Everything that follows from the counts alone, by `here` threads of every one of `blocks` blocks: gaps, the facts of
// rows that do not exist, counts, ends.
__device__ __forceinline__ void write_frame(const DispatchParams& p, const Places& s, int here_thread, int here,
                                            int block, int blocks) {
  const int thread = block * here + here_thread, threads = blocks * here;
  const int lane = threadIdx.x % 32;
  if (p.layout == kExpert) {
    // Alignment gaps are zero rows: a NaN there would poison weight gradients.
#pragma unroll 1
    for (int slot = block; slot < p.num_slots; slot += blocks) {
      const int first = s.start[slot] + s.tally[slot];
      const int last = min(s.start[slot + 1], p.capacity);
#pragma unroll 1
      for (int row = first + here_thread / 32; row < last; row += here / 32) {
        zero_row(p, row);
        if (lane == 0) clear_row_facts(p, row);
      }
    }
  }
  if (p.layout == kBatched) {
    const int width = p.ws.num_ranks * p.max_tokens;
#pragma unroll 1
    for (int row = thread; row < p.num_slots * width; row += threads) {
      if (row % width >= s.tally[row / width]) clear_row_facts(p, row);
    }
  } else {
    const int first = p.layout == kRank ? s.tally[p.num_slots] : s.start[p.num_slots];
#pragma unroll 1
    for (int row = first + thread; row < p.capacity; row += threads) clear_row_facts(p, row);
  }
  if (block == blocks - 1) {  // the last block: it sends nothing where only some do
#pragma unroll 1
    for (int slot = here_thread; slot < p.num_slots; slot += here) {
      int rows = s.tally[slot];
      if (p.layout == kExpert) rows = min(rows, max(0, p.capacity - s.start[slot]));
      p.expert_counts[slot] = rows;
      if (p.layout == kExpert) p.expert_ends[slot] = min(s.start[slot + 1], p.capacity);
    }
    if (p.layout == kRank) {
#pragma unroll 1
      for (int source = here_thread; source < p.ws.num_ranks; source += here) {
        const int end = source + 1 < p.ws.num_ranks
                            ? s.total[(source + 1) * p.num_chunks * (p.num_slots + 1) + p.num_slots]
                            : s.tally[p.num_slots];
        p.expert_ends[source] = min(end, p.capacity);
      }
    }
#pragma unroll 1
    for (int rank = here_thread; rank < p.ws.num_ranks; rank += here) p.route[32 + rank] = s.takes_part[rank];
  }
}

// Route header and status, by one warp of block 0, whose counts of bad selections are those of the whole rank.
__device__ __forceinline__ void write_facts(const DispatchParams& p, const Places& s, const Op& op) {
  int total = 0;
  if (p.layout == kRank) {
    total = s.tally[p.num_slots];
  } else {
#pragma unroll 1
    for (int slot = threadIdx.x % 32; slot < p.num_slots; slot += 32) total += s.tally[slot];
#pragma unroll 1
    for (int step = 16; step > 0; step >>= 1) total += __shfl_xor_sync(~0u, total, step);
  }
  const int lane = threadIdx.x % 32;
  const int kept = s.words[kRowsKept], dropped = total - kept;
  const int bits = s.words[kBits] | (dropped != 0 ? kOverflow : 0);
  const int epoch = static_cast<int>(op.epoch & 0x7fffffff);
  const int facts[16] = {0x45504f31,     1,           p.layout,      p.num_tokens, p.max_tokens, p.top_k,
                         p.ws.num_ranks, p.num_slots, p.capacity,    p.alignment,  p.ws.rank,    epoch,
                         kept,           p.lane,      p.num_experts, dropped};
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < 16; ++i) p.route[i] = facts[i];
#pragma unroll
    for (int i = 16; i < 32; ++i) p.route[i] = 0;
    p.status[0] = bits;
    p.status[1] = kept;
    p.status[2] = dropped;
    p.status[3] = s.words[kNumBad];
    p.status[4] = s.words[kNumRepeated];
    p.status[5] = -1;
    p.status[6] = epoch;
    p.status[7] = 0;
    if (bits != 0) report(p.ws, bits, -1, kPhaseCounts, op.epoch);
  }
}

}  // namespace epops
