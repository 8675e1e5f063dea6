// combine of many tokens: a warp that only asks for rows, warps that only add them up.
//
// One kernel. In a team, one warp (the producer) reads what a route says of the tokens ahead and asks for whole rows by
// bulk copies into a ring in shared memory, each with what it is worth and what to do after it; the others (consumers)
// have 256 * kSteps channels each, and take row after row without asking where it came from. Sending blocks first make
// the answers to peers' tokens, as in combine.cu: consumers store them into the slot (this rank, token) of the peer,
// and the poster releases a flag an answer. All blocks: an own token's rows, then the answers to it, rank 0 first, as
// their flags come, then the addend are rows of the same ring. The producer alone waits for peers; what it has asked
// for comes without it. Which of this kernel and combine.cu's a rank runs is its own affair: records, flags and headers
// are the same. Sums are rounded as in combine.cu, one by one. Nothing here is for sm_80: the host chooses combine.cu.
#include "launch.cuh"
#include "stream_rows.cuh"
#include "sums.cuh"

namespace epops {
namespace {

constexpr int kUnits = 8;  // of route words that a team has room for

// What a producer has asked for of the route, unit by unit, a lane each; a lane reads only what it asked for itself.
struct Words {
  int32_t row[kUnits][32];
  int32_t slot[kUnits][32];
  float weight[kUnits][32];
};

#if __CUDA_ARCH__ >= 900

constexpr int kRouteAhead = 4;  // units that route words are asked for ahead
constexpr int kWeightAhead = 2;

// Warps of a block: teams of some consumers and a producer, and the poster.
struct Role {
  int team, part, parts, teams;
  bool produces, consumes, posts;

  __device__ __forceinline__ explicit Role(const CombineParams& p) {
    const int warp = threadIdx.x / 32;
    parts = p.launch.send_warps;
    teams = num_teams(p);
    team = warp / (parts + 1);
    part = warp % (parts + 1);
    posts = warp == static_cast<int>(blockDim.x / 32) - 1;
    produces = !posts && team < teams && part == parts;
    consumes = !posts && team < teams && part < parts;
  }
};

// ---- producing
// ------------------------------------------------------------------------------------------------------------

struct Producer {
  const CombineParams& p;
  const Op& op;
  const Route& route;
  Rows& rows;
  Words& words;
  uint32_t row_bytes;

  __device__ __forceinline__ const uint8_t* row_at(int row) const {
    return static_cast<const uint8_t*>(p.y) + static_cast<int64_t>(row) * row_bytes;
  }
  __device__ __forceinline__ void none(uint32_t command, const void* where) {
    put(rows, nullptr, 0, 0.f, kNoRow | command, where);
  }
  // Row of this lane in a unit whose words have come.
  __device__ __forceinline__ int row_of(int unit, bool has) const {
    return has ? route.checked_row(words.row[unit % kUnits][threadIdx.x % 32]) : -1;
  }
  __device__ __forceinline__ void ask_weight(int unit, int row) {
    if (p.row_weights != nullptr && row >= 0) {
      cp_async_4(&words.weight[unit % kUnits][threadIdx.x % 32], p.row_weights + row);
    }
  }
  __device__ __forceinline__ float weight_of(int unit, int row) const {
    return p.row_weights != nullptr && row >= 0 ? words.weight[unit % kUnits][threadIdx.x % 32] : 1.f;
  }
  // Rows of a token, those of the lanes in `valid`, in the order of lanes, each by its lane, as many at once as places
  // are empty; `last` goes with the last one. Places are emptied in order: where one is empty, those before it are.
  __device__ __forceinline__ void put_rows(uint32_t valid, int row, float weight, uint32_t last, const void* where) {
    const uint32_t bit = 1u << threadIdx.x % 32;
#pragma unroll 1
    while (valid != 0) {
      const int before = __popc(valid & (bit - 1));
      const bool has = (valid & bit) != 0 && before < p.stream_rows;
      Rows place = rows;
      if (has) place.advance(before);
      const uint32_t empty = __ballot_sync(~0u, has && is_over(place.empty(), place.parity));
      const uint32_t put_now = empty != 0 ? valid & ~0u >> __clz(empty) : valid & -valid;
      // The last of these is empty, or none is: now each lane knows so of all of them. (What one lane of several saw at
      // a barrier of its own is more than racecheck follows.)
      Rows end = rows;
      end.advance(__popc(put_now) - 1);
      await_parity(end.empty(), end.parity);
      // Nobody fills one while another lane waits for it: the phase after the next would look like this one.
      __syncwarp();
      if ((put_now & bit) != 0) {
        put_at(place, row_at(row), row_bytes, weight, (valid & -bit) == bit ? last : 0, where);
      }
      __syncwarp();
      end.advance();
      rows = end;
      valid &= ~put_now;
    }
  }

  // Answers to the tokens of peers: items of the block, every `teams`-th. A unit is as many items as 32 lanes have
  // selections for.
  template <class TokenOf, class PeerOf>
  __device__ __forceinline__ void send(const Role& role, const Outbox& outbox, const uint8_t* gone, int num,
                                       TokenOf token_of, PeerOf peer_of) {
    const int lane = threadIdx.x % 32;
    const int shift = 32 - __clz(p.top_k - 1), width = 1 << shift, items = 32 >> shift;  // of a unit
    const int k = lane & (width - 1);
    const int mine = num > role.team ? (num - 1 - role.team) / role.teams + 1 : 0;
    const auto item_of = [&](int unit) {  // this lane's, -1 none
      const int number = unit * items + (lane >> shift);
      return unit >= 0 && number < mine && k < p.top_k ? role.team + number * role.teams : -1;
    };
    int posted = 0;  // as last seen
#pragma unroll 1
    for (int unit = -kRouteAhead; unit * items < mine; ++unit) {
      cp_async_wait<kWeightAhead - 1>();  // words of unit + kWeightAhead have come, and weights of `unit`
      ask_weight(unit + kWeightAhead, row_of(unit + kWeightAhead, item_of(unit + kWeightAhead) >= 0));
      const int ahead = item_of(unit + kRouteAhead);
      if (ahead >= 0) {
        cp_async_4(&words.row[(unit + kRouteAhead) % kUnits][lane], route.row_word(peer_of(ahead), token_of(ahead), k));
      }
      cp_async_commit();
      if (unit < 0) continue;
      // What needs divisions every lane finds for its item, all items of the unit at once.
      const int own = item_of(unit);
      const int row = row_of(unit, own >= 0);
      const float weight = weight_of(unit, row);
      uint64_t place = 0;
      if (own >= 0 && gone[peer_of(own)] == 0) {
        place = reinterpret_cast<uint64_t>(
            record(p.ws, peer_of(own), op.parity, p.ws.rank, token_of(own), p.max_tokens, p.record_bytes));
      }
      const uint32_t selected = __ballot_sync(~0u, row != -1 && place != 0), valid = __ballot_sync(~0u, row >= 0);
      int item = role.team + unit * items * role.teams;
      uint32_t lanes = width == 32 ? ~0u : (1u << width) - 1;
      const int here = min(items, mine - unit * items);
#pragma unroll 1
      for (int i = 0; i < here; ++i, item += role.teams, lanes <<= width & 31) {
        while (item - posted >= kOutbox) posted = atomicAdd(outbox.posted, 0);
        const uint8_t* to = reinterpret_cast<const uint8_t*>(__shfl_sync(~0u, place, i << shift));
        if ((selected & lanes) == 0) {  // not a token of ours, or nobody is there to have it
          if (lane == 0) atomicAdd(&outbox.done[item % kOutbox], static_cast<uint32_t>(role.parts));
          continue;
        }
        uint32_t ours = valid & lanes;
        if (p.rank_layout) ours &= -ours;  // one row, whatever K is
        const uint32_t last = kAnswerEnd | static_cast<uint32_t>(item % kOutbox) << 8;
        if (ours == 0) none(last, to);  // all were dropped
        put_rows(ours, row, weight, last, to);
      }
    }
    cp_async_wait<0>();
  }

  // The rest of a token's rows: the answers that came, in order of ranks, with the own one at its place if it has been
  // kept, and the addend.
  __device__ __forceinline__ void put_answers(const Answers& answers, bool kept, int token, const void* to) {
    const uint32_t out = p.addend == nullptr ? static_cast<uint32_t>(kOut) : 0;
    uint32_t came = __ballot_sync(~0u, answers.place != 0);
    uint32_t own = kept ? __ballot_sync(~0u, answers.source == p.ws.rank) : 0;  // one lane, or none
    fence_before_bulk();
    __syncwarp();
    if (came == 0 || (own != 0 && own < (came & -came))) {
      const uint32_t command = (own != 0 ? static_cast<uint32_t>(kOwnNow) : 0) | (came == 0 ? out : 0);
      if (command != 0) none(command, to);
      own = 0;
    }
#pragma unroll 1
    while (came != 0) {
      const uint64_t from = __shfl_sync(~0u, answers.place, __ffs(came) - 1);
      came &= came - 1;
      uint32_t command = came == 0 ? out : 0;
      if (own != 0 && (came == 0 || own < (came & -came))) {
        command |= kOwnNow;
        own = 0;
      }
      put(rows, reinterpret_cast<const void*>(from), row_bytes, 1.f, command, to);
    }
    if (p.addend != nullptr) {
      put(rows, static_cast<const uint8_t*>(p.addend) + static_cast<int64_t>(token) * row_bytes, row_bytes,
          p.addend_scale, kAddend | kOut, to);
    }
  }

  // Own tokens, from a counter as the ring has room for their rows; a unit is one of them.
  __device__ __forceinline__ void receive(const uint8_t* gone, int* failed) {
    const int lane = threadIdx.x % 32, me = p.ws.rank;
    const bool selects = lane < p.top_k;
    uint32_t* work = &control(p.ws, me)->work[op.parity];
    int token_of_unit = p.num_tokens;  // lane i: of the unit i modulo 32
    const auto token_of = [&](int unit) {
      const int token = __shfl_sync(~0u, token_of_unit, unit & 31);
      return unit >= 0 ? token : p.num_tokens;
    };
    uint32_t taken = lane == 0 ? atomicAdd(work, 1u) : 0;  // of the next unit to ask for
#pragma unroll 1
    for (int unit = -kRouteAhead; unit < 0 || token_of(unit) < p.num_tokens; ++unit) {
      cp_async_wait<kWeightAhead - 1>();
      const int next = token_of(unit + kWeightAhead);
      ask_weight(unit + kWeightAhead, row_of(unit + kWeightAhead, selects && next < p.num_tokens));
      const int ahead = min(static_cast<int>(__shfl_sync(~0u, taken, 0)), p.num_tokens);
      if (lane == ((unit + kRouteAhead) & 31)) token_of_unit = ahead;
      if (ahead < p.num_tokens) {
        if (lane == 0) taken = atomicAdd(work, 1u);
        if (selects) {
          cp_async_4(&words.row[(unit + kRouteAhead) % kUnits][lane], route.row_word(me, ahead, lane));
          cp_async_4(&words.slot[(unit + kRouteAhead) % kUnits][lane], route.slot_word(ahead, lane));
        }
      }
      cp_async_commit();
      if (unit < 0) continue;
      const int token = token_of(unit);
      const int row = row_of(unit, selects);
      const int rank = selects ? route.rank_of(words.slot[unit % kUnits][lane]) : -1;
      const float weight = weight_of(unit, row);
      const uint8_t* to = static_cast<const uint8_t*>(p.out) + static_cast<int64_t>(token) * row_bytes;
      const bool first = __reduce_min_sync(~0u, static_cast<unsigned>(rank)) == static_cast<unsigned>(me);
      const bool theirs = __ballot_sync(~0u, rank >= 0 && rank != me) != 0;
      uint32_t own = __ballot_sync(~0u, row >= 0);
      if (__ballot_sync(~0u, rank == me) == 0) own = 0;
      if (p.rank_layout) own &= -own;
      uint32_t last = kOwnEnd;
      if (first) last |= kOwnNow;
      if (!theirs && p.addend == nullptr) last |= kOut;
      put_rows(own, row, weight, last, to);  // on their way while the answers are waited for
      if (own != 0 && (last & kOut) != 0) continue;
      Answers answers{0, -1, 0};
      if (theirs) answers = await_answers(p, op, rank, token, gone, failed);
      put_answers(answers, own != 0 && !first, token, to);
    }
    cp_async_wait<0>();
  }
};

// ---- consuming
// ------------------------------------------------------------------------------------------------------------

template <class T, int kSteps>
struct Consumer {
  Eight sums[kSteps];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int c = 0; c < 8; ++c) sums[i].v[c] = 0.f;
    }
  }
  // A product with 1 is exact, so that every row has one.
  __device__ __forceinline__ void add(const Raw8<T> (&row)[kSteps], float weight) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const Eight values = row[i].floats();
#pragma unroll
      for (int c = 0; c < 8; ++c) sums[i].v[c] = __fadd_rn(sums[i].v[c], __fmul_rn(values.v[c], weight));
    }
  }
  __device__ __forceinline__ void scale(float by) {
    if (by == 1.f) return;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int c = 0; c < 8; ++c) sums[i].v[c] = __fmul_rn(sums[i].v[c], by);
    }
  }
  __device__ __forceinline__ void store(const CombineParams& p, uint64_t where, int channel) const {
    T* to = reinterpret_cast<T*>(where) + channel;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      Raw8<T> out;
      out.set(sums[i]);
      if (channel + i * 256 < p.hidden) out.store(to + i * 256);
    }
  }

  // Rows of the ring until the producer says that there are no more.
  __device__ __forceinline__ void run(const CombineParams& p, Rows rows, int part, const Outbox& outbox) {
    const int channel = part * kSteps * 256 + threadIdx.x % 32 * 8;
    Raw8<T> own[kSteps];
    uint32_t at[kSteps];  // of this lane's channels in a row; where it has none, of the last ones
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      own[i].zero();
      at[i] = min(channel + i * 256, p.hidden - 8) * 2;
    }
    clear();
    uint32_t last = rows.last();
#pragma unroll 1
    for (;;) {
      await_parity(rows.head, rows.parity);
      const uint4 facts = ld_shared_16(rows.head + kFacts);
      Raw8<T> raw[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) raw[i].w = ld_shared_16(rows.row + at[i]);
      if (rows.head == last) {  // of a group, which is empty now
        fence_before_refill();
        arrive(last + kEmpty);
        rows.advance();
        last = rows.last();
      } else {
        rows.step();
      }
      const float weight = __uint_as_float(facts.x);
      const uint32_t command = facts.y;
      if (command == 0) {  // the usual
        add(raw, weight);
        continue;
      }
      const uint64_t where = facts.z | static_cast<uint64_t>(facts.w) << 32;
      if ((command & kAnswerEnd) != 0) {
        if ((command & kNoRow) == 0) add(raw, weight);
        store(p, where, channel);
        outbox.finish(static_cast<int>(command >> 8));
        clear();
        continue;
      }
      if ((command & kStop) != 0) return;
      if ((command & kAddend) != 0) scale(p.out_scale);
      if ((command & kNoRow) == 0) add(raw, weight);
      if ((command & kOwnEnd) != 0) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) own[i].set(sums[i]);
        clear();
      }
      if ((command & kOwnNow) != 0) add(own, 1.f);
      if ((command & kOut) != 0) {
        if ((command & kAddend) == 0) scale(p.out_scale);
        store(p, where, channel);
        clear();
      }
    }
  }
};

#endif

template <class T, int kSteps>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_streams_kernel(const __grid_constant__ CombineParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ uint32_t done[kOutbox];
  __shared__ int32_t posted, failed;
  __shared__ Op opened;
  __shared__ uint8_t gone[kMaxRanks];  // as in combine.cu
#pragma unroll 1
  for (int i = threadIdx.x; i < kOutbox; i += blockDim.x) done[i] = 0;
  if (threadIdx.x == 0) posted = failed = 0;
  const Role role(p);
  Rows rows(p, memory, role.team, role.produces ? 1 : 0);  // what has never been filled counts as emptied
  if (role.produces && threadIdx.x % 32 == 0) {
#pragma unroll 1
    for (uint32_t head = rows.first_head; head < rows.end_head; head += sizeof(Head)) {
      init_barrier(head, 1);
      init_barrier(head + kEmpty, role.parts * 32);  // of which the last one of a group is used
    }
  }
  if (threadIdx.x < 32) trace(0);
  wait_for_earlier_kernels();
  if (threadIdx.x < 32) trace(1);
  let_next_kernel_launch();
  const uint64_t region = region_bytes(p.ws, p.max_tokens, p.record_bytes);
  const bool dead = threadIdx.x < p.ws.num_ranks && is_dead(p.ws, threadIdx.x);
  begin_op(p.ws, region, &opened);
  const Route route(p);
  if (threadIdx.x < p.ws.num_ranks) gone[threadIdx.x] = dead;
  __syncthreads();
  const Op op = opened;
  const bool sends = (p.launch.phases & 1) != 0 && !op.excluded && blockIdx.x < p.launch.num_senders;
  if (sends && blockIdx.x == 0 && role.posts) {
#pragma unroll 1
    for (int peer = threadIdx.x % 32; peer < p.ws.num_ranks; peer += 32) {
      if (route.takes_part(p.ws, peer)) {
        post_header(p.ws, op, peer, p.num_tokens, p.call_hash, route.good ? 0 : kBadRoute);
      }
    }
  }
  if (op.overlaps) {
    find_gone(p.ws, op, route, sends, gone);
    __syncthreads();
    if (threadIdx.x < p.ws.num_ranks && gone[threadIdx.x] == 2) failed = 1;
  }
  if (threadIdx.x < 32) trace(2);
  const Outbox outbox{done, &posted};
  const bool receives = (p.launch.phases & 2) != 0;
  // Token by token over all peers, and over blocks: what a peer adds up first is sent first.
  const int others = p.ws.num_ranks - 1, all = p.max_tokens * others, me = p.ws.rank;
  const int block = static_cast<int>(blockIdx.x);
  const int num = sends && all > block ? (all - 1 - block) / p.launch.num_senders + 1 : 0;
  const auto token_of = [&](int item) { return (item * p.launch.num_senders + block) / others; };
  const auto peer_of = [&](int item) {
    return (me + 1 + (item * p.launch.num_senders + block) % others) % p.ws.num_ranks;
  };
  if (role.consumes) {
    Consumer<T, kSteps> consumer;
    consumer.run(p, rows, role.part, outbox);
    if (threadIdx.x < 32) trace(6);
  } else if (role.produces) {
    const int behind = num_teams(p) * team_bytes(p);  // rows and heads
    Words& words = reinterpret_cast<Words*>(memory + behind)[role.team];
    Producer producer{p, op, route, rows, words, static_cast<uint32_t>(p.hidden * 2)};
    producer.send(role, outbox, gone, num, token_of, peer_of);
    if (sends && role.team == 0) trace(3);
    if (receives) producer.receive(gone, &failed);
    if (role.team == 0) trace(5);
    producer.none(kStop, nullptr);
  } else if (role.posts) {
    outbox.post(num, role.parts, [&](int first, int count) {
      if (threadIdx.x % 32 >= count) return;
      const int item = first + threadIdx.x % 32;
      // [B] released to the warps at the peer that wait for this token
      if (gone[peer_of(item)] == 0) {
        st_relaxed_sys(flag(p.ws, peer_of(item), op.parity, me, token_of(item)), tagged(op.epoch, 1));
      }
    });
    if (sends) trace(4);
    if (receives && blockIdx.x == 0) {
      close_headers(p, op, route.good, &failed, [&](int rank) { return route.takes_part(p.ws, rank); });
    }
  }
  if (!receives) return;
  end_op(p.ws, op, region, &failed, [&] {
    if (threadIdx.x == 0) p.status[0] |= op.excluded ? kExcluded : kTimeout;
  });
  if (threadIdx.x < 32) trace(7);
#else
  __trap();
#endif
}

template <class T>
int launch_steps(const CombineParams& p, cudaStream_t stream) {
  const uint64_t shared_bytes = combine_streams_shared_bytes(p);
  switch (p.stream_steps) {
    case 2:
      return launch_kernel(combine_streams_kernel<T, 2>, p, p.launch, shared_bytes, stream);
    case 3:
      return launch_kernel(combine_streams_kernel<T, 3>, p, p.launch, shared_bytes, stream);
    default:
      return launch_kernel(combine_streams_kernel<T, 5>, p, p.launch, shared_bytes, stream);
  }
}

}  // namespace

#ifdef EPOPS_TRACE
int read_combine_streams_trace(uint64_t* out) { return cudaMemcpyFromSymbol(out, trace_clock, sizeof(trace_clock)); }
#endif

// Rows and their heads, then words.
uint64_t combine_streams_shared_bytes(const CombineParams& p) {
  const uint64_t a_row = row_room(p) + sizeof(Head);
  return num_teams(p) * (p.stream_rows * a_row + sizeof(Words));
}

int launch_combine_streams(const CombineParams& p, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return p.out_dtype == kBf16 ? launch_steps<__nv_bfloat16>(p, on) : launch_steps<__half>(p, on);
}

}  // namespace epops
