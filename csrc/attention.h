// The contract between Python and every attention kernel, on every device.
//
// A partial attention result is the pair (out, lse): out = softmax(scale * q k^T) v over the keys
// given, lse the natural logarithm of the softmax denominator, float32, -inf (and out 0) for a
// query that saw no key. Partials over disjoint sets of keys merge exactly (softmax_state.h).
//
// Positions are the mask: key j of a sequence is visible to query i of the same sequence iff
// k_pos[j] <= q_pos[i]. Positions ascend within a sequence, so the keys visible to a query are a
// prefix of its sequence's keys; with a window they are a range of it, those whose k_pos[j] is also
// above q_pos[i] - window. Slots beyond the last visible key may be uninitialised memory, which
// must not affect any result. Keys ahead of every window are read at most as far as they share a
// tile with visible ones, and are then multiplied by a weight of 0.
//
// A soft cap replaces each scaled score s by cap tanh(s / cap), before the softmax.
//
// SiLU attention is a second kind of partial: out = silu(scale * q k^T) v / max_len, with silu(s) =
// s / (1 + e^-s), over the keys that a query sees. It has no lse: partials over disjoint sets of
// keys add up. (HSTU: Zhai et al., 2024.)
#pragma once

#include <cstdint>

namespace cptool {

// How scores become weights.
enum class Kind { kSoftmax, kSilu };

enum class ScalarType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct AttentionArgs {
  // q [q_tokens, q_heads, head_dim], k and v [k_tokens, kv_heads, head_dim]; strides in elements,
  // innermost stride 1.
  const void* q;
  const void* k;
  const void* v;
  int64_t q_token_stride, q_head_stride;
  int64_t k_token_stride, k_head_stride;
  int64_t v_token_stride, v_head_stride;
  const int32_t* q_pos;  // [q_tokens]
  const int32_t* k_pos;  // [k_tokens]
  const int32_t* cu_q;   // [batch + 1] token offsets of the sequences
  const int32_t* cu_k;   // [batch + 1]
  int64_t batch, q_tokens, k_tokens, q_heads, kv_heads, head_dim;
  float scale;
  ScalarType q_dtype;    // of q: dtype or, on the CPU, float32
  ScalarType dtype;      // of k and v
  ScalarType out_dtype;  // float32, or q_dtype; float32 when accumulating
  void* out;             // [q_tokens, q_heads, head_dim], contiguous
  float* lse;            // [q_tokens, q_heads], contiguous; null for SiLU attention
  bool accumulate;       // merge into the partial that out and lse already hold
  int64_t window = 0;    // how many positions a query sees, its own the last; 0: all up to it
  float cap = 0.0f;      // of the scores; 0: none
  // On CUDA, where transfers between GPUs run at the same time: how many multiprocessors to leave
  // to them. A kernel that fills the device would otherwise keep them from starting.
  int32_t sm_margin = 0;
  float max_len = 0.0f;  // divides the weights of SiLU attention; 0: softmax attention
};

inline Kind kind(const AttentionArgs& args) {
  return args.max_len == 0.0f ? Kind::kSoftmax : Kind::kSilu;
}

// Softmax attention without window and cap.
inline bool is_plain(const AttentionArgs& args) {
  return args.window == 0 && args.cap == 0.0f && args.max_len == 0.0f;
}

struct MergeArgs {
  const void* const* outs;   // `partials` pointers to [rows, head_dim], contiguous
  const float* const* lses;  // `partials` pointers to [rows]
  int64_t partials, rows, head_dim;
  ScalarType dtype;      // of every outs[i]
  ScalarType out_dtype;  // of out
  void* out;             // [rows, head_dim]
  float* lse;            // [rows]
};

}  // namespace cptool
