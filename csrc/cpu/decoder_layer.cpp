#include "cpu/decoder_layer.h"

#include "cpu/ops.h"
#include "cpu/pieces.h"

namespace cptool::cpu {
namespace {

// Rows of x, [rows, depth], are `x_stride` elements apart; out is [rows, columns], contiguous.
struct Operand {
  const void* x;
  int64_t x_stride, depth;
};

void multiply(const Operand& x, const Weight& w, int64_t columns, void* out, const Hidden& hidden,
              int threads) {
  if (w.parts == 0) {
    linear({x.x, w.at, out, x.x_stride, w.stride, hidden.rows, columns, x.depth, hidden.dtype},
           threads);
    return;
  }
  float* to = static_cast<float*>(out);
  for (int64_t i = 0; i < w.parts; to += w.stored[i].rows, ++i) {
    stored_linear(
        {w.stored[i], static_cast<const float*>(x.x), to, x.x_stride, columns, hidden.rows},
        threads);
  }
}

void norm(const Hidden& hidden, const void* added, const void* weight, float eps, void* out,
          int threads) {
  rms_norm(
      {hidden.at, added, weight, out, hidden.stride, hidden.rows, hidden.width, eps, hidden.dtype},
      threads);
}

}  // namespace

void layer_input(const LayerInputArgs& args, int threads) {
  const Hidden& hidden = args.hidden;
  norm(hidden, nullptr, args.norm, args.eps, args.scratch, threads);
  multiply({args.scratch, hidden.width, hidden.width}, args.qkv, args.columns, args.out, hidden,
           threads);
  rotate({args.out, args.columns, args.head_dim, args.cos, args.sin, hidden.rows, args.rotated,
          args.head_dim, hidden.dtype},
         threads);
}

void layer_output(const LayerOutputArgs& args, int threads) {
  const Hidden& hidden = args.hidden;
  const int64_t row_bytes = size_of(hidden.dtype) * hidden.rows;
  char* const normed = static_cast<char*>(args.scratch);
  char* const added = normed + row_bytes * hidden.width;
  char* const gate = added + row_bytes * hidden.width;
  char* const up = gate + size_of(hidden.dtype) * args.ffn;  // in the first row
  multiply({args.attended, args.depth, args.depth}, args.o, hidden.width, added, hidden, threads);
  norm(hidden, added, args.norm, args.eps, normed, threads);
  multiply({normed, hidden.width, hidden.width}, args.gate_up, 2 * args.ffn, gate, hidden, threads);
  swiglu({gate, up, 2 * args.ffn, 2 * args.ffn, hidden.rows, args.ffn, hidden.dtype}, threads);
  // The rows of silu(gate) up are 2 ffn elements apart.
  multiply({gate, 2 * args.ffn, args.ffn}, args.down, hidden.width, added, hidden, threads);
  norm(hidden, added, nullptr, args.eps, nullptr, threads);
}

}  // namespace cptool::cpu
