// Attention of many rows with AVX-512, register-blocked, in the arithmetic that `Math` names.
//
// Both products work on words of 32 bits, which hold Math::kStep elements that are multiplied and
// added together: one float32, or two bfloat16. A register tile of a product is 8 keys (or 8
// dimensions) by 48 rows in 24 accumulators: 3 vector loads and 8 broadcasts for 24 instructions,
// so that the multipliers are the limit. The scores of a strip of keys become weights in place; the
// weights of a whole tile of keys are then multiplied with its values, so that an accumulator is
// loaded and stored once per tile.
//
// What a vector of 16 scores costs on the two ports that multiply: 2 head_dim / kStep for the
// products (at head_dim 128: 256 in float32, 128 in bfloat16); for its softmax 8 in float32 and 5.5
// in bfloat16 (maximum, scale, polynomial, half a dot product for the sum), 3% and 4% (at
// head_dim 64: twice that). Conversions, additions and powers go to the other two ports.
//
// Unnamed namespace: see isa.h.
#pragma once

#include <cstring>

#include "cpu/avx512_panel.h"
#include "cpu/avx512_panel_pack.h"

namespace cptool::cpu {
namespace {

constexpr int kVectors = 3;  // vectors of rows of a register tile
constexpr int kPanel = kVectors * kLanes;

template <class Math>
class PanelKernel {
  using T = typename Math::Input;
  static constexpr int kStep = Math::kStep;
  static constexpr int kStrip = 32;  // keys whose scores become weights together

 public:
  static constexpr int kRows = 8 * kPanel;
  static constexpr int kKeys = 128;

  static int heads(const AttentionArgs&) { return 1; }

  static size_t scratch_bytes(const AttentionArgs& args) {
    const size_t words = args.head_dim / kStep;
    return sizeof(Fixed) + (kRows * args.head_dim + kRows * words + kKeys * words +
                            kValuePanel * (args.head_dim / kTile)) *
                               sizeof(float);
  }

  PanelKernel(const AttentionArgs& args, void* scratch)
      : args_(args),
        words_(args.head_dim / kStep),
        fixed_(*static_cast<Fixed*>(scratch)),
        acc_(reinterpret_cast<float*>(static_cast<char*>(scratch) + sizeof(Fixed))),
        q_(acc_ + kRows * args.head_dim),
        k_(q_ + kRows * words_),
        v_(k_ + kKeys * words_),
        scale_log2_((args.scale < 0 ? -args.scale : args.scale) * kLog2E) {}

  void begin(const RowBlock<kRows>& block) {
    const int rows = round_up(block.rows, kLanes);
    fixed_.rows.begin(block, rows);
    for (int row = 0; row < rows; row += kPanel) {
      const int vectors = panel_vectors(block, row);
      for (int n = 0; n < vectors; ++n) {
        const int first = row + n * kLanes;
        pack_queries<Math>(block.q + first, block.rows - first, words_, args_.scale < 0,
                           vectors * kLanes, q_ + row * words_ + n * kLanes);
      }
    }
    std::memset(acc_, 0, rows * args_.head_dim * sizeof(float));
  }

  template <bool masked>
  void tile(const RowBlock<kRows>& block, int64_t key, int keys) {
    const T* k = static_cast<const T*>(block.k) + key * args_.k_token_stride;
    const T* v = static_cast<const T*>(block.v) + key * args_.v_token_stride;
    pack_keys<Math>(k, args_.k_token_stride, keys, words_, k_);
    pack_values<Math>(v, args_.v_token_stride, keys, args_.head_dim, kValuePanel, v_);
    int64_t next = key + kKeys;
    for (int row = 0; row < block.rows; row += kPanel, next += kKeys / kTile) {
      switch (panel_vectors(block, row)) {
        case 1:
          panel<1>(block, row, key, keys, next);
          break;
        case 2:
          panel<2>(block, row, key, keys, next);
          break;
        default:
          panel<3>(block, row, key, keys, next);
      }
    }
  }

  // Transposes every accumulator [dim][row] of 16 rows into 16 rows, in place.
  void finish(const RowBlock<kRows>& block) {
    const int64_t head_dim = args_.head_dim;
    float* rows = fixed_.weights;  // the weights are no longer needed
    static_assert(sizeof(fixed_.weights) >= kPanel * 256 * sizeof(float));
    for (int row = 0; row < block.rows; row += kPanel) {
      const int vectors = panel_vectors(block, row);
      float* acc = acc_ + row * head_dim;
      for (int n = 0; n < vectors; ++n) {
        for (int64_t d = 0; d < head_dim; d += kLanes) {
          __m512 r[kLanes];
          const float* from = acc + (d * vectors + n) * kLanes;
          for (int i = 0; i < kLanes; ++i) r[i] = _mm512_load_ps(from + i * vectors * kLanes);
          transpose16(r);
          float* to = rows + n * kLanes * head_dim + d;
          for (int i = 0; i < kLanes; ++i) _mm512_store_ps(to + i * head_dim, r[i]);
        }
      }
      std::memcpy(acc, rows, vectors * kLanes * head_dim * sizeof(float));
    }
  }

  const float* acc(int row) const { return acc_ + row * args_.head_dim; }
  SoftmaxState state(int row) const { return fixed_.rows.state(row); }

 private:
  // A panel of V is 8 dimensions of all keys of the tile. One cache line of padding keeps the
  // panels from sharing cache sets.
  static constexpr int kValuePanel = (kKeys / kStep + 2) * kTile;

  struct Fixed {
    RowStates<kRows> rows;
    // Words [keys / kStep][rows of the panel]. The strip in progress holds scores first.
    alignas(64) float weights[256 * kPanel];
  };

  // The K and V of a key of the next tile. Each line is prefetched 16 times, once per word, because
  // a processor whose queue of misses is full drops a prefetch (half of them, on Zen 4, when each
  // is requested once).
  struct Ahead {
    Ahead() = default;
    Ahead(const AttentionArgs& args, const RowBlock<kRows>& block, int64_t key)
        : k(static_cast<const T*>(block.k) + key * args.k_token_stride),
          v(static_cast<const T*>(block.v) + key * args.v_token_stride) {}

    void prefetch(int64_t word) const {
      _mm_prefetch(k + kStep * word, _MM_HINT_T0);
      _mm_prefetch(v + kStep * word, _MM_HINT_T0);
    }

    const T *k, *v;
  };

  static int panel_vectors(const RowBlock<kRows>& block, int row) {
    const int left = block.rows - row;
    return left >= kPanel ? kVectors : round_up(left, kLanes) / kLanes;
  }

  // Processes the tile's keys for a panel of rows, and prefetches the keys from `next` on, one per
  // register tile of scores.
  template <int kN>
  void panel(const RowBlock<kRows>& block, int row, int64_t key, int tile_keys, int64_t next) {
    const Visible visible(fixed_.rows, row, row + kN * kLanes - 1, key, tile_keys);
    if (visible.keys == 0) return;
    const int keys = round_up(visible.keys, kTile);
    // Every row sees the keys before this one.
    const int64_t dense = fixed_.rows.limit[row] - key;
    int begun = 0;  // the first key whose weighted values are not accumulated yet
    for (int first = 0; first < keys; first += kStrip) {
      const int end = keys < first + kStrip ? keys : first + kStrip;
      __m512 top[kN];
      for (int n = 0; n < kN; ++n) top[n] = _mm512_set1_ps(-INFINITY);
      for (int j = first; j < end; j += kTile, ++next) {
        ahead_ = Ahead(args_, block, next);
        float* scores = weights<kN>(first) + (j - first) * kN * kLanes;
        if (j + kTile <= dense) {
          multiply_keys<kN, false>(row, key, j, scores, top);
        } else {
          multiply_keys<kN, true>(row, key, j, scores, top);
        }
      }
      begun = raise<kN>(row, top, begun, first);
      weigh<kN>(row, first, end);
    }
    accumulate<kN>(row, begun, keys);
  }

  // The weights from a key on, or the scores that become weights.
  template <int kN>
  float* weights(int key) const {
    return fixed_.weights + key / kStep * kN * kLanes;
  }

  // scores[j][row] = sum over words of k[j][word] * q[word][row] for 8 keys; -inf where a row does
  // not see the key. Raises `top` to the greatest score.
  template <int kN, bool masked>
  void multiply_keys(int row, int64_t key, int first, float* scores, __m512 (&top)[kN]) const {
    const float* k = k_ + first * words_;
    const float* q = q_ + row * words_;
    const Ahead ahead = ahead_;
    __m512 acc[kTile][kN];
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j)
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) acc[j][n] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int64_t w = 0; w < words_; ++w) {
      __m512 rows[kN];
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) rows[n] = _mm512_load_ps(q + (w * kN + n) * kLanes);
      ahead.prefetch(w);
#pragma GCC unroll 8
      for (int j = 0; j < kTile; ++j) {
        const __m512 word = _mm512_set1_ps(k[j * words_ + w]);
#pragma GCC unroll 3
        for (int n = 0; n < kN; ++n) acc[j][n] = Math::multiply_add(word, rows[n], acc[j][n]);
      }
    }
#pragma GCC unroll 3
    for (int n = 0; n < kN; ++n) {
      if (masked) {
        const __m512i left =
            _mm512_sub_epi32(_mm512_load_si512(fixed_.rows.limit + row + n * kLanes),
                             _mm512_set1_epi32(static_cast<int32_t>(key + first)));
#pragma GCC unroll 8
        for (int j = 0; j < kTile; ++j)
          acc[j][n] =
              _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY),
                                 _mm512_cmpgt_epi32_mask(left, _mm512_set1_epi32(j)), acc[j][n]);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kTile; ++j) {
        top[n] = _mm512_max_ps(top[n], acc[j][n]);
        _mm512_store_ps(scores + (j * kN + n) * kLanes, acc[j][n]);
      }
    }
  }

  // Where `top` exceeds the maximum of a row, raises the maximum and rescales what was computed
  // relative to the old one, after accumulating the keys [begun, end), whose weights are. Returns
  // the first key that is not accumulated yet.
  template <int kN>
  int raise(int row, const __m512 (&top)[kN], int begun, int end) {
    const __m512 scale = _mm512_set1_ps(scale_log2_);
    __m512 base[kN], scaled[kN];
    unsigned exceeds = 0;
    for (int n = 0; n < kN; ++n) {
      base[n] = _mm512_load_ps(fixed_.rows.max + row + n * kLanes);
      scaled[n] = _mm512_mul_ps(top[n], scale);
      exceeds |=
          _mm512_cmp_ps_mask(scaled[n], _mm512_add_ps(base[n], _mm512_set1_ps(kSlack)), _CMP_GT_OQ);
    }
    if (!exceeds) return begun;
    if (begun < end) accumulate<kN>(row, begun, end);
    for (int n = 0; n < kN; ++n) {
      const __m512 higher = _mm512_max_ps(scaled[n], base[n]);
      const __m512 keep = exp2_full(_mm512_sub_ps(base[n], higher));
      float* sum = fixed_.rows.sum + row + n * kLanes;
      _mm512_store_ps(sum, _mm512_mul_ps(_mm512_load_ps(sum), keep));
      _mm512_store_ps(fixed_.rows.max + row + n * kLanes, higher);
      float* acc = acc_ + row * args_.head_dim + n * kLanes;
      for (int64_t d = 0; d < args_.head_dim; ++d, acc += kN * kLanes)
        _mm512_store_ps(acc, _mm512_mul_ps(_mm512_load_ps(acc), keep));
    }
    return end;
  }

  template <int kN>
  void weigh(int row, int first, int end) {
    __m512 base[kN], total[kN];
    for (int n = 0; n < kN; ++n) {
      base[n] = _mm512_load_ps(fixed_.rows.max + row + n * kLanes);
      total[n] = _mm512_load_ps(fixed_.rows.sum + row + n * kLanes);
    }
    Math::template weigh<kN>(weights<kN>(first), end - first, _mm512_set1_ps(scale_log2_), base,
                             total);
    for (int n = 0; n < kN; ++n) _mm512_store_ps(fixed_.rows.sum + row + n * kLanes, total[n]);
  }

  // Adds the weighted values of keys [first, end).
  template <int kN>
  void accumulate(int row, int first, int end) {
    for (int64_t d = 0; d < args_.head_dim; d += kTile) {
      multiply_values<kN>(v_ + d / kTile * kValuePanel + first / kStep * kTile, weights<kN>(first),
                          (end - first) / kStep, acc_ + row * args_.head_dim + d * kN * kLanes);
    }
  }

  // acc[i][row] += sum over words of v[word][i] * weights[word][row] for 8 dimensions i.
  template <int kN>
  static void multiply_values(const float* v, const float* weights, int words, float* out) {
    __m512 acc[kTile][kN];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) acc[i][n] = _mm512_load_ps(out + (i * kN + n) * kLanes);
#pragma GCC unroll 4
    for (int w = 0; w < words; ++w) {
      __m512 rows[kN];
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) rows[n] = _mm512_load_ps(weights + (w * kN + n) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) {
        const __m512 value = _mm512_set1_ps(v[w * kTile + i]);
#pragma GCC unroll 3
        for (int n = 0; n < kN; ++n) acc[i][n] = Math::multiply_add(value, rows[n], acc[i][n]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) _mm512_store_ps(out + (i * kN + n) * kLanes, acc[i][n]);
  }

  FlushSubnormals flush_;
  const AttentionArgs& args_;
  const int64_t words_;  // of a row of Q or K
  Fixed& fixed_;
  float* acc_;  // panels [head_dim][rows of the panel], one after the other
  float* q_;    // panels [word][rows of the panel]
  float* k_;
  float* v_;
  float scale_log2_;
  Ahead ahead_;
};

}  // namespace
}  // namespace cptool::cpu
