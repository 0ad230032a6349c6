// The compiler's own vectors of float32 (with a + b, a * b and so on), as wide as the instruction
// set that the including file is compiled for. Unnamed namespace: see isa.h.
#pragma once

#if defined(__AVX2__)
// GCC 12's intrinsics start from deliberately undefined registers and warn about it where they are
// inlined.
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
typedef __m512 Vector;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
typedef __m256 Vector;
#else
constexpr int kLanes = 4;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
#endif
constexpr int kParts = kLanes / 4;  // of 128 bits
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

#if defined(__AVX512F__)
constexpr Ints kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
constexpr Ints kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr Ints kLaneNumbers = {0, 1, 2, 3};
#endif

inline Vector as_floats(Bits bits) { return (Vector)bits; }

inline Bits as_bits(Vector value) { return (Bits)value; }

// The intrinsics, because the compiler spills what memcpy loads into an array of vectors.
inline Vector load(const float* from) {
#if defined(__AVX512F__)
  return _mm512_loadu_ps(from);
#elif defined(__AVX2__)
  return _mm256_loadu_ps(from);
#else
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
#endif
}

// The intrinsics, because GCC 12 converts to AVX2's vectors by halves.
inline Vector load(const BFloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
#if defined(__AVX512F__)
  const Bits bits = (Bits)_mm512_cvtepu16_epi32((__m256i)halves);
#elif defined(__AVX2__)
  const Bits bits = (Bits)_mm256_cvtepu16_epi32((__m128i)halves);
#else
  const Bits bits = __builtin_convertvector(halves, Bits);
#endif
  return as_floats(bits << 16);
}

// Widens 2 kLanes elements into those of even and those of odd indices, each with one instruction:
// they are the low and the high halves of 32-bit words.
inline Vector load_even(const BFloat16* from) {
  Bits words;
  std::memcpy(&words, from, sizeof words);
  return as_floats(words << 16);
}

inline Vector load_odd(const BFloat16* from) {
  Bits words;
  std::memcpy(&words, from, sizeof words);
  return as_floats(words & 0xffff0000u);
}

// Without conversion instructions this follows to_float in scalar.h.
inline Vector load(const Float16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtph_ps((__m256i)halves);
#elif defined(__F16C__)
  return (Vector)_mm256_cvtph_ps((__m128i)halves);
#else
  const Bits wide = __builtin_convertvector(halves, Bits);
  const Bits magnitude = (wide & 0x7fffu) << 13;
  const Bits finite = as_bits(as_floats(magnitude) * 0x1p112f);
  const Bits special = magnitude | 0x7f800000u;
  return as_floats((wide & 0x8000u) << 16 | (magnitude >= 0x0f800000u ? special : finite));
#endif
}

inline void store(Vector value, float* to) {
#if defined(__AVX512F__)
  _mm512_storeu_ps(to, value);
#elif defined(__AVX2__)
  _mm256_storeu_ps(to, value);
#else
  std::memcpy(to, &value, sizeof value);
#endif
}

// Rounds to bfloat16, left in the upper half of each element; NaN stays NaN.
inline Bits rounded_halves(Vector value) {
  const Bits bits = as_bits(value);
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded;
}

inline void store(Vector value, BFloat16* to) {
  const Bits bits = rounded_halves(value) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);  // within 128 bits
  const __m128i halves = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  const Halves halves = __builtin_convertvector(bits, Halves);
#endif
  std::memcpy(to, &halves, sizeof halves);
}

inline void store(Vector value, Float16* to) {
#if defined(__AVX512F__)
  const Halves halves = (Halves)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  const Halves halves = (Halves)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
  const Bits bits = as_bits(value), magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Bits subnormal = as_bits(as_floats(magnitude) + 0.5f) - 0x3f000000u;
  Bits half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? Bits{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : half;
  const Halves halves = __builtin_convertvector((bits >> 16 & 0x8000u) | half, Halves);
#endif
  std::memcpy(to, &halves, sizeof halves);
}

// Loads the first `lanes` elements; the others are 0.
template <class T>
inline Vector load(const T* from, int lanes) {
  if (lanes == kLanes) return load(from);
  T some[kLanes] = {};
  std::memcpy(some, from, lanes * sizeof(T));
  return load(some);
}

template <class T>
inline void store(Vector value, T* to, int lanes) {
  if (lanes == kLanes) return store(value, to);
  T some[kLanes];
  store(value, some);
  std::memcpy(to, some, lanes * sizeof(T));
}

// Rounds every element to T.
template <class T>
inline Vector rounded(Vector value) {
  T stored[kLanes];
  store(value, stored);
  return load(stored);
}

template <>
inline Vector rounded<BFloat16>(Vector value) {
  return as_floats(rounded_halves(value) & 0xffff0000u);
}

// Calls body(begin, lanes) for each vector of `count` elements; the last may be partial.
template <class Body>
inline void for_vectors(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, kLanes);
  if (i < count) body(i, static_cast<int>(count - i));
}

// a * b + c, with one rounding where the instruction set has a fused multiply-add, whatever the
// compiler's setting for contraction.
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

}  // namespace
}  // namespace cptool::cpu
