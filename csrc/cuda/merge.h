// The merge of partials, for other kernels' pieces as well.
#pragma once

#include <cuda_runtime.h>

#include "attention.h"

namespace cptool::cuda {

// `running`: into the partial that out and lse already hold; where its lse is -inf its out is
// ignored.
void merge(const MergeArgs& args, bool running, cudaStream_t stream);

}  // namespace cptool::cuda
