// Divides the token-wise steps over threads (tokenwise_kernel.h).
#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "cpu/pieces.h"

namespace cptool::cpu {
namespace {

constexpr int64_t kPieceBytes = 1 << 16;

}  // namespace

void rms_norm(const RmsNormArgs& args, int threads) {
  const TokenwiseKernels& kernels = tokenwise_isa().tokenwise;
  in_pieces(args.rows, 3 * args.width * size_of(args.dtype), kPieceBytes, 1, threads,
            [&](int64_t begin, int64_t end) { kernels.rms_norm(args, begin, end); });
}

void rotate(const RotateArgs& args, int threads) {
  const TokenwiseKernels& kernels = tokenwise_isa().tokenwise;
  in_pieces(args.tokens, 2 * args.num_heads * args.head_dim * size_of(args.dtype), kPieceBytes, 1,
            threads, [&](int64_t begin, int64_t end) { kernels.rotate(args, begin, end); });
}

void swiglu(const SwigluArgs& args, int threads) {
  const TokenwiseKernels& kernels = tokenwise_isa().tokenwise;
  in_pieces(args.rows, 3 * args.width * size_of(args.dtype), kPieceBytes, 1, threads,
            [&](int64_t begin, int64_t end) { kernels.swiglu(args, begin, end); });
}

}  // namespace cptool::cpu
