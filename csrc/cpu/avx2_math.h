// AVX2's part of vector_math.h. Unnamed namespace: see isa.h.
#pragma once

#include "cpu/vectors.h"  // kLanes: 8

namespace cptool::cpu {
namespace {

inline Vector broadcast(float value) { return _mm256_set1_ps(value); }

inline Vector largest(Vector a, Vector b) { return _mm256_max_ps(a, b); }

inline Vector multiply_subtract(Vector a, Vector b, Vector c) { return _mm256_fmsub_ps(a, b, c); }

inline Vector reciprocal(Vector x) { return _mm256_div_ps(broadcast(1.0f), x); }

inline unsigned above(Vector a, Vector b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}

inline void store_halves(Vector values, float* low, float* high) {
  _mm_storeu_ps(low, _mm256_castps256_ps128(values));
  _mm_storeu_ps(high, _mm256_extractf128_ps(values, 1));
}

inline Vector load_first(const float* from, int count) {
  return _mm256_maskload_ps(from, (__m256i)(kLaneNumbers < count));
}

// The first `count` of up to 4 elements of 16 bits, in the low bits of a word.
inline uint64_t first_of_four(const uint16_t* from, int count) {
  uint64_t word = 0;
  if (count == 4) {
    std::memcpy(&word, from, 8);
    return word;
  }
  if (count & 2) std::memcpy(&word, from, 4);
  if (count & 1) word |= static_cast<uint64_t>(from[count - 1]) << (count & 2 ? 32 : 0);
  return word;
}

// The same of up to 8, in registers: what is stored in two parts and loaded as one waits for the
// cache.
inline __m128i first_halves(const void* from, int count) {
  const uint16_t* at = static_cast<const uint16_t*>(from);
  return count < 4 ? _mm_set_epi64x(0, static_cast<int64_t>(first_of_four(at, count)))
                   : _mm_set_epi64x(static_cast<int64_t>(first_of_four(at + 4, count - 4)),
                                    static_cast<int64_t>(first_of_four(at, 4)));
}

inline Vector load_first(const BFloat16* from, int count) {
  const __m256i words = _mm256_cvtepu16_epi32(first_halves(from, count));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}

inline Vector load_first(const Float16* from, int count) {
  return _mm256_cvtph_ps(first_halves(from, count));
}

inline Vector load_eight(const float* from) { return _mm256_loadu_ps(from); }

inline Vector broadcast_part(const float* from) {
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(from));
}

inline Vector sum_parts(Vector a, Vector b, Vector c, Vector d) {
  auto pairs = [](Vector x, Vector y) {
    return (__m256d)_mm256_add_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y));
  };
  const __m256d ab = pairs(a, b), cd = pairs(c, d);
  return _mm256_add_ps((Vector)_mm256_unpacklo_pd(ab, cd), (Vector)_mm256_unpackhi_pd(ab, cd));
}

inline void transpose_parts(Vector (&r)[kParts]) {
  const Vector low = _mm256_permute2f128_ps(r[0], r[1], 0x20);
  r[1] = _mm256_permute2f128_ps(r[0], r[1], 0x31);
  r[0] = low;
}

// 2^n * p(x - n) with n the integer next to x; p is the polynomial of Cephes' exp2f, minimax on
// [-1/2, 1/2] (1.7e-9), which leaves the rounding. AVX2 has no instructions for powers: adding 1.5
// * 2^23 + 127 rounds x and leaves the biased exponent in the low bits, and the exponent -127 is
// that of 0.
inline Vector exp2_full(Vector x) {
  const Vector bounded = _mm256_max_ps(broadcast(-127.0f), x);  // of NaN: x
  const Vector magic = broadcast(12582912.0f + 127.0f);
  const Vector shifted = _mm256_add_ps(bounded, magic);
  const Vector f = _mm256_sub_ps(bounded, _mm256_sub_ps(shifted, magic));
  Vector p = broadcast(1.535336188319500e-4f);
  p = multiply_add(p, f, broadcast(1.339887440266574e-3f));
  p = multiply_add(p, f, broadcast(9.618437357674640e-3f));
  p = multiply_add(p, f, broadcast(5.550332471162809e-2f));
  p = multiply_add(p, f, broadcast(2.402264791363012e-1f));
  p = multiply_add(p, f, broadcast(6.931472028550421e-1f));
  p = multiply_add(p, f, broadcast(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

inline void transpose(Vector (&r)[kLanes]) {
  Vector t[kLanes];
#pragma GCC unroll 2
  for (int i = 0; i < kLanes; i += 4) {  // t[i + c]: column c of each half, rows i .. i + 3
    const __m256d a = (__m256d)_mm256_unpacklo_ps(r[i], r[i + 1]);
    const __m256d b = (__m256d)_mm256_unpackhi_ps(r[i], r[i + 1]);
    const __m256d c = (__m256d)_mm256_unpacklo_ps(r[i + 2], r[i + 3]);
    const __m256d d = (__m256d)_mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = (Vector)_mm256_unpacklo_pd(a, c);
    t[i + 1] = (Vector)_mm256_unpackhi_pd(a, c);
    t[i + 2] = (Vector)_mm256_unpacklo_pd(b, d);
    t[i + 3] = (Vector)_mm256_unpackhi_pd(b, d);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    r[c] = _mm256_permute2f128_ps(t[c], t[4 + c], 0x20);
    r[4 + c] = _mm256_permute2f128_ps(t[c], t[4 + c], 0x31);
  }
}

// Each step adds the halves (4, 2, 1 lanes) of two vectors into one, as in avx512_math.h.
__attribute__((always_inline)) inline Vector sum_each(const Vector (&r)[kLanes]) {
  Vector fours[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vector a = r[i], b = r[i + 4];
    fours[i] = _mm256_add_ps(_mm256_blend_ps(a, b, 0xf0), _mm256_permute2f128_ps(a, b, 0x21));
  }
  Vector twos[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Vector a = fours[i], b = fours[i + 2];
    twos[i] = _mm256_add_ps(_mm256_blend_ps(a, b, 0xcc), _mm256_shuffle_ps(a, b, 0x4e));
  }
  const Vector a = twos[0], b = twos[1];
  return _mm256_add_ps(_mm256_blend_ps(a, b, 0xaa),
                       _mm256_permute_ps(_mm256_blend_ps(b, a, 0xaa), 0xb1));
}

}  // namespace
}  // namespace cptool::cpu
