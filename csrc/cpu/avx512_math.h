// AVX-512's part of vector_math.h, and what the AMX kernel needs beside it. Unnamed namespace: see
// isa.h.
#pragma once

#include "cpu/vectors.h"  // kLanes: 16

namespace cptool::cpu {
namespace {

inline Vector broadcast(float value) { return _mm512_set1_ps(value); }

inline Vector largest(Vector a, Vector b) { return _mm512_max_ps(a, b); }

inline Vector multiply_subtract(Vector a, Vector b, Vector c) { return _mm512_fmsub_ps(a, b, c); }

// One step of Newton's from 14 bits: a division of 16 lanes takes as long as 32 multiplications.
inline Vector reciprocal(Vector x) {
  const __m512 about = _mm512_rcp14_ps(x);
  return _mm512_fmadd_ps(about, _mm512_fnmadd_ps(x, about, _mm512_set1_ps(1.0f)), about);
}

inline unsigned above(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }

inline void store_halves(Vector values, float* low, float* high) {
  _mm256_storeu_ps(low, _mm512_castps512_ps256(values));
  _mm256_storeu_ps(high, _mm512_extractf32x8_ps(values, 1));
}

inline __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }

inline Vector load_first(const float* from, int count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), from);
}

inline Vector load_first(const BFloat16* from, int count) {
  const __m256i halves = _mm256_maskz_loadu_epi16(first_lanes(count), from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline Vector load_first(const Float16* from, int count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}

inline Vector load_eight(const float* from) {
  return _mm512_castps256_ps512(_mm256_loadu_ps(from));
}

inline Vector low_half(Vector x) { return _mm512_maskz_mov_ps(0xff, x); }
inline Vector high_half(Vector x) { return low_half(_mm512_shuffle_f32x4(x, x, 0xee)); }

inline Vector broadcast_part(const float* from) {
  return _mm512_broadcast_f32x4(_mm_loadu_ps(from));
}

inline Vector sum_parts(Vector a, Vector b, Vector c, Vector d) {
  auto pairs = [](Vector x, Vector y) {
    return (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  };
  const __m512d ab = pairs(a, b), cd = pairs(c, d);
  return _mm512_add_ps((Vector)_mm512_unpacklo_pd(ab, cd), (Vector)_mm512_unpackhi_pd(ab, cd));
}

inline void transpose_parts(Vector (&r)[kParts]) {
  const Vector a = _mm512_shuffle_f32x4(r[0], r[1], 0x44);
  const Vector b = _mm512_shuffle_f32x4(r[2], r[3], 0x44);
  const Vector c = _mm512_shuffle_f32x4(r[0], r[1], 0xee);
  const Vector d = _mm512_shuffle_f32x4(r[2], r[3], 0xee);
  r[0] = _mm512_shuffle_f32x4(a, b, 0x88);
  r[1] = _mm512_shuffle_f32x4(a, b, 0xdd);
  r[2] = _mm512_shuffle_f32x4(c, d, 0x88);
  r[3] = _mm512_shuffle_f32x4(c, d, 0xdd);
}

// 2^floor(x) * p(x - floor(x)), where p is the polynomial of degree 6 with p(0) = 1 that has the
// least greatest relative error on [0, 1] (2.0e-9).
inline __m512 exp2_full(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0x1.c54174p-13f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.46d64cp-10f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.3d0b92p-7f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c68912p-5f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebfd58p-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e42cp-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);
}

// 2^x like exp2_full, by a cubic: relative error 8.6e-5, a fortieth of bfloat16's rounding.
inline __m512 exp2_cubic(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0x1.3baaa8p-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.d2378ap-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.63e658p-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);
}

// Transposes 16 x 16 elements of 32 bits in registers.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // r[4i + c]: column c of every 128-bit lane, rows 4i .. 4i + 3
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even_low =
        _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);  // lanes 0, 2 of rows 0-3 and 4-7
    const __m512i odd_low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);  // lanes 1, 3
    const __m512i even_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

inline void transpose(Vector (&r)[kLanes]) {
  __m512i bits[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) bits[i] = _mm512_castps_si512(r[i]);
  transpose(bits);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castsi512_ps(bits[i]);
}

// Each step adds the halves (8, 4, 2, 1 lanes) of two vectors into one: a blend keeps one half of
// each in place, a shuffle moves the others there. There is one shuffle per two vectors because
// fewer ports shuffle than blend.
__attribute__((always_inline)) inline Vector sum_each(const Vector (&r)[kLanes]) {
  __m512 eights[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 a = r[i], b = r[i + 8];
    eights[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
  }
  __m512 fours[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = eights[i], b = eights[i + 4];
    const __m512 others = _mm512_mask_blend_ps(0xf0f0, b, a);
    fours[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, a, b),
                             _mm512_shuffle_f32x4(others, others, 0xb1));
  }
  __m512 twos[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 a = fours[i], b = fours[i + 2];
    twos[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
  }
  const __m512 a = twos[0], b = twos[1];
  return _mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, a, b),
                       _mm512_permute_ps(_mm512_mask_blend_ps(0xaaaa, b, a), 0xb1));
}

}  // namespace
}  // namespace cptool::cpu
