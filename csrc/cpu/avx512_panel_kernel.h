// Attention of many rows with AVX-512, register-blocked, in the arithmetic that `Math` names.
//
// Both products work on words of 32 bits, which hold Math::kStep elements that are multiplied and
// added together: one float32, or two bfloat16. A register tile of a product is 8 keys (or 8
// dimensions) by 48 rows in 24 accumulators: 3 vector loads and 8 broadcasts for 24 instructions,
// so that the multipliers are the limit. The scores of a strip of keys become weights where they
// lie; the weights of a whole tile of keys are then multiplied with its values, so that an
// accumulator is loaded and stored once per tile.
//
// What a vector of 16 scores costs on the two ports that multiply: 2 head_dim / kStep for the
// products (at head_dim 128: 256 in float32, 128 in bfloat16); for its softmax 8 in float32 and 5.5
// in bfloat16 (maximum, scale, polynomial, half a dot product for the sum), 3% and 4% (at
// head_dim 64: twice that). Conversions, additions and powers go to the other two ports.
//
// struct Math:
//   using Input, Weight;                                        of q, k and v; of rounded weights
//   static constexpr int kStep;                                 elements of a word
//   static constexpr uint32_t kSigns;                           their sign bits
//   static __m512 load(const Input* row, int64_t word, int64_t words);
//     16 words of a row, 0 from `words` on.
//   static __m512 load_values(const Input* v, int64_t stride, int keys);
//     16 dimensions of the values of kStep keys, of which `keys` exist, as words.
//   template <int kN> static void load_step(const Input* v, int64_t next, __m512 (&values)[kN]);
//     16 kN dimensions of kStep keys, the next one's at v + next, as words; in_order(acc) brings 32
//     sums of such products into the order of the dimensions. kN is 1 or even.
//   static __m512 exp2(__m512 x);                               as good as a Weight can hold
//   static __m512 multiply_add(__m512 a, __m512 b, __m512 sum);
//   static __m512 store_weights(__m512 weights, Weight* to);
//     Stores 16 weights of one row, consecutive keys, rounded; returns them as float32.
//   template <int kN> static void weigh(float* scores, int keys, __m512 scale,
//                                       const __m512 (&base)[kN], __m512 (&total)[kN]);
//     Turns scores [keys][16 kN rows] into weights 2^(score * scale - base), as words [keys /
//     kStep][16 kN rows] in the same memory, and adds them to `total`.
//
// Unnamed namespace: see dispatch.h.
#pragma once

#include <cstring>

#include "cpu/avx512_panel.h"

namespace cptool::cpu {
namespace {

constexpr int kTile = 8;     // keys, or dimensions, of a register tile
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
        pack_queries(block, row + n * kLanes, vectors * kLanes, q_ + row * words_ + n * kLanes);
      }
    }
    std::memset(acc_, 0, rows * args_.head_dim * sizeof(float));
  }

  template <bool masked>
  void tile(const RowBlock<kRows>& block, int64_t key, int keys) {
    pack(block, key, keys);
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

  // Turns every accumulator [dim][row] of 16 rows into 16 rows, in place.
  void finish(const RowBlock<kRows>& block) {
    const int64_t head_dim = args_.head_dim;
    float* rows = fixed_.weights;  // not needed any more
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
    // Words [keys / kStep][rows of the panel]; the last strip begins as scores.
    alignas(64) float weights[256 * kPanel];
  };

  // The K and V of a key that the next tile will pack. Each line is asked for 16 times, once per
  // word: a processor whose queue of misses is full drops a prefetch (half of them, on Zen 4, when
  // each is asked for once).
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

  // 16 queries from `row` on, transposed: to[w * stride] holds word w of the 16 rows, 0 for rows
  // that the block lacks. With the scale's sign, so that it may be taken as positive.
  void pack_queries(const RowBlock<kRows>& block, int row, int stride, float* to) const {
    const __m512i sign = _mm512_set1_epi32(args_.scale < 0 ? static_cast<int>(Math::kSigns) : 0);
    for (int64_t w = 0; w < words_; w += kLanes) {
      __m512i r[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        r[i] = _mm512_setzero_si512();
        if (row + i < block.rows) {
          const T* q = static_cast<const T*>(block.q[row + i]);
          r[i] = _mm512_xor_si512(_mm512_castps_si512(Math::load(q, w, words_)), sign);
        }
      }
      transpose16(r);
      for (int i = 0; i < kLanes && w + i < words_; ++i)
        _mm512_store_si512(to + (w + i) * stride, r[i]);
    }
  }

  // K to [key][word], V to [dim / 8][key / kStep][dim % 8], zeros up to a whole register tile of
  // keys.
  void pack(const RowBlock<kRows>& block, int64_t key, int keys) {
    const T* k = static_cast<const T*>(block.k) + key * args_.k_token_stride;
    const T* v = static_cast<const T*>(block.v) + key * args_.v_token_stride;
    const int padded = round_up(keys, kTile);
    for (int j = 0; j < padded; ++j) {
      for (int64_t w = 0; w < words_; w += kLanes) {
        const __mmask16 exist = words_ - w >= kLanes ? 0xffff : (1u << (words_ - w)) - 1;
        _mm512_mask_storeu_ps(
            k_ + j * words_ + w, exist,
            j < keys ? Math::load(k + j * args_.k_token_stride, w, words_) : _mm512_setzero_ps());
      }
    }
    for (int j = 0; j < padded; j += kStep) {
      for (int64_t d = 0; d < args_.head_dim; d += kLanes) {
        const __m512 values =
            Math::load_values(v + j * args_.v_token_stride + d, args_.v_token_stride, keys - j);
        float* to = v_ + d / kTile * kValuePanel + j / kStep * kTile;
        _mm256_storeu_ps(to, _mm512_castps512_ps256(values));
        _mm256_storeu_ps(to + kValuePanel, _mm512_extractf32x8_ps(values, 1));
      }
    }
  }

  // Absorbs the tile's keys for a panel of rows, and prefetches those from `next` on, one per
  // register tile of scores.
  template <int kN>
  void panel(const RowBlock<kRows>& block, int row, int64_t key, int tile_keys, int64_t next) {
    const Visible visible(fixed_.rows, row, row + kN * kLanes - 1, key, tile_keys);
    if (visible.keys == 0) return;
    const int keys = round_up(visible.keys, kTile);
    // The keys before this one every row sees.
    const int64_t dense = fixed_.rows.limit[row] - key;
    int begun = 0;  // of the keys with weights, the first that isn't accumulated
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

  // The weights from a key on, or the scores that will be those.
  template <int kN>
  float* weights(int key) const {
    return fixed_.weights + key / kStep * kN * kLanes;
  }

  // scores[j][row] = sum over words of k[j][word] * q[word][row] for 8 keys; -inf where a row
  // doesn't see the key. Raises `top` to the greatest.
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

  // Raises the maxima of the rows that a greatest score exceeds, with what was computed against the
  // old ones: first accumulates the keys from `begun` to `end`. Returns the first that isn't.
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
