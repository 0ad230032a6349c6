// Divides a product of many rows with a matrix over threads (product_kernel.h).
#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "cpu/pieces.h"

namespace cptool::cpu {
namespace {

constexpr int64_t kPiecesOfThread = 4;

int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void product(const StoredLinearArgs& args, int threads) {
  const Isa* const isa = product_isa();
  if (isa == nullptr) throw std::invalid_argument("no kernel for many rows is in use");
  const ProductKernel& kernel = isa->product;
  if (args.rows == 0 || args.w.rows == 0) return;
  // A piece's columns are packed for its rows alone, and its rows for its columns alone.
  const int64_t wanted = threads == 1 ? 1 : kPiecesOfThread * threads;
  const int64_t least = kernel.least_columns;
  int64_t columns = ceiling(ceiling(args.w.rows, wanted), least) * least;
  columns = std::min<int64_t>(columns, kernel.most_columns);
  const int64_t across = std::max<int64_t>(1, ceiling(args.w.rows, columns));
  int64_t rows = std::max(ceiling(args.rows, ceiling(wanted, across)), kernel.least_rows);
  rows = ceiling(rows, kernel.row_grain) * kernel.row_grain;
  rows = std::min(rows, kernel.most_rows);
  const int64_t pieces = across * ceiling(args.rows, rows);
  const int64_t bytes = 4 * args.w.depth * std::min(rows, args.rows);  // of x: work enough to share
  in_pieces(pieces, bytes, bytes, 1, threads, [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(kernel.scratch_bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * rows, column = i % across * columns;
      kernel.compute(
          args,
          {row, std::min(rows, args.rows - row), column, std::min(columns, args.w.rows - column)},
          scratch);
    }
  });
}

}  // namespace cptool::cpu
