// Products of few rows with weights that are widened in registers, and widening itself.
//
// Weights are widened 32 at a time: their integers to bytes, then a vector of bytes to float32,
// scaled. Four rows of w are multiplied at once, a quarter of the piece apart, as in
// few_rows_kernel.h, and each result is summed in the same order as there: it has the bits that the
// product with the widened weights has.
//
// AVX2 has a faster way for most types (group_kernel.h). Unnamed namespace: see isa.h.
#pragma once

#include "cpu/few_rows_kernel.h"  // kGroup, kColumns, sums_of
#include "cpu/isa.h"
#include "cpu/widening.h"

namespace cptool::cpu {
namespace {

template <int kNumber>
struct Rows {
  static constexpr int kCount = kNumber;
};

// Begins a block of each of kColumns rows of w, `gap` bytes apart.
template <class Block>
__attribute__((always_inline)) inline void begin_all(const uint8_t* w, int64_t gap,
                                                     Block (&blocks)[kColumns]) {
#if defined(__F16C__)
  if constexpr (Block::kTwoHalves) {
    // All are converted together, and spread over vectors as they are loaded again: ports that
    // shuffle and convert are what these products wait for.
    alignas(32) float halves[kColumns][2];
    const auto two = [&](int c) { return static_cast<int>(word_at(w + c * gap)); };
    _mm256_store_ps(halves[0], _mm256_cvtph_ps(_mm_setr_epi32(two(0), two(1), two(2), two(3))));
    asm volatile("" : "+m"(halves));
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      blocks[c].begin(w + c * gap, halves[c][0], halves[c][1]);
    }
    return;
  }
#endif
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) blocks[c].begin(w + c * gap);
}

// sums[r][c] = x[r] . w[c] for kRows rows of x and kColumns rows of w, `gap` bytes apart.
template <class Block, int kRows>
void stored_products(const uint8_t* w, int64_t gap, const float* x, int64_t x_stride, int64_t depth,
                     float (&sums)[kGroup][kColumns]) {
  Vector acc[kRows][kColumns] = {};
  Block blocks[kColumns];
  for (int64_t k = 0; k < depth; k += Block::kWeights, w += Block::kBytes) {
    begin_all(w, gap, blocks);
    for (int run = 0; run < Block::kWeights / Block::kRun; ++run) {
#pragma GCC unroll 8
      for (int part = 0; part < Block::kRun / kPart; ++part) {
        const float* at = x + k + run * Block::kRun + part * kPart;
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
          Vector weights[kPartVectors];
          blocks[c].widen(run, part, weights);
#pragma GCC unroll 4
          for (int v = 0; v < kPartVectors; ++v) {
#pragma GCC unroll 6
            for (int r = 0; r < kRows; ++r) {
              const Vector values = load(at + r * x_stride + v * kLanes);
              acc[r][c] = multiply_add(weights[v], values, acc[r][c]);
            }
          }
        }
      }
    }
  }
  // Unrolled, or the accumulators would lie in memory.
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) sums_of(acc[r], sums[r]);
}

inline void put_columns(const StoredLinearArgs& args, int64_t row, const float* sums,
                        int64_t column, int64_t apart) {
  float* out = args.out + row * args.out_stride;
  for (int c = 0; c < kColumns; ++c) out[place_of(args.w, column + c * apart)] = sums[c];
}

// Rows up to which weights are widened in registers, again for each group of rows: with AVX-512 of
// 3 to 6, else of kSharingRows.
#if defined(__AVX512F__)
constexpr int kSharingRows = 8;
#elif defined(__FMA__)
constexpr int kSharingRows = 2;
#else
constexpr int kSharingRows = 1;
#endif

// Computes the columns that four rows of the file make, `apart` rows from each other.
template <class Block>
inline void stored_columns(const StoredLinearArgs& args, int64_t column, int64_t apart) {
  const uint8_t* w = static_cast<const uint8_t*>(args.w.at) + column * args.w.stride;
  const int64_t gap = apart * args.w.stride, depth = args.w.depth, stride = args.x_stride;
  int64_t row = 0;
  const auto run = [&](auto rows) {
    constexpr int kRows = decltype(rows)::kCount;
    float sums[kGroup][kColumns];
    stored_products<Block, kRows>(w, gap, args.x + row * stride, stride, depth, sums);
    for (int r = 0; r < kRows; ++r) put_columns(args, row + r, sums[r], column, apart);
    row += kRows;
  };
#if defined(__AVX512F__)
  if (args.rows == 5) return run(Rows<5>{});
  if (args.rows == 6) return run(Rows<6>{});
  while (args.rows - row >= 4) run(Rows<4>{});
  if (args.rows - row == 3) run(Rows<3>{});
#endif
#if defined(__FMA__)
#if !defined(__AVX512F__)
  while (args.rows - row == 3 || args.rows - row > 4) run(Rows<3>{});
#endif
  while (args.rows - row >= 2) run(Rows<2>{});
#endif
  while (args.rows - row >= 1) run(Rows<1>{});
}

#if defined(__AVX512F__)
// More rows, for which weights are widened once, to memory of level 1, from which groups of rows
// take them: with 4 rows of w, 1024 weights at a time. A step of SmolLM2 in Q4_1 (Xeon with
// AVX512_BF16, one core) takes 0.68 of the time of a panel in memory with 16 rows.
constexpr int kMostStoredRows = 16, kWidened = 256;

template <int kRows>
inline void add_widened(const float (*weights)[kColumns][kPart], int64_t parts, const float* x,
                        int64_t x_stride, Vector (*sums)[kColumns]) {
  Vector acc[kRows][kColumns];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) acc[r][c] = sums[r][c];
  }
  for (int64_t part = 0; part < parts; ++part, x += kPart) {
    Vector w[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) w[c] = load(weights[part][c]);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Vector values = load(x + r * x_stride);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) acc[r][c] = multiply_add(w[c], values, acc[r][c]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) sums[r][c] = acc[r][c];
  }
}

// As stored_columns, for more rows.
template <class Block>
inline void widened_columns(const StoredLinearArgs& args, int64_t column, int64_t apart) {
  const uint8_t* w = static_cast<const uint8_t*>(args.w.at) + column * args.w.stride;
  const int64_t gap = apart * args.w.stride, depth = args.w.depth, stride = args.x_stride;
  alignas(64) float weights[kWidened / kPart][kColumns][kPart];
  Vector acc[kMostStoredRows][kColumns] = {};
  Block block;
  for (int64_t k = 0; k < depth; k += kWidened) {
    const int64_t parts = (depth - k < kWidened ? depth - k : kWidened) / kPart;
    for (int64_t first = 0; first < parts; first += Block::kWeights / kPart, w += Block::kBytes) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        block.begin(w + c * gap);
        for (int run = 0; run < Block::kWeights / Block::kRun; ++run) {
#pragma GCC unroll 8
          for (int part = 0; part < Block::kRun / kPart; ++part) {
            Vector widened[kPartVectors];
            block.widen(run, part, widened);
            store(widened[0], weights[first + run * (Block::kRun / kPart) + part][c]);
          }
        }
      }
    }
    const int64_t groups = (args.rows + kGroup - 1) / kGroup;
    for (int64_t group = 0, row = 0; group < groups; ++group) {
      const int64_t count = (args.rows - row) / (groups - group);
      const float* x = args.x + row * stride + k;
      switch (count) {
        case 4:
          add_widened<4>(weights, parts, x, stride, acc + row);
          break;
        case 5:
          add_widened<5>(weights, parts, x, stride, acc + row);
          break;
        default:
          add_widened<6>(weights, parts, x, stride, acc + row);
      }
      row += count;
    }
  }
  for (int64_t row = 0; row < args.rows; ++row) {
    float sums[kColumns];
    sums_of(acc[row], sums);
    put_columns(args, row, sums, column, apart);
  }
}
#endif

constexpr StoredKernels kStored = {
    [](Encoding) { return true; },
    [](Encoding encoding) {
#if defined(__AVX512F__)
      (void)encoding;
      return kMostStoredRows;
#else
#if defined(__FMA__)
      // These widen in an instruction or two, so doing it again for further rows is faster than a
      // panel in memory: on a Zen 3, 4.4 times with 3 rows, 2.6 with 4, 1.4 with 16.
      if (encoding == Encoding::kBFloat16 || encoding == Encoding::kFloat16) return 16;
#else
      (void)encoding;
#endif
      return kSharingRows;
#endif
    },
    [](const StoredLinearArgs&) -> int64_t { return 0; },  // x is read as it is
    [](const StoredLinearArgs&, void*) {},
    [](const StoredLinearArgs& args, const void*, int64_t begin, int64_t end) {
      with_block(args.w.encoding, [&](auto block) {
        using Block = decltype(block);
        const int64_t apart = (end - begin) / kColumns;
        const auto columns = [&](const auto& four) {
          for (int64_t n = begin; n < begin + apart; ++n) four(n, apart);
          // What four leave over, at most three rows of a matrix, is computed four times each,
          // which saves the code for single rows.
          for (int64_t n = begin + kColumns * apart; n < end; ++n) four(n, 0);
        };
#if defined(__AVX512F__)
        if (args.rows > kSharingRows) {
          return columns([&](int64_t n, int64_t gap) { widened_columns<Block>(args, n, gap); });
        }
#endif
        columns([&](int64_t n, int64_t gap) { stored_columns<Block>(args, n, gap); });
      });
    },
    [](const WidenArgs& args, int64_t begin, int64_t end) {
      with_block(args.w.encoding, [&](auto block) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = args.index == nullptr ? args.first + i : args.index[i];
          const uint8_t* from =
              static_cast<const uint8_t*>(args.w.at) + row_of(args.w, row) * args.w.stride;
          float* to = args.out + i * args.w.depth;
          for (int64_t k = 0; k < args.w.depth; from += block.kBytes) {
            block.begin(from);
            for (int run = 0; run < block.kWeights / block.kRun; ++run) {
#pragma GCC unroll 8
              for (int part = 0; part < block.kRun / kPart; ++part, k += kPart) {
                Vector weights[kPartVectors];
                block.widen(run, part, weights);
                for (int v = 0; v < kPartVectors; ++v) store(weights[v], to + k + v * kLanes);
              }
            }
          }
        }
      });
    },
};

}  // namespace
}  // namespace cptool::cpu
