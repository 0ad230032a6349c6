// Launches a kernel and gives it shared memory. This is the CUDA syntax that a plain C++ compiler
// cannot parse, in a file of its own so that tests/cuda_emulation can replace it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "cuda/device.h"

namespace cptool::cuda {
namespace {

// Queues the kernel on `stream`; `what` names the op in an error.
template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {  // more must be requested, separately on every device
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          what);
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError(), what);
}

#if defined(__CUDACC__)
// Returns the block's dynamic shared memory, aligned for ldmatrix, cp.async and TMA's 128-byte
// swizzle.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}
#endif

}  // namespace
}  // namespace cptool::cuda
