// Products of few rows with weights that are widened in registers, and widening itself.
//
// Weights are widened 32 at a time: their integers to bytes, then a vector of bytes to float32,
// scaled. Four rows of w are multiplied at once, a quarter of the piece apart, as in
// few_rows_kernel.h, and each result is summed in the same order as there: it has the bits that the
// product with the widened weights has.
//
// AVX2 has a faster way for most types (group_kernel.h). Unnamed namespace: see isa.h.
#pragma once

#include "cpu/block_formats.h"
#include "cpu/few_rows_kernel.h"  // kGroup, kColumns, sums_of
#include "cpu/isa.h"

namespace cptool::cpu {
namespace {

constexpr int kPart = 16;  // weights that are widened together
constexpr int kPartVectors = kPart / kLanes;

// Vector v of sixteen signed bytes, as float32.
inline Vector widened_bytes(Bytes bytes, int v) {
#if defined(__AVX512F__)
  (void)v;
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)bytes));
#elif defined(__AVX2__)
  const __m128i all = (__m128i)bytes;
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v ? _mm_unpackhi_epi64(all, all) : all));
#else
  typedef int8_t Four __attribute__((vector_size(kLanes)));
  Four four;
  std::memcpy(&four, reinterpret_cast<const char*>(&bytes) + v * kLanes, sizeof four);
  return __builtin_convertvector(four, Vector);
#endif
}

inline Vector all_lanes(float value) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(value);
#elif defined(__AVX2__)
  return _mm256_set1_ps(value);
#else
  return value - Vector{};  // not a sum, for -0 + 0 is 0
#endif
}

// A block of a quantised type, widened part by part.
template <class Type>
struct Widening {
  static constexpr int kWeights = Type::kWeights, kBytes = Type::kBytes, kRun = Type::kRun;

  void begin(const uint8_t* from) {
    block = from;
    Type::scales(block, scale, shift);
  }
  void widen(int run, int part, Vector (&weights)[kPartVectors]) const {
    const int group = (run * kRun + part * kPart) / Type::kGroup;
    const Vector by = all_lanes(scale[group]);
    const auto scaled = [&](Vector whole) {
      if constexpr (Type::kShifted) return multiply_add(by, whole, all_lanes(shift[group]));
      return by * whole;
    };
#if defined(__AVX512F__)
    if constexpr (Type::kIndexed) {  // scale the table, and take each weight from it
      const Vector table = scaled(widened_bytes(load_bytes(Type::kTable), 0));
      __m512i indices = _mm512_cvtepu8_epi32((__m128i)load_bytes(Type::indices(block, run, part)));
      if (Type::half(part)) indices = _mm512_srli_epi32(indices, 4);
      weights[0] = _mm512_permutexvar_ps(indices, table);  // by their four lowest bits
      return;
    }
#endif
    const Bytes integers = Type::integers(block, run, part);
#pragma GCC unroll 4
    for (int v = 0; v < kPartVectors; ++v) weights[v] = scaled(widened_bytes(integers, v));
  }

  const uint8_t* block;
  float scale[Type::kWeights / Type::kGroup], shift[Type::kWeights / Type::kGroup];
};

template <class T>
struct WideningHalves {  // bfloat16 or float16
  static constexpr int kWeights = 32, kBytes = 64, kRun = 32;

  void begin(const uint8_t* from) { block = from; }
  void widen(int, int part, Vector (&weights)[kPartVectors]) const {
    const T* from = reinterpret_cast<const T*>(block) + part * kPart;
#pragma GCC unroll 4
    for (int v = 0; v < kPartVectors; ++v) weights[v] = load(from + v * kLanes);
  }

  const uint8_t* block;
};

template <int kNumber>
struct Rows {
  static constexpr int kCount = kNumber;
};

// sums[r][c] = x[r] . w[c] for kRows rows of x and kColumns rows of w, `gap` bytes apart.
template <class Block, int kRows>
void stored_products(const uint8_t* w, int64_t gap, const float* x, int64_t x_stride, int64_t depth,
                     float (&sums)[kGroup][kColumns]) {
  Vector acc[kRows][kColumns] = {};
  Block blocks[kColumns];
  for (int64_t k = 0; k < depth; k += Block::kWeights, w += Block::kBytes) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) blocks[c].begin(w + c * gap);
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
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
              const Vector values = load(at + r * x_stride + v * kLanes);
              acc[r][c] = multiply_add(weights[v], values, acc[r][c]);
            }
          }
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) sums_of(acc[r], sums[r]);
}

// Where the file's row `row` belongs in the matrix (StoredMatrix::head_dim).
inline int64_t place_of(const StoredMatrix& w, int64_t row) {
  if (w.head_dim == 0) return row;
  const int64_t in_head = row % w.head_dim;
  return row - in_head + in_head / 2 + in_head % 2 * (w.head_dim / 2);
}

// Which row of the file is the matrix's row `row`.
inline int64_t row_of(const StoredMatrix& w, int64_t row) {
  if (w.head_dim == 0) return row;
  const int64_t in_head = row % w.head_dim, half = w.head_dim / 2;
  return row - in_head + 2 * (in_head % half) + in_head / half;
}

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
    for (int r = 0; r < kRows; ++r) {
      float* out = args.out + (row + r) * args.out_stride;
      for (int c = 0; c < kColumns; ++c) out[place_of(args.w, column + c * apart)] = sums[r][c];
    }
    row += kRows;
  };
#if defined(__AVX512F__)
  while (args.rows - row >= 4) run(Rows<4>{});
#endif
#if defined(__FMA__)
  while (args.rows - row >= 2) run(Rows<2>{});
#endif
  while (args.rows - row >= 1) run(Rows<1>{});
}

// Returns run(Block) for the encoding.
template <class Run>
inline void with_block(Encoding encoding, const Run& run) {
  switch (encoding) {
    case Encoding::kFloat32:
      return;
    case Encoding::kBFloat16:
      return run(WideningHalves<BFloat16>{});
    case Encoding::kFloat16:
      return run(WideningHalves<Float16>{});
    case Encoding::kQ4_0:
      return run(Widening<Q4<8>>{});
    case Encoding::kQ4_1:
      return run(Widening<Q4<0>>{});
    case Encoding::kQ5_0:
      return run(Widening<Q5<16>>{});
    case Encoding::kQ5_1:
      return run(Widening<Q5<0>>{});
    case Encoding::kQ8_0:
      return run(Widening<Q8>{});
    case Encoding::kQ2_K:
      return run(Widening<Q2K>{});
    case Encoding::kQ3_K:
      return run(Widening<Q3K>{});
    case Encoding::kQ4_K:
      return run(Widening<Q4K>{});
    case Encoding::kQ5_K:
      return run(Widening<Q5K>{});
    case Encoding::kQ6_K:
      return run(Widening<Q6K>{});
    case Encoding::kIQ4_NL:
      return run(Widening<IQ4NL>{});
    case Encoding::kIQ4_XS:
      return run(Widening<IQ4XS>{});
  }
}

// Rows that share a widened weight.
#if defined(__AVX512F__)
constexpr int kSharingRows = 4;
#elif defined(__FMA__)
constexpr int kSharingRows = 2;
#else
constexpr int kSharingRows = 1;
#endif

constexpr StoredKernels kStored = {
    [](Encoding) { return kSharingRows; },
    [](const StoredLinearArgs&) -> int64_t { return 0; },  // x is read as it is
    [](const StoredLinearArgs&, void*) {},
    [](const StoredLinearArgs& args, const void*, int64_t begin, int64_t end) {
      with_block(args.w.encoding, [&](auto block) {
        using Block = decltype(block);
        const int64_t apart = (end - begin) / kColumns;
        for (int64_t n = begin; n < begin + apart; ++n) {
          stored_columns<Block>(args, n, apart);
        }
        // What four leave over, at most three rows of a matrix, is computed four times each, which
        // saves the code for single rows.
        for (int64_t n = begin + kColumns * apart; n < end; ++n) stored_columns<Block>(args, n, 0);
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
