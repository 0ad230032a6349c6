// Attention of a few rows, as when decoding, in the arithmetic that `Math` names
// (avx512_panel_kernel.h): memory bandwidth is the limit of up to four rows of a KV head.
//
// A block holds the rows of all KV heads, so that K and V are read once, front to back, as they lie
// in a cache of [token][K or V][head][dim]: a head alone is a few lines of every other kilobyte,
// which main memory delivers at a third of the rate. Each row of K and V is read for up to four
// query rows at once and nothing is packed. Unnamed namespace: see dispatch.h.
#pragma once

#include <cstring>

#include "cpu/avx512_panel.h"

namespace cptool::cpu {
namespace {

// How many rows the longest sequence has for each KV head.
inline int64_t rows_per_head(const AttentionArgs& args) {
  int64_t tokens = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t n = args.cu_q[b + 1] - args.cu_q[b];
    tokens = n > tokens ? n : tokens;
  }
  return tokens * (args.q_heads / args.kv_heads);
}

inline bool few_rows(const AttentionArgs& args, int most) { return rows_per_head(args) <= most; }

// Walks the lines of K and V in the order in which they lie, and prefetches them into the level-2
// cache. Not into level 1: it has too few buffers for lines on their way to keep memory busy, and a
// tile of many heads with what follows it is more than it holds, so that lines would be gone before
// their use.
class StreamAhead {
 public:
  StreamAhead() = default;

  // The keys [key, end) of `heads` heads.
  StreamAhead(const AttentionArgs& args, const void* k, const void* v, int heads, int64_t key,
              int64_t end)
      : left_(end > key ? end - key : 0) {
    const int64_t size = static_cast<int64_t>(element_size(args.dtype));
    parts_[0] = {static_cast<const char*>(k), args.k_token_stride * size,
                 args.k_head_stride * size};
    parts_[1] = {static_cast<const char*>(v), args.v_token_stride * size,
                 args.v_head_stride * size};
    row_bytes_ = args.head_dim * size;
    heads_ = heads;
    if (parts_[0].head_stride == row_bytes_ && parts_[1].head_stride == row_bytes_) {
      row_bytes_ *= heads;  // the heads of a token are one row
      heads_ = 1;
    }
    const bool adjoin = heads_ == 1 && parts_[1].at == parts_[0].at + row_bytes_ &&
                        parts_[0].token_stride == 2 * row_bytes_ &&
                        parts_[1].token_stride == 2 * row_bytes_;
    for (Part& part : parts_) part.at += key * part.token_stride;
    if (adjoin) {  // the whole is one row
      row_bytes_ *= 2 * left_;
      left_ = 0;
    }
    begin_row();
  }

  // May run over the end of a row: what lies behind is asked for once more, or in vain.
  void prefetch(int lines) {
    if (at_ >= row_end_ && (left_ == 0 || !next_row())) return;
    for (int i = 0; i < lines; ++i) _mm_prefetch(at_ + i * kLine, _MM_HINT_T1);
    at_ += lines * kLine;
  }

 private:
  static constexpr int kLine = 64;

  struct Part {      // K or V
    const char* at;  // head 0 of the key at hand
    int64_t token_stride, head_stride;
  };

  void begin_row() {
    at_ = parts_[part_].at + head_ * parts_[part_].head_stride;
    row_end_ = at_ + row_bytes_;
  }

  // False if there is none. Some keys must be left.
  __attribute__((noinline)) bool next_row() {
    if (++head_ == heads_) {
      head_ = 0;
      parts_[part_].at += parts_[part_].token_stride;
      part_ ^= 1;
      if (part_ == 0 && --left_ == 0) return false;
    }
    begin_row();
    return true;
  }

  const char *at_ = nullptr, *row_end_ = nullptr;
  int64_t row_bytes_ = 0, left_ = 0;  // keys
  Part parts_[2] = {};
  int part_ = 0, head_ = 0, heads_ = 0;
};

// `tile_keys`: 8, 16 or 32.
template <class Math, int tile_keys>
class StreamKernel {
  using T = typename Math::Input;
  using Weight = typename Math::Weight;
  static constexpr int kStep = Math::kStep;
  static constexpr int kQuarter = 16 / sizeof(T);  // dimensions of a quarter of a vector
  // Whether words hold elements as they lie in memory.
  static constexpr bool kAsTheyAre = kStep * sizeof(T) == sizeof(float);
  // Bytes between a read and its prefetch, but a tile at least: a fraction of a level-2 cache.
  static constexpr int64_t kAhead = 32 << 10;
  static constexpr int kLinesOfWeights = 2;  // asked for while a row's weights are computed
  static constexpr int kSlots = tile_keys < kLanes ? kLanes : tile_keys;

 public:
  static constexpr int kRows = 64;
  static constexpr int kKeys = tile_keys;

  static int heads(const AttentionArgs& args) {
    const int64_t most = kRows / padded_rows(static_cast<int>(rows_per_head(args)));
    return static_cast<int>(most < args.kv_heads ? most : args.kv_heads);
  }

  static size_t scratch_bytes(const AttentionArgs& args) {
    return sizeof(Fixed) + kRows * (args.head_dim + query_words(args)) * sizeof(float);
  }

  StreamKernel(const AttentionArgs& args, void* scratch)
      : args_(args),
        words_(args.head_dim / kStep),
        query_words_(query_words(args)),
        fixed_(*static_cast<Fixed*>(scratch)),
        q_(reinterpret_cast<float*>(static_cast<char*>(scratch) + sizeof(Fixed))),
        acc_(q_ + kRows * query_words_),
        scale_log2_(args.scale * kLog2E) {}

  void begin(const RowBlock<kRows>& block) {
    rows_ = block.rows / block.heads;
    slots_ = padded_rows(rows_);
    const bool quarters = kAsTheyAre && rows_at_once() == 4;
    for (int slot = 0; slot < block.heads * slots_; ++slot) {
      const int row = slot % slots_;
      const T* from =
          row < rows_ ? static_cast<const T*>(block.q[slot / slots_ * rows_ + row]) : nullptr;
      fixed_.max[slot] = kNoScore;
      _mm512_store_ps(fixed_.sum[slot], _mm512_setzero_ps());
      if (quarters) {
        float* to = q_ + slot / 4 * 4 * query_words_ + slot % 4 * 4;
        for (int64_t d = 0; d < args_.head_dim; d += kQuarter, to += kLanes) {
          __m128 words = _mm_setzero_ps();
          if (from != nullptr) words = _mm_loadu_ps(reinterpret_cast<const float*>(from + d));
          _mm_store_ps(to, words);
        }
        continue;
      }
      for (int64_t w = 0; w < query_words_; w += kLanes) {
        __m512 words = _mm512_setzero_ps();
        if (from != nullptr) words = Math::load(from, w, words_);
        _mm512_store_ps(q_ + slot * query_words_ + w, words);
      }
    }
    std::memset(acc_, 0, block.heads * slots_ * args_.head_dim * sizeof(float));
  }

  template <bool masked>
  void tile(const RowBlock<kRows>& block, int64_t key, int keys) {
    const int64_t fit = kAhead / (2 * block.heads * args_.head_dim * sizeof(T));
    const int64_t next = key + (fit < kKeys ? kKeys : fit);
    const int64_t end = block.limit[block.rows - 1];
    ahead_ = StreamAhead(args_, block.k, block.v, block.heads, next,
                         next + keys < end ? next + keys : end);
    // A step for all heads before the next step: the weights of one row alone are a chain of
    // instructions that each wait for the last.
    const T* k = static_cast<const T*>(block.k) + key * args_.k_token_stride;
    for (int slot = 0; slot < block.heads * slots_; k += args_.k_head_stride) {
      for (const int end = slot + slots_; slot < end; slot += rows_at_once()) {
        switch (rows_at_once()) {
          case 1:
            score<1>(k, keys, slot);
            break;
          case 2:
            score<2>(k, keys, slot);
            break;
          default:
            if constexpr (kAsTheyAre) {
              score_four(k, keys, slot);
            } else {
              score<4>(k, keys, slot);
            }
        }
      }
    }
    for (int row = 0; row < block.rows; ++row) {
      const int64_t left = block.limit[row] - key;
      ahead_.prefetch(kLinesOfWeights);
      weigh(slot_of(row), masked && left < keys ? static_cast<int>(left < 0 ? 0 : left) : keys);
    }
    const T* v = static_cast<const T*>(block.v) + key * args_.v_token_stride;
    for (int slot = 0; slot < block.heads * slots_; v += args_.v_head_stride) {
      for (const int end = slot + slots_; slot < end; slot += rows_at_once()) {
        switch (rows_at_once()) {
          case 1:
            accumulate<1>(v, keys, slot);
            break;
          case 2:
            accumulate<2>(v, keys, slot);
            break;
          default:
            accumulate<4>(v, keys, slot);
        }
      }
    }
  }

  void finish(const RowBlock<kRows>& block) {
    for (int row = 0; row < block.rows; ++row) {
      float* acc = acc_ + slot_of(row) * args_.head_dim;
      for (int64_t d = 0; d + 2 * kLanes <= args_.head_dim; d += 2 * kLanes)
        Math::in_order(acc + d);
    }
  }

  const float* acc(int row) const { return acc_ + slot_of(row) * args_.head_dim; }

  SoftmaxState state(int row) const {
    SoftmaxState state;
    const int slot = slot_of(row);
    const float sum = _mm512_reduce_add_ps(_mm512_load_ps(fixed_.sum[slot]));
    if (sum != 0.0f) {
      state.max = fixed_.max[slot] * kLn2;
      state.sum = sum;
    }
    return state;
  }

 private:
  struct Fixed {
    alignas(64) float scores[kRows][kSlots];
    alignas(64) Weight weights[kRows][kSlots];
    alignas(64) float sum[kRows][kLanes];  // key j of a tile goes to lane j % kLanes
    float max[kRows];
  };

  // Rows of a head come in ones, twos or fours; those that don't exist are zero.
  static int padded_rows(int rows) { return rows < 1 ? 1 : rows <= 2 ? rows : round_up(rows, 4); }

  static int64_t query_words(const AttentionArgs& args) {
    return (args.head_dim / kStep + kLanes - 1) / kLanes * kLanes;
  }

  int rows_at_once() const { return slots_ < 4 ? slots_ : 4; }
  int slot_of(int row) const { return row / rows_ * slots_ + row % rows_; }

  // Scores of kR rows with all keys of the tile; its last key stands in for those that are missing.
  // Asks for as many lines as it reads.
  template <int kR>
  void score(const T* k, int keys, int slot) {
    constexpr int kSums = kLanes / kR;                      // of a row
    constexpr int kAtOnce = kSums < kKeys ? kSums : kKeys;  // keys
    const float* q = q_ + slot * query_words_;
    for (int first = 0; first < keys; first += kAtOnce) {
      const T* row[kAtOnce];
      __m512 sums[16];  // [row][key]
#pragma GCC unroll 16
      for (int j = 0; j < kAtOnce; ++j)
        row[j] = k + (first + j < keys ? first + j : keys - 1) * args_.k_token_stride;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
      auto multiply = [&](int64_t w, int64_t words) __attribute__((always_inline)) {
        __m512 query[kR];
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r) query[r] = _mm512_load_ps(q + r * query_words_ + w);
#pragma GCC unroll 16
        for (int j = 0; j < kAtOnce; ++j) {
          const __m512 key = Math::load(row[j], w, words);
#pragma GCC unroll 4
          for (int r = 0; r < kR; ++r) {
            __m512& sum = sums[r * kSums + j];
            sum = Math::multiply_add(query[r], key, sum);
          }
        }
        ahead_.prefetch(kAtOnce * kLanes * kStep * static_cast<int>(sizeof(T)) / 64);
      };
      int64_t w = 0;
      for (; w + kLanes <= words_; w += kLanes) multiply(w, w + kLanes);
      if (w < words_) multiply(w, words_);
      alignas(64) float scores[kR][kSums];
      _mm512_store_ps(scores[0], sum_each(sums));
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r)
        std::memcpy(fixed_.scores[slot + r] + first, scores[r], kAtOnce * sizeof(float));
    }
  }

  // The same for four rows of elements that no instruction has to convert: 16 bytes of a key meet
  // those of all four rows at once, a row in each quarter of a vector, so that only four values of
  // each product are left to add up.
  void score_four(const T* k, int keys, int slot) {
    const float* q = q_ + slot * query_words_;
    for (int first = 0; first < keys; first += kLanes) {
      constexpr int kGroups = (kKeys < kLanes ? kKeys : kLanes) / 8;
      __m512 fours[2 * kGroups];  // the scores of four keys, a row in each quarter
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) score_eight(k, first + 8 * g, keys, q, fours + 2 * g);
      const __m512 low = _mm512_shuffle_f32x4(fours[0], fours[1], 0x44);
      const __m512 high = _mm512_shuffle_f32x4(fours[0], fours[1], 0xee);
      if constexpr (kGroups == 2) {
        const __m512 low2 = _mm512_shuffle_f32x4(fours[2], fours[3], 0x44);
        const __m512 high2 = _mm512_shuffle_f32x4(fours[2], fours[3], 0xee);
        _mm512_store_ps(fixed_.scores[slot] + first, _mm512_shuffle_f32x4(low, low2, 0x88));
        _mm512_store_ps(fixed_.scores[slot + 1] + first, _mm512_shuffle_f32x4(low, low2, 0xdd));
        _mm512_store_ps(fixed_.scores[slot + 2] + first, _mm512_shuffle_f32x4(high, high2, 0x88));
        _mm512_store_ps(fixed_.scores[slot + 3] + first, _mm512_shuffle_f32x4(high, high2, 0xdd));
      } else {
        const __m512 rows01 = _mm512_shuffle_f32x4(low, low, 0xd8);
        const __m512 rows23 = _mm512_shuffle_f32x4(high, high, 0xd8);
        _mm256_store_ps(fixed_.scores[slot], _mm512_castps512_ps256(rows01));
        _mm256_store_ps(fixed_.scores[slot + 1], _mm512_extractf32x8_ps(rows01, 1));
        _mm256_store_ps(fixed_.scores[slot + 2], _mm512_castps512_ps256(rows23));
        _mm256_store_ps(fixed_.scores[slot + 3], _mm512_extractf32x8_ps(rows23, 1));
      }
    }
  }

  // Of eight keys from `first` on.
  __attribute__((always_inline)) void score_eight(const T* k, int first, int keys, const float* q,
                                                  __m512* fours) {
    const T* row[8];
    __m512 sums[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      row[j] = k + (first + j < keys ? first + j : keys - 1) * args_.k_token_stride;
      sums[j] = _mm512_setzero_ps();
    }
    for (int64_t d = 0; d < args_.head_dim; d += kQuarter, q += kLanes) {
      const __m512 query = _mm512_load_ps(q);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const __m128 words = _mm_loadu_ps(reinterpret_cast<const float*>(row[j] + d));
        sums[j] = Math::multiply_add(query, _mm512_broadcast_f32x4(words), sums[j]);
      }
      ahead_.prefetch(8 * 16 / 64);
    }
    auto sum_pairs = [](__m512 a, __m512 b) {
      return (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    };
#pragma GCC unroll 2
    for (int j = 0; j < 8; j += 4) {
      const __m512d a = sum_pairs(sums[j], sums[j + 1]), b = sum_pairs(sums[j + 2], sums[j + 3]);
      fours[j / 4] =
          _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
  }

  // Turns a row's scores into weights, 0 from `visible` on.
  void weigh(int slot, int visible) {
    const __m512 scale = _mm512_set1_ps(scale_log2_);
    __mmask16 seen[kSlots / kLanes];
    __m512 scores[kSlots / kLanes];
    __mmask16 above = 0;
#pragma GCC unroll 2
    for (int i = 0; i < kSlots / kLanes; ++i) {
      const int left = visible - i * kLanes;
      seen[i] = left >= kLanes ? 0xffff : (1u << (left < 0 ? 0 : left)) - 1;
      scores[i] = load_scores(fixed_.scores[slot] + i * kLanes);
      above |= _mm512_mask_cmp_ps_mask(seen[i], _mm512_mul_ps(scores[i], scale),
                                       _mm512_set1_ps(fixed_.max[slot] + kSlack), _CMP_GT_OQ);
    }
    if (above) {
      __m512 largest = _mm512_set1_ps(kNoScore);
#pragma GCC unroll 2
      for (int i = 0; i < kSlots / kLanes; ++i)
        largest = _mm512_mask_max_ps(largest, seen[i], largest, _mm512_mul_ps(scores[i], scale));
      raise(slot, _mm512_reduce_max_ps(largest));
    }
    __m512 sum = _mm512_load_ps(fixed_.sum[slot]);
#pragma GCC unroll 2
    for (int i = 0; i < kSlots / kLanes; ++i) {
      const __m512 shifted = _mm512_fmsub_ps(scores[i], scale, _mm512_set1_ps(fixed_.max[slot]));
      const __m512 weights = _mm512_maskz_mov_ps(seen[i], Math::exp2(shifted));
      sum = _mm512_add_ps(sum, Math::store_weights(weights, fixed_.weights[slot] + i * kLanes));
    }
    _mm512_store_ps(fixed_.sum[slot], sum);
  }

  // No wider than `score_four` stores them, or the processor waits for the store to reach its
  // cache.
  static __m512 load_scores(const float* scores) {
    return kKeys < kLanes ? _mm512_castps256_ps512(_mm256_load_ps(scores)) : _mm512_load_ps(scores);
  }

  // Raises a row's maximum, with all that was computed against the old one.
  __attribute__((noinline)) void raise(int slot, float max) {
    const __m512 keep = exp2_full(_mm512_set1_ps(fixed_.max[slot] - max));
    fixed_.max[slot] = max;
    _mm512_store_ps(fixed_.sum[slot], _mm512_mul_ps(_mm512_load_ps(fixed_.sum[slot]), keep));
    float* acc = acc_ + slot * args_.head_dim;
    for (int64_t d = 0; d < args_.head_dim; d += kLanes)
      _mm512_store_ps(acc + d, _mm512_mul_ps(_mm512_load_ps(acc + d), keep));
  }

  // Adds the weighted values of the tile to kR rows.
  template <int kR>
  void accumulate(const T* v, int keys, int slot) {
    constexpr int kWide = kR == 4 ? 4 : 8;  // vectors, to hide the latency of a multiplication
    int64_t d = 0;
    for (; d + kWide * kLanes <= args_.head_dim; d += kWide * kLanes)
      add_values<kR, kWide>(v, keys, slot, d);
    for (; d + 2 * kLanes <= args_.head_dim; d += 2 * kLanes) add_values<kR, 2>(v, keys, slot, d);
    if (d < args_.head_dim) add_values<kR, 1>(v, keys, slot, d);
  }

  // 16 kN dimensions of it, as Math::load_step gives them. Asks for as many lines as it reads.
  template <int kR, int kN>
  void add_values(const T* v, int keys, int slot, int64_t d) {
    float* acc = acc_ + slot * args_.head_dim + d;
    __m512 sums[kR][kN];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n)
        sums[r][n] = _mm512_load_ps(acc + r * args_.head_dim + n * kLanes);
    for (int j = 0; j < keys; j += kStep) {
      __m512 values[kN];
      // The last of an odd number of keys stands in for the next, whose weights are 0.
      Math::load_step(v + j * args_.v_token_stride + d, j + 1 < keys ? args_.v_token_stride : 0,
                      values);
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) {
        float word;
        std::memcpy(&word, fixed_.weights[slot + r] + j, sizeof(word));
        const __m512 weight = _mm512_set1_ps(word);
#pragma GCC unroll 8
        for (int n = 0; n < kN; ++n) sums[r][n] = Math::multiply_add(weight, values[n], sums[r][n]);
      }
      ahead_.prefetch((kN * kLanes * kStep * static_cast<int>(sizeof(T)) + 63) / 64);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n)
        _mm512_store_ps(acc + r * args_.head_dim + n * kLanes, sums[r][n]);
  }

  FlushSubnormals flush_;
  const AttentionArgs& args_;
  const int64_t words_;        // of a row of Q or K
  const int64_t query_words_;  // the same, in whole vectors
  Fixed& fixed_;
  float* q_;    // [slots][query_words_]
  float* acc_;  // [slots][head_dim]
  float scale_log2_;
  int rows_ = 0;   // of each head
  int slots_ = 0;  // the same, padded
  StreamAhead ahead_;
};

// With tiles of 16 KB where that is 8 to 32 keys. Larger ones were measured to cost a fifth of the
// rate, perhaps because the level-1 cache then loses the lines of V that come along with those of
// K.
template <class Math>
inline void run_stream(const AttentionArgs& args, int threads) {
  constexpr int64_t kTileBytes = 16 << 10;
  const int64_t heads = StreamKernel<Math, 16>::heads(args);
  const int64_t keys =
      kTileBytes / (2 * heads * args.head_dim * static_cast<int64_t>(sizeof(typename Math::Input)));
  if (keys >= 32) return run<StreamKernel<Math, 32>>(args, threads);
  if (keys >= 16) return run<StreamKernel<Math, 16>>(args, threads);
  run<StreamKernel<Math, 8>>(args, threads);
}

}  // namespace
}  // namespace cptool::cpu
