// Replaces CUDA's header for g++: qualifiers, built-in variables, warp functions and the few
// runtime calls that the kernels' files make.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

#define threadIdx (::emulation::current->thread)
#define blockIdx (::emulation::current->block->index)
#define gridDim (::emulation::grid_size)
#define blockDim (::emulation::block_size)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using std::max;
using std::min;

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline void __syncthreads() {
  emulation::barrier(0, static_cast<int>(emulation::current->block->threads), true);
}

namespace emulation {

template <class T>
struct Shuffle {
  T value;
  int from;
  T got;

  static void run(void* const* lanes) {
    for (int i = 0; i < kWarp; ++i) {
      Shuffle* mine = static_cast<Shuffle*>(lanes[i]);
      if (mine == nullptr) continue;
      const Shuffle* other = static_cast<const Shuffle*>(lanes[mine->from]);
      mine->got = other == nullptr ? T{} : other->value;
    }
  }
};

template <class T>
T shuffle(unsigned mask, T value, int from, const char* name) {
  if (!(mask >> from & 1)) fail(std::string(name) + ": reads a lane outside the mask");
  Shuffle<T> mine = {value, from, T{}};
  warp_collective(mask, Shuffle<T>::run, &mine, name);
  return mine.got;
}

struct Ballot {
  bool vote;
  unsigned got;

  static void run(void* const* lanes) {
    unsigned votes = 0;
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[i] != nullptr && static_cast<Ballot*>(lanes[i])->vote) votes |= 1u << i;
    }
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[i] != nullptr) static_cast<Ballot*>(lanes[i])->got = votes;
    }
  }
};

struct Meeting {
  static void run(void* const* lanes) {
    uint32_t mask = 0;
    for (int i = 0; i < kWarp; ++i) mask |= static_cast<uint32_t>(lanes[i] != nullptr) << i;
    meet(mask);
  }
};

}  // namespace emulation

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  char nothing;
  emulation::warp_collective(mask, emulation::Meeting::run, &nothing, "__syncwarp");
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const int segment = emulation::current->lane & ~(width - 1);
  return emulation::shuffle(mask, value, segment + (lane & (width - 1)), "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = emulation::current->lane;
  const int from = lane ^ lanes;
  const bool held = (from & ~(width - 1)) <= (lane & ~(width - 1));
  return emulation::shuffle(mask, value, held ? from : lane, "__shfl_xor_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int lane = emulation::current->lane;
  const int from = lane + static_cast<int>(lanes);
  const bool held = from <= (lane | (width - 1));
  return emulation::shuffle(mask, value, held ? from : lane, "__shfl_down_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int lane = emulation::current->lane;
  const int from = lane - static_cast<int>(lanes);
  const bool held = from >= (lane & ~(width - 1));
  return emulation::shuffle(mask, value, held ? from : lane, "__shfl_up_sync");
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  emulation::Ballot mine = {vote, 0};
  emulation::warp_collective(mask, emulation::Ballot::run, &mine, "__ballot_sync");
  return mine.got;
}
inline bool __any_sync(unsigned mask, bool vote) {
  const bool any = __ballot_sync(mask, vote) != 0;
  emulation::counters.votes_won += any;
  return any;
}
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, !vote) == 0; }

// One CPU thread runs everything, so every operation is atomic and visible to all threads. Atomics
// are no races.
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
UNREPORTED T atomicAdd(T* to, T value) {
  const T old = *to;
  *to = old + value;
  return old;
}
template <class T>
UNREPORTED T atomicExch(T* to, T value) {
  const T old = *to;
  *to = value;
  return old;
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}

// The runtime.

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrL2CacheSize,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};

inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = static_cast<int>(emulation::options.multiprocessors);
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 164 * 1024;
      break;
    case cudaDevAttrL2CacheSize:
      *value = static_cast<int>(emulation::options.l2_bytes);
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulation::options.compute_capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emulation::options.compute_capability % 10;
      break;
  }
  return cudaSuccess;
}
