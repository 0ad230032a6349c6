// The token-wise steps in plain C++ with the compiler's own vectors, for whatever instruction set
// the including file is compiled for. Unnamed namespace: see dispatch.h.
#pragma once

#if defined(__AVX2__)
// GCC 12's intrinsics start from deliberately undefined registers; see avx512_math.h.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include <cstring>

#include "cpu/scalar.h"
#include "cpu/tokenwise_dispatch.h"

namespace cptool::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

inline Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Vector load(const BFloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Bits bits = __builtin_convertvector(halves, Bits) << 16;
  Vector value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline Vector load(const Float16* from) {
#if defined(__F16C__) && defined(__AVX512F__)
  const __m512 wide = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  Vector value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
#else
  float values[kLanes];
#pragma omp simd
  for (int i = 0; i < kLanes; ++i) values[i] = to_float(from[i]);
  return load(values);
#endif
}

// a * b + c; the language standard keeps the compiler from fusing it by itself.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline float sum(Vector v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof lanes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// How far ahead of its use a weight is fetched. One thread with the processor's own prefetching
// stays under the memory's bandwidth: it stops at the ends of pages.
constexpr int64_t kAheadBytes = 2048;

// One row of w against kRows rows of x [kRows, depth]. Rows of w follow each other in memory, so
// the reads are one stream.
template <class T, int kRows>
inline void dot(const T* w, const float* x, int64_t depth, float* sums) {
  constexpr int kUnroll = kRows == 1 ? 4 : 2;  // chains to hide the latency of the additions
  Vector acc[kRows][kUnroll] = {};
  int64_t k = 0;
  for (; k + kUnroll * kLanes <= depth; k += kUnroll * kLanes) {
    for (int64_t byte = 0; byte < int64_t(kUnroll * kLanes * sizeof(T)); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + k) + kAheadBytes + byte);
    }
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const Vector weights = load(w + k + u * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        acc[r][u] = multiply_add(weights, load(x + r * depth + k + u * kLanes), acc[r][u]);
      }
    }
  }
  for (; k + kLanes <= depth; k += kLanes) {
    const Vector weights = load(w + k);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      acc[r][0] = multiply_add(weights, load(x + r * depth + k), acc[r][0]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    Vector total = acc[r][0];
    for (int u = 1; u < kUnroll; ++u) total += acc[r][u];
    sums[r] = sum(total);
    for (int64_t tail = k; tail < depth; ++tail) {
      sums[r] += to_float(w[tail]) * x[r * depth + tail];
    }
  }
}

template <class T>
void linear_columns(const LinearArgs& args, const float* x, int64_t begin, int64_t end) {
  const T* w = static_cast<const T*>(args.w);
  T* out = static_cast<T*>(args.out);
  for (int64_t n = begin; n < end; ++n) {
    const T* weights = w + n * args.w_stride;
    for (int64_t row = 0; row < args.rows; row += 4) {
      const float* rows = x + row * args.depth;
      const int64_t count = args.rows - row < 4 ? args.rows - row : 4;
      float sums[4];
      switch (count) {
        case 1:
          dot<T, 1>(weights, rows, args.depth, sums);
          break;
        case 2:
          dot<T, 2>(weights, rows, args.depth, sums);
          break;
        case 3:
          dot<T, 3>(weights, rows, args.depth, sums);
          break;
        default:
          dot<T, 4>(weights, rows, args.depth, sums);
      }
      for (int64_t r = 0; r < count; ++r) {
        from_float(sums[r], out[(row + r) * args.columns + n]);
      }
    }
  }
}

template <class T>
inline float rounded(float value) {
  T stored;
  from_float(value, stored);
  return to_float(stored);
}

template <class T>
void rms_norm_rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width;
  const T* weight = static_cast<const T*>(args.weight);
  for (int64_t row = begin; row < end; ++row) {
    T* hidden = static_cast<T*>(args.hidden) + row * args.hidden_stride;
    if (args.added != nullptr) {
      const T* added = static_cast<const T*>(args.added) + row * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        from_float(to_float(hidden[i]) + to_float(added[i]), hidden[i]);
      }
    }
    if (args.out == nullptr) continue;
    T* out = static_cast<T*>(args.out) + row * width;
    Vector squares[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
      for (int u = 0; u < 2; ++u) {
        const Vector value = load(hidden + i + u * kLanes);
        squares[u] = multiply_add(value, value, squares[u]);
      }
    }
    float total = sum(squares[0] + squares[1]);
    for (; i < width; ++i) total += to_float(hidden[i]) * to_float(hidden[i]);
    const float scale = 1.0f / __builtin_sqrtf(total / static_cast<float>(width) + args.eps);
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      from_float(rounded<T>(to_float(hidden[j]) * scale) * to_float(weight[j]), out[j]);
    }
  }
}

template <class T>
void rotate_tokens(const RotateArgs& args, int64_t begin, int64_t end) {
  const int64_t half = args.head_dim / 2;
  for (int64_t token = begin; token < end; ++token) {
    const float* cos = args.cos + token * half;
    const float* sin = args.sin + token * half;
    for (int64_t head = 0; head < args.num_heads; ++head) {
      T* first = static_cast<T*>(args.heads) + token * args.token_stride + head * args.head_stride;
      T* second = first + half;
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const float a = to_float(first[i]), b = to_float(second[i]);
        from_float(a * cos[i] - b * sin[i], first[i]);
        from_float(b * cos[i] + a * sin[i], second[i]);
      }
    }
  }
}

// 1 + e^x to about two units in the last place. x = n ln 2 + r with |r| <= ln(2) / 2, ln 2 in two
// parts so that r is good to the last bit; the polynomial is that of Cephes' expf.
inline float one_plus_exp(float x) {
  float bounded = x > 89.0f ? 89.0f : x;          // infinite from there on
  bounded = bounded < -80.0f ? -80.0f : bounded;  // nothing beside 1
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const float shifted = bounded * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = bounded - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^(n - 1), then twice that: n may be 128, and 2^128 is no float.
  const float half_power = bits_float((float_bits(shifted) - 0x4b400000u + 126u) << 23);
  return 1.0f + p * half_power * 2.0f;
}

template <class T>
void swiglu_rows(const SwigluArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* gate = static_cast<T*>(args.gate) + row * args.gate_stride;
    const T* up = static_cast<const T*>(args.up) + row * args.up_stride;
#pragma omp simd
    for (int64_t i = 0; i < args.width; ++i) {
      const float g = to_float(gate[i]);
      from_float(rounded<T>(g / one_plus_exp(-g)) * to_float(up[i]), gate[i]);
    }
  }
}

// Calls the function of args.dtype.
#define CPTOOL_BY_DTYPE(function, ...)        \
  switch (args.dtype) {                       \
    case ScalarType::kBFloat16:               \
      return function<BFloat16>(__VA_ARGS__); \
    case ScalarType::kFloat16:                \
      return function<Float16>(__VA_ARGS__);  \
    default:                                  \
      return function<float>(__VA_ARGS__);    \
  }

TokenwiseKernels kernels_of_this_file() {
  return {
      [](const LinearArgs& args, const float* x, int64_t begin, int64_t end) {
        CPTOOL_BY_DTYPE(linear_columns, args, x, begin, end)
      },
      [](const RmsNormArgs& args, int64_t begin, int64_t end) {
        CPTOOL_BY_DTYPE(rms_norm_rows, args, begin, end)
      },
      [](const RotateArgs& args, int64_t begin, int64_t end) {
        CPTOOL_BY_DTYPE(rotate_tokens, args, begin, end)
      },
      [](const SwigluArgs& args, int64_t begin, int64_t end) {
        CPTOOL_BY_DTYPE(swiglu_rows, args, begin, end)
      },
  };
}

#undef CPTOOL_BY_DTYPE

}  // namespace
}  // namespace cptool::cpu
