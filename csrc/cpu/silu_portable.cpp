// SiLU attention in plain C++.
#include "cpu/portable_kernel.h"
#include "cpu/silu.h"

namespace cptool::cpu {

void silu_portable(const AttentionArgs& args, int threads) {
  run_portable_kernel<Kind::kSilu>(args, threads);
}

}  // namespace cptool::cpu
