// Packs the operands of avx512_panel_kernel.h in the order in which its register tiles read them.
// Unnamed namespace: see isa.h.
#pragma once

#include "cpu/avx512_math.h"

namespace cptool::cpu {
namespace {

constexpr int kTile = 8;  // keys, or dimensions, of a register tile

// Packs 16 queries, of which the first `rows` exist, transposed: to[w * stride] holds word w of the
// 16 rows, 0 for rows that do not exist. `negate` flips their signs, so that the kernel may take
// the scale as positive.
template <class Math>
inline void pack_queries(const void* const* q, int rows, int64_t words, bool negate, int stride,
                         float* to) {
  const __m512i sign = _mm512_set1_epi32(negate ? static_cast<int>(Math::kSigns) : 0);
  for (int64_t w = 0; w < words; w += kLanes) {
    __m512i r[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      r[i] = _mm512_setzero_si512();
      if (i < rows) {
        const auto* from = static_cast<const typename Math::Input*>(q[i]);
        r[i] = _mm512_xor_si512(_mm512_castps_si512(Math::load(from, w, words)), sign);
      }
    }
    transpose16(r);
    for (int i = 0; i < kLanes && w + i < words; ++i)
      _mm512_store_si512(to + (w + i) * stride, r[i]);
  }
}

// Packs rows of K as [key][word], with zeros up to a whole register tile of keys.
template <class Math>
inline void pack_keys(const typename Math::Input* k, int64_t stride, int keys, int64_t words,
                      float* to) {
  for (int j = 0; j < round_up(keys, kTile); ++j) {
    for (int64_t w = 0; w < words; w += kLanes) {
      const __mmask16 exist = words - w >= kLanes ? 0xffff : (1u << (words - w)) - 1;
      _mm512_mask_storeu_ps(to + j * words + w, exist,
                            j < keys ? Math::load(k + j * stride, w, words) : _mm512_setzero_ps());
    }
  }
}

// Packs rows of V as panels [dim / 8] of [key / kStep][dim % 8], `panel` floats apart, with zeros
// up to a whole register tile of keys.
template <class Math>
inline void pack_values(const typename Math::Input* v, int64_t stride, int keys, int64_t head_dim,
                        int panel, float* to) {
  for (int j = 0; j < round_up(keys, kTile); j += Math::kStep) {
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const __m512 values = Math::load_values(v + j * stride + d, stride, keys - j);
      float* at = to + d / kTile * panel + j / Math::kStep * kTile;
      _mm256_storeu_ps(at, _mm512_castps512_ps256(values));
      _mm256_storeu_ps(at + panel, _mm512_extractf32x8_ps(values, 1));
    }
  }
}

}  // namespace
}  // namespace cptool::cpu
