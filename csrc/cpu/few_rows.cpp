// Which kernel multiplies few rows, and on how many threads.
#include "cpu/few_rows.h"

#include "cpu/dispatch.h"
#include "cpu/pieces.h"

namespace cptool::cpu {
namespace {

// One thread reads the whole as four streams (few_rows_kernel.h), each as long as can be: streams
// of 32 KB were measured at 81% of a plain read's rate, of 256 KB at 87%, of a quarter of 11 MB at
// 94%. Several threads take pieces, so that all end together, but no smaller ones than this much
// time.
constexpr int64_t kPieceBytes = 1 << 17;
constexpr int64_t kPiecesOfThread = 4;
// Rows are taken in blocks whose packed x leaves room in a level-2 cache, full groups of any
// kernel.
constexpr int64_t kPackedBytes = 1 << 19;
constexpr int64_t kGroups = 12;

struct Choice {
  const char* isa;
  FewRowsKernel (*kernel)();
};

Choice choose([[maybe_unused]] ScalarType dtype) {
#if defined(CPTOOL_HAS_AVX512BF16)
  if (dtype == ScalarType::kBFloat16 && allows_isa("avx512bf16")) {
    return {"avx512bf16", few_rows_avx512bf16};
  }
#endif
#if defined(CPTOOL_HAS_AVX512)
  if (allows_isa("avx512")) return {"avx512", few_rows_avx512};
#endif
#if defined(CPTOOL_HAS_AVX2)
  if (allows_isa("avx2")) return {"avx2", few_rows_avx2};
#endif
  return {"portable", few_rows_portable};
}

}  // namespace

const char* linear_isa(ScalarType dtype) { return choose(dtype).isa; }

void linear(const LinearArgs& args, int threads) {
  const FewRowsKernel kernel = choose(args.dtype).kernel();
  const int64_t row_bytes = std::max<int64_t>(kernel.packed_row_bytes(args), 1);
  const int64_t block = std::max<int64_t>(kPackedBytes / row_bytes / kGroups, 1) * kGroups;
  // The caller's scratch, read by all threads until the block has ended.
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
