// Packs the operands of tile products as whole tiles of 1 KB, with dimensions and keys padded with
// zeros. Unnamed namespace: see isa.h.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/avx512_math.h"

namespace cptool::cpu {
namespace {

// Elements that one step of a product sums over: dimensions for scores, keys for outputs.
constexpr int kStrip = 32;

// Loads elements [d, d + 32) of a row; those from head_dim on are 0.
inline __m512i load_strip(const BFloat16* from, int64_t d, int64_t head_dim) {
  const __mmask32 mask = head_dim - d >= kStrip ? ~0u : (1u << (head_dim - d)) - 1;
  return _mm512_maskz_loadu_epi16(mask, from + d);
}

// Where a key is packed, in tiles [keys / 32][dims / 32][kPieces][2], each [16 keys][32 dims].
template <int kPieces>
inline char* key_row(int key, int64_t head_dim, char* tiles) {
  const int64_t strip = (head_dim + kStrip - 1) / kStrip * kPieces * 2;
  return tiles + (key / kStrip * strip + key % kStrip / kLanes) * kTileBytes +
         key % kLanes * kTileStride;
}

// The tile of 16 dimensions of 32 keys, in tiles [dims / 32][kKeys / 32][kPieces][2].
template <int kPieces, int kKeys>
inline char* value_tile(int64_t dim, int key, char* tiles) {
  const int64_t product = dim / kStrip * (kKeys / kStrip) + key / kStrip;
  return tiles + (product * kPieces * 2 + dim % kStrip / kLanes) * kTileBytes;
}

// Packs 16 queries, of which the first `rows` exist, as every second tile of [dims / 32][2], each
// [16 pairs of dims][16 rows][2]. `negate` flips their signs, so that the kernel may take the scale
// as positive.
inline void pack_queries(const void* const* q, int rows, int64_t head_dim, bool negate, char* to) {
  const __m512i sign = _mm512_set1_epi16(negate ? -0x8000 : 0);
  for (int64_t d = 0; d < head_dim; d += kStrip, to += 2 * kTileBytes) {
    __m512i r[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      r[i] = i < rows ? load_strip(static_cast<const BFloat16*>(q[i]), d, head_dim)
                      : _mm512_setzero_si512();
      r[i] = _mm512_xor_si512(r[i], sign);
    }
    transpose(r);
    for (int i = 0; i < kLanes; ++i) _mm512_store_si512(to + i * kTileStride, r[i]);
  }
}

// Packs rows of K as tiles [keys / 32][dims / 32][2], each [16 keys][32 dims].
inline void pack_keys(const BFloat16* k, int64_t stride, int keys, int64_t head_dim, char* to) {
  const int padded = (keys + kStrip - 1) / kStrip * kStrip;
  for (int j = 0; j < padded; ++j) {
    char* row = key_row<1>(j, head_dim, to);
    for (int64_t d = 0; d < head_dim; d += kStrip, row += 2 * kTileBytes) {
      _mm512_store_si512(
          row, j < keys ? load_strip(k + j * stride, d, head_dim) : _mm512_setzero_si512());
    }
  }
}

// Packs rows of V as tiles [dims / 32][kKeys / 32][2], each [16 dims][32 keys].
template <int kKeys>
inline void pack_values(const BFloat16* v, int64_t stride, int keys, int64_t head_dim, char* to) {
  for (int first = 0; first < keys; first += kStrip) {
    for (int64_t d = 0; d < head_dim; d += kStrip) {
      // Interleaving two keys leaves, in each 128-bit lane, dimensions 0-3 in one register and 4-7
      // in the other.
      __m512i low[kLanes], high[kLanes];
      for (int pair = 0; pair < kLanes; ++pair) {
        __m512i key[2];
        for (int i = 0; i < 2; ++i) {
          const int j = first + 2 * pair + i;
          key[i] = j < keys ? load_strip(v + j * stride, d, head_dim) : _mm512_setzero_si512();
        }
        low[pair] = _mm512_unpacklo_epi16(key[0], key[1]);
        high[pair] = _mm512_unpackhi_epi16(key[0], key[1]);
      }
      transpose(low);
      transpose(high);
      char* const tiles = value_tile<1, kKeys>(d, first, to);
      for (int i = 0; i < kLanes; ++i) {
        const int dim = i / 4 * 8 + i % 4;  // of low[i]; that of high[i] is 4 more
        char* const row = tiles + dim / kLanes * kTileBytes + dim % kLanes * kTileStride;
        _mm512_store_si512(row, low[i]);
        _mm512_store_si512(row + 4 * kTileStride, high[i]);
      }
    }
  }
}

// Rounds finite nonnegative x to bfloat16, as float32 bits: adds half a unit, then clears the low
// half.
inline __m512i round_bits(__m512 x) {
  const __m512i raised = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
  return _mm512_and_si512(raised, _mm512_set1_epi32(-0x10000));
}

// Interleaves the weights of two keys, both rounded, for 16 rows: one row of the pair-interleaved
// operand.
inline __m512i pair_up(__m512i even, __m512i odd) {
  return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
}

}  // namespace
}  // namespace cptool::cpu
