// The arithmetic of the AVX-512 attention kernels, as a class that they take: this one is in
// float32 and widens its inputs, avx512bf16_math.h multiplies pairs of bfloat16.
//
// A product works on words of 32 bits, which hold Math::kStep elements that are multiplied and
// added together: one float32, or two bfloat16.
//
// struct Math:
//   using Input, Weight;                                        of q, k and v; of rounded weights
//   static constexpr int kStep;                                 elements of a word
//   static constexpr uint32_t kSigns;                           their sign bits
//   static __m512 load(const Input* row, int64_t word, int64_t words);
//     Loads 16 words of a row, 0 from `words` on.
//   static __m512 load_values(const Input* v, int64_t stride, int keys);
//     Loads 16 dimensions of the values of kStep keys, of which `keys` exist, as words.
//   template <int kN> static void load_step(const Input* v, int64_t next, __m512 (&values)[kN]);
//     Loads 16 kN dimensions of kStep keys, the next one's at v + next, as words. in_order(acc)
//     brings 32 sums of such products into the order of the dimensions. kN is 1 or even.
//   static __m512 exp2(__m512 x);                               as good as a Weight can hold
//   static __m512 multiply_add(__m512 a, __m512 b, __m512 sum);
//   static __m512 store_weights(__m512 weights, Weight* to);
//     Stores 16 weights of one row, consecutive keys, rounded; returns them as float32.
//   template <int kN> static void weigh(float* scores, int keys, __m512 scale,
//                                       const __m512 (&base)[kN], __m512 (&total)[kN]);
//     Turns scores [keys][16 kN rows] into weights 2^(score * scale - base), as words [keys /
//     kStep][16 kN rows] in the same memory, and adds them to `total`.
//
// Unnamed namespace: see isa.h.
#pragma once

#include "cpu/avx512_math.h"

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

}  // namespace
}  // namespace cptool::cpu
