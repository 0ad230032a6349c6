// Prefetching for stream_kernel.h. Unnamed namespace: see isa.h.
#pragma once

#include "cpu/panel.h"

namespace cptool::cpu {
namespace {

// Walks the lines of K and V in the order of their addresses, and prefetches them into the level-2
// cache. Not into level 1: it has too few buffers for lines in flight to keep memory busy, and a
// tile of many heads and its successor exceed its size, so that lines would be evicted before their
// use.
class StreamAhead {
 public:
  StreamAhead() = default;

  // Walks keys [key, end) of `heads` heads.
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
    if (adjoin) {  // all keys are one row
      row_bytes_ *= 2 * left_;
      left_ = 0;
    }
    begin_row();
  }

  // Whether to prefetch two steps of `bytes` together, which takes fewer instructions. Longer
  // bursts were measured to be slower: they fill the queue of misses.
  static constexpr bool together(int bytes) { return bytes <= kLine; }

  // Prefetches the next `bytes`. May run past the end of a row, and steps of less than a line
  // prefetch it again: such prefetches cost little.
  __attribute__((always_inline)) void prefetch(int bytes) {
    if (at_ >= row_end_ && (left_ == 0 || !next_row())) return;
    for (int i = 0; i < bytes; i += kLine) _mm_prefetch(at_ + i, _MM_HINT_T1);
    at_ += bytes;
  }

 private:
  static constexpr int kLine = 64;

  struct Part {      // K or V
    const char* at;  // head 0 of the current key
    int64_t token_stride, head_stride;
  };

  void begin_row() {
    at_ = parts_[part_].at + head_ * parts_[part_].head_stride;
    row_end_ = at_ + row_bytes_;
  }

  // Returns false if there is none. Some keys must be left.
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

}  // namespace
}  // namespace cptool::cpu
