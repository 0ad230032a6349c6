// Panels: how the AVX2, AVX-512 and AMX kernels hold the rows of a block, and their softmax state.
//
// Everything is transposed: a vector's lanes are as many query rows. A panel is a few such vectors
// side by side; its scores are [key][row], its accumulator [dim][row]. Maxima and sums over keys
// therefore need no horizontal step, a row's limit is a lane of a mask, K and V are not transposed,
// and Q and the result are transposed only once.
//
// Unnamed namespace: see isa.h.
#pragma once

#include "cpu/driver.h"
#include "cpu/vector_math.h"

namespace cptool::cpu {
namespace {

constexpr float kLn2 = 0.693147180559945309f;
// Returns `x`, rounded to float32 here: a compiler that contracts it with the addition that follows
// in one place and not in another would give the same row two results.
inline float rounded_here(float x) {
  __asm__("" : "+x"(x));
  return x;
}

// The maximum of a row that has seen no score. Finite, so that a difference of two maxima is never
// NaN.
constexpr float kNoScore = -1e30f;

// A row keeps its maximum until a score exceeds it by this much (log2): weights up to 2^8 cost no
// precision, and the accumulators rarely need rescaling.
constexpr float kSlack = 8.0f;

// The softmax state of every row of a block, in the units of exp2: weights are 2^(score * scale *
// log2 e - max).
template <int kRows>
struct RowStates {
  alignas(64) float max[kRows];
  alignas(64) float sum[kRows];
  alignas(64) int32_t first[kRows];  // of the keys of the sequence that the row sees
  alignas(64) int32_t limit[kRows];  // the end of them

  // `rows`: the number of rows in the block, rounded up to whole panels. Rows beyond the block see
  // what its last row sees, so that they do not change any decision.
  void begin(const RowBlock<kRows>& block, int rows) {
    for (int r = 0; r < rows; ++r) {
      max[r] = kNoScore;
      sum[r] = 0.0f;
      const int like = r < block.rows ? r : block.rows - 1;
      first[r] = static_cast<int32_t>(block.first[like]);
      limit[r] = static_cast<int32_t>(block.limit[like]);
    }
  }

  SoftmaxState state(int row) const {
    SoftmaxState state;
    if (sum[row] != 0.0f) {
      state.max = rounded_here(max[row] * kLn2);
      state.sum = sum[row];
    }
    return state;
  }
};

// Which keys of a tile rows `first` to `last` of the block see, counted from `key`, its first:
// some row each of [begin, end), every row each of [dense_begin, dense_end).
struct Visible {
  int begin, end;  // within the tile
  int64_t dense_begin, dense_end;

  template <int kRows>
  Visible(const RowStates<kRows>& rows, int first, int last, int64_t key, int tile_keys)
      : begin(clamp(rows.first[first] - key, tile_keys)),
        end(clamp(rows.limit[last] - key, tile_keys)),
        dense_begin(rows.first[last] - key),
        dense_end(rows.limit[first] - key) {}

  bool empty() const { return begin >= end; }

  static int clamp(int64_t key, int tile_keys) {
    return key < 0 ? 0 : key < tile_keys ? static_cast<int>(key) : tile_keys;
  }
};

// Prefetches the keys and values [key, key + keys) of the sequence into the level-2 cache. A head's
// rows are far apart, so the processor's own prefetchers find no pattern and every other row begins
// a page; packing them without prefetching takes longer than their arithmetic.
template <int kRows>
inline void prefetch_keys(const AttentionArgs& args, const RowBlock<kRows>& block, int64_t key,
                          int keys) {
  constexpr int kCacheLine = 64;
  const int64_t size = static_cast<int64_t>(element_size(args.dtype));
  const int64_t end =
      key + keys < block.limit[block.rows - 1] ? key + keys : block.limit[block.rows - 1];
  for (int64_t j = key; j < end; ++j) {
    const char* k = static_cast<const char*>(block.k) + j * args.k_token_stride * size;
    const char* v = static_cast<const char*>(block.v) + j * args.v_token_stride * size;
    for (int64_t byte = 0; byte < args.head_dim * size; byte += kCacheLine) {
      _mm_prefetch(k + byte, _MM_HINT_T1);
      _mm_prefetch(v + byte, _MM_HINT_T1);
    }
  }
}

}  // namespace
}  // namespace cptool::cpu
