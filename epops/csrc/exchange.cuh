// What every exchange kernel does around its rows: epochs, headers, waits that end, and the end of an op.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace epops {

// Where the time of a kernel goes: built with -DEPOPS_TRACE, each block keeps the clock at some points; see bench
// --trace.
#ifdef EPOPS_TRACE
constexpr int kTracePoints = 12;
static __device__ unsigned long long trace_clock[256 * kTracePoints];
__device__ __forceinline__ void trace(int point) {
  if (threadIdx.x % 32 == 0) trace_clock[blockIdx.x * kTracePoints + point] = clock64();
}
#else
__device__ __forceinline__ void trace(int) {}
#endif

// At the start of a rank's memory. `progress` grows by kEpochStep an op, in shares: block 0 adds what the others leave,
// so the epoch changes when the last block of an op is done, and no block has to wait to find out which one is the
// last.
struct Control {
  uint64_t progress;
  uint32_t num_failed;       // blocks of this op that met a failure
  uint32_t excluded;         // nonzero: a peer took this rank out of its mask at that epoch; peers store it
  uint32_t work[2];          // chunks taken by groups, by parity
  uint64_t region[2];        // bytes of the data area that the last op of this parity used
  uint32_t dead[kMaxRanks];  // 1: took too long once
};
constexpr uint64_t kEpochStep = 1 << 16;
constexpr uint64_t kHeaderOffset = 4096;  // [2][kMaxRanks][4] tagged: T, hash of the call, status bits, a fourth
constexpr uint64_t kHeaderEnd = kHeaderOffset + 2 * kMaxRanks * 4 * 8;
static_assert(sizeof(Control) <= kHeaderOffset, "the control block must fit before the headers");

struct Op {
  uint32_t epoch;
  int parity;
  bool excluded;
  bool overlaps;  // this op's records lie where the op before has some
};

__device__ __forceinline__ Control* control(const Workspace& ws, int rank) {
  return reinterpret_cast<Control*>(ws.base[rank]);
}
__device__ __forceinline__ uint64_t* header(const Workspace& ws, int owner, int parity, int source) {
  return reinterpret_cast<uint64_t*>(ws.base[owner] + kHeaderOffset) + (parity * kMaxRanks + source) * 4;
}
__device__ __forceinline__ uint64_t* counts(const Workspace& ws, int owner, int parity, int source, int chunk) {
  return reinterpret_cast<uint64_t*>(ws.base[owner] + ws.counts_offset) +
         static_cast<uint64_t>((parity * ws.num_ranks + source) * max_chunks(ws.num_ranks) + chunk) *
             (ws.max_slots + kCountWords);
}
__device__ __forceinline__ uint64_t* flag(const Workspace& ws, int owner, int parity, int source, int token) {
  return reinterpret_cast<uint64_t*>(ws.base[owner] + ws.flags_offset) +
         static_cast<uint64_t>(parity * ws.num_ranks + source) * ws.max_tokens + token;
}
__device__ __forceinline__ uint2* entries(const Workspace& ws, int owner, int parity, int source, int token) {
  return reinterpret_cast<uint2*>(ws.base[owner] + ws.entries_offset) +
         (static_cast<uint64_t>(parity * ws.num_ranks + source) * ws.max_tokens + token) * ws.max_top_k;
}
__device__ __forceinline__ uint8_t* selections(const Workspace& ws, int owner, int parity, int source) {
  return reinterpret_cast<uint8_t*>(ws.base[owner] + ws.selections_offset) +
         static_cast<uint64_t>(parity * ws.num_ranks + source) * ws.board_tokens * chosen_lines(ws.max_top_k) * 16;
}
// Bytes of the data area that an op takes.
__device__ __forceinline__ uint64_t region_bytes(const Workspace& ws, int max_tokens, int record_bytes) {
  return static_cast<uint64_t>(ws.num_ranks - 1) * max_tokens * record_bytes;
}
// Slot of `token` of rank `source` in the memory of `owner`; a rank keeps no slots for itself.
__device__ __forceinline__ uint8_t* record(const Workspace& ws, int owner, int parity, int source, int token,
                                           int max_tokens, int record_bytes) {
  const uint64_t index = static_cast<uint64_t>(source < owner ? source : source - 1) * max_tokens + token;
  const uint64_t start = parity == 0 ? 0 : ws.data_bytes - region_bytes(ws, max_tokens, record_bytes);
  return reinterpret_cast<uint8_t*>(ws.base[owner] + ws.data_offset) + start + index * record_bytes;
}

__device__ __forceinline__ uint64_t tagged(uint32_t epoch, uint32_t value) {
  return static_cast<uint64_t>(epoch) << 32 | value;
}

// Every block reads the epoch for itself; blocks of one op agree, for `progress` reaches the next epoch only with the
// last.
__device__ __forceinline__ Op begin_op(const Workspace& ws, uint64_t region) {
  Control* here = control(ws, ws.rank);
  Op op;
  op.epoch = static_cast<uint32_t>(ld_relaxed_gpu(&here->progress) / kEpochStep) + 1;
  op.parity = op.epoch & 1;
  op.excluded = ld_relaxed_sys(&here->excluded) != 0;
  op.overlaps = region != 0 && ld_relaxed_gpu(&here->region[op.parity ^ 1]) + region > ws.data_bytes;
  return op;
}

// By one thread of a block, for all of it after its next barrier: words that every warp of the chip asks for queue up
// at the one place where they lie, for a microsecond.
__device__ __forceinline__ void begin_op(const Workspace& ws, uint64_t region, Op* of_block) {
  if (threadIdx.x == 0) *of_block = begin_op(ws, region);
}

__device__ __forceinline__ bool is_dead(const Workspace& ws, int rank) {
  return ld_relaxed_sys(&control(ws, ws.rank)->dead[rank]) != 0;
}

// Errors go straight to words that the host reads whenever it likes, one a bit, so that nobody has to read what others
// wrote; the first one's particulars stay until the host has seen them.
inline __device__ __noinline__ void report(const Workspace& ws, int bits, int peer, int phase, uint32_t epoch) {
  if (ws.error_host == nullptr) return;
  volatile int32_t* host = ws.error_host;
  if (host[0] == 0) {
    host[1] = peer;
    host[2] = phase;
    host[3] = epoch;
    __threadfence_system();
    host[0] = 1;
  }
#pragma unroll 1
  for (int bit = 0; bit < kStatusBits; ++bit) {
    if (bits >> bit & 1) host[4 + bit] = 1;
  }
}

// Whether a wait for a peer has to end: it or this rank is out of the mask. The first to run out of time takes the peer
// out, for every wait that follows, and tells the peer. `start` is 0 before the first call: the clock is slow to read.
inline __device__ __noinline__ bool is_over(const Workspace& ws, uint32_t epoch, int peer, int phase, uint64_t* start) {
  Control* here = control(ws, ws.rank);
  if (ld_relaxed_sys(&here->dead[peer]) != 0) return true;
  if (ld_relaxed_sys(&here->excluded) != 0) {
    report(ws, kExcluded, peer, phase, epoch);
    return true;
  }
  const uint64_t now = global_timer_ns();
  if (*start == 0) *start = now;
  if (now - *start <= ws.timeout_ns) return false;
  if (atomicExch(&here->dead[peer], 1u) == 0) {
    report(ws, kTimeout, peer, phase, epoch);
    st_relaxed_sys(&control(ws, peer)->excluded, epoch);
  }
  return true;
}

// A word of this op, or false: see is_over.
inline __device__ __noinline__ bool wait_slowly(const Workspace& ws, const uint64_t* word, uint32_t epoch, int peer,
                                                int phase, uint32_t* value, const uint32_t* give_up,
                                                uint32_t at_least = 0) {
  uint64_t start = 0;
#pragma unroll 1
  for (uint32_t spin = 1;; ++spin) {
    const uint64_t now = ld_relaxed_sys(word);
    const uint32_t tag = static_cast<uint32_t>(now >> 32);
    if (tag == epoch && static_cast<uint32_t>(now) >= at_least) {
      *value = static_cast<uint32_t>(now);
      return true;
    }
    if (static_cast<int32_t>(tag - epoch) > 0) {  // the others are in a later op: they went on without this rank
      report(ws, kExcluded, peer, phase, epoch);
      return false;
    }
    if (spin % 64 == 0) {
      if (give_up != nullptr && *static_cast<const volatile uint32_t*>(give_up) != 0) return false;
      if (is_over(ws, epoch, peer, phase, &start)) return false;
    }
  }
}

// [A] What the peer's poster released before the word may be read after it. An acquiring load would empty the L1 at
// every turn of the wait; instead, what peers write is read by ld_no_allocate alone, after the branch on this word:
// such a load finds nothing in the L1, where no line of that memory ever is, and the L2 has what was released. A wait
// ends early when `give_up` (shared memory) becomes nonzero.
__device__ __forceinline__ bool wait_word(const Workspace& ws, const uint64_t* word, uint32_t epoch, int peer,
                                          int phase, uint32_t* value, const uint32_t* give_up = nullptr) {
  const uint64_t now = ld_relaxed_sys(word);
  *value = static_cast<uint32_t>(now);
  if (static_cast<uint32_t>(now >> 32) == epoch) return true;
  *value = 0;
  return wait_slowly(ws, word, epoch, peer, phase, value, give_up);
}

// The words that open an op.
__device__ __forceinline__ void post_header(const Workspace& ws, const Op& op, int peer, int num_tokens, uint32_t hash,
                                            int bits) {
  uint64_t* words = header(ws, peer, op.parity, ws.rank);
  st_relaxed_sys(&words[0], tagged(op.epoch, num_tokens));
  st_relaxed_sys(&words[1], tagged(op.epoch, hash));
  st_relaxed_sys(&words[2], tagged(op.epoch, bits));
}

// Words of a header, one a thread: T, the hash of the call, status bits.
constexpr int kHeaderWords = 3;

// Whether rows may be stored at `peer`; by the threads of a block that sends, after this rank has posted its header. A
// peer that has opened this op has read all rows of the one before.
__device__ __forceinline__ bool may_store(const Workspace& ws, const Op& op, int peer) {
  uint32_t unused;
  return !op.overlaps || peer == ws.rank ||
         wait_word(ws, header(ws, ws.rank, op.parity, peer), op.epoch, peer, kPhaseHeader, &unused);
}

// Every rank opens every op with a header to every peer, and ends it only when it has theirs: see Workspace. Warp 0 of
// one block waits for them, a lane a word, and writes the status; `takes_part(rank)` says whose to wait for.
template <class Params, class TakesPart>
__device__ __forceinline__ void close_headers(const Params& p, const Op& op, bool good_route, int* failed,
                                              TakesPart takes_part) {
  const int lane = threadIdx.x % 32;
  int bits = good_route ? 0 : kBadRoute;
  if (op.excluded) {
    bits |= kExcluded;
  } else {
#pragma unroll 1
    for (int i = lane; i < p.ws.num_ranks * kHeaderWords; i += 32) {
      const int peer = i / kHeaderWords, word = i % kHeaderWords;
      uint32_t value = 0;
      if (peer == p.ws.rank || !takes_part(peer)) continue;
      if (!wait_word(p.ws, header(p.ws, p.ws.rank, op.parity, peer) + word, op.epoch, peer, kPhaseHeader, &value)) {
        *failed = 1;
        bits |= ld_relaxed_sys(&control(p.ws, p.ws.rank)->excluded) != 0 ? kExcluded : kTimeout;
      } else if (word == 1 && value != p.call_hash) {
        bits |= kDisagree;
        report(p.ws, kDisagree, peer, kPhaseHeader, op.epoch);
      } else if (word == 2) {
        bits |= static_cast<int>(value);
      }
    }
  }
  bits = static_cast<int>(__reduce_or_sync(~0u, static_cast<unsigned>(bits)));
  if (lane == 0) {
    const int32_t words[8] = {bits, 0, 0, 0, 0, -1, static_cast<int32_t>(op.epoch & 0x7fffffff), 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) p.status[i] = words[i];
    if (bits != 0) report(p.ws, bits, -1, kPhaseHeader, op.epoch);
  }
}

// The last thing a block does. `mend` runs in one block, after all others are done, when a peer was lost on the way.
template <class Mend>
__device__ __forceinline__ void end_op(const Workspace& ws, const Op& op, uint64_t region, int* failed_here,
                                       Mend mend) {
  __shared__ uint32_t order;
  Control* here = control(ws, ws.rank);
  const uint64_t share = blockIdx.x == 0 ? kEpochStep - (gridDim.x - 1) : 1;
  __syncthreads();
  if (*failed_here != 0) {
    if (threadIdx.x == 0) {
      order = atomicAdd(&here->num_failed, 1u);
      if (order == 0) {
        const uint64_t others = static_cast<uint64_t>(op.epoch) * kEpochStep - share;
        while (ld_relaxed_gpu(&here->progress) != others) {
        }
        // Blocks do not fence before they sign off, which would cost every op a microsecond. After a timeout there is
        // time: what they stored has long landed when this has passed.
        const uint64_t start = global_timer_ns();
        while (global_timer_ns() - start < 200000) {
        }
        __threadfence();
        here->num_failed = 0;
      }
    }
    __syncthreads();
    if (order == 0) mend();
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    if (blockIdx.x == 0) {
      here->work[op.parity ^ 1] = 0;  // of the next op; nobody else looks at it now
      here->region[op.parity] = region;
    }
    atomicAdd(reinterpret_cast<unsigned long long*>(&here->progress), static_cast<unsigned long long>(share));
  }
}

}  // namespace epops
