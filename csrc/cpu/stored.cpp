// Divides products with stored weights, and widening, over threads (stored_kernel.h).
#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "cpu/pieces.h"

namespace cptool::cpu {
namespace {

// As in few_rows.cpp: one thread reads four long streams, several take pieces.
constexpr int64_t kPieceBytes = 1 << 16;
constexpr int64_t kPiecesOfThread = 4;

}  // namespace

void stored_linear(const StoredLinearArgs& args, int threads) {
  const StoredKernels& kernels = stored_isa(args.w.encoding).stored;
  void* packed = thread_scratch(static_cast<size_t>(kernels.packed_bytes(args)));
  kernels.pack(args, packed);
  const int64_t bytes = args.w.rows * args.w.stride;
  const int64_t piece =
      threads == 1 ? bytes : std::max(bytes / (kPiecesOfThread * threads), kPieceBytes);
  in_pieces(args.w.rows, args.w.stride, piece, 4, threads,
            [&](int64_t begin, int64_t end) { kernels.columns(args, packed, begin, end); });
}

void widen(const WidenArgs& args, int threads) {
  const StoredKernels& kernels = widen_isa().stored;
  const int64_t row_bytes = args.w.stride + 4 * args.w.depth;
  in_pieces(args.count, row_bytes, kPieceBytes, 1, threads,
            [&](int64_t begin, int64_t end) { kernels.widen(args, begin, end); });
}

}  // namespace cptool::cpu
