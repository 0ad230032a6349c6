// Divides a product of few rows with a matrix over threads (few_rows_kernel.h).
#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "cpu/pieces.h"

namespace cptool::cpu {
namespace {

// One thread reads the whole matrix as four streams (few_rows_kernel.h), which should be long:
// streams of 32 KB were measured at 81% of the rate of a plain read, of 256 KB at 87%, of a quarter
// of 11 MB at 94%. Several threads take pieces, so that all finish at the same time. kPieceBytes is
// the least size of a piece of up to four rows; with more rows a byte takes longer, and pieces may
// be smaller.
constexpr int64_t kPieceBytes = 1 << 17;
constexpr int64_t kPiecesOfThread = 4;
// Rows are computed in blocks of a multiple of kGroups, which any kernel divides into full groups,
// whose packed x leaves room in a level-2 cache.
constexpr int64_t kPackedBytes = 1 << 19;
constexpr int64_t kGroups = 12;

}  // namespace

void linear(const LinearArgs& args, int threads) {
  const FewRowsKernel& kernel = few_rows_isa(args.dtype).few_rows;
  const int64_t row_bytes = std::max<int64_t>(kernel.packed_row_bytes(args), 1);
  const int64_t block = std::max<int64_t>(kPackedBytes / row_bytes / kGroups, 1) * kGroups;
  // The scratch of the calling thread, which all threads read until the block is done.
  void* packed = thread_scratch(static_cast<size_t>(std::min(block, args.rows) * row_bytes));
  for (int64_t row = 0; row < args.rows; row += block) {
    LinearArgs part = args;
    part.x = static_cast<const char*>(args.x) + row * args.x_stride * size_of(args.dtype);
    part.out = static_cast<char*>(args.out) + row * args.columns * size_of(args.dtype);
    part.rows = std::min(block, args.rows - row);
    kernel.pack(part, packed);
    const int64_t w_bytes = args.columns * args.depth * size_of(args.dtype);
    const int64_t piece = threads == 1
                              ? w_bytes
                              : std::max(w_bytes / (kPiecesOfThread * threads),
                                         kPieceBytes * 4 / std::max<int64_t>(part.rows, 4));
    in_pieces(args.columns, args.depth * size_of(args.dtype), piece, 4, threads,
              [&](int64_t begin, int64_t end) { kernel.columns(part, packed, begin, end); });
  }
}

}  // namespace cptool::cpu
