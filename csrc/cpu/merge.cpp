// Merges partials: out = sum_i w_i outs[i] / sum_i w_i with w_i = exp(lses[i] - max_i lses[i]);
// lse = max_i lses[i] + log(sum_i w_i).
#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/dispatch.h"
#include "cpu/scalar.h"
#include "cpu/thread_pool.h"
#include "softmax_state.h"

namespace cptool::cpu {
namespace {

constexpr int64_t kRowsPerPiece = 64;

template <class In, class Out>
void merge_row(const MergeArgs& args, int64_t row, float* acc) {
  const int64_t head_dim = args.head_dim;
  SoftmaxState total;
  for (int64_t i = 0; i < args.partials; ++i) {
    const float lse = args.lses[i][row];
    total.max = lse > total.max ? lse : total.max;
  }
  const float base = total.max == -INFINITY ? 0.0f : total.max;
  std::fill_n(acc, head_dim, 0.0f);
  for (int64_t i = 0; i < args.partials; ++i) {
    const float lse = args.lses[i][row];
    if (lse == -INFINITY) continue;  // its out is ignored, whatever it holds
    const float weight = std::exp(lse - base);
    total.sum += weight;
    const In* from = static_cast<const In*>(args.outs[i]) + row * head_dim;
#pragma omp simd
    for (int64_t d = 0; d < head_dim; ++d) acc[d] += weight * to_float(from[d]);
  }
  const float divisor = total.empty() ? 1.0f : total.sum;
  Out* out = static_cast<Out*>(args.out) + row * head_dim;
#pragma omp simd
  for (int64_t d = 0; d < head_dim; ++d) from_float(acc[d] / divisor, out[d]);
  args.lse[row] = total.lse();
}

template <class In, class Out>
void merge_rows(const MergeArgs& args, int64_t begin, int64_t end, float* acc) {
  for (int64_t row = begin; row < end; ++row) merge_row<In, Out>(args, row, acc);
}

template <class In>
auto merge_function(ScalarType out_dtype) {
  switch (out_dtype) {
    case ScalarType::kBFloat16:
      return merge_rows<In, BFloat16>;
    case ScalarType::kFloat16:
      return merge_rows<In, Float16>;
    default:
      return merge_rows<In, float>;
  }
}

auto merge_function(ScalarType dtype, ScalarType out_dtype) {
  switch (dtype) {
    case ScalarType::kBFloat16:
      return merge_function<BFloat16>(out_dtype);
    case ScalarType::kFloat16:
      return merge_function<Float16>(out_dtype);
    default:
      return merge_function<float>(out_dtype);
  }
}

}  // namespace

void merge_partials(const MergeArgs& args, int threads) {
  const auto merge = merge_function(args.dtype, args.out_dtype);
  std::atomic<int64_t> next{0};
  auto body = [&] {
    float* acc =
        static_cast<float*>(thread_scratch(static_cast<size_t>(args.head_dim) * sizeof(float)));
    for (;;) {
      const int64_t begin = next.fetch_add(kRowsPerPiece, std::memory_order_relaxed);
      if (begin >= args.rows) return;
      merge(args, begin, std::min(begin + kRowsPerPiece, args.rows), acc);
    }
  };
  const int64_t pieces = (args.rows + kRowsPerPiece - 1) / kRowsPerPiece;
  const int useful = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(pieces, 1)));
  run_parallel(useful, [](void* self, int) { (*static_cast<decltype(body)*>(self))(); }, &body);
}

}  // namespace cptool::cpu
