// Merges partials: those of a caller, or the pieces of a kernel that divides its keys.
#pragma once

#include <cuda_runtime.h>

#include "attention.h"

namespace cptool::cuda {

// `running`: also merges the partial that out and lse already hold, whose out is ignored where its
// lse is -inf.
void merge(const MergeArgs& args, bool running, cudaStream_t stream);

}  // namespace cptool::cuda
