// The tensor maps that TMA reads: where a tensor of tokens is in memory, and the box of it that one
// load copies. tests/cuda_emulation/cuda/sm90/tensor_map.h has the same for the CPU.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "cuda/device.h"

namespace cptool::cuda {

using TensorMap = CUtensorMap;

namespace {

// cuTensorMapEncodeTiled of the installed driver, with which the extension does not link.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
          "cudaGetDriverEntryPoint");
#endif
    if (found != cudaDriverEntryPointSuccess || function == nullptr) {
      throw std::runtime_error(
          "this CUDA driver lacks cuTensorMapEncodeTiled; "
          "update it to one of CUDA 12.0 or later");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

// Makes the map of a tensor [tokens, heads, head_dim] of 16-bit elements, strides in bytes, and its
// box of `columns` (128 bytes) of `box_heads` heads of `box_tokens` tokens. A box's rows are 128
// bytes apart in shared memory, head after head and token after token, swizzled (descriptors.h).
inline TensorMap tensor_map(ScalarType dtype, const void* tensor, int64_t tokens,
                            int64_t token_stride, int64_t heads, int64_t head_stride,
                            int64_t head_dim, uint32_t columns, uint32_t box_heads,
                            uint32_t box_tokens) {
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(heads),
                               static_cast<cuuint64_t>(tokens)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(head_stride),
                                 static_cast<cuuint64_t>(token_stride)};
  const cuuint32_t box[3] = {columns, box_heads, box_tokens};
  const cuuint32_t every[3] = {1, 1, 1};
  TensorMap map;
  const CUresult result =
      tensor_map_encoder()(&map,
                           dtype == ScalarType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                          : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                           3, const_cast<void*>(tensor), sizes, strides, box, every,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("CUDA error " + std::to_string(static_cast<int>(result)) +
                             " in cuTensorMapEncodeTiled");
  }
  return map;
}

}  // namespace
}  // namespace cptool::cuda
