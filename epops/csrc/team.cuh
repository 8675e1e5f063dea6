// Warps of a block: teams that carry tokens, and one warp, the poster, that tells peers what has arrived.
//
// Telling means a fence that waits until the peer's memory has everything, a microsecond or more. Only the poster
// waits: teams go on, and one fence serves all tokens that were finished meanwhile.
#pragma once

#include "exchange.cuh"

namespace epops {

constexpr int kOutbox = 256;  // items of a block between the first not told and the last started

struct Team {
  int id;           // -1: this warp is in none
  int part, parts;  // this warp's part of every row
  int num_teams;
  int num_threads;  // of all warps but the poster
  bool poster;
};

// `posters`: 0 where rows travel as lines, which nobody tells of.
__device__ __forceinline__ Team my_team(int parts, int posters = 1) {
  const int warp = threadIdx.x / 32, data_warps = static_cast<int>(blockDim.x / 32) - posters;
  Team t;
  t.parts = parts;
  t.num_teams = data_warps / t.parts;
  t.id = warp < t.num_teams * t.parts ? warp / t.parts : -1;
  t.part = warp % t.parts;
  t.num_threads = data_warps * 32;
  t.poster = warp >= data_warps;
  return t;
}

// Blocks that do the same, and this one's number among them.
struct Crew {
  bool sends, places;
  int block, blocks;

  __device__ __forceinline__ explicit Crew(const Launch& launch) {
    const int all = gridDim.x, here = blockIdx.x, senders = launch.num_senders;
    const bool apart = senders < all;
    sends = !apart || here < senders;
    places = !apart || here >= senders;
    block = apart && places ? here - senders : here;
    blocks = !apart ? all : sends ? senders : all - senders;
  }
};

// A barrier of all warps but the poster.
__device__ __forceinline__ void team_sync(const Team& t) { barrier_sync(1, t.num_threads); }

// A barrier of one team, where all warps of the block are in teams or idle; none of its numbers is another's.
__device__ __forceinline__ void sync_team(const Team& t) {
  if (t.parts == 1) {
    __syncwarp();
  } else {
    barrier_sync(2 + t.id, t.parts * 32);
  }
}

// Items of a sending block, in order: `done` counts the warps that finished each.
struct Outbox {
  uint32_t* done;   // shared, [kOutbox], zero
  int32_t* posted;  // shared: items told, zero

  // Reads and writes that no barrier orders are atomic.
  __device__ __forceinline__ void begin(int item) const {
    while (item - atomicAdd(posted, 0) >= kOutbox) __nanosleep(100);
  }
  // [D] releases this warp's stores to the poster.
  __device__ __forceinline__ void finish(int item) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      fence_acq_rel_cta();
      atomicAdd(&done[item % kOutbox], 1u);
    }
  }
  // The poster's loop: `tell(first, count)` after a fence that covers items [first, first + count).
  template <class Tell>
  __device__ __forceinline__ void post(int num_items, int parts, Tell tell) const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int next = 0; next < num_items;) {
      const int item = next + lane;
      const bool ready = item < num_items && atomicAdd(&done[item % kOutbox], 0u) == static_cast<uint32_t>(parts);
      const uint32_t missing = ~__ballot_sync(~0u, ready);
      const int count = missing == 0 ? 32 : __ffs(missing) - 1;
      if (count == 0) continue;
      __syncwarp();         // a lane may tell of what another one saw
      fence_acq_rel_sys();  // [D] acquires, too
      tell(next, count);
      if (lane < count) atomicExch(&done[item % kOutbox], 0u);
      __syncwarp();
      next += count;
      if (next < num_items && lane == 0) {
        fence_acq_rel_cta();
        atomicExch(posted, next);
      }
    }
  }
};

// Items of an op to teams: by turns, or, where a team is one warp, from a counter as warps come free.
struct Turns {
  uint32_t* work;
  int next, step, dynamic;

  __device__ __forceinline__ Turns(const Launch& launch, const Team& t, uint32_t* work)
      : work(work), dynamic(launch.dynamic) {
    next = blockIdx.x + t.id * gridDim.x;
    step = gridDim.x * t.num_teams;
  }
  __device__ __forceinline__ int take() {
    if (dynamic) {
      uint32_t item = 0;
      if (threadIdx.x % 32 == 0) item = atomicAdd(work, 1u);
      return static_cast<int>(__shfl_sync(~0u, item, 0));
    }
    const int mine = next;
    next += step;
    return mine;
  }
};

// Brings line `thread` of [from, from + bytes) into the L1 without waiting for it. The result means nothing, but has to
// be used somewhere, late, for the load to be kept.
__device__ __forceinline__ uint32_t touch(const void* from, int64_t bytes, int thread) {
  uint32_t value = 0;
  if (thread * 128 < bytes)
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(static_cast<const uint8_t*>(from) + thread * 128));
  return value;
}

}  // namespace epops
