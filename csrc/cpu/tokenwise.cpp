// Which kernels of the token-wise steps run, and on how many threads.
#include "cpu/dispatch.h"
#include "cpu/pieces.h"
#include "cpu/tokenwise_dispatch.h"

namespace cptool::cpu {
namespace {

constexpr int64_t kPieceBytes = 1 << 16;

TokenwiseKernels kernels() {
#if defined(CPTOOL_HAS_AVX512)
  if (allows_isa("avx512")) return tokenwise_avx512();
#endif
#if defined(CPTOOL_HAS_AVX2)
  if (allows_isa("avx2")) return tokenwise_avx2();
#endif
  return tokenwise_portable();
}

}  // namespace

void rms_norm(const RmsNormArgs& args, int threads) {
  const TokenwiseKernels chosen = kernels();
  in_pieces(args.rows, 3 * args.width * size_of(args.dtype), kPieceBytes, 1, threads,
            [&](int64_t begin, int64_t end) { chosen.rms_norm(args, begin, end); });
}

void rotate(const RotateArgs& args, int threads) {
  const TokenwiseKernels chosen = kernels();
  in_pieces(args.tokens, 2 * args.num_heads * args.head_dim * size_of(args.dtype), kPieceBytes, 1,
            threads, [&](int64_t begin, int64_t end) { chosen.rotate(args, begin, end); });
}

void swiglu(const SwigluArgs& args, int threads) {
  const TokenwiseKernels chosen = kernels();
  in_pieces(args.rows, 3 * args.width * size_of(args.dtype), kPieceBytes, 1, threads,
            [&](int64_t begin, int64_t end) { chosen.swiglu(args, begin, end); });
}

}  // namespace cptool::cpu
