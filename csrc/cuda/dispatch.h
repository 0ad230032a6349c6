// Which CUDA kernel runs.
//
// There is one family of kernels per step of compute capability, each in its own file or directory.
// All take the same arguments and compute the same partials. The first one handles every call and
// is the reference for the others.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "attention.h"

namespace cptool::cuda {

struct Device {
  int compute_capability;  // 10 major + minor; 0: no device
  int multiprocessors;
  int shared_bytes;  // shared memory of one multiprocessor
};

// Returns the current device of the calling thread. Its properties are queried once.
Device current_device();

struct Kernel {
  const char* name;
  int compute_capability;  // at least this
  int only_major;          // unless 0, exactly this major version
  bool (*handles)(const AttentionArgs& args, const Device& device);
  // Returns the bytes of device memory, aligned to 16, that a call of these shapes needs. Null:
  // none.
  int64_t (*workspace)(const AttentionArgs& args, const Device& device);
  void (*attention_partial)(const AttentionArgs& args, void* workspace, cudaStream_t stream);

  bool supported(const Device& device) const {
    return device.compute_capability >= compute_capability &&
           (only_major == 0 || device.compute_capability / 10 == only_major);
  }
};

void attention_partial_simt(const AttentionArgs& args, cudaStream_t stream);

// mma.sync and cp.async: 16-bit dtypes; few queries over many keys in pieces, through a workspace.
bool sm80_handles(const AttentionArgs& args);
int64_t sm80_workspace(const AttentionArgs& args, const Device& device);
void attention_partial_sm80(const AttentionArgs& args, void* workspace, cudaStream_t stream);
// Returns whether the call has few rows, or would leave most of the device idle without sm80's
// pieces.
bool few_queries(const AttentionArgs& args, const Device& device);

// TMA and wgmma, for compute capability 9.0 only; compiled in if CPTOOL_HAS_SM90 is defined.
bool sm90_handles(const AttentionArgs& args);
int64_t sm90_workspace(const AttentionArgs& args, const Device& device);
void attention_partial_sm90(const AttentionArgs& args, void* workspace, cudaStream_t stream);

}  // namespace cptool::cuda
