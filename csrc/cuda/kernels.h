// The CUDA kernels. They queue their work on a stream of the current device and return; nothing
// waits for the device.
//
// `stream` is a cudaStream_t as an integer, so that callers need no CUDA header. All pointers are
// to memory of the current device, except MergeArgs::outs and lses, which are host arrays of such
// pointers. The values of offsets and positions lie on the device, where no one checks them: wrong
// ones make wrong results, but no access outside the tensors.
//
// Throws std::invalid_argument for sizes beyond a kernel's limits and std::runtime_error for an
// error of the CUDA runtime.
#pragma once

#include <cstdint>

#include "attention.h"

namespace cptool::cuda {

// head_dim: a multiple of 8 up to 256.
void attention_partial(const AttentionArgs& args, uintptr_t stream);
void merge_partials(const MergeArgs& args, uintptr_t stream);

}  // namespace cptool::cuda
