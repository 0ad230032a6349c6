#include "cpu/few_rows_kernel.h"

namespace cptool::cpu {

FewRowsKernel few_rows_avx2() { return kernel_of_this_file(); }

}  // namespace cptool::cpu
