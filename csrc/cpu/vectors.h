// The compiler's own vectors of float32, as wide as the instruction set that the including file is
// compiled for. Unnamed namespace: see dispatch.h.
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
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
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

}  // namespace
}  // namespace cptool::cpu
