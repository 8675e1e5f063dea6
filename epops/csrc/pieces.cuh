// What both kernels of all_to_all know of a rank's pieces: which there are, where they lie, how they are received when
// they may have any size and peers may be wrong or lost.
#pragma once

#include "boxes.cuh"
#include "ring.cuh"
#include "team.cuh"

namespace epops {

constexpr int kQuickTurns = 1000;  // of a wait for several words at once, before the one that ends

struct Peer {
  Box out;               // what goes there
  Box in;                // where what comes from there lies; where nothing may be put there, what to clear
  int64_t expected;      // steps that this rank says come from there, where it does
  int64_t sent_at;       // first step of the piece for it
  uint64_t bytes_from;   // of the piece that comes
  uint32_t sent;         // steps of the piece for it
  uint32_t split, came;  // of the piece that comes: steps along the scattered dim and along the gathered one
  uint32_t chunks_to, chunks_from, base_to, base_from;  // base: chunks of the peers before it
  int32_t takes_part;
  int32_t lost;   // stopped taking part on the way
  int32_t wrong;  // nothing of it is put anywhere
};

struct Shared {
  Box tail, side;  // to clear: behind the last piece, beside all pieces
  int32_t failed, posted, bits, num_bad, num_items, rounds_to, rounds_from, disagrees_with;
  int64_t num_rows, num_dropped;
  uint32_t done[kOutbox];
  unsigned long long items[kOutbox];  // peer, chunk; read and written atomically, as the outbox orders them
};

__device__ __forceinline__ Peer* peers(Shared* s) { return reinterpret_cast<Peer*>(s + 1); }

// ---- what goes where
// -------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool is_tagged(const AllToAllParams& p, uint64_t bytes) {
  return bytes <= static_cast<uint64_t>(p.ws.tagged_bytes);
}

// Both sides of a pair know the size of its piece, and so how it is cut.
__device__ __forceinline__ uint32_t chunk_size(const AllToAllParams& p, uint64_t bytes) {
  uint32_t size = p.min_chunk;
  if (!is_tagged(p, bytes)) {
    while (size * 64ull < bytes && size * 2 <= p.ws.slot_bytes) size *= 2;
    if (size * 64ull < bytes) size = p.ws.slot_bytes;
  }
  return size;
}

__device__ __forceinline__ uint32_t num_chunks(uint64_t bytes, uint32_t size) {
  const uint64_t up = bytes + size - 1;
  // 64-bit division is slow, and sizes seldom need it.
  return up >> 32 == 0 ? static_cast<uint32_t>(up) / size : static_cast<uint32_t>(up / size);
}

__device__ __forceinline__ int64_t clamp(int64_t value, int64_t most) {
  return value < 0 ? 0 : value > most ? most : value;
}

// Of warp 0: `value` of the lanes before, from `total` on.
template <class T>
__device__ __forceinline__ T before(T value, T* total) {
  T sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(~0u, sum, step);
    if (static_cast<int>(threadIdx.x) >= step) sum += other;
  }
  const T first = *total + sum - value;
  *total += __shfl_sync(~0u, sum, 31);
  return first;
}

// What the splits say of one rank, asked for before anything else is waited for.
struct Given {
  int64_t wanted, at, expected;
  bool good_plan;
  uint32_t dead;
};

__device__ __forceinline__ Given ask(const AllToAllParams& p, int rank) {
  Given g{p.even_split, 0, 0, true, 0};
  if (rank >= p.ws.num_ranks) {
    g.wanted = 0;
    return g;
  }
  if (p.plan != nullptr) {
    const int64_t* sections = p.plan + 4 + rank;
    g.wanted = sections[0];
    g.at = sections[p.ws.num_ranks];
    g.expected = sections[2 * p.ws.num_ranks];
    // Both words, whatever the first is: the second must not wait for it.
    g.good_plan = (p.plan[0] == 1) & (p.plan[1] == p.ws.num_ranks);
  }
  if (p.input_splits != nullptr) g.wanted = p.input_splits[rank];
  if (p.output_splits != nullptr) g.expected = p.output_splits[rank];
  g.dead = ld_relaxed_sys(&control(p.ws, p.ws.rank)->dead[rank]);
  return g;
}

// Headers of all peers, by the data threads of a block.
__device__ __forceinline__ void wait_headers(const AllToAllParams& p, Shared* s, const Op& op) {
#pragma unroll 1
  for (int i = threadIdx.x; i < p.ws.num_ranks * 4; i += kDataThreads) {
    const int rank = i / 4, word = i % 4;
    Peer& peer = peers(s)[rank];
    if (rank == p.ws.rank || !peer.takes_part) continue;
    uint32_t value = 0;
    if (!wait_word(p.ws, header(p.ws, p.ws.rank, op.parity, rank) + word, op.epoch, rank, kPhaseHeader, &value)) {
      s->failed = 1;
      peer.lost = 1;
      atomicOr(&s->bits, ld_relaxed_sys(&control(p.ws, p.ws.rank)->excluded) != 0 ? kExcluded : kTimeout);
    } else if (word == 0) {
      peer.split = value;
    } else if (word == 1 && value != p.call_hash) {
      peer.wrong = 1;
      s->disagrees_with = rank;
      atomicOr(&s->bits, kDisagree);
    } else if (word == 2 && value != 0) {
      atomicOr(&s->bits, static_cast<int>(value));
    } else if (word == 3 && p.scatter_at != p.gather_at) {
      peer.came = value;
    }
  }
}

// Warp 0 of every block: where each piece lies in the result, and what stays empty.
__device__ __forceinline__ void lay_out_received(const AllToAllParams& p, Shared* s) {
  const int lane = threadIdx.x, num_ranks = p.ws.num_ranks, me = p.ws.rank;
  const bool same = p.scatter_at == p.gather_at;
  const bool expects = p.output_splits != nullptr || p.plan != nullptr;
  const int64_t own_split = peers(s)[me].sent;
  const int64_t step_bytes = p.gather_unit * p.out_stride[p.gather_at];
  const uint64_t out = reinterpret_cast<uint64_t>(p.out);
  int64_t placed_before = 0, rows = 0, dropped = 0;
  uint32_t chunks_before = 0, most = 0;
  int bits = 0;
#pragma unroll 1
  for (int first = 0; first < num_ranks; first += 32) {
    const int rank = first + lane;
    int64_t placed = 0;
    if (rank < num_ranks) {
      Peer& peer = peers(s)[rank];
      const bool absent = !peer.takes_part || peer.lost || peer.wrong;  // wrong: of another op, its sizes mean nothing
      if (absent) peer.split = peer.came = 0;
      if (same) peer.came = peer.split;
      const int64_t expected = peer.expected;
      if (!absent && ((expects && peer.came != expected) || (!same && peer.split != own_split))) {
        peer.wrong = 1;
        bits |= kDisagree;
        s->disagrees_with = rank;
      }
      placed = expects ? clamp(expected, int64_t{1} << 31) : peer.came;
      if (absent) peer.wrong = 1;
      rows += peer.came;
      if (blockIdx.x == 0) p.counts[rank] = peer.came;
    }
    const int64_t at = before(placed, &placed_before);
    if (rank < num_ranks) {
      Peer& peer = peers(s)[rank];
      const int64_t from = clamp(at, p.gather_out);
      // What is wrong leaves its place empty; that is cleared along the whole of the other dim, but for its side.
      const int64_t along_g = peer.wrong ? clamp(placed, p.gather_out - from) : peer.came;
      const int64_t along_s = same ? along_g : peer.wrong ? clamp(own_split, p.scatter_out) : peer.split;
      const int64_t room_g = clamp(along_g, p.gather_out - from);
      const int64_t room_s = same ? room_g : clamp(along_s, p.scatter_out);
      make_box(p, p.out_stride, &peer.in, out + from * step_bytes, along_s, along_g, room_s, room_g);
      if (!peer.wrong) dropped += along_g - room_g;
      if (!same) dropped += peer.split - clamp(peer.split, p.scatter_out);
      peer.bytes_from = static_cast<uint64_t>(peer.split) * (same ? 1 : peer.came) * p.cell_bytes;
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int first = 0; first < num_ranks; first += 32) {
    const int step = first + lane, rank = (me + step) % num_ranks;
    Peer& peer = peers(s)[rank];
    uint32_t chunks = 0;
    if (step < num_ranks) {
      chunks = num_chunks(peer.bytes_from, rank == me ? kSelfChunk : chunk_size(p, peer.bytes_from));
      if (rank == me && peer.wrong) chunks = 0;
    }
    const uint32_t base = before(chunks, &chunks_before);
    if (step < num_ranks) {
      peer.chunks_from = chunks;
      peer.base_from = base;
    }
    most = max(most, __reduce_max_sync(~0u, chunks));
  }
  bits = static_cast<int>(__reduce_or_sync(~0u, static_cast<unsigned>(bits)));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    rows += __shfl_xor_sync(~0u, rows, step);
    dropped += __shfl_xor_sync(~0u, dropped, step);
  }
  if (lane == 0) {
    const int64_t end = clamp(placed_before, p.gather_out), split = clamp(own_split, p.scatter_out);
    const int64_t empty = p.gather_out - end;
    s->tail.bytes = s->side.bytes = 0;
    if (empty > 0) {
      make_box(p, p.out_stride, &s->tail, out + end * step_bytes, same ? empty : p.scatter_out, empty,
               same ? empty : p.scatter_out, empty);
    }
    if (!same && split < p.scatter_out) {
      make_box(p, p.out_stride, &s->side, out + split * p.scatter_unit * p.out_stride[p.scatter_at],
               p.scatter_out - split, end, p.scatter_out - split, end);
    }
    s->bits |= bits | (dropped != 0 ? kOverflow : 0);
    s->num_rows = rows;
    s->num_dropped = dropped;
    s->rounds_from = static_cast<int>((most + p.num_receivers - 1) / p.num_receivers);
  }
}

// ---- sending and receiving
// -------------------------------------------------------------------------------------------

// Two tagged words for 8 bytes, four for a unit.
__device__ __forceinline__ void put_tagged(uint8_t* words, uint32_t unit, uint32_t epoch, uint4 v) {
  st_16(words + unit * 32ull, make_uint4(v.x, epoch, v.y, epoch));
  st_16(words + unit * 32ull + 16, make_uint4(v.z, epoch, v.w, epoch));
}

inline __device__ __noinline__ uint4 take_tagged_slowly(const AllToAllParams& p, Shared* s, const Op& op, int source,
                                                        const uint8_t* words) {
  uint32_t v[4] = {0, 0, 0, 0};
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    if (!wait_word(p.ws, reinterpret_cast<const uint64_t*>(words) + i, op.epoch, source, kPhaseRows, &v[i])) {
      s->failed = 1;
      break;
    }
  }
  return make_uint4(v[0], v[1], v[2], v[3]);
}

__device__ __forceinline__ uint4 take_tagged(const AllToAllParams& p, Shared* s, const Op& op, int source,
                                             const uint8_t* piece, uint32_t unit) {
  const uint8_t* words = piece + unit * 32ull;
  // All words at every turn: one way to memory after the last has come, not one for each.
#pragma unroll 1
  for (int turn = 0; turn < kQuickTurns; ++turn) {
    const uint4 a = ld_relaxed_sys_16(words), b = ld_relaxed_sys_16(words + 16);
    if (a.y == op.epoch && a.w == op.epoch && b.y == op.epoch && b.w == op.epoch) {
      return make_uint4(a.x, a.z, b.x, b.z);
    }
  }
  return take_tagged_slowly(p, s, op, source, words);
}

__device__ __forceinline__ void receive_all(const AllToAllParams& p, Shared* s, const Op& op, const Team& t) {
  const int me = p.ws.rank, num_ranks = p.ws.num_ranks;
  const uint32_t turns = p.num_receivers;
#pragma unroll 1
  for (int round = 0; round < s->rounds_from; ++round) {
#pragma unroll 1
    for (int step = 0; step < num_ranks; ++step) {
      const int rank = (me + step) % num_ranks;
      Peer& peer = peers(s)[rank];
      const uint32_t chunk = (blockIdx.x + turns - peer.base_from % turns) % turns + round * turns;
      if (chunk >= peer.chunks_from) continue;
      if (rank == me) {
        copy_own(p, peer.out, peer.in, units_of(peer.bytes_from, chunk, kSelfChunk));
        continue;
      }
      const Units u = units_of(peer.bytes_from, chunk, chunk_size(p, peer.bytes_from));
      const bool is_small = is_tagged(p, peer.bytes_from);
      const uint32_t slots = p.ws.ring_slots, slot = chunk % slots;
      bool here = true;
      if (!is_small && threadIdx.x % 32 == 0) {  // [R]
        here = wait_at_least(p.ws, chunk_flag(p.ws, me, op.parity, rank, slot), op.epoch, chunk + 1, rank, kPhaseRows);
        if (!here) s->failed = 1;
      }
      here = __shfl_sync(~0u, here, 0);
      if (here && !peer.wrong) {
        if (is_small) {
          const uint8_t* words = tagged_piece(p.ws, me, op.parity, rank);
          write_box(p, peer.in, u, [&](uint32_t unit) { return take_tagged(p, s, op, rank, words, unit); });
        } else {
          empty_slot(p, peer.in, u, chunk_data(p.ws, me, op.parity, rank, slot));
        }
      }
      if (!is_small && chunk + slots < peer.chunks_from) {
        // Loads that went into stores are done: behind this barrier nobody needs the slot.
        team_sync(t);
        if (threadIdx.x == 0) {
          st_relaxed_sys(chunk_credit(p.ws, rank, op.parity, me, slot), tagged(op.epoch, chunk + 1));
        }
      }
    }
  }
}

// A peer that is in another call waits for no credit of this one.
__device__ __forceinline__ void free_strangers(const AllToAllParams& p, Shared* s, const Op& op) {
#pragma unroll 1
  for (int rank = 0; rank < p.ws.num_ranks; ++rank) {
    const Peer& peer = peers(s)[rank];
    if (rank == p.ws.rank || !peer.takes_part || peer.lost || !peer.wrong || peer.bytes_from != 0) continue;
#pragma unroll 1
    for (int slot = threadIdx.x; slot < p.ws.ring_slots; slot += kDataThreads) {
      st_relaxed_sys(chunk_credit(p.ws, rank, op.parity, p.ws.rank, slot), tagged(op.epoch, 0xffffffffu));
    }
  }
}

__device__ __forceinline__ void write_status(const AllToAllParams& p, Shared* s, const Op& op) {
  const int epoch = static_cast<int>(op.epoch & 0x7fffffff);
  const int32_t words[8] = {
      s->bits, static_cast<int32_t>(s->num_rows), static_cast<int32_t>(s->num_dropped), s->num_bad, 0, -1, epoch, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) p.status[i] = words[i];
  if (s->bits != 0) report(p.ws, s->bits, s->disagrees_with, kPhaseHeader, op.epoch);
}

// A peer was lost on the way: blocks may have seen it at different times and put pieces to different places, so the
// whole result counts as zero.
inline __device__ __noinline__ void clear_all(const AllToAllParams& p) {
  uint64_t bytes = p.element_bytes;
#pragma unroll 1
  for (int d = 0; d < p.num_dims; ++d) {
    bytes *= static_cast<uint64_t>(d == p.gather_at    ? p.gather_out * p.gather_unit
                                   : d == p.scatter_at ? p.scatter_out * p.scatter_unit
                                                       : p.size[d]);
  }
  uint8_t* out = static_cast<uint8_t*>(p.out);
  const uint64_t whole = bytes / 16 * 16;
#pragma unroll 1
  for (uint64_t at = threadIdx.x * 16ull; at < whole; at += blockDim.x * 16ull) st_16(out + at, make_uint4(0, 0, 0, 0));
  if (threadIdx.x < bytes - whole) out[whole + threadIdx.x] = 0;
#pragma unroll 1
  for (int rank = threadIdx.x; rank < p.ws.num_ranks; rank += blockDim.x) p.counts[rank] = 0;
  if (threadIdx.x == 0) {
    p.status[0] |= kTimeout;
    p.status[1] = 0;
  }
}

// What a block does once its data threads have all headers, by those.
__device__ __forceinline__ void take_pieces(const AllToAllParams& p, Shared* s, const Op& op, const Team& t) {
  team_sync(t);
  if (threadIdx.x < 32) lay_out_received(p, s);
  team_sync(t);
  if (blockIdx.x == 0 && (s->bits & kDisagree) != 0) free_strangers(p, s, op);
  if (blockIdx.x < p.num_receivers) receive_all(p, s, op, t);
  if (blockIdx.x == 0 && threadIdx.x == 0) write_status(p, s, op);
  clear_box(p, s->tail);
  clear_box(p, s->side);
#pragma unroll 1
  for (int rank = 0; rank < p.ws.num_ranks; ++rank) {
    if (peers(s)[rank].wrong) clear_box(p, peers(s)[rank].in);
  }
}

}  // namespace epops
