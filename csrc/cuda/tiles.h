// What a block of the reference kernel (attention_simt.cu) holds in shared memory, and how it is
// loaded.
//
// Tiles are float32 for every dtype, so the dtype affects only loads and stores: a run-time switch
// that all threads take the same way.
#pragma once

#include <cstdint>

#include "attention.h"
#include "cuda/device.h"

namespace cptool::cuda {
namespace {

constexpr int kThreadsX = 16;
constexpr int kThreadsY = 16;
constexpr int kThreads = kThreadsX * kThreadsY;
// Tile rows start 4 banks apart, so that eight threads that read 16 bytes each from eight rows have
// no bank conflict and stay aligned.
constexpr int kPadding = 4;

// Everything that a block holds in shared memory: less than the 99 KiB of the smallest device of
// compute capability 8.0 and above.
template <int kHeadDim>
struct Tiles {
  static constexpr int kThreadRows = kHeadDim <= 128 ? 4 : 2;
  static constexpr int kRows = kThreadRows * kThreadsY;
  static constexpr int kThreadKeys = 2;
  static constexpr int kKeys = kThreadKeys * kThreadsX;

  float q[kRows][kHeadDim + kPadding];
  float kv[kKeys][kHeadDim + kPadding];  // keys, then values
  float p[kRows][kKeys + kPadding];
  // Each row sees keys firsts to limits - 1 of the sequence; none for rows that do not exist.
  int64_t firsts[kRows], limits[kRows];
};

// One warp per row and one element per thread, which works for any stride and alignment; a tile has
// few loads compared with its multiply-adds. Rows from `rows` on and columns from `head_dim` on
// become 0, and their memory is never read.
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
