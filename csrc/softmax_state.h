// How partial softmax results are merged, in every kernel on every device: they are a monoid.
//
// Over a set of keys with scores s_j a kernel holds max >= max_j s_j, sum = sum_j exp(s_j - max)
// and the vector acc = sum_j exp(s_j - max) v_j. The union of two disjoint sets is merge(); the
// empty set is the identity. Everything is in natural units: a kernel that works with exp2 converts
// its maximum (max = max2 * ln 2) before it makes a state.
//
// The unnamed namespace is deliberate: see cpu/isa.h.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define CPTOOL_HOST_DEVICE __host__ __device__
#else
#define CPTOOL_HOST_DEVICE
#endif

namespace cptool {
namespace {

struct SoftmaxState {
  float max = -INFINITY;
  float sum = 0.0f;

  // Returns the state of a finished partial, whose out is acc / sum.
  static CPTOOL_HOST_DEVICE inline SoftmaxState of_lse(float lse) {
    SoftmaxState state;
    state.max = lse;
    state.sum = lse == -INFINITY ? 0.0f : 1.0f;
    return state;
  }

  CPTOOL_HOST_DEVICE inline bool empty() const { return sum == 0.0f; }

  CPTOOL_HOST_DEVICE inline float lse() const { return empty() ? -INFINITY : max + logf(sum); }

  // Adds `other`. The caller then sets acc = acc * keep + other.acc * add.
  CPTOOL_HOST_DEVICE inline void merge(const SoftmaxState& other, float& keep, float& add) {
    const float larger = max > other.max ? max : other.max;
    const float base = larger == -INFINITY ? 0.0f : larger;  // -inf - -inf would be NaN
    keep = expf(max - base);
    add = expf(other.max - base);
    sum = sum * keep + other.sum * add;
    max = larger;
  }
};

}  // namespace
}  // namespace cptool
