// The contract of the token-wise steps of a Llama forward pass: everything but attention and large
// matrix products. Every value is rounded to the type of the tensors where `transformers` rounds
// it.
#pragma once

#include <cstdint>

#include "attention.h"

namespace cptool {

// out[i][n] = sum_k x[i][k] w[n][k], summed in float32 and rounded once. For few rows: w is read
// from memory once, for all rows together.
struct LinearArgs {
  const void* x;               // [rows, depth]
  const void* w;               // [columns, depth]
  void* out;                   // [rows, columns], contiguous
  int64_t x_stride, w_stride;  // elements from row to row; the innermost stride is 1
  int64_t rows, columns, depth;
  ScalarType dtype;
};

// hidden += added, rounded (if added is not null); then out = round(hidden / sqrt(mean(hidden^2) +
// eps)) * weight, rounded.
struct RmsNormArgs {
  void* hidden;        // [rows, width], rows contiguous; written only if `added` is given
  const void* added;   // [rows, width], contiguous, or null
  const void* weight;  // [width]
  void* out;           // [rows, width], contiguous, or null: only add
  int64_t hidden_stride;
  int64_t rows, width;
  float eps;
  ScalarType dtype;
};

// (a, b) -> (a cos - b sin, b cos + a sin) in place, for the pairs of elements (j, j + head_dim /
// 2) of a head; in float32, rounded once.
struct RotateArgs {
  void* heads;  // [tokens, heads, head_dim], the innermost stride 1
  int64_t token_stride, head_stride;
  const float* cos;  // [tokens, head_dim / 2], contiguous
  const float* sin;
  int64_t tokens, num_heads, head_dim;
  ScalarType dtype;
};

// gate = round(round(gate / (1 + exp(-gate))) * up), in place.
struct SwigluArgs {
  void* gate;                      // [rows, width]
  const void* up;                  // [rows, width]
  int64_t gate_stride, up_stride;  // elements from row to row
  int64_t rows, width;
  ScalarType dtype;
};

}  // namespace cptool
