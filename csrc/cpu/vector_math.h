// Arithmetic of the kernels that are written once for vectors of 8 and of 16 lanes. vectors.h has
// what plain C++ can express; this is what takes intrinsics, under the same names in avx2_math.h
// and avx512_math.h:
//
//   Vector broadcast(float)
//   Vector largest(Vector a, Vector b)                      b where either is NaN
//   Vector multiply_subtract(Vector a, Vector b, Vector c)  a * b - c, with one rounding
//   unsigned above(Vector a, Vector b)                      lanes where a > b, as bits
//   void store_halves(Vector, float* low, float* high)
//   Vector load_eight(const float*)                         further lanes hold anything
//   Vector load_first(const T*, int count)
//     The first `count` elements, fewer than kLanes; other lanes are 0, and their memory is not
//     touched.
//   Vector broadcast_part(const float*)                     four floats, in every 128 bits
//   Vector sum_parts(Vector a, Vector b, Vector c, Vector d)
//     The sums of the four lanes of every 128 bits of a, b, c and d, in the same 128 bits.
//   void transpose_parts(Vector (&r)[kParts])
//     Transposes a matrix of parts of 128 bits.
//   Vector reciprocal(Vector x)                             1 / x, of x from 1 to 2
//   Vector exp2_full(Vector x)
//     2^x for x well below 128, to about one unit in the last place. Flushes to 0 far below; 2^-inf
//     is 0, NaN stays. Within FlushSubnormals.
//   void transpose(Vector (&r)[kLanes])
//   Vector sum_each(const Vector (&r)[kLanes])
//     Lane i of the result is the sum of the lanes of r[i]. Always inline: r must stay in
//     registers.
//
// Unnamed namespace: see isa.h.
#pragma once

#if defined(__AVX512F__)
#include "cpu/avx512_math.h"
#else
#include "cpu/avx2_math.h"
#endif

namespace cptool::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

// The hyperbolic tangent, to three units in the last place (`tests/ops/test_windows.py` measures
// it). Up to 0.625 the odd polynomial of Cephes' tanhf, which keeps small results to their own
// precision; beyond, (1 - e^(-2|x|)) / (1 + e^(-2|x|)). NaN stays. Within FlushSubnormals.
inline Vector hyperbolic_tangent(Vector x) {
  const Bits sign = as_bits(x) & 0x80000000u;
  const Vector size = as_floats(as_bits(x) ^ sign);
  const Vector square = x * x;
  Vector p = broadcast(-5.70498872745e-3f);
  p = multiply_add(p, square, broadcast(2.06390887954e-2f));
  p = multiply_add(p, square, broadcast(-5.37397155531e-2f));
  p = multiply_add(p, square, broadcast(1.33314422036e-1f));
  p = multiply_add(p, square, broadcast(-3.33332819422e-1f));
  const Vector small = multiply_add(p * square, x, x);
  const Vector power = exp2_full(size * broadcast(-2 * kLog2E));
  const Vector one = broadcast(1.0f);
  const Vector large = (one - power) / (one + power);
  return size < broadcast(0.625f) ? small : as_floats(as_bits(large) | sign);
}

// x / (1 + e^-x), as x times 1 / (1 + p) or p / (1 + p) with p = e^-|x|, which does not overflow.
// `exp2`: of numbers up to 0.
template <class Exp2>
inline Vector silu(Vector x, const Exp2& exp2) {
  const Vector size = as_floats(as_bits(x) & 0x7fffffffu);
  const Vector power = exp2(size * broadcast(-kLog2E));
  const Vector one = broadcast(1.0f);
  return (x < Vector{} ? x * power : x) * reciprocal(one + power);
}

constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Treats subnormal numbers as 0 for the lifetime of the object. A weight below 2^-126 would
// otherwise cost a microcode assist, fifty times the arithmetic of its whole vector, and adds
// nothing to a sum that holds a weight of about 1.
class FlushSubnormals {
 public:
  FlushSubnormals() { _mm_setcsr(saved_ | 0x8040); }  // flush to zero, denormals are zeros
  ~FlushSubnormals() { _mm_setcsr(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned saved_ = _mm_getcsr();
};

}  // namespace
}  // namespace cptool::cpu
