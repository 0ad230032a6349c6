// Which CUDA kernel runs.
//
// A kernel family for every step of compute capability, in a file or directory of its own. All take
// the same arguments and compute the same partials; the first one takes every call and is what the
// others are held against.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "attention.h"

namespace cptool::cuda {

struct Device {
  int compute_capability;  // 10 major + minor; 0: no device
  int multiprocessors;
  int shared_bytes;  // of shared memory, of a multiprocessor
};

// Of the calling thread; its properties are asked for once.
Device current_device();

struct Kernel {
  const char* name;
  int compute_capability;  // at least this
  int only_major;          // and, unless 0, of this major version
  bool (*handles)(const AttentionArgs& args, const Device& device);
  // Bytes of device memory, aligned to 16, that a call of these shapes needs. Null: none.
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
// Whether the call has few rows, or would leave most of the device idle but for sm80's pieces.
bool few_queries(const AttentionArgs& args, const Device& device);

// TMA and wgmma, of compute capability 9.0 alone; compiled in where CPTOOL_HAS_SM90 is defined.
bool sm90_handles(const AttentionArgs& args);
int64_t sm90_workspace(const AttentionArgs& args, const Device& device);
void attention_partial_sm90(const AttentionArgs& args, void* workspace, cudaStream_t stream);

}  // namespace cptool::cuda
