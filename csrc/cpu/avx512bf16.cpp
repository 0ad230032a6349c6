// attention_partial for bfloat16 with AVX-512's dot products of pairs: both products multiply
// bfloat16 and add up in float32.
//
// The weights are rounded to bfloat16; their sum is taken of the rounded values, so that weights
// add up to one and an error common to all cancels.
#include "cpu/avx512_panel_kernel.h"
#include "cpu/avx512_stream.h"

namespace cptool::cpu {
namespace {

struct BFloat16Math {
  using Input = BFloat16;
  static constexpr int kStep = 2;
  static constexpr uint32_t kSigns = 0x80008000u;

  static __m512 load(const BFloat16* row, int64_t word, int64_t words) {
    const __mmask16 exist = words - word >= kLanes ? 0xffff : (1u << (words - word)) - 1;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(exist, row + 2 * word));
  }

  static __m512 load_values(const BFloat16* v, int64_t stride, int keys) {
    auto widened = [](const BFloat16* from) {
      return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    };
    __m512i pairs = _mm512_setzero_si512();
    if (keys > 0) pairs = widened(v);
    if (keys > 1) pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(widened(v + stride), 16));
    return _mm512_castsi512_ps(pairs);
  }

  static __m512 multiply_add(__m512 a, __m512 b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }

  template <int kN>
  static void weigh(float* scores, int keys, __m512 scale, const __m512 (&base)[kN],
                    __m512 (&total)[kN]) {
    const __m512i half = _mm512_set1_epi32(0x8000);  // of a unit in the last place
    const __m512 ones = _mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80));
    for (int j = 0; j < keys; j += 2) {
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) {
        const float* at = scores + (j * kN + n) * kLanes;
        auto weight = [&](const float* score) {
          const __m512 w = exp2_cubic(_mm512_fmsub_ps(_mm512_load_ps(score), scale, base[n]));
          return _mm512_add_epi32(_mm512_castps_si512(w), half);
        };
        const __m512i even = weight(at), odd = weight(at + kN * kLanes);
        // (even >> 16) | (odd & 0xffff0000)
        const __m512 pair = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
            _mm512_srli_epi32(even, 16), odd, _mm512_set1_epi32(-0x10000), 0xf8));
        total[n] = multiply_add(pair, ones, total[n]);
        _mm512_store_ps(scores + (j / 2 * kN + n) * kLanes, pair);
      }
    }
  }
};

}  // namespace

bool avx512bf16_supported() { return avx512_supported() && __builtin_cpu_supports("avx512bf16"); }

bool avx512bf16_handles(ScalarType dtype, int64_t head_dim) {
  return dtype == ScalarType::kBFloat16 && head_dim % kLanes == 0;
}

void attention_partial_avx512bf16(const AttentionArgs& args, int threads) {
  if (few_rows(args)) return run<StreamKernel<BFloat16>>(args, threads);
  run<PanelKernel<BFloat16Math>>(args, threads);
}

}  // namespace cptool::cpu
