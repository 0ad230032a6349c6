// The kernel of csrc/cuda/sm90, emulated, which tests/cuda/test_sm90_emulation.py calls through
// ctypes.
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "attention.h"
#include "cuda/dispatch.h"
#include "cuda/merge.h"
#include "cuda_runtime.h"
#include "results.h"

namespace cptool::cuda {

Device current_device() { return {90, static_cast<int>(emulation::options.multiprocessors)}; }

}  // namespace cptool::cuda

extern "C" {

void emulated_device(unsigned multiprocessors, unsigned l2_bytes) {
  emulation::options.multiprocessors = multiprocessors;
  emulation::options.l2_bytes = l2_bytes;
}

// Whether later calls look for races.
void emulated_races(bool look) { emulation::options.races = look; }

// Has a library of tests/helpers/planted.py make one of its mistakes.
void emulated_mistake(int mistake) { emulation::options.mistake = mistake; }

bool emulated_force(const char* kernel) {
  return kernel == nullptr || std::strcmp(kernel, "sm90") == 0;
}

// TMA stays within the tensor by itself.
void emulated_readable(const uint8_t* const*, int) {}

bool emulated_handles(const cptool::AttentionArgs* args) {
  return cptool::cuda::sm90_handles(*args);
}

// What the launches since the last call did.
void emulated_counters(emulation::Counters* counters) {
  *counters = emulation::counters;
  emulation::counters = {};
}

// Returns how many pieces of keys the call would be computed in.
int emulated_pieces(const cptool::AttentionArgs* args) {
  const int64_t bytes = cptool::cuda::sm90_workspace(*args, cptool::cuda::current_device()) - 16;
  return bytes == 0 ? 1 : static_cast<int>(bytes / cptool::cuda::pieces_bytes(*args, 1));
}

const char* emulated_attention(const cptool::AttentionArgs* args, uint64_t seed) {
  static std::string message;
  const int64_t bytes = cptool::cuda::sm90_workspace(*args, cptool::cuda::current_device());
  std::vector<float4> workspace(bytes / 16 + 1, float4{NAN, NAN, NAN, NAN});
  emulation::options.seed = seed;
  emulation::watch_results(*args, workspace.data(), bytes);
  if (!cptool::cuda::sm90_handles(*args)) return "the kernel does not take this call";
  try {
    if (args->q_tokens > 0) cptool::cuda::attention_partial_sm90(*args, workspace.data(), nullptr);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
}
