#include "cpu/tokenwise_kernel.h"

namespace cptool::cpu {

TokenwiseKernels tokenwise_portable() { return kernels_of_this_file(); }

}  // namespace cptool::cpu
