// AMX for bfloat16, and for products of many rows of float32; attention of few rows goes through
// AVX-512's dot products of pairs.
#include "cpu/amx_kernel.h"
#include "cpu/amx_product.h"
#include "cpu/avx512_features.h"
#include "cpu/avx512bf16_math.h"
#include "cpu/isa.h"
#include "cpu/stream_kernel.h"

namespace cptool::cpu {
namespace {

// At most half a tile: below this, streaming keys is faster than packing them for tile products.
constexpr int kAmxStreamRows = 8;

bool supported() {
  static const bool supported = has_avx512bf16() && tiles_available();
  return supported;
}

// It takes no float32 q over bfloat16 k and v: that would round q.
bool handles(ScalarType q_dtype, ScalarType dtype, int64_t head_dim) {
  return q_dtype == dtype && dtype == ScalarType::kBFloat16 && head_dim % kLanes == 0;
}

void attention_partial(const AttentionArgs& args, int threads) {
  if (few_rows(args, kAmxStreamRows)) return run_stream<BFloat16Math>(args, threads);
  run<AmxKernel>(args, threads);
}

}  // namespace

extern constexpr Isa isa_amx = {"amx",   supported,  {handles, attention_partial, kAmxStreamRows},
                                nullptr, {},         {},
                                {},      kAmxProduct};

}  // namespace cptool::cpu
