// attention_partial in float32 arithmetic with AVX-512; bfloat16 and float16 inputs are widened
// while they are packed.
//
// Both products are register-blocked the same way (avx512_panel.h): 8 keys (or 8 dimensions) by 48
// rows in 24 accumulators, 3 vector loads and 8 broadcasts for 24 multiply-adds, so that the two
// FMA ports are the limit.
#include "cpu/avx512_panel.h"
#include "cpu/avx512_stream.h"

namespace cptool::cpu {
namespace {

constexpr int kTile = 8;     // keys, or dimensions, of a register tile
constexpr int kVectors = 3;  // vectors of rows of a register tile
constexpr int kPanel = kVectors * kLanes;

// scores[j][row] = sum over d of k[j][d] * q[d][row] for 8 keys.
template <int kN>
inline void multiply_keys(const float* k, const float* q, int64_t head_dim, float* scores) {
  __m512 acc[kTile][kN];
#pragma GCC unroll 8
  for (int j = 0; j < kTile; ++j)
#pragma GCC unroll 3
    for (int n = 0; n < kN; ++n) acc[j][n] = _mm512_setzero_ps();
  for (int64_t d = 0; d < head_dim; ++d) {
    __m512 rows[kN];
#pragma GCC unroll 3
    for (int n = 0; n < kN; ++n) rows[n] = _mm512_load_ps(q + (d * kN + n) * kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j) {
      const __m512 key = _mm512_set1_ps(k[j * head_dim + d]);
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) acc[j][n] = _mm512_fmadd_ps(key, rows[n], acc[j][n]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kTile; ++j)
#pragma GCC unroll 3
    for (int n = 0; n < kN; ++n) _mm512_store_ps(scores + (j * kN + n) * kLanes, acc[j][n]);
}

// acc[i][row] = acc[i][row] * keep[row] + sum over keys of v[key][i] * weights[key][row] for 8
// dimensions i.
template <int kN>
inline void multiply_values(const float* v, const float* weights, int keys,
                            const __m512 (&keep)[kN], float* out) {
  __m512 acc[kTile][kN];
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 3
    for (int n = 0; n < kN; ++n)
      acc[i][n] = _mm512_mul_ps(_mm512_load_ps(out + (i * kN + n) * kLanes), keep[n]);
  for (int j = 0; j < keys; ++j) {
    __m512 rows[kN];
#pragma GCC unroll 3
    for (int n = 0; n < kN; ++n) rows[n] = _mm512_load_ps(weights + (j * kN + n) * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
      const __m512 value = _mm512_set1_ps(v[j * kTile + i]);
#pragma GCC unroll 3
      for (int n = 0; n < kN; ++n) acc[i][n] = _mm512_fmadd_ps(value, rows[n], acc[i][n]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 3
    for (int n = 0; n < kN; ++n) _mm512_store_ps(out + (i * kN + n) * kLanes, acc[i][n]);
}

// Turns scores into weights in place, updates max and sum; keep = 2^(old max - new max). Row r sees
// the first limit[r] of these keys.
template <int kN, bool masked>
inline void softmax(float* scores, int keys, const int32_t* limit, int64_t key, float scale_log2,
                    float* max, float* sum, __m512 (&keep)[kN]) {
  __m512i left[kN];
  __m512 base[kN], total[kN];
  for (int n = 0; n < kN; ++n) {
    left[n] = _mm512_sub_epi32(_mm512_load_si512(limit + n * kLanes),
                               _mm512_set1_epi32(static_cast<int32_t>(key)));
    base[n] = _mm512_set1_ps(-INFINITY);
    total[n] = _mm512_setzero_ps();
  }
  for (int j = 0; j < keys; ++j) {
    for (int n = 0; n < kN; ++n) {
      const __m512 score = _mm512_load_ps(scores + (j * kN + n) * kLanes);
      base[n] = masked ? _mm512_mask_max_ps(base[n],
                                            _mm512_cmpgt_epi32_mask(left[n], _mm512_set1_epi32(j)),
                                            base[n], score)
                       : _mm512_max_ps(base[n], score);
    }
  }
  const __m512 scale = _mm512_set1_ps(scale_log2);
  for (int n = 0; n < kN; ++n) {
    const __m512 old = _mm512_load_ps(max + n * kLanes);
    base[n] = _mm512_max_ps(_mm512_mul_ps(base[n], scale), old);
    keep[n] = exp2_full(_mm512_sub_ps(old, base[n]));
  }
  for (int j = 0; j < keys; ++j) {
    for (int n = 0; n < kN; ++n) {
      float* at = scores + (j * kN + n) * kLanes;
      __m512 weight = exp2_full(_mm512_fmsub_ps(_mm512_load_ps(at), scale, base[n]));
      if (masked)
        weight =
            _mm512_maskz_mov_ps(_mm512_cmpgt_epi32_mask(left[n], _mm512_set1_epi32(j)), weight);
      total[n] = _mm512_add_ps(total[n], weight);
      _mm512_store_ps(at, weight);
    }
  }
  for (int n = 0; n < kN; ++n) {
    _mm512_store_ps(max + n * kLanes, base[n]);
    _mm512_store_ps(sum + n * kLanes,
                    _mm512_fmadd_ps(_mm512_load_ps(sum + n * kLanes), keep[n], total[n]));
  }
}

template <class T>
class PanelKernel {
 public:
  static constexpr int kRows = 8 * kPanel;
  static constexpr int kKeys = 128;

  static size_t scratch_bytes(const AttentionArgs& args) {
    return sizeof(Fixed) + (2 * kRows + 2 * kKeys + kTile) * args.head_dim * sizeof(float);
  }

  PanelKernel(const AttentionArgs& args, void* scratch)
      : args_(args),
        fixed_(*static_cast<Fixed*>(scratch)),
        q_(reinterpret_cast<float*>(static_cast<char*>(scratch) + sizeof(Fixed))),
        acc_(q_ + kRows * args.head_dim),
        k_(acc_ + kRows * args.head_dim),
        v_(k_ + kKeys * args.head_dim),
        scale_log2_((args.scale < 0 ? -args.scale : args.scale) * kLog2E) {}

  void begin(const RowBlock<kRows>& block) {
    const int rows = round_up(block.rows, kLanes);
    fixed_.rows.begin(block, rows);
    for (int row = 0; row < rows; row += kPanel) {
      const int vectors = panel_vectors(block, row);
      for (int n = 0; n < vectors; ++n) {
        transpose_queries<T>(block, row + n * kLanes, args_.head_dim,
                             args_.scale < 0 ? -1.0f : 1.0f, vectors * kLanes,
                             q_ + row * args_.head_dim + n * kLanes);
      }
    }
    std::memset(acc_, 0, rows * args_.head_dim * sizeof(float));
  }

  template <bool masked>
  void tile(const RowBlock<kRows>& block, int64_t key, int keys) {
    pack(block, key, keys);
    const int share = kKeys / ((block.rows + kPanel - 1) / kPanel);
    for (int row = 0; row < block.rows; row += kPanel) {
      prefetch_keys(args_, block, key + kKeys + row / kPanel * share, share);
      switch (panel_vectors(block, row)) {
        case 1:
          panel<1>(row, key, keys);
          break;
        case 2:
          panel<2>(row, key, keys);
          break;
        default:
          panel<3>(row, key, keys);
      }
    }
  }

  void finish(const RowBlock<kRows>& block) {
    // Into the memory of the queries, which are not needed any more.
    for (int row = 0; row < block.rows; row += kPanel) {
      const int vectors = panel_vectors(block, row);
      for (int n = 0; n < vectors; ++n) {
        for (int64_t d = 0; d < args_.head_dim; d += kLanes) {
          __m512 r[kLanes];
          const float* from = acc_ + row * args_.head_dim + (d * vectors + n) * kLanes;
          for (int i = 0; i < kLanes; ++i) r[i] = _mm512_load_ps(from + i * vectors * kLanes);
          transpose16(r);
          float* to = q_ + (row + n * kLanes) * args_.head_dim + d;
          for (int i = 0; i < kLanes; ++i) _mm512_store_ps(to + i * args_.head_dim, r[i]);
        }
      }
    }
  }

  const float* acc(int row) const { return q_ + row * args_.head_dim; }
  SoftmaxState state(int row) const { return fixed_.rows.state(row); }

 private:
  struct Fixed {
    RowStates<kRows> rows;
    alignas(64) float scores[kKeys * kPanel];
  };
  // A panel of V is 8 dimensions of all keys of the tile. One cache line of padding keeps the
  // panels from sharing cache sets.
  static constexpr int kValuePanel = (kKeys + 2) * kTile;

  static int panel_vectors(const RowBlock<kRows>& block, int row) {
    const int left = block.rows - row;
    return left >= kPanel ? kVectors : round_up(left, kLanes) / kLanes;
  }

  // K to [key][dim], V to [dim / 8][key][dim % 8], zeros up to a whole register tile of keys.
  void pack(const RowBlock<kRows>& block, int64_t key, int keys) {
    const int64_t head_dim = args_.head_dim;
    const T* k = static_cast<const T*>(block.k) + key * args_.k_token_stride;
    const T* v = static_cast<const T*>(block.v) + key * args_.v_token_stride;
    const int padded = round_up(keys, kTile);
    for (int j = 0; j < padded; ++j) {
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        const bool exists = j < keys;
        const __m512 value =
            exists ? load16(v + j * args_.v_token_stride + d) : _mm512_setzero_ps();
        _mm512_store_ps(k_ + j * head_dim + d,
                        exists ? load16(k + j * args_.k_token_stride + d) : _mm512_setzero_ps());
        float* to = v_ + (d / kTile) * kValuePanel + j * kTile;
        _mm256_store_ps(to, _mm512_castps512_ps256(value));
        _mm256_store_ps(to + kValuePanel, _mm512_extractf32x8_ps(value, 1));
      }
    }
  }

  template <int kN>
  void panel(int row, int64_t key, int tile_keys) {
    RowStates<kRows>& rows = fixed_.rows;
    const Visible visible(rows, row, row + kN * kLanes - 1, key, tile_keys);
    if (visible.keys == 0) return;
    const int64_t head_dim = args_.head_dim;
    const float* q = q_ + row * head_dim;
    float* scores = fixed_.scores;
    const int keys = round_up(visible.keys, kTile);
    for (int j = 0; j < keys; j += kTile)
      multiply_keys<kN>(k_ + j * head_dim, q, head_dim, scores + j * kN * kLanes);
    __m512 keep[kN];
    if (visible.masked || keys != visible.keys) {
      softmax<kN, true>(scores, keys, rows.limit + row, key, scale_log2_, rows.max + row,
                        rows.sum + row, keep);
    } else {
      softmax<kN, false>(scores, keys, rows.limit + row, key, scale_log2_, rows.max + row,
                         rows.sum + row, keep);
    }
    float* acc = acc_ + row * head_dim;
    for (int64_t d = 0; d < head_dim; d += kTile) {
      multiply_values<kN>(v_ + d / kTile * kValuePanel, scores, keys, keep, acc + d * kN * kLanes);
    }
  }

  FlushSubnormals flush_;
  const AttentionArgs& args_;
  Fixed& fixed_;
  float* q_;    // panels [head_dim][rows of the panel], one after the other
  float* acc_;  // the same
  float* k_;
  float* v_;
  float scale_log2_;
};

template <class T>
inline void run_rows(const AttentionArgs& args, int threads) {
  if (few_rows(args)) return run<StreamKernel<T>>(args, threads);
  run<PanelKernel<T>>(args, threads);
}

}  // namespace

bool avx512_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool avx512_handles(ScalarType, int64_t head_dim) { return head_dim % kLanes == 0; }

void attention_partial_avx512(const AttentionArgs& args, int threads) {
  switch (args.dtype) {
    case ScalarType::kFloat32:
      return run_rows<float>(args, threads);
    case ScalarType::kBFloat16:
      return run_rows<BFloat16>(args, threads);
    case ScalarType::kFloat16:
      return run_rows<Float16>(args, threads);
  }
}

}  // namespace cptool::cpu
