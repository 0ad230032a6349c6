#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/ops.h"

namespace cptool::cpu {
namespace {

std::string at(const char* name, int64_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

void check_offsets(const char* name, const int32_t* offsets, int64_t batch, const char* tokens_name,
                   int64_t tokens) {
  if (offsets[0] < 0) {
    throw std::invalid_argument(at(name, 0) + " is " + std::to_string(offsets[0]) +
                                "; offsets must not be negative");
  }
  for (int64_t b = 0; b < batch; ++b) {
    if (offsets[b + 1] < offsets[b]) {
      throw std::invalid_argument(at(name, b + 1) + " is " + std::to_string(offsets[b + 1]) +
                                  ", below " + at(name, b) + " = " + std::to_string(offsets[b]) +
                                  "; offsets must not decrease");
    }
  }
  if (offsets[batch] > tokens) {
    throw std::invalid_argument(at(name, batch) + " is " + std::to_string(offsets[batch]) +
                                "; it must be at most the " + std::to_string(tokens) +
                                " tokens of " + tokens_name);
  }
}

void check_positions(const char* name, const int32_t* positions, const int32_t* offsets,
                     int64_t batch) {
  for (int64_t b = 0; b < batch; ++b) {
    int falls = 0;
#pragma omp simd reduction(| : falls)
    for (int64_t i = offsets[b] + 1; i < offsets[b + 1]; ++i)
      falls |= positions[i] < positions[i - 1];
    if (!falls) continue;
    int64_t i = offsets[b] + 1;
    while (positions[i] >= positions[i - 1]) ++i;
    throw std::invalid_argument(at(name, i) + " is " + std::to_string(positions[i]) + ", below " +
                                at(name, i - 1) + " = " + std::to_string(positions[i - 1]) +
                                "; positions must ascend within a sequence (here number " +
                                std::to_string(b) + ")");
  }
}

}  // namespace

void attention_partial(const AttentionArgs& args, int threads) {
  check_offsets("cu_q", args.cu_q, args.batch, "q", args.q_tokens);
  check_offsets("cu_k", args.cu_k, args.batch, "k", args.k_tokens);
  // A query outside every sequence would leave its row of the result unwritten.
  if (args.cu_q[0] != 0 || args.cu_q[args.batch] != args.q_tokens) {
    throw std::invalid_argument("cu_q runs from " + std::to_string(args.cu_q[0]) + " to " +
                                std::to_string(args.cu_q[args.batch]) +
                                "; it must cover the tokens of q, from 0 to " +
                                std::to_string(args.q_tokens));
  }
  check_positions("q_pos", args.q_pos, args.cu_q, args.batch);
  check_positions("k_pos", args.k_pos, args.cu_k, args.batch);
  const Kind of = kind(args);
  const AttentionKernel& kernel =
      attention_isa(args.q_dtype, args.dtype, args.head_dim, of).attention;
  (of == Kind::kSilu ? kernel.silu_partial : kernel.attention_partial)(args, threads);
}

void merge_partials(const MergeArgs& args, int threads) {
  merge_isa().merge_partials(args, threads);
}

}  // namespace cptool::cpu
