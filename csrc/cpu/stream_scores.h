// Scores of a few rows with a tile of keys, which are read in place. Unnamed namespace: see isa.h.
#pragma once

#include <cstring>

#include "cpu/stream_ahead.h"

namespace cptool::cpu {
namespace {

// The keys of a tile of one KV head.
template <class T>
struct StreamKeys {
  const T* first;
  int64_t stride;
  int count;

  // The last key stands in for those that are missing: its scores are computed and never used.
  const T* row(int j) const { return first + (j < count ? j : count - 1) * stride; }
};

// Scores of kR rows with up to kKeys keys: scores[r][j]. `q`: kR rows of `query_words` words, of
// which `words` exist. Prefetches as many lines as it reads.
template <class Math, int kKeys, int kR, int kSlots>
inline void score_rows(const StreamKeys<typename Math::Input>& keys, const float* q,
                       int64_t query_words, int64_t words, StreamAhead& ahead,
                       float (*scores)[kSlots]) {
  using T = typename Math::Input;
  constexpr int kSums = kLanes / kR;                      // of a row
  constexpr int kAtOnce = kSums < kKeys ? kSums : kKeys;  // keys
  for (int first = 0; first < keys.count; first += kAtOnce) {
    const T* row[kAtOnce];
    __m512 sums[16];  // [row][key]
#pragma GCC unroll 16
    for (int j = 0; j < kAtOnce; ++j) row[j] = keys.row(first + j);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
    auto multiply = [&](int64_t w, int64_t end) __attribute__((always_inline)) {
      __m512 query[kR];
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) query[r] = _mm512_load_ps(q + r * query_words + w);
#pragma GCC unroll 16
      for (int j = 0; j < kAtOnce; ++j) {
        const __m512 key = Math::load(row[j], w, end);
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r) {
          __m512& sum = sums[r * kSums + j];
          sum = Math::multiply_add(query[r], key, sum);
        }
      }
      ahead.prefetch(kAtOnce * kLanes * Math::kStep * static_cast<int>(sizeof(T)) / 64);
    };
    int64_t w = 0;
    for (; w + kLanes <= words; w += kLanes) multiply(w, w + kLanes);
    if (w < words) multiply(w, words);
    alignas(64) float summed[kR][kSums];
    _mm512_store_ps(summed[0], sum_each(sums));
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) std::memcpy(scores[r] + first, summed[r], kAtOnce * sizeof(float));
  }
}

// Scores of four rows with eight keys from `first` on, as two vectors of four keys each, a row in
// each quarter.
template <class Math>
__attribute__((always_inline)) inline void score_eight(const StreamKeys<typename Math::Input>& keys,
                                                       int first, const float* q, int64_t head_dim,
                                                       StreamAhead& ahead, __m512* fours) {
  using T = typename Math::Input;
  constexpr int kQuarter = 16 / sizeof(T);  // dimensions of a quarter of a vector
  const T* row[8];
  __m512 sums[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    row[j] = keys.row(first + j);
    sums[j] = _mm512_setzero_ps();
  }
  for (int64_t d = 0; d < head_dim; d += kQuarter, q += kLanes) {
    const __m512 query = _mm512_load_ps(q);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m128 words = _mm_loadu_ps(reinterpret_cast<const float*>(row[j] + d));
      sums[j] = Math::multiply_add(query, _mm512_broadcast_f32x4(words), sums[j]);
    }
    ahead.prefetch(8 * 16 / 64);
  }
  auto sum_pairs = [](__m512 a, __m512 b) {
    return (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
#pragma GCC unroll 2
  for (int j = 0; j < 8; j += 4) {
    const __m512d a = sum_pairs(sums[j], sums[j + 1]), b = sum_pairs(sums[j + 2], sums[j + 3]);
    fours[j / 4] =
        _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
  }
}

// The same as score_rows for four rows of elements that need no conversion: 16 bytes of a key are
// multiplied with those of all four rows at once, a row in each quarter of a vector, so that only
// four values of each product are left to add up. `q`: [16 bytes of a row][row].
template <class Math, int kKeys, int kSlots>
inline void score_four(const StreamKeys<typename Math::Input>& keys, const float* q,
                       int64_t head_dim, StreamAhead& ahead, float (*scores)[kSlots]) {
  for (int first = 0; first < keys.count; first += kLanes) {
    constexpr int kGroups = (kKeys < kLanes ? kKeys : kLanes) / 8;
    __m512 fours[2 * kGroups];  // the scores of four keys, a row in each quarter
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g)
      score_eight<Math>(keys, first + 8 * g, q, head_dim, ahead, fours + 2 * g);
    const __m512 low = _mm512_shuffle_f32x4(fours[0], fours[1], 0x44);
    const __m512 high = _mm512_shuffle_f32x4(fours[0], fours[1], 0xee);
    if constexpr (kGroups == 2) {
      const __m512 low2 = _mm512_shuffle_f32x4(fours[2], fours[3], 0x44);
      const __m512 high2 = _mm512_shuffle_f32x4(fours[2], fours[3], 0xee);
      _mm512_store_ps(scores[0] + first, _mm512_shuffle_f32x4(low, low2, 0x88));
      _mm512_store_ps(scores[1] + first, _mm512_shuffle_f32x4(low, low2, 0xdd));
      _mm512_store_ps(scores[2] + first, _mm512_shuffle_f32x4(high, high2, 0x88));
      _mm512_store_ps(scores[3] + first, _mm512_shuffle_f32x4(high, high2, 0xdd));
    } else {
      const __m512 rows01 = _mm512_shuffle_f32x4(low, low, 0xd8);
      const __m512 rows23 = _mm512_shuffle_f32x4(high, high, 0xd8);
      _mm256_store_ps(scores[0], _mm512_castps512_ps256(rows01));
      _mm256_store_ps(scores[1], _mm512_extractf32x8_ps(rows01, 1));
      _mm256_store_ps(scores[2], _mm512_castps512_ps256(rows23));
      _mm256_store_ps(scores[3], _mm512_extractf32x8_ps(rows23, 1));
    }
  }
}

}  // namespace
}  // namespace cptool::cpu
