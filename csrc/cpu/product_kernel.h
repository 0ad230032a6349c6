// Products of many rows with a matrix in any type that is stored: float32 sums, for AVX2 and
// AVX-512.
//
// The matrix is widened and packed once for all rows, up to `kDepth` of its depth and
// `kProductColumns` of its columns at a time (1.3 MB, for a level-3 cache or a large level 2), then
// up to `kProductRows` rows of x at a time (184 KB, for level 2). A tile of 6 rows and 16 columns,
// or with AVX-512 of 12 and 32, is summed in 12 or 24 registers: in each step of the depth 2 loads
// and a broadcast for each row feed two multiply-adds for each row, of which two start in a cycle,
// so that the loads have 1.33 or 1.17 per cycle to keep up with.
//
// Counted: a tile of 256 steps takes 1,536 cycles, with AVX-512 3,072, and reads and writes 12 or
// 24 vectors of the result (2%); packing takes 1 to 2 cycles per weight, which is used for rows /
// 16 cycles (rows / 32), and half a cycle per element of x, used for columns / 16 (columns / 32).
//
// A result is one chain of multiply-adds for each piece of the depth, and these are added in their
// order: it does not depend on how many rows or columns go with it.
// Unnamed namespace: see isa.h.
#pragma once

#include "cpu/product_rows.h"
#include "cpu/vector_math.h"  // transpose

namespace cptool::cpu {
namespace {

constexpr int kTileRows = kLanes == 16 ? 12 : 6, kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kLanes;
constexpr int kDepth = 320;  // the most of the depth that is packed at a time: 28 KB for a tile
constexpr int64_t kProductColumns = 1024, kProductRows = 144;  // that are packed at a time

// How much of the depth is packed at a time: whole blocks of any type whose rows have this depth,
// in as few pieces as there can be, of about the same size.
inline int64_t packed_depth(int64_t depth) {
  if (depth % 256 == 0) return 256;
  const int64_t pieces = (depth + kDepth - 1) / kDepth;
  return ((depth + pieces - 1) / pieces + 31) / 32 * 32;
}

// Multiplies R packed rows with kTileColumns packed columns; `c` is their place in the result, of
// which the first `columns` columns exist, and holds the sum over the depth before if `add`.
template <int R>
void product_tile(const float* a, const float* b, int64_t depth, float* c, int64_t c_stride,
                  int columns, bool add) {
  // The result was last used a piece of the depth ago. Its lines arrive while the tile is summed.
  for (int r = 0; r < R; ++r) {
    __builtin_prefetch(c + r * c_stride, 1);
    __builtin_prefetch(c + r * c_stride + columns - 1, 1);
  }
  Vector acc[R][kTileVectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += R, b += kTileColumns) {
    const Vector b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Vector value = broadcast(a[r]);
      acc[r][0] = multiply_add(value, b0, acc[r][0]);
      acc[r][1] = multiply_add(value, b1, acc[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    float* const to = c + r * c_stride;
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) {
      const int lanes = columns - v * kLanes;
      if (lanes >= kLanes) {
        float* const at = to + v * kLanes;
        store(add ? load(at) + acc[r][v] : acc[r][v], at);
      } else if (lanes > 0) {
        float* const at = to + v * kLanes;
        store(add ? load(at, lanes) + acc[r][v] : acc[r][v], at, lanes);
      }
    }
  }
}

// Writes rows [0, count) of x as slivers of up to kTileRows rows, each [depth][rows], and up to
// kLanes - kTileRows elements beyond.
inline void pack_rows(const float* x, int64_t stride, int64_t count, int64_t depth, float* to) {
  for (int64_t row = 0; row < count; row += kTileRows, x += kTileRows * stride) {
    const int rows = count - row < kTileRows ? static_cast<int>(count - row) : kTileRows;
    int64_t k = 0;
    if (rows == kTileRows) {
      for (; k + kLanes <= depth; k += kLanes) {
        Vector square[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) {
          square[r] = r < kTileRows ? load(x + r * stride + k) : Vector{};
        }
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(square[i], to + (k + i) * kTileRows);
      }
    }
    for (; k < depth; ++k) {
      for (int r = 0; r < rows; ++r) to[k * rows + r] = x[r * stride + k];
    }
    to += rows * depth;
  }
}

// Writes kTileColumns rows of float32 as [depth][kTileColumns].
inline void pack_columns(const float* const (&from)[kTileColumns], int64_t depth, float* to) {
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes, to += kLanes * kTileColumns) {
    for (int v = 0; v < kTileVectors; ++v) {
      Vector square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = load(from[v * kLanes + i] + k);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(square[i], to + i * kTileColumns + v * kLanes);
    }
  }
  for (; k < depth; ++k) {
    for (int c = 0; c < kTileColumns; ++c) *to++ = from[c][k];
  }
}

// The same for `rows` packed rows, at most R.
template <int R>
void last_tile(int64_t rows, const float* a, const float* b, int64_t depth, float* c,
               int64_t c_stride, int columns, bool add) {
  if (rows == R) return product_tile<R>(a, b, depth, c, c_stride, columns, add);
  if constexpr (R > 1) last_tile<R - 1>(rows, a, b, depth, c, c_stride, columns, add);
}

inline void product_tiles(const float* a, const float* b, int64_t rows, int64_t depth, float* c,
                          int64_t c_stride, int columns, bool add) {
  for (; rows >= kTileRows; rows -= kTileRows, a += kTileRows * depth, c += kTileRows * c_stride) {
    product_tile<kTileRows>(a, b, depth, c, c_stride, columns, add);
  }
  if (rows > 0) last_tile<kTileRows - 1>(rows, a, b, depth, c, c_stride, columns, add);
}

constexpr ProductKernel kProduct = {
    sizeof(float) * kDepth * (kProductColumns + kProductRows + kTileColumns),
    INT64_MAX,         // most_rows
    kProductColumns,   // most_columns
    kProductRows,      // row_grain
    4 * kProductRows,  // least_rows
    128,               // least_columns
    [](const StoredLinearArgs& args, const ProductPiece& piece, void* scratch) {
      float* const packed = static_cast<float*>(scratch);
      float* const x = packed + kDepth * kProductColumns;
      float* const widened = x + kDepth * kProductRows;
      const int64_t whole = packed_depth(args.w.depth);
      for (int64_t k = 0; k < args.w.depth; k += whole) {
        const int64_t depth = at_most(args.w.depth - k, whole);
        for (int64_t n = 0; n < piece.columns; n += kTileColumns) {
          const auto count = static_cast<int>(at_most(piece.columns - n, kTileColumns));
          const float* rows[kTileColumns];
          widened_rows<kTileColumns, kDepth>(args.w, piece.column + n, count, k, depth, widened,
                                             rows);
          pack_columns(rows, depth, packed + n * depth);
        }
        for (int64_t m = 0; m < piece.rows; m += kProductRows) {
          const int64_t count = at_most(piece.rows - m, kProductRows), row = piece.row + m;
          pack_rows(args.x + row * args.x_stride + k, args.x_stride, count, depth, x);
          float* const out = args.out + row * args.out_stride + piece.column;
          for (int64_t n = 0; n < piece.columns; n += kTileColumns) {
            const auto columns = static_cast<int>(at_most(piece.columns - n, kTileColumns));
            product_tiles(x, packed + n * depth, count, depth, out + n, args.out_stride, columns,
                          k > 0);
          }
        }
      }
    },
};

}  // namespace
}  // namespace cptool::cpu
