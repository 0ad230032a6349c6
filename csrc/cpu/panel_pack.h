// Packs the operands of panel_kernel.h in the order in which its register tiles read them.
// Unnamed namespace: see isa.h.
#pragma once

#include "cpu/vector_math.h"

namespace cptool::cpu {
namespace {

constexpr int kTile = kLanes / 2;  // keys, or dimensions, of a register tile

// Packs kLanes queries of `type`, of which the first `rows` exist, transposed: to[w * stride] holds
// word w of the rows, 0 for rows that do not exist. `negate` flips their signs, so that the kernel
// may take the scale as positive.
template <class Math>
inline void pack_queries(const void* const* q, ScalarType type, int rows, int64_t words,
                         bool negate, int stride, float* to) {
  const uint32_t sign = negate ? Math::kSigns : 0;
  for (int64_t w = 0; w < words; w += kLanes) {
    Vector r[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      r[i] = Vector{};
      if (i < rows) r[i] = as_floats(as_bits(Math::load_query(q[i], type, w, words)) ^ sign);
    }
    transpose(r);
    for (int i = 0; i < kLanes && w + i < words; ++i) store(r[i], to + (w + i) * stride);
  }
}

// Packs rows of K as [key][word], with zeros up to a whole register tile of keys.
template <class Math>
inline void pack_keys(const typename Math::Input* k, int64_t stride, int keys, int64_t words,
                      float* to) {
  for (int j = 0; j < round_up(keys, kTile); ++j) {
    for (int64_t w = 0; w < words; w += kLanes) {
      const int64_t left = words - w;
      store(j < keys ? Math::load(k + j * stride, w, words) : Vector{}, to + j * words + w,
            left < kLanes ? static_cast<int>(left) : kLanes);
    }
  }
}

// Packs rows of V as panels [dim / kTile] of [key / kStep][dim % kTile], `panel` floats apart, with
// zeros up to a whole register tile of keys and a whole vector of dimensions.
template <class Math>
inline void pack_values(const typename Math::Input* v, int64_t stride, int keys, int64_t head_dim,
                        int panel, float* to) {
  for (int j = 0; j < round_up(keys, kTile); j += Math::kStep) {
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      float* at = to + d / kTile * panel + j / Math::kStep * kTile;
      store_halves(Math::load_values(v + j * stride + d, stride, keys - j, head_dim - d), at,
                   at + panel);
    }
  }
}

}  // namespace
}  // namespace cptool::cpu
