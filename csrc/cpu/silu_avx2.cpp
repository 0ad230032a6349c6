// SiLU attention with AVX2 and FMA.
#include "cpu/float32_math.h"
#include "cpu/silu.h"
#include "cpu/silu_kernel.h"

namespace cptool::cpu {

void silu_avx2(const AttentionArgs& args, int threads) {
  with_type(args.dtype,
            [&](auto element) { run_silu<Float32Math<decltype(element)>>(args, threads); });
}

}  // namespace cptool::cpu
