#include "cpu/tokenwise_kernel.h"

namespace cptool::cpu {

TokenwiseKernels tokenwise_avx2() { return kernels_of_this_file(); }

}  // namespace cptool::cpu
