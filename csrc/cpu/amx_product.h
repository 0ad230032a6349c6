// Products of many rows with a matrix in any type that is stored, float32 by float32, on the
// bfloat16 tiles of AMX.
//
// Values are split into bfloat16 pieces (amx_pieces.h). A weight that is stored in fewer bits has
// fewer: bfloat16 takes 3 products instead of 6, and float16, Q4_0 and Q5_0 take 5.
//
// Counted: a tile product of 16 x 16 x 32 takes 16 cycles, a rate of 1024 operations per cycle
// where AVX-512's multiply-adds have 64: 171 of float32 in 6 products, 341 in 3. 8, 12 or 14 tile
// loads feed 12, 20 or 24 products, 37 to 43 bytes per cycle, most from the level-2 cache. Packing
// takes 0.2 cycles per weight in one piece and 0.9 in three, for up to 2048 rows, and 0.5 per
// element of x, for all columns of a piece; memory comes on top.
//
// A result is one chain of sums over the depth: it does not depend on how many rows or columns go
// with it.
// Unnamed namespace: see isa.h.
#pragma once

#include "cpu/amx_pieces.h"
#include "cpu/isa.h"
#include "cpu/product_rows.h"

namespace cptool::cpu {
namespace {

constexpr int kBlock = 32;  // rows, and columns, of four tiles that are summed at a time
constexpr int kRowPieces = kFloat32Pieces;

// Into how many bfloat16 values each weight is split without loss.
inline int pieces_of(Encoding encoding) {
  switch (encoding) {
    case Encoding::kBFloat16:
      return 1;
    case Encoding::kFloat16:
    case Encoding::kQ4_0:
    case Encoding::kQ5_0:
      return 2;  // an 11-bit scale times an integer of at most 4 bits and its sign
    default:
      return 3;
  }
}

// Loads elements [0, 32) of a row of which `count` > 0 exist; the others are 0.
inline void load_values(const float* from, int64_t count, Vector (&values)[2]) {
  const __mmask32 mask = count >= kStrip ? ~0u : (1u << count) - 1;
  values[0] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
  values[1] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + kLanes);
}

// Packs 16 columns as tiles [depth / 32][kPieces][2], of which it writes every second one, each [16
// pairs of depth][16 columns][2].
template <int kPieces>
void pack_matrix(const float* const (&from)[kLanes], int64_t depth, char* to) {
  for (int64_t k = 0; k < depth; k += kStrip, to += 2 * kPieces * kTileBytes) {
    __m512i r[kPieces][kLanes];
#pragma GCC unroll 16
    for (int c = 0; c < kLanes; ++c) {
      Vector values[2];
      load_values(from[c] + k, depth - k, values);
      split<kPieces>(values, [&](__m512i piece, int p) { r[p][c] = piece; });
    }
    for (int p = 0; p < kPieces; ++p) {
      transpose(r[p]);
      char* const tile = to + 2 * p * kTileBytes;
      for (int i = 0; i < kLanes; ++i) _mm512_store_si512(tile + i * kTileStride, r[p][i]);
    }
  }
}

// Packs `count` rows of x as tiles [depth / 32][3 pieces][2], each [16 rows][32]; rows that do not
// exist are 0.
inline void pack_x(const float* x, int64_t stride, int count, int64_t depth, char* to) {
  for (int64_t k = 0; k < depth; k += kStrip) {
    for (int r = 0; r < kBlock; ++r) {
      Vector values[2] = {};
      if (r < count) load_values(x + r * stride + k, depth - k, values);
      char* const at = to + r / kLanes * kTileBytes + r % kLanes * kTileStride;
      split<kRowPieces>(values, [&](__m512i piece, int p) {
        _mm512_store_si512(at + 2 * p * kTileBytes, piece);
      });
    }
    to += 2 * kRowPieces * kTileBytes;
  }
}

template <int kRowTiles, int kX>
inline void load_x(const char* x) {
  load_tile<4>(x + 2 * kX * kTileBytes);
  if constexpr (kRowTiles == 2) load_tile<5>(x + (2 * kX + 1) * kTileBytes);
}

template <int kW>
inline void load_w(const char* w) {
  load_tile<6>(w + 2 * kW * kTileBytes);
  load_tile<7>(w + (2 * kW + 1) * kTileBytes);
}

template <int kRowTiles>
inline void multiply_block() {
  multiply_tiles<0, 4, 6>();
  multiply_tiles<1, 4, 7>();
  if constexpr (kRowTiles == 2) {
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
  }
}

// Adds to the block `c` of 16 or 32 rows and 32 columns what `steps` times 32 of the depth give.
template <int kRowTiles, int kPieces>
void multiply(const char* x, const char* w, int64_t steps, float* c, int64_t stride, bool add) {
  const int64_t bytes = stride * sizeof(float);
  if (add) {
    load_tile<0>(c, bytes);
    load_tile<1>(c + kLanes, bytes);
    if constexpr (kRowTiles == 2) {
      load_tile<2>(c + kLanes * stride, bytes);
      load_tile<3>(c + kLanes * stride + kLanes, bytes);
    }
  } else {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
  }
  for (int64_t step = 0; step < steps; ++step) {
    // The largest products last. Each tile stays for the next product where that takes it too.
    load_x<kRowTiles, 2>(x);
    load_w<0>(w);
    multiply_block<kRowTiles>();
    load_x<kRowTiles, 1>(x);
    multiply_block<kRowTiles>();
    if constexpr (kPieces > 1) {
      load_w<1>(w);
      multiply_block<kRowTiles>();
    }
    load_x<kRowTiles, 0>(x);
    if constexpr (kPieces > 1) multiply_block<kRowTiles>();
    if constexpr (kPieces > 2) {
      load_w<2>(w);
      multiply_block<kRowTiles>();
    }
    if constexpr (kPieces > 1) load_w<0>(w);
    multiply_block<kRowTiles>();
    x += 2 * kRowPieces * kTileBytes;
    w += 2 * kPieces * kTileBytes;
  }
  store_tile<0>(c, bytes);
  store_tile<1>(c + kLanes, bytes);
  if constexpr (kRowTiles == 2) {
    store_tile<2>(c + kLanes * stride, bytes);
    store_tile<3>(c + kLanes * stride + kLanes, bytes);
  }
}

template <int kPieces>
class AmxProduct {
 public:
  static constexpr int64_t kRows = 2048;  // that are packed at a time

  static constexpr size_t scratch_bytes() { return kMatrix + kX + kWhole + kWidened; }

  AmxProduct(const StoredLinearArgs& args, const ProductPiece& piece, void* scratch)
      : args_(args),
        piece_(piece),
        w_(static_cast<char*>(scratch)),
        x_(w_ + kMatrix),
        whole_(reinterpret_cast<float*>(x_ + kX)),
        widened_(reinterpret_cast<float*>(x_ + kX + kWhole)) {}

  void compute() {
    const TileConfig config;
    for (begin_ = 0; begin_ < args_.w.depth; begin_ += kDepth) {
      depth_ = at_most(args_.w.depth - begin_, kDepth);
      steps_ = (depth_ + kStrip - 1) / kStrip;
      for (int64_t m = 0; m < piece_.rows; m += kBlock) {
        const float* const x = args_.x + (piece_.row + m) * args_.x_stride + begin_;
        pack_x(x, args_.x_stride, existing(piece_.rows - m), depth_, packed_x(m));
      }
      for (int64_t first = 0; first < piece_.columns; first += kColumns) {
        const int64_t columns = at_most(piece_.columns - first, kColumns);
        pack_columns(piece_.column + first, columns);
        for (int64_t m = 0; m < piece_.rows; m += kBlock) multiply_rows(m, first, columns);
      }
    }
  }

 private:
  static constexpr int64_t kDepth = 512;  // that is packed at a time
  static constexpr int64_t kColumns = kPieces == 1 ? 1152 : 384;
  static constexpr int64_t kMatrix = kDepth * kColumns * kPieces * 2;
  static constexpr int64_t kX = kDepth * kRows * kRowPieces * 2;
  static constexpr int64_t kWhole = kBlock * kBlock * sizeof(float);
  static constexpr int64_t kWidened = kLanes * kDepth * sizeof(float);

  static int existing(int64_t count) { return static_cast<int>(at_most(count, kBlock)); }

  char* packed_x(int64_t row) const {
    return x_ + row / kBlock * steps_ * 2 * kRowPieces * kTileBytes;
  }
  char* packed_w(int64_t column) const {
    return w_ + column / kBlock * steps_ * 2 * kPieces * kTileBytes;
  }

  void pack_columns(int64_t first, int64_t columns) {
    for (int64_t n = 0; n < columns; n += kLanes) {
      const auto count = static_cast<int>(at_most(columns - n, kLanes));
      const float* rows[kLanes];
      widened_rows<kLanes, kDepth>(args_.w, first + n, count, begin_, depth_, widened_, rows);
      pack_matrix<kPieces>(rows, depth_, packed_w(n) + n / kLanes % 2 * kTileBytes);
    }
  }

  // Multiplies 32 rows with the columns that are packed, which begin with the piece's column
  // `first`.
  void multiply_rows(int64_t row, int64_t first, int64_t columns) {
    const int rows = existing(piece_.rows - row);
    const int64_t stride = args_.out_stride;
    float* out = args_.out + (piece_.row + row) * stride + piece_.column + first;
    for (int64_t n = 0; n < columns; n += kBlock, out += kBlock) {
      const int width = existing(columns - n);
      if (rows == kBlock && width == kBlock) {
        multiply<2, kPieces>(packed_x(row), packed_w(n), steps_, out, stride, begin_ > 0);
      } else {
        multiply_some(packed_x(row), packed_w(n), out, rows, width);
      }
    }
  }

  // The same for a block of which `rows` and `columns` exist.
  void multiply_some(const char* x, const char* w, float* c, int rows, int columns) {
    const auto copy = [=](const float* from, int64_t from_stride, float* to, int64_t to_stride) {
      for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < columns; ++i) to[r * to_stride + i] = from[r * from_stride + i];
      }
    };
    const bool add = begin_ > 0;
    if (add) copy(c, args_.out_stride, whole_, kBlock);
    if (rows <= kLanes) {
      multiply<1, kPieces>(x, w, steps_, whole_, kBlock, add);
    } else {
      multiply<2, kPieces>(x, w, steps_, whole_, kBlock, add);
    }
    copy(whole_, kBlock, c, args_.out_stride);
  }

  const StoredLinearArgs& args_;
  const ProductPiece piece_;
  char* const w_;         // [columns / 32][depth / 32][kPieces][2 tiles]
  char* const x_;         // [rows / 32][depth / 32][3 pieces][2 tiles]
  float* const whole_;    // a block of the result of which only a part exists
  float* const widened_;  // 16 rows of the matrix
  int64_t begin_ = 0, depth_ = 0, steps_ = 0;
};

constexpr ProductKernel kAmxProduct = {
    AmxProduct<3>::scratch_bytes(),
    AmxProduct<3>::kRows,  // most_rows
    INT64_MAX,             // most_columns
    kBlock,                // row_grain
    8 * kBlock,            // least_rows
    8 * kBlock,            // least_columns
    [](const StoredLinearArgs& args, const ProductPiece& piece, void* scratch) {
      switch (pieces_of(args.w.encoding)) {
        case 1:
          return AmxProduct<1>(args, piece, scratch).compute();
        case 2:
          return AmxProduct<2>(args, piece, scratch).compute();
        default:
          return AmxProduct<3>(args, piece, scratch).compute();
      }
    },
};

}  // namespace
}  // namespace cptool::cpu
