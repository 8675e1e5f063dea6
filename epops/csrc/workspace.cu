// Where things lie in a rank's memory.
#include "lines.cuh"
#include "ring.cuh"

namespace epops {

uint64_t layout_workspace(Workspace& ws) {
  const auto up = [](uint64_t bytes) { return (bytes + 255) / 256 * 256; };
  const uint64_t pairs = 2ull * ws.num_ranks;
  ws.counts_offset = kHeaderEnd;
  ws.flags_offset = up(ws.counts_offset + pairs * max_chunks(ws.num_ranks) * (ws.max_slots + kCountWords) * 8);
  ws.entries_offset = up(ws.flags_offset + pairs * ws.max_tokens * 8);
  ws.selections_offset = up(ws.entries_offset + pairs * ws.max_tokens * ws.max_top_k * 8);
  ws.lines_offset = up(ws.selections_offset + pairs * ws.board_tokens * chosen_lines(ws.max_top_k) * 16);
  ws.data_offset = up(ws.lines_offset + 2ull * (ws.num_ranks - 1) * ws.line_tokens * ws.line_bytes);
  ws.ring_offset = up(ws.data_offset + ws.data_bytes);
  return ws.ring_offset + layout_ring(ws);
}

}  // namespace epops
