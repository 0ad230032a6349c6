// AVX2 and FMA in float32 arithmetic; bfloat16 and float16 inputs are widened while they are
// packed, or as they are read.
#include "cpu/few_rows_kernel.h"
#include "cpu/float32_math.h"
#include "cpu/group_kernel.h"
#include "cpu/isa.h"
#include "cpu/merge_kernel.h"
#include "cpu/panel_kernel.h"
#include "cpu/product_kernel.h"
#include "cpu/silu.h"
#include "cpu/stream_kernel.h"
#include "cpu/tokenwise_kernel.h"

namespace cptool::cpu {
namespace {

bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool handles(ScalarType, ScalarType, int64_t) { return true; }

void attention_partial(const AttentionArgs& args, int threads) {
  with_type(args.dtype, [&](auto element) {
    using Math = Float32Math<decltype(element)>;
    if (few_rows(args, kStreamRows)) return run_stream<Math>(args, threads);
    run<PanelKernel<Math>>(args, threads);
  });
}

}  // namespace

extern constexpr Isa isa_avx2 = {
    "avx2",           supported, {handles, attention_partial, stream_rows, silu_avx2},
    run_merge_kernel, kFewRows,  kTokenwise,
    kStoredGroups,    kProduct};

}  // namespace cptool::cpu
