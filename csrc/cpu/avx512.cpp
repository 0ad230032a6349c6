// AVX-512 in float32 arithmetic; bfloat16 and float16 inputs are widened while they are packed, or
// as they are read.
#include "cpu/avx512_features.h"
#include "cpu/few_rows_kernel.h"
#include "cpu/float32_math.h"
#include "cpu/isa.h"
#include "cpu/merge_kernel.h"
#include "cpu/panel_kernel.h"
#include "cpu/product_kernel.h"
#include "cpu/silu.h"
#include "cpu/stored_kernel.h"
#include "cpu/stream_kernel.h"
#include "cpu/tokenwise_kernel.h"

namespace cptool::cpu {
namespace {

bool handles(ScalarType, ScalarType, int64_t) { return true; }

void attention_partial(const AttentionArgs& args, int threads) {
  with_type(args.dtype, [&](auto element) {
    using Math = Float32Math<decltype(element)>;
    if (few_rows(args, kStreamRows)) return run_stream<Math>(args, threads);
    run<PanelKernel<Math>>(args, threads);
  });
}

// AVX2's products with integers take 0.4 to 0.7 of the time for one row of types whose integers or
// scales take many instructions to find, and about as long for 16 rows.
bool handles_stored(Encoding encoding) {
  switch (encoding) {
    case Encoding::kQ5_0:
    case Encoding::kQ5_1:
    case Encoding::kQ4_K:
    case Encoding::kQ5_K:
    case Encoding::kQ6_K:
      return false;
    default:
      return true;
  }
}

constexpr StoredKernels some_stored() {
  StoredKernels kernels = kStored;
  kernels.handles = handles_stored;
  return kernels;
}

}  // namespace

extern constexpr Isa isa_avx512 = {
    "avx512",         has_avx512, {handles, attention_partial, stream_rows, silu_avx512},
    run_merge_kernel, kFewRows,   kTokenwise,
    some_stored(),    kProduct};

}  // namespace cptool::cpu
