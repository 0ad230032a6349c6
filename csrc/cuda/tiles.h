// What a block of the attention kernel holds in shared memory, and how it gets there.
//
// Tiles are float32 whatever the dtype, which is thus a matter of loads and stores alone: a switch
// at run time, the same way for all threads.
#pragma once

#include <cstdint>

#include "attention.h"
#include "cuda/device.h"

namespace cptool::cuda {
namespace {

constexpr int kThreadsX = 16;
constexpr int kThreadsY = 16;
constexpr int kThreads = kThreadsX * kThreadsY;
// Tile rows lie 4 banks apart: eight threads that read 16 bytes each from eight rows meet no
// conflict, and stay aligned.
constexpr int kPadding = 4;

// All that a block holds in shared memory: less than the 99 KiB of the smallest device of compute
// capability 8.0 and above.
template <int kHeadDim>
struct Tiles {
  static constexpr int kThreadRows = kHeadDim <= 128 ? 4 : 2;
  static constexpr int kRows = kThreadRows * kThreadsY;
  static constexpr int kThreadKeys = 2;
  static constexpr int kKeys = kThreadKeys * kThreadsX;

  float q[kRows][kHeadDim + kPadding];
  float kv[kKeys][kHeadDim + kPadding];  // keys, then values
  float p[kRows][kKeys + kPadding];
  int64_t limits[kRows];  // keys of the sequence that each row sees; 0 for rows the block lacks
};

// One warp a row and one element a thread, so that any stride and alignment will do; a tile's loads
// are few beside its multiply-adds. Rows from `rows` on and columns from `head_dim` on become 0:
// what lies there in memory is never read.
template <class T, int kTileRows, int kStride, class RowOffset>
__device__ void load_rows(const void* from, RowOffset offset, int rows, int head_dim,
                          float (&tile)[kTileRows][kStride]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll 2
  for (int row = threadIdx.x / kWarp; row < kTileRows; row += kThreads / kWarp) {
    const T* elements = static_cast<const T*>(from) + (row < rows ? offset(row) : 0);
#pragma unroll
    for (int column = lane; column < kStride - kPadding; column += kWarp) {
      const bool held = row < rows && column < head_dim;
      tile[row][column] = held ? to_float(elements[column]) : 0.0f;
    }
  }
}

// `offset(row)`: where a row starts, in elements.
template <int kTileRows, int kStride, class RowOffset>
__device__ void load_tile(ScalarType dtype, const void* from, RowOffset offset, int rows,
                          int head_dim, float (&tile)[kTileRows][kStride]) {
  switch (dtype) {
    case ScalarType::kFloat32:
      return load_rows<float>(from, offset, rows, head_dim, tile);
    case ScalarType::kBFloat16:
      return load_rows<__nv_bfloat16>(from, offset, rows, head_dim, tile);
    case ScalarType::kFloat16:
      return load_rows<__half>(from, offset, rows, head_dim, tile);
  }
}

}  // namespace
}  // namespace cptool::cuda
