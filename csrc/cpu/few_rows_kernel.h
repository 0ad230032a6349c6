// Products of few rows of x with the rows of w, a matrix that is read once from memory.
//
// Four rows of w are multiplied with up to kGroup rows of x at a time, in registers: for each step
// of k a group of R rows loads R + 4 vectors for 4 R multiplications. The four rows lie a quarter
// of the piece apart, so that a thread reads four long streams: one stream is bound by the latency
// of its misses, and streams that share a page (neighbouring rows of a narrow matrix) stop the
// processor's own prefetching. Counted on a Zen 4 that starts a 512-bit multiplication every two
// cycles at 3.5 GHz: a cache line of bfloat16 weights takes R / 1.75 ns, of which memory hides
// 2.5 to 4.5.
//
// Each result is the sum of one vector of accumulators, so it depends on its own row of x and of w
// alone, not on how rows and columns are grouped. Unnamed namespace: see isa.h.
#pragma once

#include <cstring>

#include "cpu/isa.h"
#include "cpu/vectors.h"

namespace cptool::cpu {
namespace {

// Rows of x in a group. Accumulators for 4 columns, a vector of each row of x and one of weights
// must fit in the registers.
#if defined(__AVX512F__)
constexpr int kGroup = 6;
#elif defined(__FMA__)
constexpr int kGroup = 3;
#else
constexpr int kGroup = 2;
#endif
constexpr int kColumns = 4;

// Arithmetic in float32. A step is kVectors vectors of weights, widened from the bytes at `from`.
template <class T>
struct Widened {
  using Packed = float;
  static constexpr int kVectors = 1;
  static constexpr int kStep = kLanes;
  static Vector weights(const T* from, int) { return load(from); }
  static Vector load_packed(const float* from) { return load(from); }
  static Vector multiply(Vector w, Vector x, Vector sum) { return multiply_add(w, x, sum); }
  static void pack(const T* from, float* to) {
    for (int i = 0; i < kStep; ++i) to[i] = to_float(from[i]);
  }
};

// In the order in which widening takes one instruction: even elements, then odd ones.
template <>
struct Widened<BFloat16> {
  using Packed = float;
  static constexpr int kVectors = 2;
  static constexpr int kStep = 2 * kLanes;
  static Vector weights(const BFloat16* from, int odd) {
    return odd ? load_odd(from) : load_even(from);
  }
  static Vector load_packed(const float* from) { return load(from); }
  static Vector multiply(Vector w, Vector x, Vector sum) { return multiply_add(w, x, sum); }
  static void pack(const BFloat16* from, float* to) {
    for (int i = 0; i < kLanes; ++i) {
      to[i] = to_float(from[2 * i]);
      to[kLanes + i] = to_float(from[2 * i + 1]);
    }
  }
};

#if defined(__AVX512BF16__)
// The instruction set's dot products of pairs: each adds two products to a float32, rounding twice,
// and treats subnormal values as 0.
struct Pairs {
  using Packed = BFloat16;
  static constexpr int kVectors = 1;
  static constexpr int kStep = 2 * kLanes;
  static Vector weights(const BFloat16* from, int) { return load_packed(from); }
  static Vector load_packed(const BFloat16* from) { return (Vector)_mm512_loadu_ps(from); }
  static Vector multiply(Vector w, Vector x, Vector sum) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
  }
  static void pack(const BFloat16* from, BFloat16* to) {
    std::memcpy(to, from, kStep * sizeof *to);
  }
};
#endif

// Sums the lanes of each of four vectors, all in the same order.
inline void sums_of(const Vector (&v)[kColumns], float* sums) {
#if defined(__AVX512F__)
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all =
      _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
  const __m256 a = (__m256)v[0], b = (__m256)v[1], c = (__m256)v[2], d = (__m256)v[3];
  const __m256d ab = (__m256d)_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256d cd = (__m256d)_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256 all =
      _mm256_add_ps((__m256)_mm256_unpacklo_pd(ab, cd), (__m256)_mm256_unpackhi_pd(ab, cd));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  for (int c = 0; c < kColumns; ++c) sums[c] = sum(v[c]);
#endif
}

template <class Math, int kRows, int kCount, class T, class Packed>
inline void multiply_step(const T* w, int64_t gap, const Packed* x, Vector (&acc)[kRows][kCount]) {
  constexpr int kWide = Math::kStep / Math::kVectors;
#pragma GCC unroll 2
  for (int v = 0; v < Math::kVectors; ++v) {
    Vector rows[kRows];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      rows[r] = Math::load_packed(x + r * Math::kStep + v * kWide);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) {
      const Vector weights = Math::weights(w + c * gap, v);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) acc[r][c] = Math::multiply(weights, rows[r], acc[r][c]);
    }
  }
}

// sums[r][c] = x[r] . w[c] for kRows packed rows of x and kCount rows of w, `gap` elements apart.
template <class Math, int kRows, int kCount, class T, class Packed>
void products(const T* w, int64_t gap, const Packed* x, int64_t depth,
              float (&sums)[kGroup][kColumns]) {
  Vector acc[kRows][kCount] = {};
  int64_t k = 0;
  for (; k + Math::kStep <= depth; k += Math::kStep, x += kRows * Math::kStep) {
    multiply_step<Math, kRows, kCount>(w + k, gap, x, acc);
  }
  if (k < depth) {
    T rest[kCount * Math::kStep] = {};
    for (int c = 0; c < kCount; ++c) {
      std::memcpy(rest + c * Math::kStep, w + c * gap + k, (depth - k) * sizeof(T));
    }
    multiply_step<Math, kRows, kCount>(rest, Math::kStep, x, acc);
  }
  // Unrolled, or the accumulators would lie in memory.
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    Vector columns[kColumns] = {};
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) columns[c] = acc[r][c];
    sums_of(columns, sums[r]);
  }
}

template <class Math, class T>
struct FewRows {
  using Packed = typename Math::Packed;

  static int64_t steps(const LinearArgs& args) {
    return (args.depth + Math::kStep - 1) / Math::kStep;
  }

  // Calls run(first row, rows) for groups that are as even as possible.
  template <class Run>
  static void in_groups(int64_t rows, const Run& run) {
    for (int64_t groups = (rows + kGroup - 1) / kGroup, row = 0; groups > 0; --groups) {
      const int64_t count = (rows - row) / groups;
      run(row, count);
      row += count;
    }
  }

  static int64_t packed_row_bytes(const LinearArgs& args) {
    return steps(args) * Math::kStep * static_cast<int64_t>(sizeof(Packed));
  }

  // Packs each group as [step][row][kStep], padded with zeros.
  static void pack(const LinearArgs& args, void* packed) {
    Packed* to = static_cast<Packed*>(packed);
    in_groups(args.rows, [&](int64_t row, int64_t count) {
      for (int64_t k = 0; k < args.depth; k += Math::kStep) {
        for (int64_t r = row; r < row + count; ++r, to += Math::kStep) {
          const T* from = static_cast<const T*>(args.x) + r * args.x_stride + k;
          if (k + Math::kStep <= args.depth) {
            Math::pack(from, to);
          } else {
            T rest[Math::kStep] = {};
            std::memcpy(rest, from, (args.depth - k) * sizeof(T));
            Math::pack(rest, to);
          }
        }
      }
    });
  }

  template <int kCount>
  static void block(const LinearArgs& args, const void* packed, int64_t column, int64_t apart) {
    const T* w = static_cast<const T*>(args.w) + column * args.w_stride;
    const int64_t gap = apart * args.w_stride, depth = args.depth;
    in_groups(args.rows, [&](int64_t row, int64_t count) {
      const Packed* x = static_cast<const Packed*>(packed) + row * steps(args) * Math::kStep;
      float sums[kGroup][kColumns];
      switch (count) {
        case 1:
          products<Math, 1, kCount>(w, gap, x, depth, sums);
          break;
        case 2:
          products<Math, 2, kCount>(w, gap, x, depth, sums);
          break;
#if defined(__FMA__)
        case 3:
          products<Math, 3, kCount>(w, gap, x, depth, sums);
          break;
#endif
#if defined(__AVX512F__)
        case 4:
          products<Math, 4, kCount>(w, gap, x, depth, sums);
          break;
        case 5:
          products<Math, 5, kCount>(w, gap, x, depth, sums);
          break;
        case 6:
          products<Math, 6, kCount>(w, gap, x, depth, sums);
          break;
#endif
      }
      for (int64_t r = 0; r < count; ++r) {
        T rounded[kColumns];
#pragma omp simd
        for (int c = 0; c < kColumns; ++c) from_float(sums[r][c], rounded[c]);
        T* out = static_cast<T*>(args.out) + (row + r) * args.columns + column;
        for (int c = 0; c < kCount; ++c) out[c * apart] = rounded[c];
      }
    });
  }

  static void columns(const LinearArgs& args, const void* packed, int64_t begin, int64_t end) {
    const int64_t apart = (end - begin) / kColumns;
    for (int64_t n = begin; n < begin + apart; ++n) block<kColumns>(args, packed, n, apart);
    for (int64_t n = begin + kColumns * apart; n < end; ++n) block<1>(args, packed, n, 1);
  }
};

template <class T>
using InFloat = FewRows<Widened<T>, T>;

// All types, in float32 arithmetic.
constexpr FewRowsKernel kFewRows = {
    [](ScalarType) { return true; },
    [](const LinearArgs& args) {
      return with_type(args.dtype, [&](auto element) {
        return InFloat<decltype(element)>::packed_row_bytes(args);
      });
    },
    [](const LinearArgs& args, void* packed) {
      with_type(args.dtype, [&](auto element) { InFloat<decltype(element)>::pack(args, packed); });
    },
    [](const LinearArgs& args, const void* packed, int64_t begin, int64_t end) {
      with_type(args.dtype, [&](auto element) {
        InFloat<decltype(element)>::columns(args, packed, begin, end);
      });
    },
};

}  // namespace
}  // namespace cptool::cpu
