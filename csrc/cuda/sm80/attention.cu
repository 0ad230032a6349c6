// The kernel for compute capability 8.0 as dispatch.h declares it.
#include <cfloat>
#include <cmath>
#include <stdexcept>

#include "cuda/dispatch.h"
#include "cuda/merge.h"
#include "cuda/sm80/plan.h"

namespace cptool::cuda {
namespace {

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Rows start at multiples of 16 bytes.
bool rows_aligned(const void* pointer, int64_t token_stride, int64_t head_stride) {
  return is_aligned(pointer) && token_stride % 8 == 0 && head_stride % 8 == 0;
}

sm80::Attention* attention_of(const AttentionArgs& args, const sm80::Plan& plan) {
  if (is_plain(args)) return plan.few_rows ? sm80::attention_few_rows : sm80::attention_many_rows;
  return plan.few_rows ? sm80::attention_few_rows_general : sm80::attention_many_rows_general;
}

}  // namespace

bool sm80_handles(const AttentionArgs& args) {
  if (kind(args) != Kind::kSoftmax) return false;
  const bool head_dim =
      args.head_dim == 64 || args.head_dim == 80 || args.head_dim == 96 || args.head_dim == 128;
  return args.dtype != ScalarType::kFloat32 && head_dim &&
         args.scale >= FLT_MIN &&  // the maximum is taken of scores before scaling
         // With a soft cap products are multiplied by this quotient.
         (args.cap == 0.0f || std::isnormal(args.scale / args.cap)) &&
         rows_aligned(args.q, args.q_token_stride, args.q_head_stride) &&
         rows_aligned(args.k, args.k_token_stride, args.k_head_stride) &&
         rows_aligned(args.v, args.v_token_stride, args.v_head_stride) && is_aligned(args.out);
}

bool few_queries(const AttentionArgs& args, const Device& device) {
  return sm80::plan(args, device).few_queries();
}

int64_t sm80_workspace(const AttentionArgs& args, const Device& device) {
  const int pieces = sm80::plan(args, device).pieces;
  return pieces == 1 ? 0 : pieces_bytes(args, pieces);
}

void attention_partial_sm80(const AttentionArgs& args, void* workspace, cudaStream_t stream) {
  const sm80::Plan plan = sm80::plan(args, current_device());
  if (plan.pieces > 1 && workspace == nullptr) {
    // For example if another thread has just forced another kernel.
    throw std::invalid_argument("attention_partial on CUDA needs a workspace for this call");
  }
  float* partials = plan.pieces == 1 ? nullptr : static_cast<float*>(workspace);
  attention_of(args, plan)(args, plan.pieces, partials, stream);
  if (partials != nullptr) merge_pieces(args, partials, plan.pieces, stream);
}

}  // namespace cptool::cuda
