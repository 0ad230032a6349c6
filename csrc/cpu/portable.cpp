// The kernel of last resort: the compiler's baseline instruction set.
#include "cpu/portable_kernel.h"

namespace cptool::cpu {

bool portable_supported() { return true; }

bool portable_handles(ScalarType, int64_t) { return true; }

void attention_partial_portable(const AttentionArgs& args, int threads) {
  run_portable_kernel(args, threads);
}

}  // namespace cptool::cpu
