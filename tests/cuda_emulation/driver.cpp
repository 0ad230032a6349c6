// What tests/cuda_emulator.py calls through ctypes: the ops of csrc/cuda, emulated.
#include <exception>
#include <string>
#include <vector>

#include "attention.h"
#include "cuda/kernels.h"
#include "fibers.h"

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

// Null, or what went wrong.
const char* emulated_attention(const cptool::AttentionArgs* args, uint64_t seed) {
  emulation::options.seed = seed;
  return caught([&] { cptool::cuda::attention_partial(*args, 0); });
}

const char* emulated_merge(const cptool::MergeArgs* args, uint64_t seed) {
  emulation::options.seed = seed;
  return caught([&] { cptool::cuda::merge_partials(*args, 0); });
}

// Memory that cp.async may read from now on: `ranges` pairs of begin and end.
void emulated_readable(const uint8_t* const* ranges, int count) {
  emulation::readable.clear();
  for (int i = 0; i < count; ++i) {
    emulation::readable.push_back({ranges[2 * i], ranges[2 * i + 1]});
  }
}

// Counters since the last call.
void emulated_counters(emulation::Counters* counters) {
  *counters = emulation::counters;
  emulation::counters = {};
}
}
