// The rings of combine_streams.cu: rows on their way to a team's shared memory, each with what it is worth and what to
// do after it.
#pragma once

#include <cstddef>

#include "bulk.cuh"
#include "params.h"

namespace epops {

// What consumers do about a row of the ring, in this order.
enum Command : uint32_t {
  kNoRow = 1,      // there is none: nothing to add
  kStop = 2,       // nothing comes any more
  kAddend = 4,     // the sum is scaled before this row is added
  kAnswerEnd = 8,  // the sum is the answer to a peer's token; bits 8 and up say which item of the outbox
  kOwnEnd = 16,    // the sum is this rank's own answer: it is rounded and kept, and a new sum begins
  kOwnNow = 32,    // the own answer is added
  kOut = 64        // the sum is the result, scaled unless it has been
};

// Beside each row of a ring.
struct alignas(32) Head {
  uint64_t full, empty;  // barriers; `empty` of the last place of a group says that the places of the group are
  uint4 facts;           // weight that the row is multiplied by, command, address that kAnswerEnd or kOut store to
};

__host__ __device__ inline int row_room(const CombineParams& p) { return (p.hidden * 2 + 127) / 128 * 128; }
__host__ __device__ inline int num_teams(const CombineParams& p) {
  return (p.launch.num_threads / 32 - 1) / (p.launch.send_warps + 1);
}

#if __CUDA_ARCH__ >= 900

constexpr uint32_t kEmpty = offsetof(Head, empty), kFacts = offsetof(Head, facts);

__device__ __forceinline__ int team_bytes(const CombineParams& p) {
  return p.stream_rows * (row_room(p) + static_cast<int>(sizeof(Head)));
}

// A team's ring as one warp sees it: where the next row and its head lie in shared memory. Rows of all teams come
// first, then their heads, then words. Consumers give places back in groups: a fence and an arrival of every lane for
// every row are 7 % of a sender's time. Groups of a short ring are smaller, so that enough places are left for rows on
// their way. A producer that waits for a group has asked for all rows that were there before, so that it is emptied.
struct Rows {
  uint32_t first_row, first_head, end_head;
  uint32_t row, head;  // addresses in shared memory
  uint32_t room, ring, parity;
  uint32_t rest_of_group;  // bytes of heads between the first and the last of a group

  __device__ __forceinline__ Rows(const CombineParams& p, const void* memory, int team, uint32_t parity)
      : room(row_room(p)), ring(p.stream_rows * room), parity(parity) {
    rest_of_group = ((p.stream_rows >= 12 ? 4 : p.stream_rows >= 8 ? 2 : 1) - 1) * static_cast<uint32_t>(sizeof(Head));
    const uint32_t start = shared_address(memory), heads = p.stream_rows * static_cast<uint32_t>(sizeof(Head));
    row = first_row = start + team * p.stream_rows * room;
    head = first_head = start + num_teams(p) * p.stream_rows * room + team * heads;
    end_head = first_head + heads;
  }
  // Head of the last place of the group.
  __device__ __forceinline__ uint32_t last() const {
    const uint32_t end = first_head + ((head - first_head) | rest_of_group);
    return min(end, end_head - static_cast<uint32_t>(sizeof(Head)));
  }
  // The barrier that the group is emptied by.
  __device__ __forceinline__ uint32_t empty() const { return last() + kEmpty; }
  // By one row, which the group has.
  __device__ __forceinline__ void step() {
    head += sizeof(Head);
    row += room;
  }
  // By no more rows than there are.
  __device__ __forceinline__ void advance(uint32_t num = 1) {
    head += num * static_cast<uint32_t>(sizeof(Head));
    row += num * room;
    if (head >= end_head) {
      head -= end_head - first_head;
      row -= ring;
      parity ^= 1;
    }
  }
};

// By one lane, which has waited for the place to be empty itself: the row at `place` of the ring will be `bytes` of
// `from`, or none where the command says kNoRow.
__device__ __forceinline__ void put_at(const Rows& place, const void* from, uint32_t bytes, float weight,
                                       uint32_t command, const void* where) {
  const uint64_t to = reinterpret_cast<uint64_t>(where);
  st_shared_16(place.head + kFacts, make_uint4(__float_as_uint(weight), command, static_cast<uint32_t>(to),
                                               static_cast<uint32_t>(to >> 32)));
  if ((command & kNoRow) != 0) {
    arrive(place.head);
  } else {
    arrive_and_expect(place.head, bytes);
    bulk_copy(place.row, from, bytes, place.head);
  }
}

// By all lanes of the producer: one row.
__device__ __forceinline__ void put(Rows& rows, const void* from, uint32_t bytes, float weight, uint32_t command,
                                    const void* where) {
  if (threadIdx.x % 32 == 0) {
    await_parity(rows.empty(), rows.parity);
    put_at(rows, from, bytes, weight, command, where);
  }
  __syncwarp();
  rows.advance();
}

#endif

}  // namespace epops
