// Replaces csrc/cpu/amx_tiles.h in tests/ops/test_emulated_amx.py: the tile registers of AMX,
// emulated in AVX-512 for machines without them. Counts the emulated instructions.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <cstring>

namespace cptool::cpu {
namespace {

constexpr int kTileBytes = 1024;
constexpr int64_t kTileStride = 64;

struct TileCounts {
  std::atomic<int64_t> loads{0}, stores{0}, products{0};
};
TileCounts tile_counts;

struct Tiles {
  alignas(64) uint32_t words[8][16][16];
};
thread_local Tiles tiles;

template <int kTile>
inline void load_tile(const void* from, int64_t stride = kTileStride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(tiles.words[kTile][row], static_cast<const char*>(from) + row * stride, 64);
  }
  ++tile_counts.loads;
}

template <int kTile>
inline void store_tile(void* to, int64_t stride = kTileStride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, tiles.words[kTile][row], 64);
  }
  ++tile_counts.stores;
}

template <int kTile>
inline void zero_tile() {
  std::memset(tiles.words[kTile], 0, kTileBytes);
}

// C[m][n] += the sum of A[m][2p] * B[p][2n] over p + that of A[m][2p + 1] * B[p][2n + 1], with the
// roundings of the processor: two chains of multiply-adds, whose sum is added to C.
template <int kC, int kA, int kB>
inline void multiply_tiles() {
  const __m512i high_half = _mm512_set1_epi32(-0x10000);
  auto even = [](__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); };
  auto odd = [&](__m512i pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, high_half)); };
  for (int m = 0; m < 16; ++m) {
    __m512 sums[2] = {};
    for (int p = 0; p < 16; ++p) {
      const __m512i a = _mm512_set1_epi32(static_cast<int>(tiles.words[kA][m][p]));
      const __m512i b = _mm512_load_si512(tiles.words[kB][p]);
      sums[0] = _mm512_fmadd_ps(even(a), even(b), sums[0]);
      sums[1] = _mm512_fmadd_ps(odd(a), odd(b), sums[1]);
    }
    const __m512 before = _mm512_castsi512_ps(_mm512_load_si512(tiles.words[kC][m]));
    const __m512 sum = _mm512_add_ps(before, _mm512_add_ps(sums[0], sums[1]));
    _mm512_store_si512(tiles.words[kC][m], _mm512_castps_si512(sum));
  }
  ++tile_counts.products;
}

// New tiles hold garbage, as after the kernel of another thread.
class TileConfig {
 public:
  TileConfig() { std::memset(&tiles, 0xff, sizeof(tiles)); }
  TileConfig(const TileConfig&) = delete;
  TileConfig& operator=(const TileConfig&) = delete;
};

inline bool tiles_available() { return true; }

}  // namespace
}  // namespace cptool::cpu
