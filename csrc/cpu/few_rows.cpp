// Which kernel multiplies few rows, and on how many threads.
#include "cpu/few_rows.h"

#include "cpu/dispatch.h"
#include "cpu/pieces.h"

namespace cptool::cpu {
namespace {

// Four streams of 32 KB; see few_rows_kernel.h.
constexpr int64_t kPieceBytes = 1 << 17;

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
  // The caller's scratch, read by all threads until the call has ended.
  void* packed = thread_scratch(std::max<size_t>(kernel.packed_bytes(args), 1));
  kernel.pack(args, packed);
  in_pieces(args.columns, args.depth * size_of(args.dtype), kPieceBytes, 4, threads,
            [&](int64_t begin, int64_t end) { kernel.columns(args, packed, begin, end); });
}

}  // namespace cptool::cpu
