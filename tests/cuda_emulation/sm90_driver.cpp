// The kernel of csrc/cuda/sm90, emulated, which tests/cuda/test_sm90_emulation.py calls through
// ctypes.
#include <cstring>
#include <exception>
#include <string>

#include "attention.h"
#include "cuda/dispatch.h"
#include "cuda_runtime.h"

namespace cptool::cuda {

Device current_device() { return {90, static_cast<int>(emulation::options.multiprocessors)}; }

}  // namespace cptool::cuda

extern "C" {

void emulated_device(unsigned multiprocessors, unsigned l2_bytes) {
  emulation::options.multiprocessors = multiprocessors;
  emulation::options.l2_bytes = l2_bytes;
}

bool emulated_force(const char* kernel) {
  return kernel == nullptr || std::strcmp(kernel, "sm90") == 0;
}

// TMA stays within the tensor by itself.
void emulated_readable(const uint8_t* const*, int) {}

bool emulated_handles(const cptool::AttentionArgs* args) {
  return cptool::cuda::sm90_handles(*args);
}

const char* emulated_attention(const cptool::AttentionArgs* args, uint64_t seed) {
  static std::string message;
  alignas(16) int32_t workspace[4] = {-7, -7, -7, -7};
  emulation::options.seed = seed;
  if (!cptool::cuda::sm90_handles(*args)) return "the kernel does not take this call";
  try {
    if (args->q_tokens > 0) cptool::cuda::attention_partial_sm90(*args, workspace, nullptr);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
}
