// One warp's part of attention: 16 kRowTiles packed rows and the warp's keys of each tile, by
// mma.m16n8k16 with float32 accumulators.
//
// A lane holds, of each 16 x 8 tile of scores or of the result, the elements that ptx.h names for
// d: with g = lane / 4 and t = lane % 4 columns 2 t and 2 t + 1 of row g (elements 0, 1) and of row
// g + 8 (elements 2, 3). The four lanes of a row are neighbours.
#pragma once

#include <cmath>

#include "cuda/ptx.h"
#include "cuda/sm80/tile.h"
#include "cuda/soft_cap.h"

namespace cptool::cuda::sm80 {
namespace {

constexpr unsigned kWholeWarp = 0xffffffffu;

template <class T, int kHeadDim, int kRowTiles, int kKeys>
struct WarpAttention {
  static constexpr int kKeyTiles = kKeys / 8;
  static constexpr int kColumnTiles = kHeadDim / 8;

  float score[kRowTiles][kKeyTiles][4];
  float acc[kRowTiles][kColumnTiles][4] = {};
  float max[kRowTiles][2];       // of the scores, in powers of two; equal in all lanes of a row
  float sum[kRowTiles][2] = {};  // of this lane's weights

  __device__ WarpAttention() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) max[m][0] = max[m][1] = -INFINITY;
  }

  // score = Q K^T. `q` and `k`: the tiles, at the warp's first row and first key.
  __device__ __forceinline__ void multiply_keys(uint32_t q, uint32_t k) {
    const int lane = threadIdx.x % 32;
    // Q: rows 0 to 7 and 8 to 15 of the lower chunk, then those of the upper one (a[0] to a[3]).
    const LaneRow<kHeadDim> query(q, lane % 16, lane / 16);
    // K: the lower and the upper chunk of keys 0 to 7 (b0, b1), then those of keys 8 to 15.
    const LaneRow<kHeadDim> key(k, lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) score[m][n][e] = 0.0f;
#pragma unroll
    for (int c = 0; c < kHeadDim / 16; ++c) {
      uint32_t queries[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) ptx::ldmatrix_x4(queries[m], query.at(16 * m, c));
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t keys[4];
        ptx::ldmatrix_x4(keys, key.at(8 * n, c));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          ptx::mma_m16n8k16<T>(score[m][n], queries[m], keys[0], keys[1]);
          ptx::mma_m16n8k16<T>(score[m][n + 1], queries[m], keys[2], keys[3]);
        }
      }
    }
  }

  // Hides the keys that a row does not see. `limits`: of the warp's rows; `first_key`: the number
  // of the warp's first key.
  __device__ __forceinline__ void mask(const int* limits, int first_key) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // The first of the tile's columns 0, 1, 8, 9, ... that this lane's row does not see.
        const int end = limits[16 * m + 8 * half + lane / 4] - first_key - lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          if (8 * n >= end) score[m][n][2 * half] = -INFINITY;
          if (8 * n + 1 >= end) score[m][n][2 * half + 1] = -INFINITY;
        }
      }
    }
  }

  // Hides the keys ahead of a row's window. `firsts`: of the warp's rows.
  __device__ __forceinline__ void mask_ahead(const int* firsts, int first_key) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // The first of the tile's columns 0, 1, 8, 9, ... that this lane's row sees.
        const int begin = firsts[16 * m + 8 * half + lane / 4] - first_key - lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          if (8 * n < begin) score[m][n][2 * half] = -INFINITY;
          if (8 * n + 1 < begin) score[m][n][2 * half + 1] = -INFINITY;
        }
      }
    }
  }

  // Scores become tanh(cap_scale score), of which softmax() must then be told the cap as the scale.
  __device__ __forceinline__ void cap(float cap_scale) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          score[m][n][e] = hyperbolic_tangent(score[m][n][e] * cap_scale);
        }
      }
    }
  }

  // Online softmax: scores become weights 2^(scale2 score - max), scale2 = scale log2(e) > 0.
  __device__ __forceinline__ void softmax(float scale2) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = -INFINITY;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          largest = fmaxf(largest, fmaxf(score[m][n][2 * half], score[m][n][2 * half + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 2));
        // The maximum is rounded once, for the weights, keep and the state alike. Otherwise keep
        // would not be exactly 1 where the maximum stays, and the error would accumulate over the
        // tiles of a long context.
        const float larger = fmaxf(max[m][half], largest * scale2);
        const float base = larger == -INFINITY ? 0.0f : larger;  // -inf - -inf is NaN
        const float keep = ptx::exp2_approx(max[m][half] - base);
        max[m][half] = larger;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            score[m][n][e] = ptx::exp2_approx(fmaf(score[m][n][e], scale2, -base));
            total += score[m][n][e];
          }
        }
        sum[m][half] = sum[m][half] * keep + total;
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
          acc[m][c][2 * half] *= keep;
          acc[m][c][2 * half + 1] *= keep;
        }
      }
    }
  }

  // acc += weights V, the weights rounded to T. `v`: the tile, at the warp's first key.
  __device__ __forceinline__ void multiply_values(uint32_t v) {
    const int lane = threadIdx.x % 32;
    // V: keys 0 to 7 and 8 to 15 of the lower chunk (b0, b1), then those of the upper one.
    const LaneRow<kHeadDim> value(v, lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < kKeyTiles; k += 2) {
      uint32_t weights[kRowTiles][4];  // two tiles of scores form one operand a of mma
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        weights[m][0] = ptx::pack<T>(score[m][k][0], score[m][k][1]);
        weights[m][1] = ptx::pack<T>(score[m][k][2], score[m][k][3]);
        weights[m][2] = ptx::pack<T>(score[m][k + 1][0], score[m][k + 1][1]);
        weights[m][3] = ptx::pack<T>(score[m][k + 1][2], score[m][k + 1][3]);
      }
#pragma unroll
      for (int c = 0; c < kColumnTiles; c += 2) {
        uint32_t values[4];
        ptx::ldmatrix_x4_transposed(values, value.at(8 * k, c / 2));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          ptx::mma_m16n8k16<T>(acc[m][c], weights[m], values[0], values[1]);
          ptx::mma_m16n8k16<T>(acc[m][c + 1], weights[m], values[2], values[3]);
        }
      }
    }
  }

  // Sums over the lanes of each row.
  __device__ __forceinline__ void finish_sums() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[m][half] += __shfl_xor_sync(kWholeWarp, sum[m][half], 1);
        sum[m][half] += __shfl_xor_sync(kWholeWarp, sum[m][half], 2);
      }
    }
  }
};

}  // namespace
}  // namespace cptool::cuda::sm80
