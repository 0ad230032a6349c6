// The kernel of last resort: the compiler's baseline instruction set.
#include "cpu/merge_kernel.h"
#include "cpu/portable_kernel.h"

namespace cptool::cpu {

bool portable_supported() { return true; }

bool portable_handles(ScalarType, int64_t) { return true; }

void attention_partial_portable(const AttentionArgs& args, int threads) {
  run_portable_kernel(args, threads);
}

void merge_partials_portable(const MergeArgs& args, int threads) {
  run_merge_kernel(args, threads);
}

}  // namespace cptool::cpu
