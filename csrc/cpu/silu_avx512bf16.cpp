// SiLU attention with AVX-512's dot products of bfloat16.
#include "cpu/avx512bf16_math.h"
#include "cpu/silu.h"
#include "cpu/silu_kernel.h"

namespace cptool::cpu {

void silu_avx512bf16(const AttentionArgs& args, int threads) {
  run_silu<BFloat16Math>(args, threads);
}

}  // namespace cptool::cpu
