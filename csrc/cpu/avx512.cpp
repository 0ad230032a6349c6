// AVX-512 in float32 arithmetic; bfloat16 and float16 inputs are widened while they are packed, or
// as they are read.
#include "cpu/avx512_features.h"
#include "cpu/few_rows_kernel.h"
#include "cpu/float32_math.h"
#include "cpu/isa.h"
#include "cpu/merge_kernel.h"
#include "cpu/panel_kernel.h"
#include "cpu/stored_kernel.h"
#include "cpu/stream_kernel.h"
#include "cpu/tokenwise_kernel.h"

namespace cptool::cpu {
namespace {

bool handles(ScalarType, ScalarType, int64_t head_dim) { return head_dim % kLanes == 0; }

void attention_partial(const AttentionArgs& args, int threads) {
  with_type(args.dtype, [&](auto element) {
    using Math = Float32Math<decltype(element)>;
    if (few_rows(args, kStreamRows)) return run_stream<Math>(args, threads);
    run<PanelKernel<Math>>(args, threads);
  });
}

}  // namespace

extern constexpr Isa isa_avx512 = {
    "avx512",   has_avx512, {handles, attention_partial, kStreamRows}, run_merge_kernel, kFewRows,
    kTokenwise, kStored};

}  // namespace cptool::cpu
