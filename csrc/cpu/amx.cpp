// AMX for bfloat16 as it is, and for attention and products of many rows in float32 arithmetic.
// Attention of few rows goes through AVX-512.
#include "cpu/amx_kernel.h"
#include "cpu/amx_product.h"
#include "cpu/avx512_features.h"
#include "cpu/avx512bf16_math.h"
#include "cpu/isa.h"
#include "cpu/stream_kernel.h"

namespace cptool::cpu {

extern const Isa isa_avx512;

namespace {

bool supported() {
  static const bool supported = has_avx512bf16() && tiles_available();
  return supported;
}

bool handles(ScalarType, ScalarType, int64_t head_dim) { return head_dim % kLanes == 0; }

// Up to these, streaming keys is faster than packing them for tile products. Measured over 8K keys.
int most_streamed(ScalarType q_dtype, ScalarType dtype) {
  if (dtype != ScalarType::kBFloat16) return kStreamRows;
  return q_dtype == dtype ? 8 : 16;
}

void attention_partial(const AttentionArgs& args, int threads) {
  const bool few = few_rows(args, most_streamed(args.q_dtype, args.dtype));
  if (args.q_dtype == ScalarType::kBFloat16) {
    if (few) return run_stream<BFloat16Math>(args, threads);
    return run<AmxKernel<BFloat16Tiles>>(args, threads);
  }
  if (few) return isa_avx512.attention.attention_partial(args, threads);
  with_type(args.dtype,
            [&](auto element) { run<AmxKernel<Float32Tiles<decltype(element)>>>(args, threads); });
}

}  // namespace

extern constexpr Isa isa_amx = {"amx",   supported,  {handles, attention_partial, most_streamed},
                                nullptr, {},         {},
                                {},      kAmxProduct};

}  // namespace cptool::cpu
