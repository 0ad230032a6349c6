// Online softmax in the registers of a consumer warpgroup, and how its result is written.
//
// Thread i of a warpgroup holds columns 8 j + 2 t and 8 j + 2 t + 1, t = i % 4, of rows g and g + 8
// of its warp (ptx.h): four neighbours share two rows. An array of accumulators is therefore
// [column block j][row 0 or 1][column 0 or 1].
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/block_rows.h"
#include "cuda/device.h"
#include "cuda/sm90/ptx.h"
#include "cuda/sm90/schedule.h"
#include "cuda/soft_cap.h"
#include "softmax_state.h"

namespace cptool::cuda::sm90 {
namespace {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, 1));
  return fmaxf(value, __shfl_xor_sync(kWholeWarp, value, 2));
}

__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(kWholeWarp, value, 1);
  return value + __shfl_xor_sync(kWholeWarp, value, 2);
}

// The state of a thread's two rows, in units of log 2: a weight is 2^(scale_log2 score - max).
struct RowPair {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // of this thread's columns

  // Turns a tile's scores into weights and adds them to the state. The caller multiplies earlier
  // sums of weighted values by `keep`.
  __device__ __forceinline__ void absorb(float (&scores)[kKeys / 2], float scale_log2,
                                         float (&keep)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      // Two chains each for maximum and sum, because a single one would wait for its own results.
      float largest = scores[2 * row], other = scores[2 * row + 1];
#pragma unroll
      for (int j = 1; j < kKeys / 8; ++j) {
        largest = fmaxf(largest, scores[4 * j + 2 * row]);
        other = fmaxf(other, scores[4 * j + 2 * row + 1]);
      }
      largest = fmaxf(largest, other);
      // The maximum is rounded once, for weights, keep and lse alike, so that its rounding cancels.
      const float larger = fmaxf(max[row], quad_max(largest) * scale_log2);
      const float base = larger == -INFINITY ? 0.0f : larger;  // -inf - -inf would be NaN
      keep[row] = ptx::exp2_approx(max[row] - base);
      max[row] = larger;
      float even = 0.0f, odd = 0.0f;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        float& first = scores[4 * j + 2 * row];
        float& second = scores[4 * j + 2 * row + 1];
        first = ptx::exp2_approx(fmaf(first, scale_log2, -base));
        second = ptx::exp2_approx(fmaf(second, scale_log2, -base));
        even += first;
        odd += second;
      }
      sum[row] = fmaf(sum[row], keep[row], even + odd);
    }
  }

  // Returns the state in natural units, over all columns.
  __device__ __forceinline__ SoftmaxState state(int row) const {
    SoftmaxState whole;
    whole.max = max[row] * kLn2;
    whole.sum = quad_sum(sum[row]);
    return whole;
  }
};

// Scores of keys from end[row] on, and before begin[row], counted from the tile's first, become
// -inf.
template <bool kHasBegin>
__device__ __forceinline__ void mask(float (&scores)[kKeys / 2], const int32_t (&begin)[2],
                                     const int32_t (&end)[2], int lane) {
  const int column = lane % 4 * 2;  // subtracted here, so that constants are compared below
  const int32_t begins[2] = {begin[0] - column, begin[1] - column};
  const int32_t ends[2] = {end[0] - column, end[1] - column};
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) {
    const int column = i / 4 * 8 + i % 2, row = i / 2 % 2;
    if (column >= ends[row] || (kHasBegin && column < begins[row])) scores[i] = -INFINITY;
  }
}

// Sums of products s become tanh(cap_scale s); what is left of a soft cap is to multiply by it, as
// by a scale. Called by a whole warp.
//
// Nearly always all arguments are below kSmallTangent. There the polynomial of soft_cap.h errs by
// two units in the last place and takes no exponentials, of which softmax already needs half of
// what a multiprocessor computes meanwhile. Otherwise 1 - 2 / (1 + e^2x) errs by 4 x 10^-7, twice
// as much as 1 + e^2x and its reciprocal are rounded: with a cap of 50, a score by 2 x 10^-5, and
// its weight by that part of itself, a tenth of what rounding to float16 does to it and a hundredth
// of what bfloat16 does. tanh.approx errs by 2^-11: a score of 30 by 0.015.
__device__ __forceinline__ void cap(float (&scores)[kKeys / 2], float cap_scale) {
  constexpr float kTwoLog2E = 2.88539008f;
  float even = 0.0f, odd = 0.0f;
#pragma unroll
  for (int i = 0; i < kKeys / 2; i += 2) {
    scores[i] *= cap_scale;
    scores[i + 1] *= cap_scale;
    even = fmaxf(even, fabsf(scores[i]));
    odd = fmaxf(odd, fabsf(scores[i + 1]));
  }
  if (__any_sync(kWholeWarp, fmaxf(even, odd) >= kSmallTangent)) {
#pragma unroll
    for (float& x : scores) {
      const float power = ptx::exp2_approx(x * kTwoLog2E);
      x = fmaf(-2.0f, ptx::reciprocal_approx(1.0f + power), 1.0f);
    }
  } else {
#pragma unroll
    for (float& x : scores) {
      x = small_hyperbolic_tangent(x);
    }
  }
}

// Weights as the fragments of products over 16 keys: accumulators of two column blocks are those of
// one fragment, in the same threads and order.
template <class T>
__device__ __forceinline__ void pack_weights(const float (&weights)[kKeys / 2],
                                             uint32_t (&fragments)[kKeys / 4]) {
#pragma unroll
  for (int i = 0; i < kKeys / 4; ++i) {
    fragments[i] = ptx::pack<T>(weights[2 * i], weights[2 * i + 1]);
  }
}

// A thread holds two columns of each of two neighbouring column blocks of 8. After neighbours swap,
// an even thread has four columns of the first block from 2 t on, an odd one four of the second
// from 2 t - 2 on.
__device__ __forceinline__ float4 four_columns(const float* first, const float* second, int lane) {
  const bool odd = lane % 2 != 0;
  const float x = __shfl_xor_sync(kWholeWarp, odd ? first[0] : second[0], 1);
  const float y = __shfl_xor_sync(kWholeWarp, odd ? first[1] : second[1], 1);
  return odd ? make_float4(x, y, second[0], second[1]) : make_float4(first[0], first[1], x, y);
}

// The four threads of a row hold a quarter each of four packed column blocks. After the
// transposition thread t holds all of block t.
__device__ __forceinline__ uint4 eight_columns(uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                                               int lane) {
  const bool odd = lane % 2 != 0;
  const uint32_t ab = __shfl_xor_sync(kWholeWarp, odd ? a : b, 1);
  const uint32_t cd = __shfl_xor_sync(kWholeWarp, odd ? c : d, 1);
  (odd ? a : b) = ab;
  (odd ? c : d) = cd;
  const bool upper = lane % 4 >= 2;
  const uint32_t ac = __shfl_xor_sync(kWholeWarp, upper ? a : c, 2);
  const uint32_t bd = __shfl_xor_sync(kWholeWarp, upper ? b : d, 2);
  (upper ? a : c) = ac;
  (upper ? b : d) = bd;
  return make_uint4(a, b, c, d);
}

// Writes one of a thread's two rows, at row `at` of the result, or merges it into the existing row.
// Called by a whole warp; each thread writes its part.
template <class T, int kCount>
__device__ __forceinline__ void finish_row(const Target& target, int head_dim,
                                           const SoftmaxState& state, float (&out)[kCount], int row,
                                           int64_t at, bool held, int lane) {
  const RowResult result(target, at, held, state);
  __syncwarp();  // every thread of the row has read its lse before one of them writes it
  if (lane % 4 == 0) result.store_lse(target);
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {  // a row that saw no key is 0; out may hold anything
    float& first = out[4 * j + 2 * row];
    float& second = out[4 * j + 2 * row + 1];
    first = result.add == 0.0f ? 0.0f : first * result.add;
    second = result.add == 0.0f ? 0.0f : second * result.add;
  }
  const int64_t index = at * head_dim;
  if (target.dtype == ScalarType::kFloat32) {
    const int first = lane % 2 * 8 + lane % 4 / 2 * 4;  // column of this thread's first four
    const int columns = result.written ? head_dim - first : 0;
    float* const there = static_cast<float*>(target.out) + index + first;
#pragma unroll
    for (int j = 0; j < kCount / 4; j += 2) {
      float4 four = four_columns(&out[4 * j + 2 * row], &out[4 * j + 4 + 2 * row], lane);
      if (8 * j >= columns) continue;
      float4* const place = reinterpret_cast<float4*>(there + 8 * j);
      if (result.merged) {
        const float4 old = *place;
        four.x = fmaf(old.x, result.keep, four.x);
        four.y = fmaf(old.y, result.keep, four.y);
        four.z = fmaf(old.z, result.keep, four.z);
        four.w = fmaf(old.w, result.keep, four.w);
      }
      *place = four;
    }
  } else {
    const int first = lane % 4 * 8;
    const int columns = result.written ? head_dim - first : 0;
    T* const there = static_cast<T*>(target.out) + index + first;
#pragma unroll
    for (int j = 0; j < kCount / 4; j += 4) {
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        packed[i] = ptx::pack<T>(out[4 * (j + i) + 2 * row], out[4 * (j + i) + 2 * row + 1]);
      }
      const uint4 eight = eight_columns(packed[0], packed[1], packed[2], packed[3], lane);
      if (8 * j < columns) *reinterpret_cast<uint4*>(there + 8 * j) = eight;
    }
  }
}

}  // namespace
}  // namespace cptool::cuda::sm90
