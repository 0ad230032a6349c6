// Attention of many rows with AVX2 and AVX-512, register-blocked, in the arithmetic that `Math`
// names.
//
// Both products work on words of 32 bits, which hold Math::kStep elements that are multiplied and
// added together: one float32, or two bfloat16. A register tile of a product is kTile keys (or
// dimensions) by three vectors of rows, so that the multipliers are the limit: with AVX-512 8 by 48
// in 24 accumulators, 3 vector loads and 8 broadcasts for 24 instructions; with AVX2, which has
// half as many registers of half the size, 4 by 24 in 12 accumulators, 3 loads and 4 broadcasts for
// 12 instructions. The scores of a strip of keys become weights in place; the weights of a whole
// tile of keys are then multiplied with its values, so that an accumulator is loaded and stored
// once per tile.
//
// What a vector of scores costs on the two ports that multiply: 2 head_dim / kStep for the products
// (at head_dim 128: 256 in float32, 128 in bfloat16); for its softmax 8 in float32 and 5.5 in
// bfloat16 (maximum, scale, polynomial, half a dot product for the sum), 3% and 4% (at head_dim 64:
// twice that). Conversions, additions and powers go to the other two ports. On AVX2 a processor
// that adds on the same ports as it multiplies (Intel's) needs 15 for the softmax: 6%, and 12%.
//
// SiLU attention is the same without maxima and sums; what a row does not see gets a score of 0, of
// which the weight is 0 too.
//
// Unnamed namespace: see isa.h.
#pragma once

#include <cstring>

#include "cpu/panel.h"
#include "cpu/panel_pack.h"

namespace cptool::cpu {
namespace {

constexpr int kVectors = 3;  // vectors of rows of a register tile
constexpr int kPanel = kVectors * kLanes;
constexpr int kPanels = kLanes == 16 ? 8 : 16;  // of a block: 384 rows

// Which keys of a register tile some row does not see: those beyond its last one, or also those
// ahead of its window.
enum class Mask { kNone, kEnd, kBoth };

template <class Math, Kind kind = Kind::kSoftmax>
class PanelKernel {
  using T = typename Math::Input;
  static constexpr bool kSoftmax = kind == Kind::kSoftmax;
  static constexpr int kStep = Math::kStep;
  static constexpr int kStrip = 32;  // keys whose scores become weights together

 public:
  static constexpr Kind kKind = kind;
  static constexpr int kRows = kPanels * kPanel;
  static constexpr int kKeys = 128;

  static int heads(const AttentionArgs&) { return 1; }

  static size_t scratch_bytes(const AttentionArgs& args) {
    const size_t words = args.head_dim / kStep, dims = padded(args.head_dim);
    return sizeof(Fixed) +
           (kRows * dims + kRows * words + kKeys * words + kValuePanel * (dims / kTile)) *
               sizeof(float);
  }

  PanelKernel(const AttentionArgs& args, void* scratch)
      : args_(args),
        words_(args.head_dim / kStep),
        dims_(padded(args.head_dim)),
        fixed_(*static_cast<Fixed*>(scratch)),
        acc_(reinterpret_cast<float*>(static_cast<char*>(scratch) + sizeof(Fixed))),
        q_(acc_ + kRows * dims_),
        k_(q_ + kRows * words_),
        v_(k_ + kKeys * words_),
        scores_(args.scale < 0 ? -args.scale : args.scale, args.cap) {}

  void begin(const RowBlock<kRows>& block) {
    const int rows = round_up(block.rows, kLanes);
    fixed_.rows.begin(block, rows);
    for (int row = 0; row < rows; row += kPanel) {
      const int vectors = panel_vectors(block, row);
      for (int n = 0; n < vectors; ++n) {
        const int first = row + n * kLanes;
        pack_queries<Math>(block.q + first, args_.q_dtype, block.rows - first, words_,
                           args_.scale < 0, vectors * kLanes, q_ + row * words_ + n * kLanes);
      }
    }
    std::memset(acc_, 0, rows * dims_ * sizeof(float));
  }

  template <bool masked>
  void tile(const RowBlock<kRows>& block, int64_t key, int keys) {
    const T* k = static_cast<const T*>(block.k) + key * args_.k_token_stride;
    const T* v = static_cast<const T*>(block.v) + key * args_.v_token_stride;
    pack_keys<Math>(k, args_.k_token_stride, keys, words_, k_);
    pack_values<Math>(v, args_.v_token_stride, keys, args_.head_dim, kValuePanel, v_);
    int64_t next = (key + kKeys) * kTilesPerKey;
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
    float* rows = fixed_.weights;  // the weights are no longer needed
    static_assert(sizeof(fixed_.weights) >= kPanel * 256 * sizeof(float));
    for (int row = 0; row < block.rows; row += kPanel) {
      const int vectors = panel_vectors(block, row);
      float* acc = acc_ + row * dims_;
      for (int n = 0; n < vectors; ++n) {
        for (int64_t d = 0; d < dims_; d += kLanes) {
          Vector r[kLanes];
          const float* from = acc + (d * vectors + n) * kLanes;
          for (int i = 0; i < kLanes; ++i) r[i] = load(from + i * vectors * kLanes);
          transpose(r);
          float* to = rows + n * kLanes * dims_ + d;
          for (int i = 0; i < kLanes; ++i) store(r[i], to + i * dims_);
        }
      }
      std::memcpy(acc, rows, vectors * kLanes * dims_ * sizeof(float));
    }
  }

  const float* acc(int row) const { return acc_ + row * dims_; }
  SoftmaxState state(int row) const { return fixed_.rows.state(row); }

 private:
  // A panel of V is kTile dimensions of all keys of the tile. One cache line of padding keeps the
  // panels from sharing cache sets.
  static constexpr int kValuePanel = kKeys / kStep * kTile + 16;
  // Register tiles of scores during which a key of the next tile is prefetched: all panels together
  // prefetch the whole tile.
  static constexpr int kTilesPerKey = kPanels / kTile;
  static constexpr float kHidden = kSoftmax ? -INFINITY : 0.0f;  // the score of an unseen key

  struct Fixed {
    RowStates<kRows> rows;
    // Words [keys / kStep][rows of the panel]. The strip in progress holds scores first.
    alignas(64) float weights[256 * kPanel];
  };

  // The K and V of a key of the next tile; where several register tiles share a key, first its K,
  // then its V. Each line is prefetched once per word, 16 times or more, because a processor whose
  // queue of misses is full drops a prefetch (half of them, on Zen 4, when each is requested once).
  struct Ahead {
    Ahead() = default;
    Ahead(const AttentionArgs& args, const RowBlock<kRows>& block, int64_t next)
        : k(static_cast<const T*>(block.k) + next / kTilesPerKey * args.k_token_stride),
          v(static_cast<const T*>(block.v) + next / kTilesPerKey * args.v_token_stride) {
      if (next % kTilesPerKey >= (kTilesPerKey + 1) / 2) k = v;
    }

    void prefetch(int64_t word) const {
      _mm_prefetch(k + kStep * word, _MM_HINT_T0);
      if (kTilesPerKey == 1) _mm_prefetch(v + kStep * word, _MM_HINT_T0);
    }

    const T *k, *v;
  };

  // Dimensions in whole vectors. Those that do not exist are 0.
  static int padded(int64_t head_dim) { return round_up(static_cast<int>(head_dim), kLanes); }

  static int panel_vectors(const RowBlock<kRows>& block, int row) {
    const int left = block.rows - row;
    return left >= kPanel ? kVectors : round_up(left, kLanes) / kLanes;
  }

  // Processes the tile's keys for a panel of rows, and prefetches the keys from `next` on, in
  // register tiles of scores.
  template <int kN>
  void panel(const RowBlock<kRows>& block, int row, int64_t key, int tile_keys, int64_t next) {
    const Visible visible(fixed_.rows, row, row + kN * kLanes - 1, key, tile_keys);
    if (visible.empty()) return;
    const int keys = round_up(visible.end, kTile);
    int first = visible.begin / kStrip * kStrip;
    int begun = first;  // the first key whose weighted values are not accumulated yet
    for (; first < keys; first += kStrip) {
      const int end = keys < first + kStrip ? keys : first + kStrip;
      Vector top[kN];
      for (int n = 0; n < kN; ++n) top[n] = broadcast(-INFINITY);
      for (int j = first; j < end; j += kTile, ++next) {
        ahead_ = Ahead(args_, block, next);
        float* scores = weights<kN>(first) + (j - first) * kN * kLanes;
        if (scores_.capped || (visible.dense_begin <= j && j + kTile <= visible.dense_end)) {
          multiply_keys<kN, Mask::kNone>(row, key, j, scores, top);
        } else if (visible.dense_begin <= j) {
          multiply_keys<kN, Mask::kEnd>(row, key, j, scores, top);
        } else {
          multiply_keys<kN, Mask::kBoth>(row, key, j, scores, top);
        }
      }
      if constexpr (kSoftmax) {
        if (scores_.capped) cap<kN>(row, key, first, end, top);
        begun = raise<kN>(row, top, begun, first);
        weigh<kN>(row, first, end);
      } else {
        const float scale = args_.scale < 0 ? -args_.scale : args_.scale;
        Math::template weigh_silu<kN>(weights<kN>(first), end - first, broadcast(scale));
      }
    }
    accumulate<kN>(row, begun, keys);
  }

  // The weights from a key on, or the scores that become weights.
  template <int kN>
  float* weights(int key) const {
    return fixed_.weights + key / kStep * kN * kLanes;
  }

  // scores[j][row] = sum over words of k[j][word] * q[word][row] for kTile keys; kHidden where a
  // row does not see the key. Raises `top` to the greatest score.
  template <int kN, Mask mask>
  void multiply_keys(int row, int64_t key, int first, float* scores, Vector (&top)[kN]) const {
    const float* k = k_ + first * words_;
    const float* q = q_ + row * words_;
    const Ahead ahead = ahead_;
    Vector acc[kTile][kN];
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j)
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) acc[j][n] = Vector{};
#pragma GCC unroll 4
    for (int64_t w = 0; w < words_; ++w) {
      Vector rows[kN];
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) rows[n] = load(q + (w * kN + n) * kLanes);
      ahead.prefetch(w);
#pragma GCC unroll 8
      for (int j = 0; j < kTile; ++j) {
        const Vector word = broadcast(k[j * words_ + w]);
#pragma GCC unroll 3
        for (int n = 0; n < kN; ++n) acc[j][n] = Math::multiply_add(word, rows[n], acc[j][n]);
      }
    }
#pragma GCC unroll 3
    for (int n = 0; n < kN; ++n) {
      if (mask != Mask::kNone) {
        const Vector hidden = broadcast(kHidden);
        const Ints left = from_key(fixed_.rows.limit + row + n * kLanes, key + first);
        const Ints before = from_key(fixed_.rows.first + row + n * kLanes, key + first);
#pragma GCC unroll 8
        for (int j = 0; j < kTile; ++j) {
          acc[j][n] = left > j ? acc[j][n] : hidden;
          if (mask == Mask::kBoth) acc[j][n] = before > j ? hidden : acc[j][n];
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < kTile; ++j) {
        if (kSoftmax) top[n] = largest(top[n], acc[j][n]);
        store(acc[j][n], scores + (j * kN + n) * kLanes);
      }
    }
  }

  // Replaces the products of keys [first, end) by their scores under a soft cap, -inf where a row
  // does not see the key, and `top` by the greatest.
  template <int kN>
  __attribute__((noinline)) void cap(int row, int64_t key, int first, int end, Vector (&top)[kN]) {
    const Vector scale = broadcast(scores_.cap_scale), hidden = broadcast(-INFINITY);
    float* scores = weights<kN>(first);
    for (int n = 0; n < kN; ++n) {
      const Ints left = from_key(fixed_.rows.limit + row + n * kLanes, key + first);
      const Ints before = from_key(fixed_.rows.first + row + n * kLanes, key + first);
      Vector most = hidden;
      for (int j = 0; j < end - first; ++j) {
        float* at = scores + (j * kN + n) * kLanes;
        Vector score = hyperbolic_tangent(load(at) * scale);
        score = left > j ? score : hidden;
        score = before > j ? hidden : score;
        most = largest(most, score);
        store(score, at);
      }
      top[n] = most;
    }
  }

  // Loads kLanes limits, counted from `key`.
  static Ints from_key(const int32_t* limits, int64_t key) {
    Ints counted;
    std::memcpy(&counted, limits, sizeof counted);
    return counted - static_cast<int32_t>(key);
  }

  // Where `top` exceeds the maximum of a row, raises the maximum and rescales what was computed
  // relative to the old one, after accumulating the keys [begun, end), whose weights are. Returns
  // the first key that is not accumulated yet.
  template <int kN>
  int raise(int row, const Vector (&top)[kN], int begun, int end) {
    const Vector scale = broadcast(scores_.factor);
    Vector base[kN], scaled[kN];
    unsigned exceeds = 0;
    for (int n = 0; n < kN; ++n) {
      base[n] = load(fixed_.rows.max + row + n * kLanes);
      scaled[n] = top[n] * scale;
      exceeds |= above(scaled[n], base[n] + kSlack);
    }
    if (!exceeds) return begun;
    if (begun < end) accumulate<kN>(row, begun, end);
    for (int n = 0; n < kN; ++n) {
      const Vector higher = largest(scaled[n], base[n]);
      const Vector keep = exp2_full(base[n] - higher);
      float* sum = fixed_.rows.sum + row + n * kLanes;
      store(load(sum) * keep, sum);
      store(higher, fixed_.rows.max + row + n * kLanes);
      float* acc = acc_ + row * dims_ + n * kLanes;
      for (int64_t d = 0; d < args_.head_dim; ++d, acc += kN * kLanes) store(load(acc) * keep, acc);
    }
    return end;
  }

  template <int kN>
  void weigh(int row, int first, int end) {
    Vector base[kN], total[kN];
    for (int n = 0; n < kN; ++n) {
      base[n] = load(fixed_.rows.max + row + n * kLanes);
      total[n] = load(fixed_.rows.sum + row + n * kLanes);
    }
    Math::template weigh<kN>(weights<kN>(first), end - first, broadcast(scores_.factor), base,
                             total);
    for (int n = 0; n < kN; ++n) store(total[n], fixed_.rows.sum + row + n * kLanes);
  }

  // Adds the weighted values of keys [first, end).
  template <int kN>
  void accumulate(int row, int first, int end) {
    for (int64_t d = 0; d < args_.head_dim; d += kTile) {
      multiply_values<kN>(v_ + d / kTile * kValuePanel + first / kStep * kTile, weights<kN>(first),
                          (end - first) / kStep, acc_ + row * dims_ + d * kN * kLanes);
    }
  }

  // acc[i][row] += sum over words of v[word][i] * weights[word][row] for kTile dimensions i.
  template <int kN>
  static void multiply_values(const float* v, const float* weights, int words, float* out) {
    Vector acc[kTile][kN];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) acc[i][n] = load(out + (i * kN + n) * kLanes);
#pragma GCC unroll 4
    for (int w = 0; w < words; ++w) {
      Vector rows[kN];
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) rows[n] = load(weights + (w * kN + n) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kTile; ++i) {
        const Vector value = broadcast(v[w * kTile + i]);
#pragma GCC unroll 3
        for (int n = 0; n < kN; ++n) acc[i][n] = Math::multiply_add(value, rows[n], acc[i][n]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) store(acc[i][n], out + (i * kN + n) * kLanes);
  }

  FlushSubnormals flush_;
  const AttentionArgs& args_;
  const int64_t words_;  // of a row of Q or K
  const int64_t dims_;   // of a row of V, padded
  Fixed& fixed_;
  float* acc_;  // panels [dims_][rows of the panel], one after the other
  float* q_;    // panels [word][rows of the panel]
  float* k_;
  float* v_;
  const Scores scores_;
  Ahead ahead_;
};

}  // namespace
}  // namespace cptool::cpu
