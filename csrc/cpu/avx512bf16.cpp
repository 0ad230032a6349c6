// AVX-512's dot products of pairs for bfloat16: they multiply bfloat16 and add up in float32.
#include "cpu/avx512_features.h"
#include "cpu/avx512bf16_math.h"
#include "cpu/few_rows_kernel.h"
#include "cpu/isa.h"
#include "cpu/panel_kernel.h"
#include "cpu/silu.h"
#include "cpu/stream_kernel.h"

namespace cptool::cpu {
namespace {

bool is_bfloat16(ScalarType dtype) { return dtype == ScalarType::kBFloat16; }

// It takes no float32 q over bfloat16 k and v: that would round q.
bool handles(ScalarType q_dtype, ScalarType dtype, int64_t) {
  return is_bfloat16(q_dtype) && is_bfloat16(dtype);
}

void attention_partial(const AttentionArgs& args, int threads) {
  if (few_rows(args, kStreamRows)) return run_stream<BFloat16Math>(args, threads);
  run<PanelKernel<BFloat16Math>>(args, threads);
}

using Products = FewRows<Pairs, BFloat16>;

}  // namespace

// Merging and the token-wise steps are bound by memory: AVX-512's run.
extern constexpr Isa isa_avx512bf16 = {
    "avx512bf16",
    has_avx512bf16,
    {handles, attention_partial, stream_rows, silu_avx512bf16},
    nullptr,
    {is_bfloat16, Products::packed_row_bytes, Products::pack, Products::columns},
    {},
    {},
    {},
    has_fast_bfloat16_dots};

}  // namespace cptool::cpu
