// The attention kernel in plain C++ with the compiler's own vectors, for any instruction set that
// the including file is compiled for. The simplest kernel: read it first. What surrounds it is in
// driver.h. Unnamed namespace: see isa.h.
//
// For each tile of keys, K is transposed to [head_dim][kKeys], so that scores and output are the
// same small matrix product, C[rows][columns] += A[rows][depth] B[depth][columns], with contiguous
// rows of B.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/driver.h"

namespace cptool::cpu {
namespace {

constexpr float kLn2 = 0.69314718055994530942f;

// Columns of C in a vector.
constexpr int kWidth = 8;
typedef float Eight __attribute__((vector_size(kWidth * sizeof(float))));
#if defined(__AVX__)
constexpr int kEights = 2;  // of columns in a register block
#else
constexpr int kEights = 1;
#endif

// The most terms that are added one after the other. Longer sums are sums of such chains, which
// accumulates less rounding error.
constexpr int64_t kChain = 128;

// What becomes of the old content of a block of C: it is overwritten, it is the first term of the
// chains, or it is added at their end.
enum class Start { kZero, kChained, kAdded };

// C[kR][kV * kWidth] (+)= A[kR][depth] B[depth][kV * kWidth].
template <int kR, int kV>
inline void multiply_block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                           int64_t ldc, int64_t depth, Start start) {
  Eight sums[kR][kV];
  for (int r = 0; r < kR; ++r) {
    for (int i = 0; i < kV; ++i) {
      sums[r][i] = Eight{};
      if (start == Start::kChained) {
        std::memcpy(&sums[r][i], c + r * ldc + i * kWidth, sizeof(Eight));
      }
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Eight row[kV];
    for (int i = 0; i < kV; ++i) std::memcpy(&row[i], b + k * ldb + i * kWidth, sizeof(Eight));
    for (int r = 0; r < kR; ++r) {
      for (int i = 0; i < kV; ++i) sums[r][i] += a[r * lda + k] * row[i];
    }
  }
  if (start == Start::kAdded) {
    for (int r = 0; r < kR; ++r) {
      for (int i = 0; i < kV; ++i) {
        Eight before;
        std::memcpy(&before, c + r * ldc + i * kWidth, sizeof(Eight));
        sums[r][i] += before;
      }
    }
  }
  for (int r = 0; r < kR; ++r) {
    for (int i = 0; i < kV; ++i) std::memcpy(c + r * ldc + i * kWidth, &sums[r][i], sizeof(Eight));
  }
}

// `columns` is a multiple of kWidth.
template <int kR>
inline void multiply_rows(const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                          int64_t ldc, int64_t depth, int64_t columns, bool accumulate) {
  Start start = accumulate ? Start::kChained : Start::kZero;
  for (int64_t k = 0; k < depth; k += kChain) {
    const int64_t terms = depth - k < kChain ? depth - k : kChain;
    const float* left = a + k;
    const float* right = b + k * ldb;
    int64_t n = 0;
    for (; n + kEights * kWidth <= columns; n += kEights * kWidth) {
      multiply_block<kR, kEights>(left, lda, right + n, ldb, c + n, ldc, terms, start);
    }
    for (; n < columns; n += kWidth)
      multiply_block<kR, 1>(left, lda, right + n, ldb, c + n, ldc, terms, start);
    start = Start::kAdded;
  }
}

// exp2 for arguments up to 0 and -inf, to 2 units in the last place; below 2^-126 it is 0, and NaN
// stays NaN. Coefficients: the Cephes library's exp2f, minimax on [-1/2, 1/2].
inline float exp2_nonpositive(float x) {
  const float clamped = x < -126.0f ? -126.0f : x;
  // Adding 1.5 * 2^23 rounds to an integer, which is left in the low bits.
  const float shifted = clamped + 12582912.0f;
  const float f = clamped - (shifted - 12582912.0f);
  float p = 1.535336188319500e-4f;
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  const float power = bits_float((float_bits(shifted) + 127u) << 23);
  return x < -126.0f ? 0.0f : p * power;
}

// The hyperbolic tangent, to three units in the last place: up to 0.625 the odd polynomial of
// Cephes' tanhf, which keeps small results to their own precision.
inline float hyperbolic_tangent(float x) {
  const float size = x < 0.0f ? -x : x;
  const float square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float power = exp2_nonpositive(size * -2.88539008177792681f);  // e^(-2 |x|)
  const float large = (1.0f - power) / (1.0f + power);
  return size < 0.625f ? p * square * x + x : x < 0.0f ? -large : large;
}

// x / (1 + e^-x), as x times 1 / (1 + p) or p / (1 + p) with p = e^-|x|, which does not overflow.
inline float silu(float x) {
  const float power = exp2_nonpositive((x < 0.0f ? x : -x) * 1.44269504088896341f);
  return (x < 0.0f ? x * power : x) / (1.0f + power);
}

template <class T, Kind kind = Kind::kSoftmax>
class PortableKernel {
 public:
  static constexpr Kind kKind = kind;
  static constexpr int kRows = 64;
  static constexpr int kKeys = 64;

  static int heads(const AttentionArgs&) { return 1; }

  static size_t scratch_bytes(const AttentionArgs& args) {
    return sizeof(float) *
           (static_cast<size_t>(args.head_dim) * (kRows + kKeys) +
            static_cast<size_t>(padded(args.head_dim)) * (kRows + kKeys) + kRows * kKeys);
  }

  PortableKernel(const AttentionArgs& args, void* scratch)
      : args_(args),
        head_dim_(args.head_dim),
        dims_(padded(args.head_dim)),
        scores_(args.scale, args.cap),
        q_(static_cast<float*>(scratch)),
        acc_(q_ + kRows * head_dim_),
        k_(acc_ + kRows * dims_),
        v_(k_ + kKeys * head_dim_),
        p_(v_ + kKeys * dims_) {}

  void begin(const RowBlock<kRows>& block) {
    const float scale = kind == Kind::kSilu ? args_.scale
                        : scores_.capped    ? scores_.cap_scale
                                            : scores_.factor;
    for (int r = 0; r < block.rows; ++r) {
      float* to = q_ + r * head_dim_;
      if (args_.q_dtype == ScalarType::kFloat32) {
        load_query(static_cast<const float*>(block.q[r]), scale, to);
      } else {
        load_query(static_cast<const T*>(block.q[r]), scale, to);
      }
      max_[r] = -INFINITY;
      sum_[r] = 0.0f;
    }
    std::memset(acc_, 0, sizeof(float) * static_cast<size_t>(block.rows * dims_));
  }

  template <bool masked>
  void tile(const RowBlock<kRows>& block, int64_t key, int keys) {
    int first = 0;
    if (masked) {
      while (block.limit[first] <= key) ++first;  // skip rows that see none of the tile
    }
    load_keys(static_cast<const T*>(block.k) + key * args_.k_token_stride, keys);
    int64_t v_stride;
    const float* v =
        load_values(static_cast<const T*>(block.v) + key * args_.v_token_stride, keys, &v_stride);

    int r = first;
    for (; r + 4 <= block.rows; r += 4) rows<masked, 4>(block, r, key, keys, v, v_stride);
    switch (block.rows - r) {
      case 3:
        return rows<masked, 3>(block, r, key, keys, v, v_stride);
      case 2:
        return rows<masked, 2>(block, r, key, keys, v, v_stride);
      case 1:
        return rows<masked, 1>(block, r, key, keys, v, v_stride);
    }
  }

  void finish(const RowBlock<kRows>&) {}
  const float* acc(int row) const { return acc_ + row * dims_; }
  SoftmaxState state(int row) const {
    SoftmaxState state;
    state.max = max_[row] * kLn2;
    state.sum = sum_[row];
    return state;
  }

 private:
  // Dimensions in whole vectors. Those that do not exist are 0.
  static int64_t padded(int64_t head_dim) { return (head_dim + kWidth - 1) / kWidth * kWidth; }

  template <class Q>
  void load_query(const Q* q, float scale, float* to) const {
#pragma omp simd
    for (int64_t d = 0; d < head_dim_; ++d) to[d] = to_float(q[d]) * scale;
  }

  // k_ [head_dim][kKeys]; columns past `keys` are zero.
  void load_keys(const T* k, int keys) {
    for (int j = 0; j < keys; ++j) {
      const T* from = k + j * args_.k_token_stride;
      for (int64_t d = 0; d < head_dim_; ++d) k_[d * kKeys + j] = to_float(from[d]);
    }
    for (int64_t d = 0; keys < kKeys && d < head_dim_; ++d) {
      std::memset(k_ + d * kKeys + keys, 0, sizeof(float) * static_cast<size_t>(kKeys - keys));
    }
  }

  const float* load_values(const T* v, int keys, int64_t* stride) {
    if constexpr (std::is_same_v<T, float>) {
      if (dims_ == head_dim_) {
        *stride = args_.v_token_stride;
        return v;
      }
    }
    for (int j = 0; j < keys; ++j) {
      const T* from = v + j * args_.v_token_stride;
      float* to = v_ + j * dims_;
#pragma omp simd
      for (int64_t d = 0; d < head_dim_; ++d) to[d] = to_float(from[d]);
      for (int64_t d = head_dim_; d < dims_; ++d) to[d] = 0.0f;
    }
    *stride = dims_;
    return v_;
  }

  template <bool masked, int kR>
  void rows(const RowBlock<kRows>& block, int r, int64_t key, int keys, const float* v,
            int64_t v_stride) {
    const int columns = (keys + kWidth - 1) / kWidth * kWidth;
    float* p = p_ + r * kKeys;
    float* acc = acc_ + r * dims_;
    multiply_rows<kR>(q_ + r * head_dim_, head_dim_, k_, kKeys, p, kKeys, head_dim_, columns,
                      false);
    if (scores_.capped) cap<kR>(p, keys);
    for (int i = 0; i < kR; ++i) {
      const int64_t end = masked ? block.limit[r + i] - key : keys;
      const int visible = end < keys ? static_cast<int>(end) : keys;
      const int64_t begin = masked ? block.first[r + i] - key : 0;
      const int first = begin <= 0 ? 0 : begin < visible ? static_cast<int>(begin) : visible;
      if constexpr (kind == Kind::kSilu) {
        weigh_silu(r + i, first, visible, keys);
      } else {
        softmax(r + i, first, visible, keys);
      }
    }
    multiply_rows<kR>(p, kKeys, v, v_stride, acc, dims_, keys, dims_, true);
  }

  // Caps the scores of kR rows, and takes them to base 2.
  template <int kR>
  __attribute__((noinline)) void cap(float* p, int keys) const {
    for (int i = 0; i < kR; ++i, p += kKeys) {
#pragma omp simd
      for (int j = 0; j < keys; ++j) p[j] = hyperbolic_tangent(p[j]) * scores_.factor;
    }
  }

  // Turns the row's scores into the weights of SiLU attention. The row sees keys [begin, visible)
  // of the tile.
  void weigh_silu(int r, int begin, int visible, int keys) {
    float* p = p_ + r * kKeys;
    for (int j = 0; j < begin; ++j) p[j] = 0.0f;
#pragma omp simd
    for (int j = begin; j < visible; ++j) p[j] = silu(p[j]);
    for (int j = visible; j < keys; ++j) p[j] = 0.0f;
  }

  // Turns the row's scores (base 2) into weights relative to its new maximum, and rescales its sum
  // and accumulator accordingly. The row sees keys [begin, visible) of the tile.
  void softmax(int r, int begin, int visible, int keys) {
    float* p = p_ + r * kKeys;
    float larger = max_[r];
#pragma omp simd reduction(max : larger)
    for (int j = begin; j < visible; ++j) larger = p[j] > larger ? p[j] : larger;
    const float base = larger == -INFINITY ? 0.0f : larger;  // -inf - -inf would be NaN
    float sum = 0.0f;
    for (int j = 0; j < begin; ++j) p[j] = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int j = begin; j < visible; ++j) {
      p[j] = exp2_nonpositive(p[j] - base);
      sum += p[j];
    }
    for (int j = visible; j < keys; ++j) p[j] = 0.0f;
    const float keep = exp2_nonpositive(max_[r] - base);
    sum_[r] = sum_[r] * keep + sum;
    max_[r] = larger;
    if (keep != 1.0f) {
      float* acc = acc_ + r * dims_;
#pragma omp simd
      for (int64_t d = 0; d < head_dim_; ++d) acc[d] *= keep;
    }
  }

  const AttentionArgs& args_;
  const int64_t head_dim_, dims_;
  const Scores scores_;
  // [kRows][head_dim], times scale * log2(e); for a cap scale / cap, for SiLU attention scale.
  float* q_;
  float* acc_;  // [kRows][dims_]
  float* k_;
  float* v_;          // [kKeys][dims_]
  float* p_;          // [kRows][kKeys]
  float max_[kRows];  // base 2
  float sum_[kRows];
};

template <Kind kind>
inline void run_portable_kernel(const AttentionArgs& args, int threads) {
  with_type(args.dtype,
            [&](auto element) { run<PortableKernel<decltype(element), kind>>(args, threads); });
}

}  // namespace
}  // namespace cptool::cpu
