// The contract of products with weights that stay in the type in which a file stores them: blocks
// of GGML's quantised types, or bfloat16 or float16, while everything else is float32.
//
// A weight counts as the float32 value that the type defines for it (the same bits as the `gguf`
// package's), and is widened each time it is read.
#pragma once

#include <cstdint>

namespace cptool {

enum class Encoding : int32_t {
  kFloat32 = -1,  // rows of any depth; for products of many rows alone
  kBFloat16 = 0,
  kFloat16,
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ2_K,
  kQ3_K,
  kQ4_K,
  kQ5_K,
  kQ6_K,
  kIQ4_NL,
  kIQ4_XS,
};

// A matrix [rows, depth]. Rows are whole blocks, `stride` bytes apart.
//
// head_dim: 0, or the rows are those of heads, of which the file has the rows 2j and 2j + 1 where
// this matrix has j and j + head_dim / 2 (interleaved rotary order).
struct StoredMatrix {
  const void* at;
  int64_t stride;
  int64_t rows, depth;
  int64_t head_dim;
  Encoding encoding;
};

// out[i][n] = sum_k x[i][k] w[n][k], summed in float32.
struct StoredLinearArgs {
  StoredMatrix w;                // [columns, depth]
  const float* x;                // [rows, depth]
  float* out;                    // [rows, columns]
  int64_t x_stride, out_stride;  // elements from row to row
  int64_t rows;
};

// out[i] = the row first + i of the matrix, or the row index[i] if `index` is not null.
struct WidenArgs {
  StoredMatrix w;
  const int64_t* index;
  int64_t first, count;
  float* out;  // [count, depth], contiguous
};

}  // namespace cptool
