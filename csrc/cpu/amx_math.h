// The arithmetic of the AMX kernel (amx_kernel.h), as a class that it takes: bfloat16 as it is, or
// float32 in pieces (amx_pieces.h).
//
// struct Math:
//   using Input;                                 of k and v
//   static constexpr int kLeft, kRight;          pieces of k and v, and of q and the weights
//   static constexpr int kPanels;                of a full block
//   static void pack_queries(const void* const* q, ScalarType type, int rows, int64_t head_dim,
//                            bool negate, char* to);
//     Packs 16 queries, of which the first `rows` exist, as every second tile of [dims / 32]
//     [kRight][2], each [16 pairs of dims][16 rows][2]. `negate` flips their signs, so that the
//     kernel may take the scale as positive.
//   static void pack_keys(const Input* k, int64_t stride, int keys, int64_t head_dim, char* to);
//     Packs rows of K as tiles [keys / 32][dims / 32][kLeft][2], each [16 keys][32 dims].
//   template <int kKeys> static void pack_values(const Input* v, ... as above);
//     Packs rows of V as tiles [dims / 32][kKeys / 32][kLeft][2], each [16 dims][32 keys].
//   static constexpr int kSteps;                 of a product
//   static void multiply(const char* left, const char* right, int step);
//     Carries out one step of adding the product of [kLeft][2] by [kRight][2] tiles to tiles 0 to
//     3, [2 of the left][2 of the right].
//   static __m512 exp2(__m512 x);                as good as the pieces of a weight
//   static __m512 store_weights(Vector (&weights)[2], char* to);
//     Stores weights of two keys for 16 rows, rounded, as one row of the tiles of their pieces,
//     each two tiles further; returns their sum.
//   static void load_weights(const char* from, Vector (&weights)[2]);
//     The reverse.
//
// Unnamed namespace: see isa.h.
#pragma once

#include "cpu/amx_pieces.h"
#include "cpu/vector_math.h"

namespace cptool::cpu {
namespace {

// Weights are rounded to bfloat16 and the rounded values are summed, so that the normalised weights
// add up to one and an error common to all cancels.
struct BFloat16Tiles {
  using Input = BFloat16;
  static constexpr int kLeft = 1, kRight = 1, kPanels = 16, kSteps = 1;

  static void pack_queries(const void* const* q, ScalarType, int rows, int64_t head_dim,
                           bool negate, char* to) {
    cpu::pack_queries(q, rows, head_dim, negate, to);
  }

  static void pack_keys(const BFloat16* k, int64_t stride, int keys, int64_t head_dim, char* to) {
    cpu::pack_keys(k, stride, keys, head_dim, to);
  }

  template <int kKeys>
  static void pack_values(const BFloat16* v, int64_t stride, int keys, int64_t head_dim, char* to) {
    cpu::pack_values<kKeys>(v, stride, keys, head_dim, to);
  }

  static void multiply(const char* left, const char* right, int) {
    load_tile<4>(left);
    load_pair<6>(right, 0);
    multiply_tiles<0, 4, 6>();
    multiply_tiles<1, 4, 7>();
    load_tile<5>(left + kTileBytes);
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
  }

  static __m512 exp2(__m512 x) { return exp2_cubic(x); }

  static __m512 store_weights(Vector (&weights)[2], char* to) {
    const __m512i even = round_bits(weights[0]), odd = round_bits(weights[1]);
    _mm512_store_si512(to, pair_up(even, odd));
    return _mm512_add_ps(_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd));
  }

  static void load_weights(const char* from, Vector (&weights)[2]) {
    const __m512i both = _mm512_load_si512(from);
    weights[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    weights[1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-0x10000)));
  }
};

// q is of type T or float32. Weights are split towards 0, which takes fewer instructions: the parts
// of their products with v that are left out (amx_pieces.h) are then below 2^-22, of either sign.
template <class T>
struct Float32Tiles {
  using Input = T;
  static constexpr int kLeft = kPiecesOf<T>, kRight = kFloat32Pieces, kPanels = 32;
  static constexpr int kSteps = kProducts<kLeft>;
  static constexpr bool kWhole = kLeft == 1;  // k and v are packed as they are

  static void pack_queries(const void* const* q, ScalarType type, int rows, int64_t head_dim,
                           bool negate, char* to) {
    const __m512i sign = _mm512_set1_epi32(negate ? INT32_MIN : 0);
    for (int64_t d = 0; d < head_dim; d += kStrip, to += 2 * kRight * kTileBytes) {
      __m512i r[kRight][kLanes];
      for (int i = 0; i < kLanes; ++i) {
        Vector values[2] = {};
        if (i < rows) {
          if (type == ScalarType::kFloat32) {
            load_strip(static_cast<const float*>(q[i]), d, head_dim, values);
          } else {
            load_strip(static_cast<const T*>(q[i]), d, head_dim, values);
          }
        }
        if constexpr (kWhole) in_pairs(values);
        for (Vector& v : values)
          v = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(v), sign));
        split<kRight>(values, [&](__m512i piece, int p) { r[p][i] = piece; });
      }
      for (int p = 0; p < kRight; ++p) store_transposed(r[p], to + 2 * p * kTileBytes);
    }
  }

  static void pack_keys(const T* k, int64_t stride, int keys, int64_t head_dim, char* to) {
    if constexpr (kWhole) {
      cpu::pack_keys(k, stride, keys, head_dim, to);
    } else {
      for (int j = 0; j < round_up(keys, kStrip); ++j) {
        char* row = key_row<kLeft>(j, head_dim, to);
        for (int64_t d = 0; d < head_dim; d += kStrip, row += 2 * kLeft * kTileBytes) {
          Vector values[2] = {};
          if (j < keys) load_strip(k + j * stride, d, head_dim, values);
          split<kLeft>(values, [&](__m512i piece, int p) {
            _mm512_store_si512(row + 2 * p * kTileBytes, piece);
          });
        }
      }
    }
  }

  template <int kKeys>
  static void pack_values(const T* v, int64_t stride, int keys, int64_t head_dim, char* to) {
    if constexpr (kWhole) {
      cpu::pack_values<kKeys>(v, stride, keys, head_dim, to);
    } else {
      const int64_t padded = (head_dim + kStrip - 1) / kStrip * kStrip;
      for (int first = 0; first < keys; first += kStrip) {
        for (int64_t d = 0; d < padded; d += kLanes) {
          __m512i r[kLeft][kLanes];
#pragma GCC unroll 16
          for (int pair = 0; pair < kLanes; ++pair) {
            Vector values[2] = {};
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
              const int j = first + 2 * pair + i;
              if (j < keys && d < head_dim) values[i] = load(v + j * stride + d);
            }
            split<kLeft>(values, [&](__m512i piece, int p) { r[p][pair] = piece; });
          }
          char* const tile = value_tile<kLeft, kKeys>(d, first, to);
          for (int p = 0; p < kLeft; ++p) store_transposed(r[p], tile + 2 * p * kTileBytes);
        }
      }
    }
  }

  static void multiply(const char* left, const char* right, int step) {
    multiply_pieces<kLeft>(left, right, step);
  }

  static __m512 exp2(__m512 x) { return exp2_full(x); }

  static __m512 store_weights(Vector (&weights)[2], char* to) {
    const __m512 sum = _mm512_add_ps(weights[0], weights[1]);
    split<kRight, false>(
        weights, [&](__m512i piece, int p) { _mm512_store_si512(to + 2 * p * kTileBytes, piece); });
    return sum;
  }

  // Exact: the sum of the later pieces is what the first left.
  static void load_weights(const char* from, Vector (&weights)[2]) {
    weights[0] = weights[1] = Vector{};
    for (int p = kRight - 1; p >= 0; --p) {
      Vector piece[2];
      BFloat16Tiles::load_weights(from + 2 * p * kTileBytes, piece);
      for (int i = 0; i < 2; ++i) weights[i] = _mm512_add_ps(weights[i], piece[i]);
    }
  }

 private:
  // Loads elements [d, d + 32) of a row; those from head_dim, a multiple of 16, on are 0.
  template <class Element>
  static void load_strip(const Element* row, int64_t d, int64_t head_dim, Vector (&values)[2]) {
    values[0] = load(row + d);
    values[1] = d + kLanes < head_dim ? load(row + d + kLanes) : Vector{};
  }

  // Moves element 2 i to lane i of the first vector, and 2 i + 1 of the second: the pairs of a row
  // of 16 bits.
  static void in_pairs(Vector (&values)[2]) {
    const __m512i even = _mm512_add_epi32((__m512i)kLaneNumbers, (__m512i)kLaneNumbers);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const Vector both[2] = {values[0], values[1]};
    values[0] = _mm512_permutex2var_ps(both[0], even, both[1]);
    values[1] = _mm512_permutex2var_ps(both[0], odd, both[1]);
  }

  static void store_transposed(__m512i (&r)[kLanes], char* tile) {
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) _mm512_store_si512(tile + i * kTileStride, r[i]);
  }
};

}  // namespace
}  // namespace cptool::cpu
