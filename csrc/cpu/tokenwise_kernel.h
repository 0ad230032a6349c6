// The token-wise steps in plain C++ with the compiler's own vectors, for any instruction set that
// the including file is compiled for. Unnamed namespace: see isa.h.
#pragma once

#include "cpu/isa.h"
#include "cpu/vectors.h"

namespace cptool::cpu {
namespace {

template <class T>
void rms_norm_rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
  const int64_t width = args.width;
  const T* weight = static_cast<const T*>(args.weight);
  for (int64_t row = begin; row < end; ++row) {
    T* hidden = static_cast<T*>(args.hidden) + row * args.hidden_stride;
    if (args.added != nullptr) {
      const T* added = static_cast<const T*>(args.added) + row * width;
      for_vectors(width, [&](int64_t i, int lanes) {
        store(load(hidden + i, lanes) + load(added + i, lanes), hidden + i, lanes);
      });
    }
    if (args.out == nullptr) continue;
    T* out = static_cast<T*>(args.out) + row * width;
    Vector squares[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
      for (int u = 0; u < 2; ++u) {
        const Vector value = load(hidden + i + u * kLanes);
        squares[u] = multiply_add(value, value, squares[u]);
      }
    }
    float total = sum(squares[0] + squares[1]);
    for (; i < width; ++i) total += to_float(hidden[i]) * to_float(hidden[i]);
    const float scale = 1.0f / __builtin_sqrtf(total / static_cast<float>(width) + args.eps);
    for_vectors(width, [&](int64_t j, int lanes) {
      const Vector normed = rounded<T>(load(hidden + j, lanes) * scale);
      store(normed * load(weight + j, lanes), out + j, lanes);
    });
  }
}

template <class T>
void rotate_tokens(const RotateArgs& args, int64_t begin, int64_t end) {
  const int64_t half = args.head_dim / 2;
  for (int64_t token = begin; token < end; ++token) {
    const float* cos = args.cos + token * half;
    const float* sin = args.sin + token * half;
    for (int64_t head = 0; head < args.num_heads; ++head) {
      T* first = static_cast<T*>(args.heads) + token * args.token_stride + head * args.head_stride;
      T* second = first + half;
      for_vectors(half, [&](int64_t i, int lanes) {
        const Vector a = load(first + i, lanes), b = load(second + i, lanes);
        const Vector c = load(cos + i, lanes), s = load(sin + i, lanes);
        store(a * c - b * s, first + i, lanes);
        store(b * c + a * s, second + i, lanes);
      });
    }
  }
}

// 1 + e^x to about two units in the last place. x = n ln 2 + r with |r| <= ln(2) / 2, ln 2 in two
// parts so that r is good to the last bit; the polynomial is that of Cephes' expf.
inline Vector one_plus_exp(Vector x) {
  const Vector most = Vector{} + 89.0f, least = Vector{} - 80.0f;
  Vector bounded = x > most ? most : x;         // e^x overflows from there on
  bounded = bounded < least ? least : bounded;  // e^x vanishes beside 1
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const Vector shifted = bounded * 1.44269504088896341f + 12582912.0f;
  const Vector n = shifted - 12582912.0f;
  const Vector r = bounded - n * 0.693359375f - n * -2.12194440e-4f;
  Vector p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^(n - 1), then twice that: n may be 128, and 2^128 is not representable.
  const Vector half_power = as_floats((as_bits(shifted) - 0x4b400000u + 126u) << 23);
  return 1.0f + p * half_power * 2.0f;
}

template <class T>
void swiglu_rows(const SwigluArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* gate = static_cast<T*>(args.gate) + row * args.gate_stride;
    const T* up = static_cast<const T*>(args.up) + row * args.up_stride;
    for_vectors(args.width, [&](int64_t i, int lanes) {
      const Vector g = load(gate + i, lanes);
      const Vector activated = rounded<T>(g / one_plus_exp(-g));
      store(activated * load(up + i, lanes), gate + i, lanes);
    });
  }
}

constexpr TokenwiseKernels kTokenwise = {
    [](const RmsNormArgs& args, int64_t begin, int64_t end) {
      with_type(args.dtype,
                [&](auto element) { rms_norm_rows<decltype(element)>(args, begin, end); });
    },
    [](const RotateArgs& args, int64_t begin, int64_t end) {
      with_type(args.dtype,
                [&](auto element) { rotate_tokens<decltype(element)>(args, begin, end); });
    },
    [](const SwigluArgs& args, int64_t begin, int64_t end) {
      with_type(args.dtype,
                [&](auto element) { swiglu_rows<decltype(element)>(args, begin, end); });
    },
};

}  // namespace
}  // namespace cptool::cpu
