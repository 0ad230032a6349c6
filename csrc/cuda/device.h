// What the CUDA kernels share: elements of the three dtypes as float32, and errors of the runtime
// as exceptions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "attention.h"

namespace cptool::cuda {
namespace {

constexpr int kWarp = 32;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

// Rounds to nearest, ties to even.
__device__ inline void store_float(void* to, ScalarType dtype, int64_t index, float value) {
  switch (dtype) {
    case ScalarType::kFloat32:
      static_cast<float*>(to)[index] = value;
      break;
    case ScalarType::kBFloat16:
      static_cast<__nv_bfloat16*>(to)[index] = __float2bfloat16_rn(value);
      break;
    case ScalarType::kFloat16:
      static_cast<__half*>(to)[index] = __float2half_rn(value);
      break;
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
