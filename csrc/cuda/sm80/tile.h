// Tiles of 16-bit elements in shared memory, [rows][kHeadDim], in chunks of 16 bytes.
//
// ldmatrix reads the same chunk of eight successive rows at a time, and does so at once only if the
// eight lie in different groups of four banks, that is, at addresses that differ modulo 128. Rows
// are kHeadDim / 8 chunks apart, which repeats modulo 8 after 8 / kTwos rows, kTwos being the power
// of two that divides it (at most 8). So every further 8 / kTwos rows have their chunks exchanged
// within aligned groups of kTwos: chunk c of row r lies at c ^ (r / (8 / kTwos) % kTwos).
#pragma once

#include <cstdint>

#include "cuda/ptx.h"

namespace cptool::cuda::sm80 {
namespace {

template <int kHeadDim>
struct Layout {
  static_assert(kHeadDim % 16 == 0);
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kTwos = kChunks % 8 == 0   ? 8
                               : kChunks % 4 == 0 ? 4
                               : kChunks % 2 == 0 ? 2
                                                  : 1;
  static constexpr int kRowBytes = 2 * kHeadDim;

  static __device__ __forceinline__ int swizzle(int row) { return row / (8 / kTwos) % kTwos; }
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ swizzle(row)) * 16;
  }
};

// Starts to copy a tile of kRows rows. Rows from `held` on become 0 and are not read.
// `row_start(row)`: the first element of a row, at a multiple of 16 bytes.
template <int kHeadDim, int kRows, int kThreads, class RowStart>
__device__ __forceinline__ void load_tile(uint32_t to, int held, RowStart row_start) {
  using L = Layout<kHeadDim>;
  constexpr int kAll = kRows * L::kChunks;
#pragma unroll 2  // more addresses do not fit in the registers beside the accumulators
  for (int i = 0; i < (kAll + kThreads - 1) / kThreads; ++i) {
    const int index = i * kThreads + static_cast<int>(threadIdx.x);
    if (kAll % kThreads != 0 && index >= kAll) break;
    const int row = index / L::kChunks;
    const int chunk = index % L::kChunks;
    const bool copied = row < held;
    ptx::cp_async_16(to + L::offset(row, chunk), row_start(copied ? row : 0) + 8 * chunk, copied);
  }
}

// Where a lane's row of an ldmatrix starts, for tiles of 16 rows and 16 columns: of `tile`, rows
// from `first_row` (a multiple of 8) on. Column tile k is at (row ^ 32 k): chunk 2 k + odd_chunk of
// the row, for 2 k ^ x = 2 k + x where x is 0 or 1.
template <int kHeadDim>
struct LaneRow {
  uint32_t start, chunk_bytes;

  __device__ __forceinline__ LaneRow(uint32_t tile, int row, int odd_chunk)
      : start(tile + row * Layout<kHeadDim>::kRowBytes),
        chunk_bytes((odd_chunk ^ Layout<kHeadDim>::swizzle(row)) * 16) {}

  // Returns the address for the tile of columns from 16 k on, `rows` (a multiple of 8) further
  // down.
  __device__ __forceinline__ uint32_t at(int rows, int k) const {
    return start + rows * Layout<kHeadDim>::kRowBytes + (chunk_bytes ^ (32 * k));
  }
};

}  // namespace
}  // namespace cptool::cuda::sm80
