// The emulated operations of csrc/cuda, which tests/helpers/cuda_emulator.py calls through ctypes.
#include <exception>
#include <string>
#include <vector>

#include "attention.h"
#include "cuda/kernels.h"
#include "cuda_runtime.h"
#include "fibers.h"
#include "results.h"

namespace {

std::string message;

template <class Run>
const char* caught(Run run) {
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" {

// Caps the kernel of later calls.
bool emulated_force(const char* kernel) { return cptool::cuda::force_kernel(kernel); }

// Returns the kernel that would run the call.
const char* emulated_kernel(const cptool::AttentionArgs* args) {
  return cptool::cuda::kernel_name(*args);
}

// Whether later calls look for races.
void emulated_races(bool look) { emulation::options.races = look; }

// Has a library of tests/helpers/planted.py make one of its mistakes.
void emulated_mistake(int mistake) { emulation::options.mistake = mistake; }

// Returns null or an error message.
const char* emulated_attention(const cptool::AttentionArgs* args, uint64_t seed,
                               bool with_workspace) {
  emulation::options.seed = seed;
  return caught([&] {
    // Aligned like torch's allocations, and filled with NaN.
    const int64_t bytes = cptool::cuda::attention_workspace(*args);
    std::vector<float4> workspace(bytes / 16 + 1, float4{NAN, NAN, NAN, NAN});
    const uintptr_t address = reinterpret_cast<uintptr_t>(workspace.data());
    emulation::watch_results(*args, workspace.data(), bytes);
    cptool::cuda::attention_partial(*args, with_workspace ? address : 0, 0);
  });
}

const char* emulated_merge(const cptool::MergeArgs* args, uint64_t seed) {
  emulation::options.seed = seed;
  emulation::watch_results(*args);
  return caught([&] { cptool::cuda::merge_partials(*args, 0); });
}

// Memory that cp.async may read from now on: `ranges` pairs of begin and end.
void emulated_readable(const uint8_t* const* ranges, int count) {
  emulation::readable.clear();
  for (int i = 0; i < count; ++i) {
    emulation::readable.push_back({ranges[2 * i], ranges[2 * i + 1]});
  }
}

// Returns the counters since the last call.
void emulated_counters(emulation::Counters* counters) {
  *counters = emulation::counters;
  emulation::counters = {};
}
}
