#include "cpu/few_rows_kernel.h"

namespace cptool::cpu {

FewRowsKernel few_rows_avx512bf16() {
  using Kernel = FewRows<Pairs, BFloat16>;
  return {Kernel::packed_row_bytes, Kernel::pack, Kernel::columns};
}

}  // namespace cptool::cpu
