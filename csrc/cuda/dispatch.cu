#include "cuda/dispatch.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/device.h"
#include "cuda/kernels.h"

namespace cptool::cuda {
namespace {

constexpr Kernel kKernels[] = {
    {"simt", 0, 0, [](const AttentionArgs&, const Device&) { return true; }, nullptr,
     [](const AttentionArgs& args, void*, cudaStream_t stream) {
       attention_partial_simt(args, stream);
     }},
    {"sm80", 80, 0, [](const AttentionArgs& args, const Device&) { return sm80_handles(args); },
     sm80_workspace, attention_partial_sm80},
#if defined(CPTOOL_HAS_SM90)
    // Only compute capability 9.x has wgmma. Its tiles are for many queries.
    {"sm90", 90, 9,
     [](const AttentionArgs& args, const Device& device) {
       return sm90_handles(args) && !(sm80_handles(args) && few_queries(args, device));
     },
     sm90_workspace, attention_partial_sm90},
#endif
};
constexpr int kKernelCount = sizeof(kKernels) / sizeof(kKernels[0]);

std::atomic<int> last_allowed{kKernelCount - 1};

// Returns the kernel for the call, at most the forced one. The choice depends on shapes, strides,
// addresses and the device, never on the content of device memory.
const Kernel* select_kernel(const AttentionArgs& args, const Device& device) {
  const Kernel* last = kKernels + last_allowed.load(std::memory_order_relaxed);
  const Kernel* found = kKernels;
  for (const Kernel& kernel : kKernels) {
    if (&kernel <= last && kernel.supported(device) && kernel.handles(args, device))
      found = &kernel;
  }
  return found;
}

void check_arguments(const AttentionArgs& args) {
  if (args.head_dim % 2 != 0 || args.head_dim <= 0 || args.head_dim > 256) {
    throw std::invalid_argument("head_dim is " + std::to_string(args.head_dim) +
                                "; CUDA takes even ones from 2 to 256");
  }
  if (args.q_tokens > 0 && args.batch < 1) {
    throw std::invalid_argument("q has tokens, but cu_q has no sequence that they could belong to");
  }
}

}  // namespace

Device current_device() {
  constexpr int kRemembered = 64;
  static std::atomic<uint64_t> remembered[kRemembered];  // 0: not queried yet
  int device;
  if (cudaGetDevice(&device) != cudaSuccess) return {};
  if (device < kRemembered) {
    if (const uint64_t known = remembered[device].load(std::memory_order_relaxed)) {
      return {static_cast<int>(known & 0xffff), static_cast<int>(known >> 16 & 0xffff),
              static_cast<int>(known >> 32)};
    }
  }
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "attention_partial");
    return value;
  };
  const Device found = {
      10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor),
      ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  if (device < kRemembered) {
    remembered[device].store(static_cast<uint64_t>(found.shared_bytes) << 32 |
                                 static_cast<uint64_t>(found.multiprocessors) << 16 |
                                 static_cast<uint64_t>(found.compute_capability),
                             std::memory_order_relaxed);
  }
  return found;
}

std::vector<std::string> kernel_names(bool supported_only) {
  const Device device = supported_only ? current_device() : Device{};
  std::vector<std::string> names;
  for (const Kernel& kernel : kKernels) {
    if (!supported_only || (device.compute_capability > 0 && kernel.supported(device))) {
      names.push_back(kernel.name);
    }
  }
  return names;
}

const char* kernel_name(const AttentionArgs& args) {
  return select_kernel(args, current_device())->name;
}

bool force_kernel(const char* name) {
  if (name == nullptr) {
    last_allowed = kKernelCount - 1;
    return true;
  }
  for (int i = 0; i < kKernelCount; ++i) {
    if (std::strcmp(kKernels[i].name, name) == 0) {
      last_allowed = i;
      return true;
    }
  }
  return false;
}

int64_t attention_workspace(const AttentionArgs& args) {
  check_arguments(args);
  if (args.q_tokens == 0) return 0;
  const Device device = current_device();
  const Kernel* kernel = select_kernel(args, device);
  return kernel->workspace == nullptr ? 0 : kernel->workspace(args, device);
}

void attention_partial(const AttentionArgs& args, uintptr_t workspace, uintptr_t stream) {
  check_arguments(args);
  if (args.q_tokens == 0) return;
  select_kernel(args, current_device())
      ->attention_partial(args, reinterpret_cast<void*>(workspace),
                          reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace cptool::cuda
