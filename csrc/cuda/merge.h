// Merges partials: those of a caller, or the pieces of a kernel that divides its keys.
#pragma once

#include <cuda_runtime.h>

#include "attention.h"

namespace cptool::cuda {

// `running`: also merges the partial that out and lse already hold, whose out is ignored where its
// lse is -inf.
void merge(const MergeArgs& args, bool running, cudaStream_t stream);

// Returns the bytes that the partials of `pieces` pieces take.
int64_t pieces_bytes(const AttentionArgs& args, int pieces);
// Merges them in order into the result of the call. `partials`: [pieces, q_tokens, q_heads,
// head_dim], then the lse of each, [pieces, q_tokens, q_heads].
void merge_pieces(const AttentionArgs& args, const float* partials, int pieces,
                  cudaStream_t stream);

}  // namespace cptool::cuda
