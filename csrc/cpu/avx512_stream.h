// Attention of a few rows, as when decoding: each row of K and V is read once, as it lies, for all
// query rows, and nothing is packed; memory bandwidth is the limit. Unnamed namespace: see
// dispatch.h.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/avx512_panel.h"

namespace cptool::cpu {
namespace {

template <class T>
class StreamKernel {
 public:
  static constexpr int kRows = 8;
  static constexpr int kKeys = 128;

  static size_t scratch_bytes(const AttentionArgs& args) {
    return sizeof(Fixed) + (2 * kRows + kGroup) * args.head_dim * sizeof(float);
  }

  StreamKernel(const AttentionArgs& args, void* scratch)
      : args_(args),
        fixed_(*static_cast<Fixed*>(scratch)),
        q_(reinterpret_cast<float*>(static_cast<char*>(scratch) + sizeof(Fixed))),
        acc_(q_ + kRows * args.head_dim),
        wide_(acc_ + kRows * args.head_dim),
        scale_log2_(args.scale * kLog2E) {}

  void begin(const RowBlock<kRows>& block) {
    for (int row = 0; row < block.rows; ++row) {
      const T* from = static_cast<const T*>(block.q[row]);
      for (int64_t d = 0; d < args_.head_dim; d += kLanes) {
        _mm512_store_ps(q_ + row * args_.head_dim + d, load16(from + d));
      }
      fixed_.max[row] = kNoScore;
      fixed_.sum[row] = 0.0f;
    }
    std::memset(acc_, 0, block.rows * args_.head_dim * sizeof(float));
  }

  template <bool masked>
  void tile(const RowBlock<kRows>& block, int64_t key, int keys) {
    const T* k = static_cast<const T*>(block.k) + key * args_.k_token_stride;
    const T* v = static_cast<const T*>(block.v) + key * args_.v_token_stride;
    for (int first = 0; first < keys; first += kGroup) {
      const Group group =
          take(k + first * args_.k_token_stride, args_.k_token_stride, keys - first);
      for (int row = 0; row < block.rows; ++row) {
        _mm512_store_ps(fixed_.weights[row] + first, score(q_ + row * args_.head_dim, group));
      }
    }
    for (int row = 0; row < block.rows; ++row) {
      const int64_t left = block.limit[row] - key;
      weigh(row, masked && left < keys ? static_cast<int>(left < 0 ? 0 : left) : keys, keys);
    }
    for (int first = 0; first < keys; first += kGroup) {
      const Group group =
          take(v + first * args_.v_token_stride, args_.v_token_stride, keys - first);
      for (int row = 0; row < block.rows; ++row) {
        const float* weights = fixed_.weights[row] + first;
        float* acc = acc_ + row * args_.head_dim;
        int64_t d = 0;
        for (; d + 4 * kLanes <= args_.head_dim; d += 4 * kLanes)
          add_values<4>(group, weights, d, acc);
        for (; d < args_.head_dim; d += kLanes) add_values<1>(group, weights, d, acc);
      }
    }
  }

  void finish(const RowBlock<kRows>&) {}
  const float* acc(int row) const { return acc_ + row * args_.head_dim; }

  SoftmaxState state(int row) const {
    SoftmaxState state;
    if (fixed_.sum[row] != 0.0f) {
      state.max = fixed_.max[row] * kLn2;
      state.sum = fixed_.sum[row];
    }
    return state;
  }

 private:
  static constexpr int kGroup = kLanes;  // keys whose scores fill a vector
  static constexpr int kAhead = 48;      // keys between a read and its prefetch

  struct Fixed {
    alignas(64) float weights[kRows][kKeys];
    float max[kRows], sum[kRows];
  };

  // Up to 16 rows of K or V as float32.
  struct Group {
    const float* rows;
    int64_t stride;
    int count;
  };

  // Reads the first of `left` rows, at most 16.
  Group take(const T* from, int64_t stride, int left) {
    const int count = left < kGroup ? left : kGroup;
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int j = 0; j < count; ++j) {
      const T* row = from + j * stride;
      for (int64_t d = 0; d < args_.head_dim; d += kLine)
        _mm_prefetch(row + kAhead * stride + d, _MM_HINT_T0);
      if constexpr (!std::is_same_v<T, float>) {
        for (int64_t d = 0; d < args_.head_dim; d += kLanes) {
          _mm512_store_ps(wide_ + j * args_.head_dim + d, load16(row + d));
        }
      }
    }
    if constexpr (std::is_same_v<T, float>) return {from, stride, count};
    return {wide_, args_.head_dim, count};
  }

  // The products of one query with 16 keys; the last key stands in for those that the group lacks.
  __m512 score(const float* q, const Group& group) const {
    __m512 sums[kGroup];
#pragma GCC unroll 4
    for (int first = 0; first < kGroup; first += 4) {
      const float* k[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int j = first + i < group.count ? first + i : group.count - 1;
        k[i] = group.rows + j * group.stride;
        sums[first + i] = _mm512_setzero_ps();
      }
      for (int64_t d = 0; d < args_.head_dim; d += kLanes) {
        const __m512 query = _mm512_load_ps(q + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          sums[first + i] = _mm512_fmadd_ps(query, _mm512_loadu_ps(k[i] + d), sums[first + i]);
        }
      }
    }
    return sum_each(sums);
  }

  // Turns a row's scores into weights, 0 from `visible` on, and rescales what the row has so far.
  void weigh(int row, int visible, int keys) {
    float* weights = fixed_.weights[row];
    const __m512 scale = _mm512_set1_ps(scale_log2_);
    auto mask = [&](int j) {
      return _mm512_cmpgt_epi32_mask(
          _mm512_set1_epi32(visible - j),
          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    };
    __m512 top = _mm512_set1_ps(fixed_.max[row]);
    for (int j = 0; j < keys; j += kLanes) {
      const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(weights + j), scale);
      top = _mm512_mask_max_ps(top, mask(j), top, scaled);
    }
    const float max = _mm512_reduce_max_ps(top);
    const float keep = _mm512_cvtss_f32(exp2_full(_mm512_set1_ps(fixed_.max[row] - max)));
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < keys; j += kLanes) {
      const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(weights + j), scale, _mm512_set1_ps(max));
      const __m512 weight = _mm512_maskz_mov_ps(mask(j), exp2_full(x));
      sum = _mm512_add_ps(sum, weight);
      _mm512_store_ps(weights + j, weight);
    }
    fixed_.sum[row] = fixed_.sum[row] * keep + _mm512_reduce_add_ps(sum);
    fixed_.max[row] = max;
    if (keep == 1.0f) return;
    float* acc = acc_ + row * args_.head_dim;
    for (int64_t d = 0; d < args_.head_dim; d += kLanes) {
      _mm512_store_ps(acc + d, _mm512_mul_ps(_mm512_load_ps(acc + d), _mm512_set1_ps(keep)));
    }
  }

  // Adds 16 kN dimensions of the group's weighted values.
  template <int kN>
  void add_values(const Group& group, const float* weights, int64_t d, float* acc) const {
    __m512 sums[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) sums[n] = _mm512_load_ps(acc + d + n * kLanes);
    for (int j = 0; j < group.count; ++j) {
      const __m512 weight = _mm512_set1_ps(weights[j]);
      const float* value = group.rows + j * group.stride + d;
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n)
        sums[n] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(value + n * kLanes), sums[n]);
    }
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) _mm512_store_ps(acc + d + n * kLanes, sums[n]);
  }

  FlushSubnormals flush_;
  const AttentionArgs& args_;
  Fixed& fixed_;
  float* q_;     // [kRows][head_dim]
  float* acc_;   // [kRows][head_dim]
  float* wide_;  // [kGroup][head_dim]: the group at hand, widened
  float scale_log2_;
};

// Whether no sequence has more rows per KV head than the streaming kernel takes at once.
inline bool few_rows(const AttentionArgs& args) {
  const int64_t group = args.q_heads / args.kv_heads;
  for (int64_t b = 0; b < args.batch; ++b) {
    if ((args.cu_q[b + 1] - args.cu_q[b]) * group > StreamKernel<float>::kRows) return false;
  }
  return true;
}

}  // namespace
}  // namespace cptool::cpu
