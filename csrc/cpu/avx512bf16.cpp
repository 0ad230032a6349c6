// attention_partial for bfloat16 with AVX-512's dot products of pairs: both products multiply
// bfloat16 and add up in float32.
#include "cpu/avx512_panel_kernel.h"
#include "cpu/avx512_stream.h"
#include "cpu/avx512bf16_math.h"

namespace cptool::cpu {
bool avx512bf16_supported() { return avx512_supported() && __builtin_cpu_supports("avx512bf16"); }

bool avx512bf16_handles(ScalarType dtype, int64_t head_dim) {
  return dtype == ScalarType::kBFloat16 && head_dim % kLanes == 0;
}

void attention_partial_avx512bf16(const AttentionArgs& args, int threads) {
  if (few_rows(args, kStreamRows)) return run_stream<BFloat16Math>(args, threads);
  run<PanelKernel<BFloat16Math>>(args, threads);
}

}  // namespace cptool::cpu
