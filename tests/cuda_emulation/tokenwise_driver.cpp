// csrc/cuda/tokenwise.cu, emulated, which tests/cuda/test_cuda_tokenwise.py calls through ctypes.
#include <exception>
#include <string>

#include "cuda/kernels.h"
#include "cuda_runtime.h"
#include "fibers.h"

namespace {

std::string message;

// Returns null or an error message.
template <class Args>
const char* caught(void (*run)(const Args&, uintptr_t), const Args* args, uint64_t seed) {
  emulation::options.seed = seed;
  try {
    run(*args, 0);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" {

const char* emulated_rms_norm(const cptool::RmsNormArgs* args, uint64_t seed) {
  return caught(cptool::cuda::rms_norm, args, seed);
}

const char* emulated_rotate(const cptool::RotateArgs* args, uint64_t seed) {
  return caught(cptool::cuda::rotate, args, seed);
}

const char* emulated_swiglu(const cptool::SwigluArgs* args, uint64_t seed) {
  return caught(cptool::cuda::swiglu, args, seed);
}
}
