// The CUDA kernels. They queue their work on a stream of the current device and return without
// waiting for it.
//
// `stream` is a cudaStream_t as an integer, so that callers need no CUDA header. All pointers are
// to memory of the current device, except MergeArgs::outs and lses, which are host arrays of such
// pointers. Offsets and positions are in device memory and are not checked: wrong values give wrong
// results, but no access outside the tensors.
//
// Throws std::invalid_argument for sizes beyond a kernel's limits and std::runtime_error for an
// error of the CUDA runtime.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attention.h"
#include "tokenwise.h"

namespace cptool::cuda {

// Returns the bytes of device memory, aligned to 16, that attention_partial needs for a call of
// these shapes, strides and alignments. The content before and after the call does not matter.
// Calls that may run concurrently need one workspace each. A CUDA graph replays with the workspace
// with which it was captured.
int64_t attention_workspace(const AttentionArgs& args);
// head_dim: even, up to 256. `workspace`: null if none is needed.
void attention_partial(const AttentionArgs& args, uintptr_t workspace, uintptr_t stream);
void merge_partials(const MergeArgs& args, uintptr_t stream);

// widths and head_dim: multiples of 8.
void rms_norm(const RmsNormArgs& args, uintptr_t stream);
void rotate(const RotateArgs& args, uintptr_t stream);
void swiglu(const SwigluArgs& args, uintptr_t stream);

// Returns the attention kernels that are compiled in, slowest first, or only those of them that the
// current device runs.
std::vector<std::string> kernel_names(bool supported_only);
// Returns the kernel that runs such a call on the current device: the fastest that handles it.
const char* kernel_name(const AttentionArgs& args);
// Caps the choice at the kernel of this name; null lifts the cap. Returns false if it is not
// compiled in. On a device that does not support the kernel, slower ones run.
bool force_kernel(const char* name);

}  // namespace cptool::cuda
