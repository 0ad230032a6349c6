// Replaces csrc/cuda/sm90/tensor_map.h in the emulation: readable tensor maps, rejected where
// cuTensorMapEncodeTiled rejects them.
#pragma once

#include <stdexcept>

#include "attention.h"
#include "cuda_runtime.h"

namespace cptool::cuda {

struct alignas(64) TensorMap {
  const uint8_t* tensor;
  uint64_t sizes[3];    // elements of 2 bytes
  uint64_t strides[3];  // bytes
  uint32_t box[3];
};

inline TensorMap tensor_map(ScalarType dtype, const void* tensor, int64_t tokens,
                            int64_t token_stride, int64_t heads, int64_t head_stride,
                            int64_t head_dim, uint32_t columns, uint32_t box_heads,
                            uint32_t box_tokens) {
  const auto require = [](bool met, const char* what) {
    if (!met) throw std::runtime_error(std::string("cuTensorMapEncodeTiled: ") + what);
  };
  TensorMap map = {};
  map.tensor = static_cast<const uint8_t*>(tensor);
  const int64_t sizes[3] = {head_dim, heads, tokens}, strides[3] = {2, head_stride, token_stride};
  const uint32_t box[3] = {columns, box_heads, box_tokens};
  require(dtype != ScalarType::kFloat32, "dtype");
  require(reinterpret_cast<uintptr_t>(tensor) % 16 == 0, "globalAddress");
  for (int i = 0; i < 3; ++i) {
    require(sizes[i] > 0 && sizes[i] <= int64_t{1} << 32, "globalDim");
    if (i > 0) {
      require(strides[i] > 0 && strides[i] % 16 == 0 && strides[i] < int64_t{1} << 40,
              "globalStrides");
    }
    if (i < 2) require(strides[i + 1] >= sizes[i], "globalStrides");  // the header's own rule
    require(box[i] > 0 && box[i] <= 256, "boxDim");
    map.sizes[i] = static_cast<uint64_t>(sizes[i]);
    map.strides[i] = static_cast<uint64_t>(strides[i]);
    map.box[i] = box[i];
  }
  require(2 * box[0] == 128, "the box is not as wide as the swizzle");  // what these kernels use
  return map;
}

}  // namespace cptool::cuda
