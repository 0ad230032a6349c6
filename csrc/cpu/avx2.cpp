// The portable kernel, compiled for AVX2 and FMA.
#include "cpu/merge_kernel.h"
#include "cpu/portable_kernel.h"

namespace cptool::cpu {

bool avx2_supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool avx2_handles(ScalarType, int64_t) { return true; }

void attention_partial_avx2(const AttentionArgs& args, int threads) {
  run_portable_kernel(args, threads);
}

void merge_partials_avx2(const MergeArgs& args, int threads) { run_merge_kernel(args, threads); }

}  // namespace cptool::cpu
