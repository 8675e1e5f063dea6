// The area of all_to_all in a rank's memory: words that carry data and epoch together for small pieces, and for large
// ones a ring of chunks a pair, with a flag a chunk from the sender and a credit a chunk from the receiver.
//
// Like the rest of the memory it exists twice, for even and odd ops, so the first `ring_slots` chunks of an op find
// free slots without a credit: see Workspace.
#pragma once

#include "exchange.cuh"

namespace epops {

// What a wait needs of a slot's words: {epoch, chunk + 1}.
__device__ __forceinline__ uint64_t ring_pair(const Workspace& ws, int owner, int parity, int source) {
  return static_cast<uint64_t>(parity) * (ws.num_ranks - 1) + (source < owner ? source : source - 1);
}
__device__ __forceinline__ uint8_t* ring_base(const Workspace& ws, int owner) {
  return reinterpret_cast<uint8_t*>(ws.base[owner] + ws.ring_offset);
}
// Two tagged words for every 8 bytes of a piece of `source`.
__device__ __forceinline__ uint8_t* tagged_piece(const Workspace& ws, int owner, int parity, int source) {
  return ring_base(ws, owner) + ring_pair(ws, owner, parity, source) * ws.tagged_bytes * 2;
}
__device__ __forceinline__ uint64_t* ring_words(const Workspace& ws, int owner) {
  return reinterpret_cast<uint64_t*>(ring_base(ws, owner) +
                                     2ull * (ws.num_ranks - 1) * static_cast<uint64_t>(ws.tagged_bytes) * 2);
}
__device__ __forceinline__ uint64_t* chunk_flag(const Workspace& ws, int owner, int parity, int source, int slot) {
  return ring_words(ws, owner) + ring_pair(ws, owner, parity, source) * ws.ring_slots + slot;
}
// Of the chunks that `owner` sent to `receiver`.
__device__ __forceinline__ uint64_t* chunk_credit(const Workspace& ws, int owner, int parity, int receiver, int slot) {
  return ring_words(ws, owner) + (2ull * (ws.num_ranks - 1) + ring_pair(ws, owner, parity, receiver)) * ws.ring_slots +
         slot;
}
__device__ __forceinline__ uint8_t* chunk_data(const Workspace& ws, int owner, int parity, int source, int slot) {
  uint8_t* data = reinterpret_cast<uint8_t*>(ring_words(ws, owner) + 4ull * (ws.num_ranks - 1) * ws.ring_slots);
  return data + (ring_pair(ws, owner, parity, source) * ws.ring_slots + slot) * ws.slot_bytes;
}

// `wait_word` for a word that counts up within an op.
__device__ __forceinline__ bool wait_at_least(const Workspace& ws, const uint64_t* word, uint32_t epoch,
                                              uint32_t at_least, int peer, int phase) {
  const uint64_t now = ld_relaxed_sys(word);
  if (static_cast<uint32_t>(now >> 32) == epoch && static_cast<uint32_t>(now) >= at_least) return true;
  uint32_t value;
  return wait_slowly(ws, word, epoch, peer, phase, &value, nullptr, at_least);
}

// Bytes of the area; fills its sizes from `ring_bytes`. Any chunk may wait for any that is `ring_slots` older, which is
// never in a circle as long as there are more slots than blocks that send and receive.
inline uint64_t layout_ring(Workspace& ws) {
  ws.ring_slots = ws.slot_bytes = ws.tagged_bytes = 0;
  if (ws.ring_bytes == 0 || ws.num_ranks == 1) return 0;
  const uint64_t pairs = 2ull * (ws.num_ranks - 1), a_pair = ws.ring_bytes / pairs;
  const auto clamp = [](uint64_t bytes, uint64_t most) {
    const uint64_t whole = bytes / 1024 * 1024;
    return static_cast<int32_t>(whole < 1024 ? 1024 : whole > most ? most : whole);
  };
  ws.ring_slots = a_pair >= 256 * 1024 ? 256 : 128;
  ws.slot_bytes = clamp(a_pair / ws.ring_slots, 64 << 10);
  ws.tagged_bytes = clamp(a_pair / 16, 256 << 10);
  return pairs * (2ull * ws.tagged_bytes + 16ull * ws.ring_slots + 1ull * ws.ring_slots * ws.slot_bytes);
}

}  // namespace epops
