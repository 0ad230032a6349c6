// The instruction set of last resort: the compiler's baseline.
#include "cpu/few_rows_kernel.h"
#include "cpu/isa.h"
#include "cpu/merge_kernel.h"
#include "cpu/portable_kernel.h"
#include "cpu/silu.h"
#include "cpu/stored_kernel.h"
#include "cpu/tokenwise_kernel.h"

namespace cptool::cpu {
namespace {

bool supported() { return true; }
bool handles(ScalarType, ScalarType, int64_t) { return true; }

}  // namespace

extern constexpr Isa isa_portable = {
    "portable",
    supported,
    {handles, run_portable_kernel<Kind::kSoftmax>, nullptr, silu_portable},
    run_merge_kernel,
    kFewRows,
    kTokenwise,
    kStored};

}  // namespace cptool::cpu
