// Merges partials: out = sum_i w_i outs[i] / sum_i w_i with w_i = exp(lses[i] - max_i lses[i]);
// lse = max_i lses[i] + log(sum_i w_i). In plain C++ with the compiler's own vectors, for any
// instruction set that the including file is compiled for; memory bandwidth is the limit. Unnamed
// namespace: see isa.h.
#pragma once

#include <atomic>
#include <cmath>

#include "attention.h"
#include "cpu/thread_pool.h"
#include "cpu/vectors.h"
#include "softmax_state.h"

namespace cptool::cpu {
namespace {

constexpr int64_t kMergeRows = 64;  // rows that a thread takes at a time

// out = sum of kN rows, weighted.
template <int kN, class In, class Out>
inline void weighted_sum(const void* const* rows, const float* weights, int64_t head_dim,
                         Out* out) {
  const In* from[kN];
  float weight[kN];
  for (int i = 0; i < kN; ++i) {
    from[i] = static_cast<const In*>(rows[i]);
    weight[i] = weights[i];
  }
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    Vector sum = load(from[0] + d) * weight[0];
    for (int i = 1; i < kN; ++i) sum = multiply_add(load(from[i] + d), Vector{} + weight[i], sum);
    store(sum, out + d);
  }
  for (int64_t e = d; e < head_dim; ++e) {
    float sum = weight[0] * to_float(from[0][e]);
    for (int i = 1; i < kN; ++i) sum += weight[i] * to_float(from[i][e]);
    from_float(sum, out[e]);
  }
}

// The same for any number of rows; `acc` holds head_dim values.
template <class In, class Out>
inline void weighted_sum(const void* const* rows, const float* weights, int64_t count,
                         int64_t head_dim, float* acc, Out* out) {
  switch (count) {
    case 1:
      return weighted_sum<1, In>(rows, weights, head_dim, out);
    case 2:
      return weighted_sum<2, In>(rows, weights, head_dim, out);
    case 3:
      return weighted_sum<3, In>(rows, weights, head_dim, out);
    case 4:
      return weighted_sum<4, In>(rows, weights, head_dim, out);
  }
  for (int64_t d = 0; d < head_dim; ++d) acc[d] = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const In* from = static_cast<const In*>(rows[i]);
    const float weight = weights[i];
#pragma omp simd
    for (int64_t d = 0; d < head_dim; ++d) acc[d] += weight * to_float(from[d]);
  }
#pragma omp simd
  for (int64_t d = 0; d < head_dim; ++d) from_float(acc[d], out[d]);
}

// Scratch memory of a thread: [partials] rows and weights, [head_dim] sums.
struct MergeScratch {
  const void** rows;
  float* weights;
  float* acc;

  static size_t bytes(const MergeArgs& args) {
    return static_cast<size_t>(args.partials) * (sizeof(void*) + sizeof(float)) +
           static_cast<size_t>(args.head_dim) * sizeof(float);
  }

  MergeScratch(const MergeArgs& args, void* memory)
      : rows(static_cast<const void**>(memory)),
        weights(reinterpret_cast<float*>(rows + args.partials)),
        acc(weights + args.partials) {}
};

template <class In, class Out>
inline void merge_rows(const MergeArgs& args, int64_t begin, int64_t end,
                       const MergeScratch& scratch) {
  const int64_t head_dim = args.head_dim;
  for (int64_t row = begin; row < end; ++row) {
    SoftmaxState total;
    for (int64_t i = 0; i < args.partials; ++i) {
      const float lse = args.lses[i][row];
      total.max = lse > total.max ? lse : total.max;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < args.partials; ++i) {
      const float lse = args.lses[i][row];
      if (lse == -INFINITY) continue;  // its out may hold anything and is ignored
      const float weight = lse == total.max ? 1.0f : expf(lse - total.max);
      total.sum += weight;
      scratch.weights[count] = weight;
      scratch.rows[count++] = static_cast<const In*>(args.outs[i]) + row * head_dim;
    }
    for (int64_t i = 0; i < count; ++i) scratch.weights[i] /= total.sum;
    weighted_sum<In>(scratch.rows, scratch.weights, count, head_dim, scratch.acc,
                     static_cast<Out*>(args.out) + row * head_dim);
    args.lse[row] = total.lse();
  }
}

inline auto merge_function(ScalarType dtype, ScalarType out_dtype) {
  return with_type(dtype, [&](auto in) {
    return with_type(out_dtype, [](auto out) { return &merge_rows<decltype(in), decltype(out)>; });
  });
}

inline void run_merge_kernel(const MergeArgs& args, int threads) {
  const auto merge = merge_function(args.dtype, args.out_dtype);
  std::atomic<int64_t> next{0};
  auto body = [&] {
    const MergeScratch scratch(args, thread_scratch(MergeScratch::bytes(args)));
    for (;;) {
      const int64_t begin = next.fetch_add(kMergeRows, std::memory_order_relaxed);
      if (begin >= args.rows) return;
      const int64_t end = begin + kMergeRows;
      merge(args, begin, end < args.rows ? end : args.rows, scratch);
    }
  };
  const int64_t pieces = (args.rows + kMergeRows - 1) / kMergeRows;
  const int64_t useful = pieces < 1 ? 1 : pieces < threads ? pieces : threads;
  run_parallel(
      static_cast<int>(useful), [](void* self, int) { (*static_cast<decltype(body)*>(self))(); },
      &body);
}

}  // namespace
}  // namespace cptool::cpu
