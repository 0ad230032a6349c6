// Attention of a few rows, as when decoding, in the arithmetic that `Math` names
// (float32_math.h). For up to four rows per KV head, memory bandwidth is the limit.
//
// A block holds the rows of all KV heads, so that K and V are read once, in the order in which a
// cache of [token][K or V][head][dim] stores them: one head alone is a few lines of every other
// kilobyte, which main memory delivers at a third of the rate. Each row of K and V is read for up
// to four query rows at once, and nothing is packed. More rows of a head take wider tiles of K and
// V, one head after another, from the level-1 cache: what is done once a tile then counts less. A
// row's result does not depend on the rows that go with it. Unnamed namespace: see isa.h.
#pragma once

#include <cstring>

#include "cpu/stream_scores.h"

namespace cptool::cpu {
namespace {

// Returns how many query tokens the longest sequence has.
inline int64_t most_tokens(const AttentionArgs& args) {
  int64_t tokens = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t n = args.cu_q[b + 1] - args.cu_q[b];
    tokens = n > tokens ? n : tokens;
  }
  return tokens;
}

// Returns how many rows a query token has per KV head.
inline int64_t group_size(const AttentionArgs& args) { return args.q_heads / args.kv_heads; }

// Up to this many rows per KV head, reading keys and values in place is faster than packing them
// for products of many rows. Measured over 2K to 32K keys in all types: 1.1 to 2.5 times as fast at
// 9 to 24 rows; at 32 rows up to 1.4 times, but no faster where the keys are in a cache (bfloat16:
// a fifth slower).
constexpr int kStreamRows = 32;

inline int stream_rows(ScalarType, ScalarType) { return kStreamRows; }

// So many query tokens count as few rows whatever the number of rows, for a step of decode that
// checks drafts: each query must get the result that it gets alone.
constexpr int kStreamTokens = 8;

inline bool few_rows(const AttentionArgs& args, int most) {
  const int64_t tokens = most_tokens(args);
  return tokens * group_size(args) <= most || (most == kStreamRows && tokens <= kStreamTokens);
}

// `tile_keys`: 8, 16 or 32, in which a row's maximum is raised and its weights are computed.
template <class Math, int tile_keys, Kind kind = Kind::kSoftmax>
class StreamKernel {
  using T = typename Math::Input;
  using Weight = typename Math::Weight;
  static constexpr int kStep = Math::kStep;
  static constexpr int kPart = 16 / sizeof(T);  // dimensions of 128 bits
  // Whether words hold elements in the form in which memory holds them.
  static constexpr bool kUnconverted = kStep * sizeof(T) == sizeof(float);
  // Bytes between a read and its prefetch, but at least a tile: a fraction of a level-2 cache.
  static constexpr int64_t kAhead = 32 << 10;
  static constexpr int kBytesOfWeights = 128;  // prefetched while a row's weights are computed
  static constexpr int kTile = tile_keys;
  static constexpr int kTileVectors = kTile < kLanes ? 1 : kTile / kLanes;

 public:
  static constexpr Kind kKind = kind;
  static constexpr int kRows = 64;
  static constexpr int kKeys = 32;

  static int heads(const AttentionArgs& args) {
    return heads_of(most_tokens(args) * group_size(args), args);
  }

  // The same for one query token. What a row's bits depend on is chosen by this, not by how many
  // tokens go together.
  static int heads_of_token(const AttentionArgs& args) { return heads_of(group_size(args), args); }

  static size_t scratch_bytes(const AttentionArgs& args) {
    return sizeof(Fixed) + kRows * (padded(args.head_dim) + query_words(args)) * sizeof(float);
  }

  StreamKernel(const AttentionArgs& args, void* scratch)
      : args_(args),
        words_(args.head_dim / kStep),
        query_words_(query_words(args)),
        dims_(padded(args.head_dim)),
        fours_(kUnconverted && group_size(args) > 2 && args.head_dim % (2 * kPart) == 0),
        fixed_(*static_cast<Fixed*>(scratch)),
        q_(reinterpret_cast<float*>(static_cast<char*>(scratch) + sizeof(Fixed))),
        acc_(q_ + kRows * query_words_),
        scores_(args.scale, args.cap) {}

  void begin(const RowBlock<kRows>& block) {
    rows_ = block.rows / block.heads;
    // The last block of a head may have one or two rows of a group of more.
    slots_ = fours_ ? round_up(rows_, 4) : padded_rows(rows_);
    for (int slot = 0; slot < block.heads * slots_; ++slot) {
      const int row = slot % slots_;
      const void* from = row < rows_ ? block.q[slot / slots_ * rows_ + row] : nullptr;
      fixed_.max[slot] = kNoScore;
      store(Vector{}, fixed_.sum[slot]);
      if (fours_) {
        store_in_parts(from, q_ + slot / 4 * 4 * query_words_ + slot % 4 * 4);
      } else {
        const int together = rows_at_once();
        store_in_order(from,
                       q_ + slot / together * together * query_words_ + slot % together * kLanes);
      }
    }
    std::memset(acc_, 0, block.heads * slots_ * dims_ * sizeof(float));
  }

  template <bool masked>
  void tile(const RowBlock<kRows>& block, int64_t key, int keys) {
    if (!masked && slots_ > 4) return wide_tile(block, key, keys);
    for (int begin = 0; begin < keys; begin += kTile) {
      narrow_tile<masked>(block, key + begin, keys - begin < kTile ? keys - begin : kTile);
    }
  }

  void finish(const RowBlock<kRows>& block) {
    for (int row = 0; row < block.rows; ++row) {
      float* acc = acc_ + slot_of(row) * dims_;
      for (int64_t d = 0; d + 2 * kLanes <= args_.head_dim; d += 2 * kLanes)
        Math::in_order(acc + d);
    }
  }

  const float* acc(int row) const { return acc_ + slot_of(row) * dims_; }

  SoftmaxState state(int row) const {
    SoftmaxState state;
    const int slot = slot_of(row);
    const float total = sum(load(fixed_.sum[slot]));
    if (total != 0.0f) {
      state.max = rounded_here(fixed_.max[slot] * kLn2);
      state.sum = total;
    }
    return state;
  }

 private:
  // Of a row: keys of a wide tile, and room for the vector that begins at its last narrow one.
  static constexpr int kSlots = kKeys + kLanes;

  struct Fixed {
    alignas(64) float scores[kRows][kSlots];
    alignas(64) Weight weights[kRows][kSlots];
    alignas(64) float sum[kRows][kLanes];  // key j of a tile goes to lane j % kLanes
    float max[kRows];
  };

  // Rows of a head are padded with zeros to 1, 2 or a multiple of 4.
  static int padded_rows(int rows) { return rows < 1 ? 1 : rows <= 2 ? rows : round_up(rows, 4); }

  static int heads_of(int64_t rows, const AttentionArgs& args) {
    const int64_t most = rows < kRows ? kRows / padded_rows(static_cast<int>(rows)) : 1;
    return static_cast<int>(most < args.kv_heads ? most : args.kv_heads);
  }

  // In whole vectors.
  static int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }
  static int64_t query_words(const AttentionArgs& args) { return padded(args.head_dim / kStep); }

  int rows_at_once() const { return slots_ < 4 ? slots_ : 4; }
  int slot_of(int row) const { return row / rows_ * slots_ + row % rows_; }

  // Prefetches the keys that follow, as many.
  void look_ahead(const RowBlock<kRows>& block, int64_t key, int keys) {
    const int64_t fit = kAhead / (2 * block.heads * args_.head_dim * sizeof(T));
    const int64_t next = key + (fit < keys ? keys : fit);
    const int64_t end = block.limit[block.rows - 1];
    ahead_ = StreamAhead(args_, block.k, block.v, block.heads, next,
                         next + keys < end ? next + keys : end);
  }

  const T* keys_at(const RowBlock<kRows>& block, int64_t key) const {
    return static_cast<const T*>(block.k) + key * args_.k_token_stride;
  }
  const T* values_at(const RowBlock<kRows>& block, int64_t key) const {
    return static_cast<const T*>(block.v) + key * args_.v_token_stride;
  }

  // At most kTile keys. Each step is done for all heads before the next step: the weights of one
  // row alone are a chain of dependent instructions.
  template <bool masked>
  void narrow_tile(const RowBlock<kRows>& block, int64_t key, int keys) {
    look_ahead(block, key, keys);
    const T* k = keys_at(block, key);
    for (int slot = 0; slot < block.heads * slots_; k += args_.k_head_stride) {
      for (const int end = slot + slots_; slot < end; slot += rows_at_once()) {
        score({k, args_.k_token_stride, keys}, slot);
      }
    }
    for (int row = 0; row < block.rows; ++row) {
      const int64_t left = block.limit[row] - key, before = block.first[row] - key;
      const int visible = masked && left < keys ? static_cast<int>(left < 0 ? 0 : left) : keys;
      const int hidden = !masked || before <= 0 ? 0
                         : before < kTile       ? static_cast<int>(before)
                                                : kTile;
      const int slot = slot_of(row);
      ahead_.prefetch(kBytesOfWeights);
      if constexpr (kind == Kind::kSilu) {
        weigh_silu<kTileVectors>(slot, hidden, visible);
        continue;
      }
      if (scores_.capped) cap<kTileVectors>(slot);
      if (hidden > 0) {
        weigh_in_window(slot, hidden, visible);
      } else {
        weigh<false>(slot, 0, visible);
      }
    }
    const T* v = values_at(block, key);
    for (int slot = 0; slot < block.heads * slots_; v += args_.v_head_stride) {
      for (const int end = slot + slots_; slot < end; slot += rows_at_once()) {
        accumulate(v, keys, slot);
      }
    }
  }

  // Up to kKeys keys that all rows see, for heads of more than four slots. A row gets the bits that
  // narrow tiles give it: where none of them raises its maximum, they can be taken together.
  void wide_tile(const RowBlock<kRows>& block, int64_t key, int keys) {
    look_ahead(block, key, keys);
    const T *k = keys_at(block, key), *v = values_at(block, key);
    for (int first = 0; first < block.heads * slots_; first += slots_) {
      const int end = first + slots_, rows_end = first + rows_;
      for (int slot = first; slot < end; slot += 4) {
        score_wide({k, args_.k_token_stride, keys}, slot);
      }
      for (int slot = first; slot < end; slot += 4) {
        const int rows = rows_end - slot < 4 ? rows_end - slot : 4;
        ahead_.prefetch(rows * kBytesOfWeights);
        weigh_wide(v, keys, slot, rows);
      }
      k += args_.k_head_stride;
      v += args_.v_head_stride;
    }
  }

  // Weighs the values of a wide tile for the first `rows` of four rows.
  void weigh_wide(const T* v, int keys, int slot, int rows) {
    constexpr int kVectors = kKeys / kLanes;
    unsigned exceeds = 0;
    for (int r = slot; r < slot + rows; ++r) {
      if constexpr (kind == Kind::kSilu) {
        weigh_silu<kVectors>(r, 0, keys);
        continue;
      }
      if (scores_.capped) cap<kVectors>(r);
      const Vector most = broadcast(fixed_.max[r] + kSlack);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        const Vector scaled = load(fixed_.scores[r] + i * kLanes) * broadcast(scores_.factor);
        exceeds |= above(kLaneNumbers < keys - i * kLanes ? scaled : broadcast(kNoScore), most);
      }
    }
    if (exceeds) {
      for (int at = 0; at < keys; at += kTile, v += kTile * args_.v_token_stride) {
        const int count = keys - at < kTile ? keys - at : kTile;
        for (int r = slot; r < slot + rows; ++r) weigh<false>(r, 0, count, at);
        accumulate_rows<4>(v, count, slot, at);
      }
      return;
    }
    for (int r = slot; kind == Kind::kSoftmax && r < slot + rows; ++r) {
      const Vector scale = broadcast(scores_.factor), max = broadcast(fixed_.max[r]);
      Vector sum = load(fixed_.sum[r]);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        const Vector scores = load(fixed_.scores[r] + i * kLanes);
        const Ints seen = kLaneNumbers < keys - i * kLanes;
        const Vector weights = seen ? Math::exp2(multiply_subtract(scores, scale, max)) : Vector{};
        const auto kept = Math::store_weights(weights, fixed_.weights[r] + i * kLanes);
        if constexpr (kTile < kLanes) {  // the keys of a narrow tile go to the first lanes
          sum = sum + low_half(kept);
          sum = sum + high_half(kept);
        } else {
          sum = sum + kept;
        }
      }
      store(sum, fixed_.sum[r]);
    }
    accumulate_rows<4>(v, keys, slot);
  }

  // Stores a query, 0 if it does not exist, in the order in which `score_rows` reads it.
  void store_in_order(const void* from, float* to) const {
    const int apart = rows_at_once() * kLanes;
    int64_t w = 0;
    for (; w + 2 * kLanes <= words_; w += 2 * kLanes) {
      for (int n = 0; n < 2; ++n, to += apart) {
        store(from != nullptr ? Math::load_query_half(from, args_.q_dtype, w, n) : Vector{}, to);
      }
    }
    for (; w < words_; w += kLanes, to += apart) {
      store(from != nullptr ? Math::load_query(from, args_.q_dtype, w, words_) : Vector{}, to);
    }
  }

  // The same for `score_four`, whose queries are of the type of the keys.
  void store_in_parts(const void* from, float* to) const {
    for (int64_t d = 0; d < args_.head_dim; d += kPart, to += 16) {
      float words[4] = {};
      if (from != nullptr) std::memcpy(words, static_cast<const T*>(from) + d, sizeof words);
      std::memcpy(to, words, sizeof words);
    }
  }

  void score(const StreamKeys<T>& keys, int slot) {
    const float* q = q_ + slot * query_words_;
    auto* scores = fixed_.scores + slot;
    switch (rows_at_once()) {
      case 1:
        return score_rows<Math, kTile, 1>(keys, q, words_, ahead_, scores);
      case 2:
        return score_rows<Math, kTile, 2>(keys, q, words_, ahead_, scores);
    }
    if constexpr (kUnconverted) {
      if (fours_) return score_four<Math, kTile>(keys, q, args_.head_dim, ahead_, scores);
    }
    score_rows<Math, kTile, 4>(keys, q, words_, ahead_, scores);
  }

  void score_wide(const StreamKeys<T>& keys, int slot) {
    const float* q = q_ + slot * query_words_;
    auto* scores = fixed_.scores + slot;
    if constexpr (kUnconverted) {
      if (fours_) return score_four<Math, kKeys>(keys, q, args_.head_dim, ahead_, scores);
    }
    score_rows<Math, kKeys, 4>(keys, q, words_, ahead_, scores);
  }

  // Replaces a row's products by scores under a soft cap, in the first kVectors vectors.
  template <int kVectors>
  __attribute__((noinline)) void cap(int slot) {
    float* scores = fixed_.scores[slot];
    for (int j = 0; j < kVectors * kLanes; j += kLanes) {
      store(hyperbolic_tangent(load(scores + j) * broadcast(scores_.cap_scale)), scores + j);
    }
  }

  // Apart, so that `weigh` without a window is inlined: one query over 1K to 32K keys took 4 to 5%
  // longer on a Zen 3 when neither was.
  __attribute__((noinline)) void weigh_in_window(int slot, int before, int visible) {
    weigh<true>(slot, before, visible);
  }

  // Turns the scores of a narrow tile, from key `at` of the wide one on, into weights, 0 from
  // `visible` on and, if there is a window, before `before`.
  template <bool windowed>
  __attribute__((always_inline)) inline void weigh(int slot, int before, int visible, int at = 0) {
    constexpr int kN = kTileVectors;
    const Vector scale = broadcast(scores_.factor);
    Ints seen[kN];
    Vector scores[kN];
    unsigned exceeds = 0;
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) {
      seen[i] = kLaneNumbers < visible - i * kLanes;
      if (windowed) seen[i] &= kLaneNumbers >= before - i * kLanes;
      scores[i] = load_scores(fixed_.scores[slot] + at + i * kLanes);
      const Vector scaled = seen[i] ? scores[i] * scale : broadcast(kNoScore);
      exceeds |= above(scaled, broadcast(fixed_.max[slot] + kSlack));
    }
    if (exceeds) {
      Vector most = broadcast(kNoScore);
#pragma GCC unroll 4
      for (int i = 0; i < kN; ++i) {
        most = seen[i] ? largest(most, scores[i] * scale) : most;
      }
      raise(slot, most);
    }
    Vector sum = load(fixed_.sum[slot]);
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) {
      const Vector shifted = multiply_subtract(scores[i], scale, broadcast(fixed_.max[slot]));
      const Vector weights = seen[i] ? Math::exp2(shifted) : Vector{};
      sum = sum + Math::store_weights(weights, fixed_.weights[slot] + at + i * kLanes);
    }
    store(sum, fixed_.sum[slot]);
  }

  // Turns kVectors vectors of a row's scores into the weights of SiLU attention, 0 before `before`
  // and from `visible` on.
  template <int kVectors>
  void weigh_silu(int slot, int before, int visible) {
    for (int i = 0; i < kVectors * kLanes; i += kLanes) {
      const float* const at = fixed_.scores[slot] + i;
      const Vector scores = kVectors > kTileVectors ? load(at) : load_scores(at);
      const Vector weights = silu(scores * broadcast(args_.scale), Math::exp2);
      const Ints seen = (kLaneNumbers < visible - i) & (kLaneNumbers >= before - i);
      Math::store_weights(seen ? weights : Vector{}, fixed_.weights[slot] + i);
    }
  }

  // The load must not be wider than the stores of the scores, or it waits for them to reach the
  // cache.
  static Vector load_scores(const float* scores) {
    return kTile < kLanes ? load_eight(scores) : load(scores);
  }

  // Raises a row's maximum to the greatest lane of `most` and rescales everything that was computed
  // relative to the old one.
  __attribute__((noinline)) void raise(int slot, Vector most) {
    float max = most[0];
    for (int i = 1; i < kLanes; ++i) max = most[i] > max ? most[i] : max;
    const Vector keep = exp2_full(broadcast(fixed_.max[slot] - max));
    fixed_.max[slot] = max;
    store(load(fixed_.sum[slot]) * keep, fixed_.sum[slot]);
    float* acc = acc_ + slot * dims_;
    for (int64_t d = 0; d < dims_; d += kLanes) store(load(acc + d) * keep, acc + d);
  }

  // Adds the weighted values of the tile to rows_at_once() rows from `slot` on.
  void accumulate(const T* v, int keys, int slot) {
    switch (rows_at_once()) {
      case 1:
        return accumulate_rows<1>(v, keys, slot);
      case 2:
        return accumulate_rows<2>(v, keys, slot);
      default:
        return accumulate_rows<4>(v, keys, slot);
    }
  }

  // `at`: the first of these keys in a row of weights.
  template <int kR>
  void accumulate_rows(const T* v, int keys, int slot, int at = 0) {
    // Vectors: enough to hide the latency of a multiplication, within the registers.
    constexpr int kWide = kLanes == 8 ? 8 / kR : kR == 4 ? 4 : 8;
    int64_t d = 0;
    for (; d + kWide * kLanes <= args_.head_dim; d += kWide * kLanes)
      add_values<kR, kWide>(v, keys, slot, d, at);
    for (; d + 2 * kLanes <= args_.head_dim; d += 2 * kLanes) {
      add_values<kR, 2>(v, keys, slot, d, at);
    }
    if (d + kLanes <= args_.head_dim) {
      add_values<kR, 1>(v, keys, slot, d, at);
      d += kLanes;
    }
    if (d < args_.head_dim) add_values<kR, 1, true>(v, keys, slot, d, at);
  }

  // The same for kN vectors of dimensions, in the order in which Math::load_step loads them; or for
  // the last dimensions, less than a vector. Prefetches as many bytes as it reads.
  template <int kR, int kN, bool kLast = false>
  void add_values(const T* v, int keys, int slot, int64_t d, int at) {
    float* acc = acc_ + slot * dims_ + d;
    Vector sums[kR][kN];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) sums[r][n] = load(acc + r * dims_ + n * kLanes);
    auto add = [&](int j) __attribute__((always_inline)) {
      Vector values[kN];
      // The last of an odd number of keys stands in for the missing one, whose weights are 0.
      const T* from = v + j * args_.v_token_stride + d;
      const int64_t next = j + 1 < keys ? args_.v_token_stride : 0;
      if constexpr (kLast) {
        values[0] = Math::load_values(from, next, kStep, args_.head_dim - d);
      } else {
        Math::load_step(from, next, values);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) {
        float word;
        std::memcpy(&word, fixed_.weights[slot + r] + at + j, sizeof(word));
        const Vector weight = broadcast(word);
#pragma GCC unroll 8
        for (int n = 0; n < kN; ++n) sums[r][n] = Math::multiply_add(weight, values[n], sums[r][n]);
      }
    };
    constexpr int kBytes = kStep * kN * kLanes * static_cast<int>(sizeof(T));
    constexpr bool kTogether = StreamAhead::together(kBytes);
    int j = 0;
    for (; j + 2 * kStep <= keys; j += 2 * kStep) {
      add(j);
      if (!kTogether) ahead_.prefetch(kBytes);
      add(j + kStep);
      ahead_.prefetch(kTogether ? 2 * kBytes : kBytes);
    }
    for (; j < keys; j += kStep) add(j);
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) store(sums[r][n], acc + r * dims_ + n * kLanes);
  }

  FlushSubnormals flush_;
  const AttentionArgs& args_;
  const int64_t words_;        // of a row of Q or K
  const int64_t query_words_;  // the same, in whole vectors
  const int64_t dims_;         // of a row of V, in whole vectors
  const bool fours_;           // scores are those of score_four; so are all rows of a token
  Fixed& fixed_;
  float* q_;    // [slots][query_words_]
  float* acc_;  // [slots][dims_]
  const Scores scores_;
  int rows_ = 0;   // of each head
  int slots_ = 0;  // the same, padded
  StreamAhead ahead_;
};

// Uses tiles of 16 KB where that is 8 to 32 keys. Larger ones were measured to be a fifth slower,
// perhaps because the level-1 cache then evicts the lines of V that arrive together with those of
// K.
template <class Math, Kind kind = Kind::kSoftmax>
inline void run_stream(const AttentionArgs& args, int threads) {
  constexpr int64_t kTileBytes = 16 << 10;
  const int64_t heads = StreamKernel<Math, 16>::heads_of_token(args);
  const int64_t keys =
      kTileBytes / (2 * heads * args.head_dim * static_cast<int64_t>(sizeof(typename Math::Input)));
  if (keys >= 32) return run<StreamKernel<Math, 32, kind>>(args, threads);
  if (keys >= 16) return run<StreamKernel<Math, 16, kind>>(args, threads);
  run<StreamKernel<Math, 8, kind>>(args, threads);
}

}  // namespace
}  // namespace cptool::cpu
