// attention_partial in float32 arithmetic with AVX-512; bfloat16 and float16 inputs are widened
// while they are packed.
#include "cpu/avx512_panel_kernel.h"
#include "cpu/avx512_stream.h"
#include "cpu/merge_kernel.h"

namespace cptool::cpu {
namespace {

template <class T>
struct Float32Math {
  using Input = T;
  using Weight = float;
  static constexpr int kStep = 1;
  static constexpr uint32_t kSigns = 0x80000000u;

  static __m512 load(const T* row, int64_t word, int64_t) { return load16(row + word); }

  static __m512 load_values(const T* v, int64_t, int keys) {
    return keys > 0 ? load16(v) : _mm512_setzero_ps();
  }

  template <int kN>
  static void load_step(const T* v, int64_t, __m512 (&values)[kN]) {
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) values[n] = load16(v + n * kLanes);
  }

  static void in_order(float*) {}
  static __m512 exp2(__m512 x) { return exp2_full(x); }

  static __m512 multiply_add(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }

  static __m512 store_weights(__m512 weights, float* to) {
    _mm512_storeu_ps(to, weights);
    return weights;
  }

  template <int kN>
  static void weigh(float* scores, int keys, __m512 scale, const __m512 (&base)[kN],
                    __m512 (&total)[kN]) {
    for (int j = 0; j < keys; ++j) {
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) {
        float* at = scores + (j * kN + n) * kLanes;
        const __m512 weight = exp2_full(_mm512_fmsub_ps(_mm512_load_ps(at), scale, base[n]));
        total[n] = _mm512_add_ps(total[n], weight);
        _mm512_store_ps(at, weight);
      }
    }
  }
};

template <class T>
inline void run_rows(const AttentionArgs& args, int threads) {
  if (few_rows(args, kStreamRows)) return run_stream<Float32Math<T>>(args, threads);
  run<PanelKernel<Float32Math<T>>>(args, threads);
}

}  // namespace

bool avx512_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool avx512_handles(ScalarType, int64_t head_dim) { return head_dim % kLanes == 0; }

void attention_partial_avx512(const AttentionArgs& args, int threads) {
  switch (args.dtype) {
    case ScalarType::kFloat32:
      return run_rows<float>(args, threads);
    case ScalarType::kBFloat16:
      return run_rows<BFloat16>(args, threads);
    case ScalarType::kFloat16:
      return run_rows<Float16>(args, threads);
  }
}

void merge_partials_avx512(const MergeArgs& args, int threads) { run_merge_kernel(args, threads); }

}  // namespace cptool::cpu
