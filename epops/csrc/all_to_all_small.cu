// all_to_all of little: everything that a rank sends travels as words that carry data and epoch together.
//
// The same words in the same places as those of all_to_all.cu, so that each rank of a call may run either: which one
// follows from what it has itself. Here a rank's way through the op is as short as it can be. Two warps of a block find
// what is sent and where it lies; all but the last take lines of 512 bytes, to peers first, then this rank's own,
// which it keeps in registers until their place is known. Meanwhile the last warp waits for the headers of all peers
// and finds every piece's place, and lines that come go to the result as their words appear. Nothing is told, fenced or
// counted, and nobody waits for another block.
//
// That is so where all is well. Splits that disagree, ranks that are lost or do not take part, pieces that do not fit
// or are larger than words go for: then the block does what those of all_to_all.cu do from here on.
#include "launch.cuh"
#include "pieces.cuh"

namespace epops {
namespace {

constexpr uint32_t kLineUnits = 32, kLineBytes = 512;  // a unit a lane

constexpr int kPlaced = 2;  // barrier: all headers are here, and every piece has its place

// Of a block, beside `Shared`.
struct Lines {
  Op op;
  uint32_t to, from;                                      // lines to and from peers
  int32_t clean;                                          // no header says anything that lines are not made for
  uint32_t base_to[kSmallRanks], base_from[kSmallRanks];  // lines of the ranks before
};

// By a warp, over as many lanes as there are ranks: `value` of the lanes before, and of all.
__device__ __forceinline__ uint32_t lanes_before(int num_ranks, uint32_t value, uint32_t* total) {
  uint32_t sum = value;
#pragma unroll 1
  for (int step = 1; step < num_ranks; step *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, sum, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) sum += other;
  }
  *total = __shfl_sync(~0u, sum, num_ranks - 1);
  return sum - value;
}

// The rank whose lines, of `base` on, the warp's line is one of; ranks without any are passed over.
__device__ __forceinline__ int rank_of_line(const uint32_t* base, int num_ranks, uint32_t line) {
  const int lane = threadIdx.x % 32;
  return 31 - __clz(__ballot_sync(~0u, lane < num_ranks && base[lane] <= line));
}

// Units of a stream by the steps that it has, and the last one with what is left.
inline __device__ __noinline__ uint4 read_in_steps(const AllToAllParams& p, const Box& b, uint32_t unit) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (unit == static_cast<uint32_t>(b.bytes / 16)) return read_rest(p, p.x_stride, b, unit);
  for_step(b.step, [&](auto step) {
    constexpr int kStep = decltype(step)::value;
    v = read_unit<kStep>(p, p.x_stride, b, run_steps<kStep>(p, b), unit);
  });
  return v;
}

inline __device__ __noinline__ void write_in_steps(const AllToAllParams& p, const Box& b, uint32_t unit, uint4 v) {
  if (unit == static_cast<uint32_t>(b.bytes / 16)) return write_rest(p, p.out_stride, b, unit, v);
  for_step(b.step, [&](auto step) {
    constexpr int kStep = decltype(step)::value;
    write_unit<kStep>(p, p.out_stride, b, run_steps<kStep>(p, b), unit, v);
  });
}

__device__ __forceinline__ uint32_t units_in(const Box& b) { return (static_cast<uint32_t>(b.bytes) + 15) / 16; }
__device__ __forceinline__ uint32_t lines_in(uint32_t bytes) { return (bytes + kLineBytes - 1) / kLineBytes; }

// Of a unit of 16 bytes.
__device__ __forceinline__ uint64_t address_of(const AllToAllParams& p, const int64_t* stride, const Box& b,
                                               uint32_t unit) {
  return b.plain ? b.base + unit * 16ull : locate<16>(p, stride, b, run_steps<16>(p, b), unit);
}

template <bool kWhole>
__device__ __forceinline__ uint4 read_stream(const AllToAllParams& p, const Box& b, uint32_t unit) {
  if constexpr (kWhole) {
    return load_plain(address_of(p, p.x_stride, b, unit));
  } else {
    return read_in_steps(p, b, unit);
  }
}

template <bool kWhole>
__device__ __forceinline__ void write_stream(const AllToAllParams& p, const Box& b, uint32_t unit, uint4 v) {
  if constexpr (kWhole) {
    store_plain(address_of(p, p.out_stride, b, unit), v);
  } else {
    write_in_steps(p, b, unit, v);
  }
}

// Zeros to a box, a line a warp.
template <bool kWhole>
__device__ __forceinline__ void clear_lines(const AllToAllParams& p, const Box& b, uint32_t first, uint32_t turns) {
  const uint32_t units = units_in(b);
#pragma unroll 1
  for (uint32_t unit = first * kLineUnits + threadIdx.x % 32; unit < units; unit += turns * kLineUnits) {
    write_stream<kWhole>(p, b, unit, make_uint4(0, 0, 0, 0));
  }
}

// A lane a rank: the piece that goes there, clamped to x whatever the splits say, as lay_out_sent does it.
struct Sent {
  int64_t from;          // its first step
  uint32_t split, mine;  // its steps along the scattered dim and, where that is another, along the gathered one
  int num_bad;           // of all pieces
};

__device__ __forceinline__ Sent find_sent(const AllToAllParams& p, const Given& given) {
  const int lane = threadIdx.x % 32, num_ranks = p.ws.num_ranks;
  const bool same = p.scatter_at == p.gather_at, is_rank = lane < num_ranks;
  const bool expects = p.output_splits != nullptr || p.plan != nullptr;
  const int64_t wanted = given.good_plan ? given.wanted : 0;
  const int64_t in_x = clamp(wanted, p.scatter_in);
  int64_t at = lane * p.even_split;
  if (p.plan != nullptr) {
    at = given.good_plan ? given.at : 0;
  } else if (p.input_splits != nullptr) {
    uint32_t total;
    at = lanes_before(num_ranks, static_cast<uint32_t>(in_x), &total);
  }
  Sent sent;
  sent.from = clamp(at, p.scatter_in);
  sent.split = is_rank ? static_cast<uint32_t>(clamp(in_x, p.scatter_in - sent.from)) : 0;
  sent.num_bad = __any_sync(~0u, !given.good_plan) +
                 __popc(__ballot_sync(~0u, is_rank && (wanted != sent.split || at != sent.from)));
  const uint32_t expected_of_me =
      __shfl_sync(~0u, static_cast<uint32_t>(clamp(given.expected, p.gather_in)), p.ws.rank);
  sent.mine = same ? 0 : expects ? expected_of_me : static_cast<uint32_t>(p.gather_in);
  return sent;
}

// Warp 1 of every block: where the pieces that this rank sends lie.
__device__ __forceinline__ void lay_out_boxes(const AllToAllParams& p, Shared* s, const Given& given) {
  const int lane = threadIdx.x % 32;
  const Sent sent = find_sent(p, given);
  const uint32_t along_g = p.scatter_at == p.gather_at ? sent.split : sent.mine;
  if (lane < p.ws.num_ranks) {
    make_box(p, p.x_stride, &peers(s)[lane].out,
             reinterpret_cast<uint64_t>(p.x) + sent.from * p.scatter_unit * p.x_stride[p.scatter_at], sent.split,
             along_g, sent.split, along_g);
  }
}

// Warp 0 of every block: what else there is to know of them. Block 0 tells the peers.
__device__ __forceinline__ void lay_out_lines(const AllToAllParams& p, Shared* s, Lines* l, const Op& op,
                                              const Given& given) {
  const int lane = threadIdx.x, num_ranks = p.ws.num_ranks, me = p.ws.rank;
  const bool same = p.scatter_at == p.gather_at, is_rank = lane < num_ranks;
  const Sent sent = find_sent(p, given);
  const bool takes_part = lane == me || (is_rank && !op.excluded && given.dead == 0);
  if (blockIdx.x == 0 && !op.excluded && takes_part && lane != me) {
    uint64_t* words = header(p.ws, lane, op.parity, me);
    st_16(words, make_uint4(sent.split, op.epoch, p.call_hash, op.epoch));
    st_16(words + 2, make_uint4(sent.num_bad != 0 ? kBadIndex : 0, op.epoch, sent.mine, op.epoch));
  }
  const uint32_t bytes = sent.split * (same ? 1 : sent.mine) * static_cast<uint32_t>(p.cell_bytes);
  uint32_t total;
  const uint32_t base = lanes_before(num_ranks, takes_part && lane != me ? lines_in(bytes) : 0, &total);
  if (is_rank) {
    Peer& peer = peers(s)[lane];
    peer.sent_at = sent.from;
    peer.sent = sent.split;
    peer.expected = given.expected;
    peer.takes_part = takes_part;
    peer.lost = peer.wrong = 0;
    peer.split = lane == me ? sent.split : 0;
    peer.came = lane != me ? 0 : same ? sent.split : sent.mine;
    l->base_to[lane] = base;
  }
  if (lane == 0) {
    l->op = op;
    l->to = total;
    s->bits = (op.excluded ? kExcluded : 0) | (sent.num_bad != 0 ? kBadIndex : 0);
    s->num_bad = sent.num_bad;
    s->disagrees_with = -1;
  }
}

// The last warp of every block, a lane a rank: waits for the headers of all peers as wait_headers does, and where they
// say what is expected finds every piece's place in the result.
__device__ __forceinline__ void await_places(const AllToAllParams& p, Shared* s, Lines* l, const Op& op) {
  const int lane = threadIdx.x % 32, num_ranks = p.ws.num_ranks, me = p.ws.rank;
  const bool same = p.scatter_at == p.gather_at, is_rank = lane < num_ranks, is_peer = is_rank && lane != me;
  const bool expects = p.output_splits != nullptr || p.plan != nullptr;
  Peer& peer = peers(s)[is_rank ? lane : me];
  const uint32_t own_split = peers(s)[me].sent;
  uint32_t split = peer.split, came = peer.came;
  bool good = !is_peer, differs = false;
  uint32_t bits = 0;
  if (is_peer && peer.takes_part != 0) {
    const uint64_t* words = header(p.ws, me, op.parity, lane);
    uint32_t value[4] = {0, 0, 0, 0};
    bool here = false;
#pragma unroll 1
    for (int turn = 0; turn < kQuickTurns && !here; ++turn) {
      const uint4 a = ld_relaxed_sys_16(words), b = ld_relaxed_sys_16(words + 2);
      here = a.y == op.epoch && a.w == op.epoch && b.y == op.epoch && b.w == op.epoch;
      value[0] = a.x, value[1] = a.z, value[2] = b.x, value[3] = b.z;
    }
    if (!here) {
      here = true;
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        uint32_t late = 0;
        here = here && wait_word(p.ws, words + word, op.epoch, lane, kPhaseHeader, &late);
        value[word] = late;
      }
    }
    if (here) {
      peer.split = split = value[0];
      came = same ? value[0] : value[3];
      peer.came = came;
      differs = value[1] != p.call_hash;
      peer.wrong = differs;
      bits = value[2] | (differs ? kDisagree : 0);
      good = bits == 0;
    } else {
      s->failed = 1;
      peer.lost = 1;
      bits = ld_relaxed_sys(&control(p.ws, me)->excluded) != 0 ? kExcluded : kTimeout;
    }
  }
  if (is_rank) {
    good = good && (!expects || came == peer.expected) && (same || split == own_split) && came <= p.gather_out;
  } else {
    came = 0;
  }
  bits = __reduce_or_sync(~0u, bits);
  const uint32_t different = __ballot_sync(~0u, differs);
  uint32_t end, total;
  const uint32_t at = lanes_before(num_ranks, came, &end);
  // Where it all fits, it has no more bytes than the result.
  bool clean =
      __all_sync(~0u, good) != 0 && s->bits == 0 && end <= p.gather_out && (same || own_split <= p.scatter_out);
  const uint32_t bytes = is_rank ? came * (same ? 1 : own_split) * static_cast<uint32_t>(p.cell_bytes) : 0;
  clean = __all_sync(~0u, clean && (!is_peer || bytes <= static_cast<uint32_t>(p.ws.tagged_bytes))) != 0;
  const uint32_t base = lanes_before(num_ranks, is_peer ? lines_in(bytes) : 0, &total);
  const uint64_t out = reinterpret_cast<uint64_t>(p.out);
  const int64_t step_bytes = p.gather_unit * p.out_stride[p.gather_at];
  if (clean) {
    if (is_rank) {
      make_box(p, p.out_stride, &peer.in, out + at * step_bytes, same ? came : own_split, came, same ? came : own_split,
               came);
      l->base_from[lane] = base;
      if (blockIdx.x == 0) p.counts[lane] = came;
    }
    if (lane < 2) {
      Box* b = lane == 0 ? &s->tail : &s->side;
      const int64_t empty = lane == 0 ? p.gather_out - end : same ? 0 : p.scatter_out - own_split;
      const int64_t along_s = same || lane == 1 ? empty : p.scatter_out, along_g = lane == 0 ? empty : end;
      b->bytes = 0;
      if (empty > 0) {
        make_box(p, p.out_stride, b,
                 out + (lane == 0 ? end * step_bytes : own_split * p.scatter_unit * p.out_stride[p.scatter_at]),
                 along_s, along_g, along_s, along_g);
      }
    }
  }
  __syncwarp();  // what the lanes have read of `s`
  if (lane == 0) {
    s->bits |= bits;
    if (different != 0) s->disagrees_with = __ffs(different) - 1;
    l->clean = clean;
    l->from = total;
    if (clean && blockIdx.x == 0) {
      s->num_rows = end;
      s->num_dropped = 0;
      write_status(p, s, op);
    }
  }
}

// Parameters come through a cache that knows nothing of them when a block begins: this brings them there while the
// kernel before still runs. Nobody reads what is stored; without that there would be no load.
__device__ __forceinline__ void warm_parameters(const AllToAllParams& p, Shared* s) {
  constexpr int kLineWords = 16;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&p);
  uint32_t all = 0;
#pragma unroll
  for (int line = 0; line < static_cast<int>(sizeof(AllToAllParams) / 4 / kLineWords); ++line) {
    all ^= words[line * kLineWords];
  }
  if (threadIdx.x % 32 == 0) s->done[threadIdx.x / 32] = all;
}

// Out of the way of what is quick.
inline __device__ __noinline__ void take_pieces_slowly(const AllToAllParams& p, Shared* s, const Op& op) {
  take_pieces(p, s, op, my_team(1));
}

// By all warps but the last one of a block: lines to peers, the own ones, and those that come, by turns of all blocks'
// warps.
template <bool kWhole>
__device__ __forceinline__ void move_lines(const AllToAllParams& p, Shared* s, const Lines& l, uint32_t turn,
                                           uint32_t turns) {
  const Op& op = l.op;
  const uint32_t lane = threadIdx.x % 32;
  const int me = p.ws.rank, num_ranks = p.ws.num_ranks;
  uint32_t line = turn;
#pragma unroll 1
  for (; line < l.to; line += turns) {
    const int rank = rank_of_line(l.base_to, num_ranks, line);
    const Box& b = peers(s)[rank].out;
    const uint32_t unit = (line - l.base_to[rank]) * kLineUnits + lane;
    if (unit < units_in(b)) {
      put_tagged(tagged_piece(p.ws, rank, op.parity, me), unit, op.epoch, read_stream<kWhole>(p, b, unit));
    }
  }
  // The first own line is read now and stored when its place is known.
  const Box& own = peers(s)[me].out;
  uint32_t unit = (line - l.to) * kLineUnits + lane;
  uint4 v = make_uint4(0, 0, 0, 0);
  if (unit < units_in(own)) v = read_stream<kWhole>(p, own, unit);
  barrier_sync(kPlaced, kAllToAllThreads);
  if (l.clean == 0) return take_pieces_slowly(p, s, op);
  if (unit < units_in(own)) write_stream<kWhole>(p, peers(s)[me].in, unit, v);
#pragma unroll 1
  for (unit += turns * kLineUnits; unit < units_in(own); unit += turns * kLineUnits) {
    write_stream<kWhole>(p, peers(s)[me].in, unit, read_stream<kWhole>(p, own, unit));
  }
  clear_lines<kWhole>(p, s->tail, turn, turns);
  clear_lines<kWhole>(p, s->side, turn, turns);
  // Warps that have sent nothing come first.
#pragma unroll 1
  for (line = turns - 1 - turn; line < l.from; line += turns) {
    const int rank = rank_of_line(l.base_from, num_ranks, line);
    const Box& b = peers(s)[rank].in;
    unit = (line - l.base_from[rank]) * kLineUnits + lane;
    if (unit < units_in(b)) {
      const uint8_t* words = tagged_piece(p.ws, me, op.parity, rank);
      write_stream<kWhole>(p, b, unit, take_tagged(p, s, op, rank, words, unit));
    }
  }
}

// kWhole: every place of x and of the result is a multiple of 16 bytes, whatever the splits are.
template <bool kWhole>
__global__ void __launch_bounds__(kAllToAllThreads, 1)
    all_to_all_small_kernel(const __grid_constant__ AllToAllParams p) {
  extern __shared__ __align__(16) uint8_t memory[];
  __shared__ Lines l;
  Shared* s = reinterpret_cast<Shared*>(memory);
  const uint32_t warp = threadIdx.x / 32;
  if (threadIdx.x == 0) s->failed = 0;
  warm_parameters(p, s);
  wait_for_earlier_kernels();
  let_next_kernel_launch();
  if (warp < 2) {
    // All that is asked for is on its way at once: ask() looks at what it gets.
    const Op begun = begin_op(p.ws, 0);
    const Given given = ask(p, static_cast<int>(threadIdx.x % 32));
    if (warp == 0) {
      lay_out_lines(p, s, &l, begun, given);
    } else {
      lay_out_boxes(p, s, given);
    }
  }
  __syncthreads();
  const Op& op = l.op;
  if (warp == kWarps) {
    await_places(p, s, &l, op);
    barrier_sync(kPlaced, kAllToAllThreads);
  } else {
    move_lines<kWhole>(p, s, l, warp * gridDim.x + blockIdx.x, gridDim.x * kWarps);
  }
  end_op(p.ws, op, 0, &s->failed, [&] { clear_all(p); });
}

}  // namespace

int launch_all_to_all_small(const AllToAllParams& p, void* stream) {
  const uint64_t shared = sizeof(Shared) + sizeof(Peer) * p.ws.num_ranks;
  const auto kernel = p.whole_units != 0 ? all_to_all_small_kernel<true> : all_to_all_small_kernel<false>;
  return launch_kernel(kernel, p, p.launch, shared, static_cast<cudaStream_t>(stream));
}

}  // namespace epops
