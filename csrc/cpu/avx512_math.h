// AVX-512 arithmetic that the AVX-512 and AMX kernels share: conversions, powers of two,
// transposition. Unnamed namespace: see isa.h.
#pragma once

#include "cpu/vectors.h"  // kLanes: 16

namespace cptool::cpu {
namespace {

constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

inline __m512 load16(const float* from) { return _mm512_loadu_ps(from); }

inline __m512 load16(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m512 load16(const Float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store16(__m512 values, float* to) { _mm512_storeu_ps(to, values); }

inline void store16(__m512 values, BFloat16* to) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q),
                                  _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
}

inline void store16(__m512 values, Float16* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Treats subnormal numbers as 0 for the lifetime of the object. A weight below 2^-126 would
// otherwise cost a microcode assist, fifty times the arithmetic of its whole vector, and adds
// nothing to a sum that holds a weight of about 1.
class FlushSubnormals {
 public:
  FlushSubnormals() { _mm_setcsr(saved_ | 0x8040); }  // flush to zero, denormals are zeros
  ~FlushSubnormals() { _mm_setcsr(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned saved_ = _mm_getcsr();
};

// 2^x for x well below 128, to about one unit in the last place: 2^floor(x) * p(x - floor(x)),
// where p is the polynomial of degree 6 with p(0) = 1 that has the least greatest relative error on
// [0, 1] (2.0e-9). Flushes to 0 far below; 2^-inf is 0, NaN stays.
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
inline void transpose16(__m512i (&r)[16]) {
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

inline void transpose16(__m512 (&r)[16]) {
  __m512i bits[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) bits[i] = _mm512_castps_si512(r[i]);
  transpose16(bits);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castsi512_ps(bits[i]);
}

// Lane i of the result is the sum of the lanes of r[i]. Each step adds the halves (8, 4, 2, 1
// lanes) of two vectors into one: a blend keeps one half of each in place, a shuffle moves the
// others there. There is one shuffle per two vectors because fewer ports shuffle than blend. Always
// inline: r must stay in registers.
__attribute__((always_inline)) inline __m512 sum_each(const __m512 (&r)[16]) {
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
