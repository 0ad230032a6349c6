// The two halves of a decoder layer, before and after its attention, for few rows: the steps of
// tokenwise.h in one call each, so that decoding with many small layers does not return to the
// caller between steps.
#pragma once

#include "stored.h"
#include "tokenwise.h"

namespace cptool::cpu {

// The hidden states [rows, width] of a layer, and the sizes and type that its steps share.
struct Hidden {
  void* at;
  int64_t stride;  // elements from row to row
  int64_t rows, width;
  ScalarType dtype;
};

// [columns, depth]: elements of the hidden states' type, or `parts` matrices, one below the other,
// which stay as a file stores them.
struct Weight {
  const void* at;
  int64_t stride;
  const StoredMatrix* stored;
  int64_t parts;  // 0: `at` and `stride` hold
};

struct LayerInputArgs {
  Hidden hidden;
  const void* norm;  // [width]
  float eps;
  Weight qkv;       // [columns, width]
  int64_t columns;  // of q, k and v
  int64_t rotated;  // heads of q and k, which come first
  int64_t head_dim;
  const float *cos, *sin;  // [rows, head_dim / 2]
  void* scratch;           // [rows, width]
  void* out;               // [rows, columns]
};

// out = norm(hidden) W^T, with its first heads rotated.
void layer_input(const LayerInputArgs& args, int threads);

struct LayerOutputArgs {
  Hidden hidden;
  const void* attended;  // [rows, depth], contiguous
  int64_t depth;
  Weight o;          // [width, depth]
  const void* norm;  // [width]
  float eps;
  Weight gate_up;  // [2 ffn, width], the gate first
  Weight down;     // [width, ffn]
  int64_t ffn;
  void* scratch;  // [rows, 2 width + 2 ffn]
};

// hidden += o(attended); hidden += down(silu(gate) up), where gate and up are those of
// norm(hidden).
void layer_output(const LayerOutputArgs& args, int threads);

}  // namespace cptool::cpu
