// Divides work into pieces that threads take in turn.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "attention.h"
#include "cpu/thread_pool.h"

namespace cptool::cpu {

// Bytes read and written that justify waking a thread: about 20 microseconds' worth.
constexpr int64_t kThreadBytes = 1 << 19;

inline int64_t size_of(ScalarType dtype) { return dtype == ScalarType::kFloat32 ? 4 : 2; }

// Calls run(begin, end) for pieces of [0, count), where each unit costs `bytes`. A piece is a
// multiple of `grain` units and close to `piece_bytes`.
template <class Run>
void in_pieces(int64_t count, int64_t bytes, int64_t piece_bytes, int64_t grain, int threads,
               const Run& run) {
  const int64_t piece =
      std::max<int64_t>(1, piece_bytes / std::max<int64_t>(bytes * grain, 1)) * grain;
  std::atomic<int64_t> next{0};
  auto body = [&] {
    for (;;) {
      const int64_t begin = next.fetch_add(piece, std::memory_order_relaxed);
      if (begin >= count) return;
      run(begin, std::min(begin + piece, count));
    }
  };
  run_parallel(
      static_cast<int>(std::min<int64_t>(threads, 1 + count * bytes / kThreadBytes)),
      [](void* self, int) { (*static_cast<decltype(body)*>(self))(); }, &body);
}

}  // namespace cptool::cpu
