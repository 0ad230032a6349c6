#include "cpu/dispatch.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

namespace cptool::cpu {
namespace {

constexpr Isa kIsas[] = {
    {"portable", portable_supported, portable_handles, attention_partial_portable,
     merge_partials_portable, 0},
#if defined(CPTOOL_HAS_AVX2)
    {"avx2", avx2_supported, avx2_handles, attention_partial_avx2, merge_partials_avx2, 0},
#endif
#if defined(CPTOOL_HAS_AVX512)
    {"avx512", avx512_supported, avx512_handles, attention_partial_avx512, merge_partials_avx512,
     kStreamRows},
#endif
#if defined(CPTOOL_HAS_AVX512BF16)
    {"avx512bf16", avx512bf16_supported, avx512bf16_handles, attention_partial_avx512bf16,
     merge_partials_avx512, kStreamRows},
#endif
#if defined(CPTOOL_HAS_AMX)
    {"amx", amx_supported, amx_handles, attention_partial_amx, merge_partials_avx512,
     kAmxStreamRows},
#endif
};
constexpr int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

std::atomic<int> last_allowed{kIsaCount - 1};

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

const Isa* isas(int* count) {
  *count = kIsaCount;
  return kIsas;
}

const Isa* select_isa(ScalarType dtype, int64_t head_dim) {
  for (int i = last_allowed.load(std::memory_order_relaxed); i > 0; --i) {
    if (kIsas[i].supported() && kIsas[i].handles(dtype, head_dim)) return &kIsas[i];
  }
  return &kIsas[0];
}

bool force_isa(const char* name) {
  if (name == nullptr) {
    last_allowed = kIsaCount - 1;
    return true;
  }
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(kIsas[i].name, name) == 0 && kIsas[i].supported()) {
      last_allowed = i;
      return true;
    }
  }
  return false;
}

bool allows_isa(const char* name) {
  for (int i = 0; i <= last_allowed.load(std::memory_order_relaxed); ++i) {
    if (std::strcmp(kIsas[i].name, name) == 0) return kIsas[i].supported();
  }
  return false;
}

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
  select_isa(args.dtype, args.head_dim)->attention_partial(args, threads);
}

void merge_partials(const MergeArgs& args, int threads) {
  int i = last_allowed.load(std::memory_order_relaxed);
  while (!kIsas[i].supported()) --i;
  kIsas[i].merge_partials(args, threads);
}

}  // namespace cptool::cpu
