// A group of warps that handles one chunk of tokens: each token by `parts` warps, all parts of a row in step.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace epops {

struct Group {
  int id, thread, num_threads;
  int token, part;  // this warp's token in the chunk, and its part of the row
  int parts, chunk_tokens;
};

__device__ __forceinline__ Group my_group(const Launch& launch) {
  Group g;
  g.num_threads = launch.group_warps * 32;
  g.id = threadIdx.x / g.num_threads;
  g.thread = threadIdx.x % g.num_threads;
  g.parts = launch.warps_per_token;
  g.token = g.thread / 32 / g.parts;
  g.part = g.thread / 32 % g.parts;
  g.chunk_tokens = launch.group_warps / g.parts;
  return g;
}

__device__ __forceinline__ void group_sync(const Group& g) { barrier_sync(1 + g.id, g.num_threads); }

// Chunks of an op to groups: by turns, or from a counter in the control block as groups come free.
struct Turns {
  uint32_t* work;
  int32_t* given;  // shared, [2][kMaxGroups]
  int next, step, turn, dynamic;

  __device__ __forceinline__ Turns(const Launch& launch, const Group& g, uint32_t* work, int32_t* given)
      : work(work), given(given), turn(0), dynamic(launch.dynamic) {
    next = blockIdx.x + g.id * gridDim.x;
    step = gridDim.x * (blockDim.x / g.num_threads);
  }
  __device__ __forceinline__ int take(const Group& g) {
    if (dynamic) {
      // A group is at most one turn ahead of its slowest warp, so two words are enough.
      int32_t* word = &given[(turn++ & 1) * kMaxGroups + g.id];
      if (g.thread == 0) *word = atomicAdd(work, 1u);
      group_sync(g);
      return *const_cast<volatile int32_t*>(word);
    }
    const int mine = next;
    next += step;
    return mine;
  }
};

}  // namespace epops
