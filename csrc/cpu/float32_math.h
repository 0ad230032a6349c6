// The arithmetic of the panel and stream kernels, as a class that they take: this one is in float32
// and widens its inputs, avx512bf16_math.h multiplies pairs of bfloat16.
//
// A product works on words of 32 bits, which hold Math::kStep elements that are multiplied and
// added together: one float32, or two bfloat16.
//
// struct Math:
//   using Input, Weight;                                        of k and v; of rounded weights
//   static constexpr int kStep;                                 elements of a word
//   static constexpr uint32_t kSigns;                           their sign bits
//   static Vector load(const Input* row, int64_t word, int64_t words);
//     Loads kLanes words of a row, 0 from `words` on.
//   static Vector load_half(const Input* row, int64_t word, int half);
//     Loads half of 2 kLanes words of a row, all of which exist, divided in any way that is the
//     same for every row.
//   static Vector load_query(const void* row, ScalarType type, int64_t word, int64_t words);
//   static Vector load_query_half(const void* row, ScalarType type, int64_t word, int half);
//     The same for a query, whose elements are of the Input or, in float32 arithmetic, float32.
//   static Vector load_values(const Input* v, int64_t stride, int keys, int64_t dims);
//     Loads kLanes dimensions of the values of kStep keys, as words, 0 for those that do not exist:
//     there are `dims` dimensions, at least 1, and `keys` keys.
//   template <int kN> static void load_step(const Input* v, int64_t next, Vector (&values)[kN]);
//     Loads kLanes * kN dimensions of kStep keys, the next one's at v + next, as words.
//     in_order(acc) brings 2 kLanes sums of such products into the order of the dimensions. kN is 1
//     or even.
//   static Vector exp2(Vector x);                               as good as a Weight can hold
//   static Vector multiply_add(Vector a, Vector b, Vector sum);
//   static Vector store_weights(Vector weights, Weight* to);
//     Stores kLanes weights of one row, consecutive keys, rounded; returns them as float32.
//   template <int kN> static void weigh(float* scores, int keys, Vector scale,
//                                       const Vector (&base)[kN], Vector (&total)[kN]);
//     Turns scores [keys][kLanes * kN rows] into weights 2^(score * scale - base), as words [keys /
//     kStep][kLanes * kN rows] in the same memory, and adds them to `total`.
//   template <int kN> static void weigh_silu(float* scores, int keys, Vector scale);
//     Turns them into weights silu(score * scale) likewise.
//
// Unnamed namespace: see isa.h.
#pragma once

#include <type_traits>

#include "cpu/vector_math.h"

namespace cptool::cpu {
namespace {

// Loads the elements that exist, of which there are `count`; other lanes are 0.
template <class T>
inline Vector load_exist(const T* from, int64_t count) {
  return count >= kLanes ? load(from) : load_first(from, static_cast<int>(count));
}

template <class T>
struct Float32Math {
  using Input = T;
  using Weight = float;
  static constexpr int kStep = 1;
  static constexpr uint32_t kSigns = 0x80000000u;
  static constexpr bool kEvenOdd = std::is_same_v<T, BFloat16>;  // the order of pairs of vectors

  static Vector load(const T* row, int64_t word, int64_t words) {
    return load_exist(row + word, words - word);
  }

  static Vector load_half(const T* row, int64_t word, int half) {
    if constexpr (kEvenOdd) return half == 0 ? load_even(row + word) : load_odd(row + word);
    return cpu::load(row + word + half * kLanes);
  }

  static Vector load_query(const void* row, ScalarType type, int64_t word, int64_t words) {
    if (type == ScalarType::kFloat32) {
      return load_exist(static_cast<const float*>(row) + word, words - word);
    }
    return load(static_cast<const T*>(row), word, words);
  }

  static Vector load_query_half(const void* row, ScalarType type, int64_t word, int half) {
    if (type != ScalarType::kFloat32) return load_half(static_cast<const T*>(row), word, half);
    const float* from = static_cast<const float*>(row) + word;
    if constexpr (!kEvenOdd) return cpu::load(from + half * kLanes);
    Vector words;
    for (int i = 0; i < kLanes; ++i) words[i] = from[2 * i + half];
    return words;
  }

  static Vector load_values(const T* v, int64_t, int keys, int64_t dims) {
    return keys > 0 ? load_exist(v, dims) : Vector{};
  }

  template <int kN>
  static void load_step(const T* v, int64_t, Vector (&values)[kN]) {
    if constexpr (kEvenOdd && kN > 1) {
#pragma GCC unroll 4
      for (int n = 0; n < kN; n += 2) {
        values[n] = load_even(v + n * kLanes);
        values[n + 1] = load_odd(v + n * kLanes);
      }
    } else {
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) values[n] = cpu::load(v + n * kLanes);
    }
  }

  static void in_order(float* acc) {
    if constexpr (kEvenOdd) {
      float ordered[2 * kLanes];
      for (int i = 0; i < kLanes; ++i) {
        ordered[2 * i] = acc[i];
        ordered[2 * i + 1] = acc[kLanes + i];
      }
      std::memcpy(acc, ordered, sizeof ordered);
    }
  }

  static Vector exp2(Vector x) { return exp2_full(x); }

  static Vector multiply_add(Vector a, Vector b, Vector sum) {
    return cpu::multiply_add(a, b, sum);
  }

  static Vector store_weights(Vector weights, float* to) {
    store(weights, to);
    return weights;
  }

  template <int kN>
  static void weigh(float* scores, int keys, Vector scale, const Vector (&base)[kN],
                    Vector (&total)[kN]) {
    for (int j = 0; j < keys; ++j) {
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) {
        float* at = scores + (j * kN + n) * kLanes;
        const Vector weight = exp2_full(multiply_subtract(cpu::load(at), scale, base[n]));
        total[n] = total[n] + weight;
        store(weight, at);
      }
    }
  }

  template <int kN>
  static void weigh_silu(float* scores, int keys, Vector scale) {
    for (int i = 0; i < keys * kN; ++i, scores += kLanes) {
      store(silu(cpu::load(scores) * scale, exp2), scores);
    }
  }
};

}  // namespace
}  // namespace cptool::cpu
