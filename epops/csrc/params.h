// What the host hands to the kernels: plain structs, shared by every translation unit. No torch headers here.
// Words are those of epops/layout.py: T tokens here, M max_tokens, K top_k, E experts, L slots a rank, R ranks, C
// capacity.
#pragma once

#include <cstdint>

namespace epops {

constexpr int kMaxRanks = 128;
constexpr int kMaxTopK = 32;
constexpr int kDispatchThreads = 512;
constexpr int kLineThreads = 512;
constexpr int kCombineThreads = 512;  // fewer, with twice the registers: more rows in flight a thread
constexpr int kPlaceEntries = 2048;   // selections whose places a block keeps in shared memory at a time
constexpr int kMaxSlots = 4096;       // an entry packs the slot in 12 bits and the position in 20
constexpr int kMaxTokens = 1 << 20;

// One rank's memory, mapped by all peers, zero before the first op. The same offsets on every rank. Tagged areas
// (headers, counts, flags) hold 64-bit words {epoch, value}, selections and lines have the epoch at fixed places; they
// are never used for anything else, so that what an earlier op left there cannot be taken for this op's. Everything but
// the control block and the data exists twice: op s uses copy s % 2. A rank that sees a word of op s from a peer knows
// that the peer has finished op s - 1, so copy (s + 1) % 2 there is free to write. The data area is one: even ops use
// its low end, odd ops its high end, and an op that overlaps the one before waits for a word of its own from a peer
// before it stores rows there.
struct Workspace {
  uint64_t base[kMaxRanks];
  uint64_t counts_offset;      // [2][R][max_chunks(R)][max_slots + kCountWords] tagged
  uint64_t flags_offset;       // [2][R][max_tokens] tagged
  uint64_t entries_offset;     // [2][R][max_tokens][max_top_k] 8 bytes
  uint64_t selections_offset;  // [2][R][board_tokens][chosen_lines(max_top_k)] 16 bytes, see board.cuh
  uint64_t lines_offset;       // [2][R - 1][line_tokens][line_bytes], see lines.cuh
  uint64_t data_offset;        // [R - 1][M] records, from the low or the high end
  uint64_t data_bytes;
  uint64_t ring_offset;  // of all_to_all, see ring.cuh; nothing where ring_bytes is 0
  uint64_t ring_bytes;   // of its chunks, both copies
  uint64_t timeout_ns;
  int32_t* error_host;  // (kErrorWords,) pinned, or null: 1, peer, phase, epoch of the first; a word a status bit
  int32_t rank;
  int32_t num_ranks;
  int32_t max_tokens;
  int32_t max_top_k;
  int32_t max_slots;
  int32_t board_tokens;  // tokens whose selections have room, 0 none
  int32_t line_tokens;   // tokens whose records have room as lines, 0 none
  int32_t line_bytes;    // of one record as lines at most
  int32_t ring_slots;    // chunks that a pair has room for
  int32_t slot_bytes;    // of one chunk at most
  int32_t tagged_bytes;  // a piece up to this size travels as tagged words
};

// Lines of 16 bytes that a token's selections take, eight a line: see board.cuh.
constexpr int chosen_lines(int top_k) { return (top_k + 7) / 8; }

// Rows as lines, see lines.cuh: steps of a warp.
constexpr int kStepBytes = 512, kStepContent = 480;  // of a step as it travels, and of a record in it
constexpr int line_steps(int bytes) { return (bytes + kStepContent - 1) / kStepContent; }
constexpr int lines_bytes(int bytes) { return line_steps(bytes) * kStepBytes; }

constexpr int kCountWords = 3;  // beside a chunk's slots: its tokens for the rank, bad and repeated selections
constexpr int kMaxChunks = 32;
// Chunks that a rank's tokens are counted in, at most: receivers add up those of all ranks one by one.
constexpr int max_chunks(int num_ranks) {
  return num_ranks >= 128 ? 1 : 128 / num_ranks < kMaxChunks ? 128 / num_ranks : kMaxChunks;
}

// How an op is laid over the chip, from M alone. A team of some warps carries one token at a time; the last warp
// of a block tells peers (team.cuh). Nothing here need be equal on all ranks.
struct Launch {
  int32_t num_blocks;
  int32_t num_senders;  // the first blocks send, then help with the rest
  int32_t num_threads;
  int32_t send_warps;  // warps that share a token
  int32_t recv_warps;
  int32_t dynamic;  // warps take tokens from a counter as they come free; only with one warp a token received
  int32_t phases;   // 1 send, 2 receive, 3 both
  int32_t rows_as;  // enum RowsAs; of a dispatch equal on all ranks, as the call's hash is
  int32_t pdl;
};

// How rows travel: a dispatch's behind counts (dispatch.cu), a combine's behind flags (combine.cu), or through rings
// that one warp of a team fills (combine_streams.cu); those of few tokens as lines (dispatch_lines.cu,
// combine_lines.cu).
enum RowsAs : int32_t { kCounted = 0, kLines = 1, kStreamed = 2 };

enum Layout : int32_t { kExpert = 0, kRank = 1, kBatched = 2 };
enum ScaleFormat : int32_t { kFloat32 = 0, kUe8m0 = 1, kFloat32Pow2 = 2 };
enum ScaleMath : int32_t { kDivide = 0, kMultiply = 1, kReciprocal = 2, kReciprocalExact = 3, kReciprocalAmax = 4 };
enum DType : int32_t { kBf16 = 0, kFp16 = 1, kFp32 = 2, kBytes = 3 };

struct Quant {
  int32_t block;  // channels to a scale; 0 the whole row
  int32_t format;
  int32_t math;
  int32_t eps_on_scale;
  int32_t clamp;
  int32_t e5m2;
  int32_t usual;  // block 128, kFloat32, kDivide, eps on the largest magnitude, e4m3: the quantizer has a path for it
  float eps;
  float top;
  float top_inverse;  // 1 / top, rounded
};

struct DispatchParams {
  Workspace ws;
  Launch launch;
  Quant quant;
  const void* x;         // (T, H)
  const void* x_scales;  // (T, num_scales) or null
  const void* topk_idx;  // (T, K)
  const float* topk_weights;
  const int64_t* expert_slot;  // (E,)
  const int64_t* mask;         // (R,)
  uint8_t* rows;
  uint8_t* scales;
  float* row_weights;
  int32_t* row_expert;
  int32_t* row_source;
  int32_t* expert_counts;
  int32_t* expert_ends;
  int32_t* route;
  int32_t* status;
  int64_t scale_token_stride, scale_block_stride;  // of x_scales, in elements
  int64_t out_scale_row_stride, out_scale_block_stride;
  int32_t x_dtype;  // kBytes: rows travel as they are
  int32_t idx64;
  int32_t num_tokens, max_tokens, top_k, num_experts, num_slots, capacity, alignment, layout, lane;
  int32_t hidden;     // elements of x
  int32_t row_bytes;  // of a row on the wire and in `rows`
  int32_t num_scales;
  int32_t wire_scale_bytes, out_scale_bytes;  // of one scale; 4 or 1
  int32_t record_bytes;
  int32_t sent_bytes;      // of a record as lines: with its weights
  int32_t num_land;        // of num_stages those for rows of peers
  uint32_t lines_inverse;  // 2^32 / lines of a rank's selections, rounded up
  int32_t tiles;           // of 32 tokens, placed together
  int32_t chunk_tokens;    // tokens that are counted together; from sizes alone, as peers read the counts
  int32_t num_chunks;      // of max_tokens
  int32_t num_stages;      // records that a team of dispatch_lines.cu has room for
  int32_t stage_bytes;     // of shared memory that a warp, or a record, has
  int32_t piece_bytes;     // of a row that pass through a stage of dispatch.cu at once, a multiple of 512 or all of it
  uint32_t call_hash;
};

struct CombineParams {
  Workspace ws;
  Launch launch;
  const void* y;                  // (C, H)
  const float* row_weights;       // (C,) or null
  const float* grad_row_weights;  // (C,) or (C, K): sent back to their tokens; null without
  const void* addend;             // (T, H) of the out dtype, or null
  const int32_t* route;
  void* out;                 // (T, H)
  float* grad_topk_weights;  // (T, K)
  int32_t* status;
  float out_scale, addend_scale;
  int32_t in_dtype, out_dtype;
  int32_t num_tokens, max_tokens, top_k, num_experts, num_slots, num_rows, hidden, rank_layout;
  int32_t record_bytes;
  int32_t sent_bytes;    // of a record as lines: with the gradients of weights
  int32_t stream_steps;  // of 256 channels that a warp of combine_streams.cu has
  int32_t stream_rows;   // that a team of it has room for
  uint32_t call_hash;
};

struct ScatterParams {  // the gradient of combine: token rows out to the rows that a route names
  Workspace ws;
  Launch launch;
  const void* grad_out;  // (T, H)
  const void* y;         // (C, H), for the gradient of the weights
  const float* row_weights;
  const int32_t* route;
  void* grad_y;             // (C, H), zero before
  float* grad_row_weights;  // (C,), zero before; null without weights
  int32_t* status;
  float out_scale, grad_scale;
  int32_t grad_dtype, y_dtype;
  int32_t num_tokens, max_tokens, top_k, num_experts, num_slots, num_rows, hidden, rank_layout;
  int32_t record_bytes;
  uint32_t call_hash;
};

constexpr int kMaxDims = 6;  // of an exchanged tensor, dims that lie in one piece counted as one
constexpr int kAllToAllThreads = 544;
constexpr int kSmallRanks = 32;  // of all_to_all_small.cu at most

struct AllToAllParams {
  Workspace ws;
  Launch launch;
  const void* x;
  void* out;                     // contiguous
  const int64_t* input_splits;   // (R,) or null: even, or in the plan
  const int64_t* output_splits;  // (R,) or null: as sent, or in the plan
  const int64_t* plan;           // (4 + 4 R,) or null
  int64_t* counts;               // (R,)
  int32_t* status;
  // Dims from outermost to innermost, the last one without gaps; strides in bytes. A dim that is scattered or gathered
  // has `unit` places for one of its steps: what lies within a step was counted as one dim with it.
  int64_t size[kMaxDims];
  int64_t x_stride[kMaxDims];
  int64_t out_stride[kMaxDims];
  int64_t scatter_in, gather_in;    // steps of the two dims in x
  int64_t scatter_out, gather_out;  // and in out
  int64_t scatter_unit, gather_unit;
  int64_t even_split;             // steps for each rank where no splits are given
  int64_t cell_bytes;             // of one step of each of the two dims, or of the one that they are
  int32_t scatter_at, gather_at;  // their places in `size`, equal where they are one dim
  int32_t num_dims;
  int32_t element_bytes;
  int32_t num_receivers;  // the first blocks; launch.num_senders, the last ones, send
  int32_t min_chunk;      // bytes
  int32_t whole_units;    // every place in x and out is a multiple of 16 bytes
  uint32_t call_hash;
};

// Bits of `status`, phases of an error record: epops/layout.py and epops/transport/nvlink.py have the same.
enum Status : int32_t {
  kOverflow = 1,
  kBadIndex = 2,
  kDuplicate = 4,
  kBadRoute = 8,
  kDisagree = 16,
  kTimeout = 32,
  kExcluded = 64
};
constexpr int kStatusBits = 7;
constexpr int kErrorWords = 4 + kStatusBits;
enum Phase : int32_t { kPhaseHeader = 1, kPhaseCounts = 2, kPhaseRows = 3, kPhaseAnswers = 4, kPhaseCredits = 5 };

// Fills the offsets of `ws` from its sizes; returns the bytes of one rank's memory.
uint64_t layout_workspace(Workspace& ws);
// Bytes of dynamic shared memory that the kernels need; the host compares with the device's limit.
uint64_t dispatch_shared_bytes(const DispatchParams& p);
uint64_t dispatch_lines_shared_bytes(const DispatchParams& p);
uint64_t combine_lines_shared_bytes(const CombineParams& p);
uint64_t combine_streams_shared_bytes(const CombineParams& p);
// Launch on `stream`; return a cudaError_t.
int launch_dispatch(const DispatchParams& p, void* stream);
int launch_dispatch_lines(const DispatchParams& p, void* stream);
int launch_combine(const CombineParams& p, void* stream);
int launch_combine_lines(const CombineParams& p, void* stream);
int launch_combine_streams(const CombineParams& p, void* stream);
int launch_scatter(const ScatterParams& p, void* stream);
int launch_all_to_all(const AllToAllParams& p, void* stream);
int launch_all_to_all_small(const AllToAllParams& p, void* stream);

#ifdef EPOPS_TRACE
int read_dispatch_trace(uint64_t* out);  // (256, 12)
int read_dispatch_lines_trace(uint64_t* out);
int read_combine_trace(uint64_t* out);
int read_combine_lines_trace(uint64_t* out);
int read_combine_streams_trace(uint64_t* out);
#endif

}  // namespace epops
