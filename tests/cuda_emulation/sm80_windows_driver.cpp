// The kernels of csrc/cuda/sm80 with windows and soft caps, emulated, which
// tests/cuda/test_sm80_windows.py calls through ctypes.
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"
#include "cuda/dispatch.h"
#include "cuda/merge.h"
#include "cuda/sm80/plan.h"
#include "cuda_runtime.h"

namespace cptool::cuda {

Device current_device() {
  return {80, static_cast<int>(emulation::options.multiprocessors), 164 * 1024};
}

// The plain kernels, which are not part of this library.
namespace sm80 {
void attention_few_rows(const AttentionArgs&, int, float*, cudaStream_t) {
  throw std::runtime_error("a plain call");
}
void attention_many_rows(const AttentionArgs&, int, float*, cudaStream_t) {
  throw std::runtime_error("a plain call");
}
}  // namespace sm80

}  // namespace cptool::cuda

extern "C" {

void emulated_device(unsigned multiprocessors) {
  emulation::options.multiprocessors = multiprocessors;
}

// Has the library make one of the mistakes of tests/helpers/planted_windows.py.
void emulated_mistake(int mistake) { emulation::options.mistake = mistake; }

bool emulated_force(const char* kernel) { return kernel == nullptr; }

// Memory that cp.async may read from now on: `ranges` pairs of begin and end.
void emulated_readable(const uint8_t* const* ranges, int count) {
  emulation::readable.clear();
  for (int i = 0; i < count; ++i) {
    emulation::readable.push_back({ranges[2 * i], ranges[2 * i + 1]});
  }
}

// What the launches since the last call did.
void emulated_counters(emulation::Counters* counters) {
  *counters = emulation::counters;
  emulation::counters = {};
}

// Returns how many pieces of keys the call is computed in.
int emulated_pieces(const cptool::AttentionArgs* args) {
  return cptool::cuda::sm80::plan(*args, cptool::cuda::current_device()).pieces;
}

const char* emulated_attention(const cptool::AttentionArgs* args, uint64_t seed) {
  static std::string message;
  emulation::options.seed = seed;
  if (!cptool::cuda::sm80_handles(*args)) return "the kernel does not take this call";
  const int64_t bytes = cptool::cuda::sm80_workspace(*args, cptool::cuda::current_device());
  std::vector<float4> workspace(bytes / 16 + 1, float4{NAN, NAN, NAN, NAN});
  try {
    cptool::cuda::attention_partial_sm80(*args, workspace.data(), nullptr);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
}
