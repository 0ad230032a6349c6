// SiLU attention (attention.h) of each instruction set that has kernels for it, in files of their
// own: compiled together with softmax attention's they would change what the compiler inlines
// there.
#pragma once

#include "attention.h"

namespace cptool::cpu {

void silu_portable(const AttentionArgs& args, int threads);
void silu_avx2(const AttentionArgs& args, int threads);
void silu_avx512(const AttentionArgs& args, int threads);
void silu_avx512bf16(const AttentionArgs& args, int threads);

}  // namespace cptool::cpu
