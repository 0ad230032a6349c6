#include "cpu/few_rows_kernel.h"

namespace cptool::cpu {

FewRowsKernel few_rows_avx512() { return kernel_of_this_file(); }

}  // namespace cptool::cpu
