// Replaces csrc/cuda/launch.h in the emulation.
#pragma once

#include "cuda_runtime.h"

namespace cptool::cuda {

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t, Arguments... arguments) {
  if (shared_bytes > 227 * 1024) emulation::fail("more shared memory than a block may have");
  emulation::run_grid(grid, block, shared_bytes, [=] { kernel(arguments...); });
}

inline unsigned char* dynamic_shared() { return emulation::current->block->shared; }

}  // namespace cptool::cuda
