// What the CUDA kernels share: conversions between the three dtypes and float32, and errors of the
// CUDA runtime as exceptions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "attention.h"

namespace cptool::cuda {
namespace {

constexpr int kWarp = 32;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

// Rounds to nearest, ties to even.
template <class T>
__device__ inline T from_float(float value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return value;
  }
}

__device__ inline void store_float(void* to, ScalarType dtype, int64_t index, float value) {
  switch (dtype) {
    case ScalarType::kFloat32:
      static_cast<float*>(to)[index] = value;
      break;
    case ScalarType::kBFloat16:
      static_cast<__nv_bfloat16*>(to)[index] = from_float<__nv_bfloat16>(value);
      break;
    case ScalarType::kFloat16:
      static_cast<__half*>(to)[index] = from_float<__half>(value);
      break;
  }
}

// Throws if an attention kernel would need a larger grid than CUDA allows.
inline void check_grid(int64_t blocks, int64_t kv_heads) {
  if (blocks > INT32_MAX || kv_heads > UINT16_MAX) {
    throw std::invalid_argument("attention_partial on CUDA would need a grid of " +
                                std::to_string(blocks) + " x " + std::to_string(kv_heads) +
                                " thread blocks; the limit is 2147483647 x 65535");
  }
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA error in ") + what + ": " +
                             cudaGetErrorString(error));
  }
}

}  // namespace
}  // namespace cptool::cuda
