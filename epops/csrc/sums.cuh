// Rows of a token weighted and added up, and the answers of all ranks added to one another.
#pragma once

#include "route.cuh"
#include "team.cuh"
#include "values.cuh"

namespace epops {

// Shared memory that a warp has for rows on their way: places of a few rows' 1024 bytes.
template <int kRowsOfStep, int kNumPlaces>
struct RingOf {
  static constexpr int kRows = kRowsOfStep;  // of a token in one step
  static constexpr int kPlaces = kNumPlaces;
  static constexpr int kPlaceBytes = kRows * 1024;
  static constexpr int kBytes = kPlaces * kPlaceBytes;
};

// Rows of one token here: lane i holds the i-th row, in the order of k, and its weight.
struct TokenRows {
  int row;
  float weight;
  int num;
};

// Place of the set bit number `n` (from 0) of `bits`, which has more.
__device__ __forceinline__ int place_of_bit(uint32_t bits, int n) {
  int place = 0;
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    const int below = __popc(bits >> place & ((1u << step) - 1));
    if (below <= n) {
      n -= below;
      place += step;
    }
  }
  return place;
}

__device__ __forceinline__ TokenRows token_rows(const CombineParams& p, int row_of_selection) {
  const int lane = threadIdx.x % 32;
  uint32_t valid = __ballot_sync(~0u, row_of_selection >= 0);
  if (p.rank_layout) valid &= -valid;  // one row, whatever K is
  TokenRows rows{-1, 1.f, __popc(valid)};
  const int row = __shfl_sync(~0u, row_of_selection, place_of_bit(valid, lane) & 31);
  if (lane < rows.num) rows.row = row;
  if (p.row_weights != nullptr && rows.row >= 0) rows.weight = p.row_weights[rows.row];
  return rows;
}

// No rows at all.
__device__ __forceinline__ TokenRows no_rows() { return TokenRows{-1, 1.f, 0}; }

// Sums the rows of a token, and then those of a second one, piece by piece, a piece being 256 channels a warp, kSteps
// of them at once. Rows come through shared memory, Ring::kPlaces - 1 steps ahead, so that enough bytes are on their
// way whatever the registers hold. A step is up to Ring::kRows rows of one piece: with fewer the warp spends its time
// on asking. A lane reads only what it asked for itself.
template <class In, int kSteps, class Ring>
struct RowSums {
  const CombineParams& p;
  uint8_t* ring;                 // this lane's part of this warp's, Ring::kBytes in all
  int first, stride;             // first channel of the lane; channels from piece to piece
  int pieces;                    // of a row
  TokenRows rows, then;          // of the two tokens
  int asked = 0, taken = 0;      // places of the ring
  int at_piece = 0, at_row = 0;  // what is asked for next
  bool second = false;           // it is of the second token

  __device__ __forceinline__ RowSums(const CombineParams& p, const Team& t, uint8_t* warp_ring) : p(p) {
    static_assert(kSteps * 8 * sizeof(In) <= 32, "a row of a step has 1024 bytes in the ring");
    const int lane = threadIdx.x % 32, begin = t.part * 256;
    ring = warp_ring + lane * 8 * sizeof(In);
    first = begin + lane * 8;
    stride = t.parts * 256;
    pieces = begin < p.hidden ? (p.hidden - begin + kSteps * stride - 1) / (kSteps * stride) : 0;
  }
  // Begins with two tokens; nothing may be left of those before.
  __device__ __forceinline__ void start(const TokenRows& of_one, const TokenRows& of_other) {
    rows = of_one;
    then = of_other;
    at_piece = at_row = 0;
    second = rows.num == 0;
#pragma unroll 1
    for (int i = 0; i < Ring::kPlaces - 1; ++i) ask();
  }
  // Begins anew with one token in place of both.
  __device__ __forceinline__ void start_again(const TokenRows& token) {
    cp_async_wait<0>();
    asked = taken = 0;
    start(no_rows(), token);
  }
  __device__ __forceinline__ uint8_t* place(int number, int r, int i) const {
    return ring + number * Ring::kPlaceBytes + r * 1024 + i * 512 * static_cast<int>(sizeof(In) / 2);
  }
  __device__ __forceinline__ void ask() {
    const int num = second ? then.num : rows.num;
    if (at_piece < pieces && num != 0) {
#pragma unroll
      for (int r = 0; r < Ring::kRows; ++r) {
        if (at_row + r >= num) break;
        const int64_t row = __shfl_sync(~0u, second ? then.row : rows.row, at_row + r);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const int channel = first + (at_piece * kSteps + i) * stride;
          if (channel >= p.hidden) continue;
          const uint8_t* from = static_cast<const uint8_t*>(p.y) + (row * p.hidden + channel) * sizeof(In);
          cp_async_16(place(asked, r, i), from);
          if constexpr (sizeof(In) == 4) cp_async_16(place(asked, r, i) + 16, from + 16);
        }
      }
      at_row += Ring::kRows;
      if (at_row >= num) {
        at_row = 0;
        if (++at_piece == pieces && !second) {
          second = true;
          at_piece = 0;
        }
      }
      asked = asked + 1 == Ring::kPlaces ? 0 : asked + 1;
    }
    cp_async_commit();
  }
  // sums[i]: channels [first + (piece * kSteps + i) * stride, + 8) of `token`, which is `rows` or, after all its
  // pieces, `then`; pieces in order. Products and sums are rounded one by one, as the reference's are.
  __device__ __forceinline__ void piece(const TokenRows& token, Eight (&sums)[kSteps]) {
    const bool weighted = p.row_weights != nullptr;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
#pragma unroll
      for (int c = 0; c < 8; ++c) sums[i].v[c] = 0.f;
    }
#pragma unroll 1
    for (int row0 = 0; row0 < token.num; row0 += Ring::kRows) {
      ask();
      cp_async_wait<Ring::kPlaces - 1>();
#pragma unroll
      for (int r = 0; r < Ring::kRows; ++r) {
        if (row0 + r >= token.num) break;
        const float weight = __shfl_sync(~0u, token.weight, row0 + r);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          Raw8<In> raw;
          raw.load(place(taken, r, i));
          const Eight values = raw.floats();
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            sums[i].v[c] = __fadd_rn(sums[i].v[c], weighted ? __fmul_rn(values.v[c], weight) : values.v[c]);
          }
        }
      }
      taken = taken + 1 == Ring::kPlaces ? 0 : taken + 1;
    }
  }
};

__device__ __forceinline__ float weight_gradient(const CombineParams& p, int row, int k) {
  if (row < 0) return 0.f;
  return p.grad_row_weights[p.rank_layout ? static_cast<int64_t>(row) * p.top_k + k : row];
}

template <class In, class Out>
constexpr int steps_of() {
  return sizeof(In) == 4 || sizeof(Out) == 4 ? 1 : 2;
}

// The ranks that answer for a token, ascending, a lane each.
struct Answers {
  int num, source;  // of this lane: -1 where none is, or it does not come
  uint64_t place;   // of its row in this rank's memory, 0 where none came
};

// Waits for the answers of own `token`; an answer that does not come counts as zero. All lanes call it.
__device__ __forceinline__ Answers await_answers(const CombineParams& p, const Op& op, int rank_of_selection, int token,
                                                 const uint8_t* gone, int* failed) {
  const int me = p.ws.rank;
  Answers a;
  a.num = distinct_ranks(rank_of_selection, &a.source);
  uint32_t unused;
  if (a.source >= 0 && a.source != me &&
      (gone[a.source] != 0 ||
       !wait_word(p.ws, flag(p.ws, me, op.parity, a.source, token), op.epoch, a.source, kPhaseAnswers, &unused))) {
    a.source = -1;
    *failed = 1;
  }
  __syncwarp();  // what one lane acquired, the others may read
  a.place = a.source >= 0 && a.source != me
                ? reinterpret_cast<uint64_t>(record(p.ws, me, op.parity, a.source, token, p.max_tokens, p.record_bytes))
                : 0;
  return a;
}

// Answers added up, rank 0 first, then scale, addend and cast, for channels [channel + i * stride, + 8) of own `token`.
// `own(here)` gives this rank's own answer, rounded as those of peers are, while theirs are on their way; without
// kOwn it is read from its place like theirs.
template <class Out, int kSteps, bool kOwn, class Own>
__device__ __forceinline__ void add_answers(const CombineParams& p, const Answers& a, int token, int channel,
                                            int stride, Own own) {
  constexpr int kAnswers = 2;  // on their way at once
  Raw8<Out> raw[kAnswers][kSteps];
  const auto load_answers = [&](int first) {
#pragma unroll
    for (int r = 0; r < kAnswers; ++r) {
      const uint64_t from = first + r < a.num ? __shfl_sync(~0u, a.place, first + r) : 0;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (from != 0 && channel + i * stride < p.hidden) {
          raw[r][i].load_fresh(reinterpret_cast<const uint8_t*>(from) + (channel + i * stride) * sizeof(Out));
        } else {
          raw[r][i].zero();
        }
      }
    }
  };
  load_answers(0);
  Raw8<Out> addend[kSteps];
  if (p.addend != nullptr) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int at = channel + i * stride;
      if (at < p.hidden)
        addend[i].load(static_cast<const Out*>(p.addend) + static_cast<int64_t>(token) * p.hidden + at);
    }
  }
  Raw8<Out> here[kOwn ? kSteps : 1];
  if constexpr (kOwn) own(here);
  Eight total[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int c = 0; c < 8; ++c) total[i].v[c] = 0.f;
  }
#pragma unroll 1
  for (int first = 0; first < a.num; first += kAnswers) {
    if (first != 0) load_answers(first);
#pragma unroll
    for (int r = 0; r < kAnswers; ++r) {
      if (first + r >= a.num) break;
      const bool mine = kOwn && __shfl_sync(~0u, a.source, first + r) == p.ws.rank;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const Eight values = mine ? here[kOwn ? i : 0].floats() : raw[r][i].floats();
#pragma unroll
        for (int c = 0; c < 8; ++c) total[i].v[c] = __fadd_rn(total[i].v[c], values.v[c]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int at = channel + i * stride;
    if (at >= p.hidden) continue;
    if (p.out_scale != 1.f) {
#pragma unroll
      for (int c = 0; c < 8; ++c) total[i].v[c] = __fmul_rn(total[i].v[c], p.out_scale);
    }
    if (p.addend != nullptr) {
      const Eight extra = addend[i].floats();
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float value = p.addend_scale == 1.f ? extra.v[c] : __fmul_rn(extra.v[c], p.addend_scale);
        total[i].v[c] = __fadd_rn(total[i].v[c], value);
      }
    }
    Raw8<Out> out;
    out.set(total[i]);
    out.store(static_cast<Out*>(p.out) + static_cast<int64_t>(token) * p.hidden + at);
  }
}

// Gradients of a token's routing weights, which came beside the answers. By one warp.
__device__ __forceinline__ void weight_gradients(const CombineParams& p, const Op& op, const Answers& a, int rank,
                                                 int own_row, int token) {
  const int lane = threadIdx.x % 32;
  if (p.grad_row_weights == nullptr) return;
  // The rank of selection k is lost when its answer is: find it among those that came.
  bool came = rank == p.ws.rank;
#pragma unroll 1
  for (int i = 0; i < a.num; ++i) {
    const int answered = __shfl_sync(~0u, a.source, i);
    came = came || answered == rank;
  }
  if (lane < p.top_k) {
    float value = 0.f;
    if (rank >= 0 && came && rank == p.ws.rank) {
      value = weight_gradient(p, own_row, lane);
    } else if (rank >= 0 && came) {
      value = __uint_as_float(ld_no_allocate8(entries(p.ws, p.ws.rank, op.parity, rank, token) + lane).x);
    }
    p.grad_topk_weights[static_cast<int64_t>(token) * p.top_k + lane] = value;
  }
}

}  // namespace epops
