// Arithmetic in dot products of bfloat16 pairs (a Math, see float32_math.h).
//
// The weights are rounded to bfloat16 and the rounded values are summed, so that the normalised
// weights add up to one and an error common to all cancels. Unnamed namespace: see isa.h.
#pragma once

#include "cpu/vector_math.h"

namespace cptool::cpu {
namespace {

struct BFloat16Math {
  using Input = BFloat16;
  using Weight = BFloat16;
  static constexpr int kStep = 2;
  static constexpr uint32_t kSigns = 0x80008000u;

  static __m512 load(const BFloat16* row, int64_t word, int64_t words) {
    const __mmask16 exist = words - word >= kLanes ? 0xffff : (1u << (words - word)) - 1;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(exist, row + 2 * word));
  }

  static __m512 load_half(const BFloat16* row, int64_t word, int half) {
    return _mm512_loadu_ps(row + 2 * (word + half * kLanes));
  }

  static __m512 load_query(const void* row, ScalarType, int64_t word, int64_t words) {
    return load(static_cast<const BFloat16*>(row), word, words);
  }

  static __m512 load_query_half(const void* row, ScalarType, int64_t word, int half) {
    return load_half(static_cast<const BFloat16*>(row), word, half);
  }

  static __m512 load_values(const BFloat16* v, int64_t stride, int keys, int64_t dims) {
    const __mmask16 exist = dims >= kLanes ? 0xffff : first_lanes(static_cast<int>(dims));
    auto widened = [=](const BFloat16* from) {
      return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(exist, from));
    };
    __m512i pairs = _mm512_setzero_si512();
    if (keys > 0) pairs = widened(v);
    if (keys > 1) pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(widened(v + stride), 16));
    return _mm512_castsi512_ps(pairs);
  }

  // Interleaves two rows with one instruction per vector, within 128-bit lanes; in_order restores
  // the order of the dimensions once, at the end.
  template <int kN>
  static void load_step(const BFloat16* v, int64_t next, __m512 (&values)[kN]) {
    if constexpr (kN == 1) {
      values[0] = load_values(v, next, 2, kLanes);
    } else {
#pragma GCC unroll 4
      for (int n = 0; n < kN; n += 2) {
        const __m512i even = _mm512_loadu_si512(v + n * kLanes);
        const __m512i odd = _mm512_loadu_si512(v + next + n * kLanes);
        values[n] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(even, odd));
        values[n + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(even, odd));
      }
    }
  }

  static void in_order(float* acc) {
    const __m512d low = _mm512_castps_pd(_mm512_load_ps(acc));
    const __m512d high = _mm512_castps_pd(_mm512_load_ps(acc + kLanes));
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_store_ps(acc, _mm512_castpd_ps(_mm512_permutex2var_pd(low, first, high)));
    _mm512_store_ps(acc + kLanes, _mm512_castpd_ps(_mm512_permutex2var_pd(low, second, high)));
  }

  static __m512 exp2(__m512 x) { return exp2_cubic(x); }

  static __m512 multiply_add(__m512 a, __m512 b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }

  // Stores 16 weights of one row, rounded; returns them as float32.
  static __m512 store_weights(__m512 weights, BFloat16* to) {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh(weights);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }

  template <int kN>
  static void weigh(float* scores, int keys, __m512 scale, const __m512 (&base)[kN],
                    __m512 (&total)[kN]) {
    const __m512i half = _mm512_set1_epi32(0x8000);  // of a unit in the last place
    const __m512 ones = _mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80));
    for (int j = 0; j < keys; j += 2) {
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) {
        const float* at = scores + (j * kN + n) * kLanes;
        auto weight = [&](const float* score) {
          const __m512 w = exp2_cubic(_mm512_fmsub_ps(_mm512_load_ps(score), scale, base[n]));
          return _mm512_add_epi32(_mm512_castps_si512(w), half);
        };
        const __m512i even = weight(at), odd = weight(at + kN * kLanes);
        // (even >> 16) | (odd & 0xffff0000)
        const __m512 pair = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
            _mm512_srli_epi32(even, 16), odd, _mm512_set1_epi32(-0x10000), 0xf8));
        total[n] = multiply_add(pair, ones, total[n]);
        _mm512_store_ps(scores + (j / 2 * kN + n) * kLanes, pair);
      }
    }
  }

  template <int kN>
  static void weigh_silu(float* scores, int keys, __m512 scale) {
    for (int j = 0; j < keys; j += 2) {
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) {
        const float* at = scores + (j * kN + n) * kLanes;
        auto weight = [&](const float* score) {
          return silu(_mm512_mul_ps(_mm512_load_ps(score), scale), exp2);
        };
        // Element i of the result is the pair of the rows' i-th weights: odd above even.
        const __m256i even = (__m256i)_mm512_cvtneps_pbh(weight(at));
        const __m256i odd = (__m256i)_mm512_cvtneps_pbh(weight(at + kN * kLanes));
        const __m512i pair = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                             _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
        _mm512_store_ps(scores + (j / 2 * kN + n) * kLanes, _mm512_castsi512_ps(pair));
      }
    }
  }
};

}  // namespace
}  // namespace cptool::cpu
