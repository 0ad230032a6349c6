// Scores of a few rows with a tile of keys, which are read in place. Unnamed namespace: see isa.h.
#pragma once

#include <cstring>
#include <type_traits>

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

// Scores of kR rows with up to kKeys keys: scores[r][j]. `q`: [vector of words][row], of which
// `words` words exist. Prefetches as many bytes as it reads.
template <class Math, int kKeys, int kR, int kSlots>
inline void score_rows(const StreamKeys<typename Math::Input>& keys, const float* q, int64_t words,
                       StreamAhead& ahead, float (*scores)[kSlots]) {
  using T = typename Math::Input;
  constexpr int kSums = kLanes / kR;                      // of a row
  constexpr int kAtOnce = kSums < kKeys ? kSums : kKeys;  // keys
  for (int first = 0; first < keys.count; first += kAtOnce) {
    const T* row[kAtOnce];
    Vector sums[kLanes];  // [row][key]
#pragma GCC unroll 16
    for (int j = 0; j < kAtOnce; ++j) row[j] = keys.row(first + j);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] = Vector{};
    // Two vectors of words, or one.
    auto multiply = [&](auto vectors, int64_t w) __attribute__((always_inline)) {
      constexpr int kN = decltype(vectors)::value;
      constexpr int kBytes = kAtOnce * kLanes * Math::kStep * static_cast<int>(sizeof(T));
      constexpr bool kTogether = kN == 2 && StreamAhead::together(kBytes);
#pragma GCC unroll 2
      for (int n = 0; n < kN; ++n) {
        auto key = [&](int j) {
          return kN == 2 ? Math::load_half(row[j], w, n) : Math::load(row[j], w, words);
        };
        Vector all[kAtOnce];  // unless each is used only once
#pragma GCC unroll 16
        for (int j = 0; kR > 1 && j < kAtOnce; ++j) all[j] = key(j);
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r) {
          const Vector query = load(q + (w + n * kLanes) * kR + r * kLanes);
#pragma GCC unroll 16
          for (int j = 0; j < kAtOnce; ++j) {
            Vector& sum = sums[r * kSums + j];
            sum = Math::multiply_add(query, kR > 1 ? all[j] : key(j), sum);
          }
        }
        if (!kTogether) ahead.prefetch(kBytes);
      }
      if (kTogether) ahead.prefetch(2 * kBytes);
    };
    int64_t w = 0;
    for (; w + 2 * kLanes <= words; w += 2 * kLanes) {
      multiply(std::integral_constant<int, 2>{}, w);
    }
    for (; w < words; w += kLanes) multiply(std::integral_constant<int, 1>{}, w);
    alignas(64) float summed[kR][kSums];
    store(sum_each(sums), summed[0]);
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) std::memcpy(scores[r] + first, summed[r], kAtOnce * sizeof(float));
  }
}

// Scores of four rows with `kFours` times four keys from `first` on: fours[f][v] holds those of
// four keys, a row in each 128 bits.
template <class Math, int kFours>
__attribute__((always_inline)) inline void score_fours(const StreamKeys<typename Math::Input>& keys,
                                                       int first, const float* q, int64_t head_dim,
                                                       StreamAhead& ahead,
                                                       Vector (*fours)[4 / kParts]) {
  using T = typename Math::Input;
  constexpr int kVectors = 4 / kParts;  // of four rows
  constexpr int kKeys = 4 * kFours;
  constexpr int kPart = 16 / sizeof(T);  // dimensions, of which head_dim holds an even number
  const T* row[kKeys];
  Vector sums[kKeys][kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kKeys; ++j) {
    row[j] = keys.row(first + j);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[j][v] = Vector{};
  }
  for (int64_t d = 0; d < head_dim; d += 2 * kPart, q += 2 * 16) {
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      Vector query[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) query[v] = load(q + p * 16 + v * kLanes);
#pragma GCC unroll 8
      for (int j = 0; j < kKeys; ++j) {
        const Vector words = broadcast_part(reinterpret_cast<const float*>(row[j] + d + p * kPart));
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          sums[j][v] = Math::multiply_add(query[v], words, sums[j][v]);
        }
      }
    }
    ahead.prefetch(2 * kKeys * 16);
  }
#pragma GCC unroll 2
  for (int f = 0; f < kFours; ++f) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const auto* four = sums + 4 * f;
      fours[f][v] = sum_parts(four[0][v], four[1][v], four[2][v], four[3][v]);
    }
  }
}

// The same as score_rows for four rows of elements that need no conversion: 16 bytes of a key are
// multiplied with those of as many rows as a vector holds, a row in each 128 bits, so that only
// four values of each product are left to add up. `q`: [16 bytes of a row][row].
template <class Math, int kKeys, int kSlots>
inline void score_four(const StreamKeys<typename Math::Input>& keys, const float* q,
                       int64_t head_dim, StreamAhead& ahead, float (*scores)[kSlots]) {
  constexpr int kVectors = 4 / kParts;
  constexpr int kFours = 2 / kVectors;  // at once, to hide the latency of a multiplication
  constexpr int kExist = kKeys < kLanes ? kKeys / 4 : kParts;
  for (int first = 0; first < keys.count; first += kLanes) {
    Vector fours[kParts][kVectors] = {};
#pragma GCC unroll 2
    for (int f = 0; f < kExist; f += kFours) {
      score_fours<Math, kFours>(keys, first + 4 * f, q, head_dim, ahead, fours + f);
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Vector rows[kParts];
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) rows[i] = fours[i][v];
      transpose_parts(rows);
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) store(rows[i], scores[v * kParts + i] + first);
    }
  }
}

}  // namespace
}  // namespace cptool::cpu
