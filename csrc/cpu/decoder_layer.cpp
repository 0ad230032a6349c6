#include "cpu/decoder_layer.h"

#include <type_traits>
#include <vector>

#include "cpu/ops.h"
#include "cpu/pieces.h"
#include "cpu/scalar.h"

namespace cptool::cpu {
namespace {

// Rows of x, [rows, depth], are `x_stride` elements apart; out is [rows, columns], contiguous.
struct Operand {
  const void* x;
  int64_t x_stride, depth;
};

// out[i] = x[i] W^T in float32, contiguous, for a matrix of stored parts.
void multiply_stored(const float* x, int64_t x_stride, const Weight& w, int64_t columns, float* out,
                     int64_t rows, int threads) {
  for (int64_t i = 0; i < w.parts; out += w.stored[i].rows, ++i) {
    stored_linear({w.stored[i], x, out, x_stride, columns, rows}, threads);
  }
}

void multiply(const Operand& x, const Weight& w, int64_t columns, void* out, const Hidden& hidden,
              int threads) {
  if (w.parts == 0) {
    linear({x.x, w.at, out, x.x_stride, w.stride, hidden.rows, columns, x.depth, hidden.dtype},
           threads);
    return;
  }
  const int64_t rows = hidden.rows;
  with_type(hidden.dtype, [&](auto of) {
    using T = decltype(of);
    const T* const from = static_cast<const T*>(x.x);
    T* const to = static_cast<T*>(out);
    if constexpr (std::is_same_v<T, float>) {
      multiply_stored(from, x.x_stride, w, columns, to, rows, threads);
    } else {
      // Stored weights are multiplied in float32, and a result is rounded once.
      static thread_local std::vector<float> wide;
      wide.resize(static_cast<size_t>(rows * (x.depth + columns)));
      float* const result = wide.data() + rows * x.depth;
      for (int64_t i = 0; i < rows; ++i) {
        const T* const row = from + i * x.x_stride;
        for (int64_t k = 0; k < x.depth; ++k) wide[i * x.depth + k] = to_float(row[k]);
      }
      multiply_stored(wide.data(), x.depth, w, columns, result, rows, threads);
      for (int64_t i = 0; i < rows * columns; ++i) from_float(result[i], to[i]);
    }
  });
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
