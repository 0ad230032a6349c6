#include "cuda/sm80/kernel.h"

namespace cptool::cuda::sm80 {

void attention_many_rows(const AttentionArgs& args, int pieces, float* partials,
                         cudaStream_t stream) {
  launch_shape<ManyRows, true>(args, pieces, partials, stream);
}

}  // namespace cptool::cuda::sm80
