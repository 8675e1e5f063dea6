// all_to_all: a piece of a tensor to every rank, cut along one dim, put together along another.
//
// One kernel. Every block reads the splits, so that it knows each piece it sends; block 0 posts how large they are. A
// piece is a stream of bytes in the order of the result, cut into chunks. Sending blocks take chunks of all peers by
// turns and store them into the receiver's memory: small pieces as words that carry data and epoch together, which need
// no fence, large ones into a ring, with a flag a chunk (told by the block's poster, team.cuh) and, once the ring is
// full, a credit back for every chunk that was copied out. Receiving blocks wait for all headers, from which every
// piece's place follows, and copy chunks to the result by turns; what no piece covers is zero.
//
// Where a rank's pieces fit into the ring, its blocks send first and receive then. Otherwise the first blocks only
// receive and the last ones only send: then both must be resident, and the launcher's blocks are.
#include "launch.cuh"
#include "pieces.cuh"

namespace epops {
namespace {

__device__ __forceinline__ int share_of(uint32_t chunks, uint32_t base, uint32_t turn, uint32_t turns) {
  const uint32_t first = (turn + turns - base % turns) % turns;
  return first < chunks ? static_cast<int>((chunks - first + turns - 1) / turns) : 0;
}

// Warp 0 of every block: the pieces that this rank sends, clamped to x whatever the splits say. Block 0 tells the
// peers.
__device__ __forceinline__ void lay_out_sent(const AllToAllParams& p, Shared* s, const Op& op, uint32_t turn,
                                             Given given) {
  const int lane = threadIdx.x, num_ranks = p.ws.num_ranks, me = p.ws.rank;
  const bool same = p.scatter_at == p.gather_at;
  const bool expects = p.output_splits != nullptr || p.plan != nullptr;
  int64_t running = 0;
  int num_bad = __any_sync(~0u, !given.good_plan);
#pragma unroll 1
  for (int first = 0; first < num_ranks; first += 32) {
    const int rank = first + lane;
    if (first != 0) given = ask(p, rank);
    const int64_t wanted = given.good_plan ? given.wanted : 0;
    int64_t at = given.good_plan ? given.at : 0;
    const int64_t in_x = clamp(wanted, p.scatter_in);
    const int64_t follows = before(in_x, &running);
    if (p.plan == nullptr) at = follows;
    const int64_t from = clamp(at, p.scatter_in), split = clamp(in_x, p.scatter_in - from);
    num_bad += __popc(__ballot_sync(~0u, wanted != split || at != from));
    if (rank < num_ranks) {
      Peer& peer = peers(s)[rank];
      peer.sent_at = from;
      peer.sent = static_cast<uint32_t>(split);
      peer.expected = given.expected;
      peer.takes_part = rank == me || (!op.excluded && given.dead == 0);
      peer.lost = peer.wrong = 0;
    }
  }
  __syncwarp();  // lanes change ranks
  const int64_t mine = same ? 0 : expects ? clamp(peers(s)[me].expected, p.gather_in) : p.gather_in;
  if (blockIdx.x == 0 && !op.excluded) {
#pragma unroll 1
    for (int rank = lane; rank < num_ranks; rank += 32) {
      const Peer& peer = peers(s)[rank];
      if (rank == me || !peer.takes_part) continue;
      post_header(p.ws, op, rank, static_cast<int>(peer.sent), p.call_hash, num_bad != 0 ? kBadIndex : 0);
      st_relaxed_sys(header(p.ws, rank, op.parity, me) + 3, tagged(op.epoch, static_cast<uint32_t>(mine)));
    }
  }
  uint32_t chunks_before = 0, most = 0;
  int num_items = 0;
#pragma unroll 1
  for (int first = 0; first < num_ranks; first += 32) {
    const int step = first + lane, rank = (me + step) % num_ranks;
    uint32_t chunks = 0;
    if (step < num_ranks) {
      Peer& peer = peers(s)[rank];
      make_box(p, p.x_stride, &peer.out,
               reinterpret_cast<uint64_t>(p.x) + peer.sent_at * p.scatter_unit * p.x_stride[p.scatter_at], peer.sent,
               same ? peer.sent : mine, peer.sent, same ? peer.sent : mine);
      if (rank != me && peer.takes_part) chunks = num_chunks(peer.out.bytes, chunk_size(p, peer.out.bytes));
    }
    const uint32_t base = before(chunks, &chunks_before);
    if (step < num_ranks) {
      Peer& peer = peers(s)[rank];
      peer.chunks_to = chunks;
      peer.base_to = base;
      if (!is_tagged(p, peer.out.bytes)) num_items += share_of(chunks, base, turn, p.launch.num_senders);
      if (rank == me) {
        peer.split = peer.sent;
        peer.came = static_cast<uint32_t>(same ? peer.sent : mine);
      } else {
        peer.split = peer.came = 0;
      }
    }
    most = max(most, __reduce_max_sync(~0u, chunks));
  }
  num_items = static_cast<int>(__reduce_add_sync(~0u, static_cast<unsigned>(num_items)));
  if (lane == 0) {
    s->bits = (op.excluded ? kExcluded : 0) | (num_bad != 0 ? kBadIndex : 0);
    s->num_bad = num_bad;
    s->num_items = num_items;
    s->rounds_to = static_cast<int>((most + p.launch.num_senders - 1) / p.launch.num_senders);
    s->disagrees_with = -1;
  }
}
__device__ __forceinline__ void send_all(const AllToAllParams& p, Shared* s, const Op& op, const Outbox& outbox,
                                         uint32_t turn) {
  const int me = p.ws.rank, num_ranks = p.ws.num_ranks;
  const uint32_t turns = p.launch.num_senders;
  int item = 0;
#pragma unroll 1
  for (int round = 0; round < s->rounds_to; ++round) {
#pragma unroll 1
    for (int step = 1; step < num_ranks; ++step) {
      const int rank = (me + step) % num_ranks;
      Peer& peer = peers(s)[rank];
      const uint32_t chunk = (turn + turns - peer.base_to % turns) % turns + round * turns;
      if (chunk >= peer.chunks_to) continue;
      const Units u = units_of(peer.out.bytes, chunk, chunk_size(p, peer.out.bytes));
      const bool is_small = is_tagged(p, peer.out.bytes);
      const uint32_t slots = p.ws.ring_slots, slot = chunk % slots;
      if (!is_small) outbox.begin(item);
      bool free = true;
      if (!is_small && chunk >= slots && threadIdx.x % 32 == 0) {
        free = wait_at_least(p.ws, chunk_credit(p.ws, me, op.parity, rank, slot), op.epoch, chunk - slots + 1, rank,
                             kPhaseCredits);
        if (!free) s->failed = peer.lost = 1;
      }
      free = __shfl_sync(~0u, free, 0);
      if (free) {
        if (is_small) {
          uint8_t* words = tagged_piece(p.ws, rank, op.parity, me);
          read_box(p, peer.out, u, [&](uint32_t unit, uint4 v) { put_tagged(words, unit, op.epoch, v); });
        } else {
          fill_slot(p, peer.out, u, chunk_data(p.ws, rank, op.parity, me, slot));
        }
      }
      if (is_small) continue;
      if (threadIdx.x == 0) atomicExch(&s->items[item % kOutbox], static_cast<unsigned long long>(rank) << 32 | chunk);
      outbox.finish(item);
      ++item;
    }
  }
}

// [R] releases what wait [R] acquires.
__device__ __forceinline__ void tell_chunks(const AllToAllParams& p, Shared* s, const Op& op, int first, int count) {
  const int lane = threadIdx.x % 32;
  if (lane >= count) return;
  const uint64_t item = atomicAdd(&s->items[(first + lane) % kOutbox], 0ull);
  const int rank = static_cast<int>(item >> 32);
  const uint32_t chunk = static_cast<uint32_t>(item);
  if (*const_cast<volatile int32_t*>(&peers(s)[rank].lost) != 0) return;
  st_relaxed_sys(chunk_flag(p.ws, rank, op.parity, p.ws.rank, chunk % p.ws.ring_slots), tagged(op.epoch, chunk + 1));
}

__global__ void __launch_bounds__(kAllToAllThreads, 1) all_to_all_kernel(const __grid_constant__ AllToAllParams p) {
  extern __shared__ __align__(16) uint8_t memory[];
  Shared* s = reinterpret_cast<Shared*>(memory);
  const int first_sender = gridDim.x - p.launch.num_senders;
  const bool sends = static_cast<int>(blockIdx.x) >= first_sender;
  const uint32_t turn = sends ? blockIdx.x - first_sender : 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < kOutbox; i += blockDim.x) s->done[i] = 0;
  if (threadIdx.x == 0) s->failed = s->posted = 0;
  wait_for_earlier_kernels();
  let_next_kernel_launch();
  const Op op = begin_op(p.ws, 0);  // its rows lie in the ring, not in the data area
  Given given{};
  if (threadIdx.x < 32) given = ask(p, threadIdx.x);
  if (threadIdx.x < 32) lay_out_sent(p, s, op, turn, given);
  __syncthreads();
  const Team t = my_team(1);
  const Outbox outbox{s->done, &s->posted};
  if (t.poster) {
    if (sends) {
      outbox.post(s->num_items, kWarps, [&](int first, int count) { tell_chunks(p, s, op, first, count); });
    }
  } else {
    if (sends) send_all(p, s, op, outbox, turn);
    wait_headers(p, s, op);
    take_pieces(p, s, op, t);
  }
  end_op(p.ws, op, 0, &s->failed, [&] { clear_all(p); });
}

}  // namespace

int launch_all_to_all(const AllToAllParams& p, void* stream) {
  const uint64_t shared = sizeof(Shared) + sizeof(Peer) * p.ws.num_ranks;
  return launch_kernel(all_to_all_kernel, p, p.launch, shared, static_cast<cudaStream_t>(stream));
}

}  // namespace epops
