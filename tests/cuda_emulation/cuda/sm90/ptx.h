// Replaces csrc/cuda/sm90/ptx.h in the emulation: mbarriers, TMA, wgmma and the fences between
// them, written from the PTX ISA manual, independently of the layouts in the kernel.
//
// An asynchronous operation happens at a random moment between its issue and the wait for it. Until
// then its results are NaN: the destination of a copy, the accumulators of products. Operands are
// read at that moment, so that shared memory that is refilled too early, or a fragment that is
// overwritten while in flight, gives a wrong result. TMA and wgmma see shared memory through a
// proxy, which is a second copy here: the writes of a thread reach it only with its own
// fence.proxy.async.
#pragma once

#include <cstring>

#include "cuda/ptx.h"
#include "cuda/sm90/tensor_map.h"
#include "hopper.h"
#include "wgmma.h"

namespace cptool::cuda::ptx {

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  using namespace emulation;
  touch(shared_pointer(barrier, 8, 8), 8, true);
  Mbarrier made = {};
  made.arrivals = made.pending = arrivals;
  made.made_by = current;
  made.slot = new_slot(*current->block, "TMA for the mbarrier at " + std::to_string(barrier));
  hopper(*current->block).mbarriers[barrier] = std::move(made);
}

// Of the writes of this thread alone.
inline void fence_proxy_async() {
  emulation::Block& block = *emulation::current->block;
  uint8_t* const proxy = emulation::hopper(block).proxy.data();
  for (uint32_t at : emulation::take_unfenced()) {
    std::memcpy(proxy + at, block.shared + at, std::min<size_t>(4, block.shared_bytes - at));
  }
}

inline void fence_mbarrier_init() {
  for (auto& barrier : emulation::hopper(*emulation::current->block).mbarriers) {
    if (barrier.second.made_by == emulation::current) barrier.second.proxied = true;
  }
  fence_proxy_async();
}

inline void mbarrier_arrive(uint32_t barrier) { emulation::arrive_at(barrier, 0); }

inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  emulation::arrive_at(barrier, bytes);
}

inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  using namespace emulation;
  Mbarrier& waited = mbarrier_at(*current->block, barrier);
  while (waited.parity == parity) {
    waited.waiting.push_back(current);
    wait("an mbarrier");
  }
  learn(*current, waited.known[parity]);
}

inline void barrier_sync(uint32_t id, uint32_t threads) {
  emulation::barrier(static_cast<int>(id), static_cast<int>(threads), true);
}
inline void barrier_arrive(uint32_t id, uint32_t threads) {
  emulation::barrier(static_cast<int>(id), static_cast<int>(threads), false);
}

template <int kRegisters>
void registers_shrink() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void registers_grow() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

inline void prefetch(const TensorMap&) {}

inline uint64_t evict_first() { return 0x12f0000000000000; }
inline uint64_t evict_last() { return 0x14f0000000000000; }

inline void load_box(uint32_t to, const TensorMap& map, int32_t x, int32_t y, int32_t z,
                     uint32_t barrier, uint64_t policy) {
  using namespace emulation;
  if (policy != evict_first() && policy != evict_last()) fail("TMA: no policy for L2");
  Block* const block = current->block;
  const uint32_t rows = map.box[1] * map.box[2];
  uint8_t* const there = shared_pointer(to, rows * 128, 128);
  Mbarrier& signalled = mbarrier_at(*block, barrier);
  if (!signalled.proxied) fail("TMA: no fence since its mbarrier was initialised");
  check_unread(*block, to, to + rows * 128);
  asynchronous_write(to, rows * 128, {0, signalled.slot, signalled.over + 1});
  std::memset(there, 0xff, rows * 128);
  std::memset(hopper(*block).proxy.data() + to, 0xff, rows * 128);
  const TensorMap copy = map;
  const uint64_t patience = random_bits() % 2 ? 1 : 100;
  for (int half = 0; half < 2; ++half) {
    const uint32_t begin = half == 0 ? 0 : rows / 2, end = half == 0 ? rows / 2 : rows;
    if (begin == end) continue;
    much_later(patience, [=] {
      copy_box(block, to, copy, x, y, z, begin, end);
      Mbarrier& waiting = mbarrier_at(*block, barrier);
      waiting.bytes -= (end - begin) * 128;
      if (waiting.bytes < 0) fail("TMA: more bytes than the mbarrier expects");
      end_phase_if_complete(waiting);
    });
  }
}

inline void wgmma_fence() {
  char nothing;
  emulation::warpgroup_collective(
      [](emulation::Block&, emulation::Warpgroup& group) { group.fenced = true; }, &nothing,
      "wgmma.fence");
}

inline void wgmma_commit() {
  char nothing;
  emulation::warpgroup_collective(
      [](emulation::Block&, emulation::Warpgroup& group) { group.groups.emplace_back(); }, &nothing,
      "wgmma.commit_group");
}

template <int kPending>
void wgmma_wait() {
  char nothing;
  emulation::warpgroup_collective(
      [](emulation::Block& block, emulation::Warpgroup& group) {
        emulation::end_groups(block, group, kPending);
      },
      &nothing, "wgmma.wait_group");
}

template <class Register, int kCount>
void keep_in_place(Register (&)[kCount]) {}

template <class T>
UNREPORTED float decode(uint16_t bits) {
  return element<T>(bits, 0);
}

template <class T>
void wgmma_shared(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  emulation::IssuedProduct mine = {};
  mine.product.columns = 128;
  mine.product.decode = decode<T>;
  mine.product.a = a;
  mine.product.b = b;
  mine.product.accumulate = accumulate;
  mine.product.d[0] = d;
  emulation::warpgroup_collective(emulation::IssuedProduct::run, &mine, "wgmma.mma_async");
}

template <class T>
void wgmma_registers_rows(float (&d)[64], const uint32_t* a, uint64_t b, bool accumulate) {
  emulation::IssuedProduct mine = {};
  mine.product.columns = 128;
  mine.product.decode = decode<T>;
  mine.product.b = b;
  mine.product.a_in_registers = true;
  mine.product.accumulate = accumulate;
  mine.product.d[0] = d;
  mine.product.fragments[0] = a;
  emulation::warpgroup_collective(emulation::IssuedProduct::run, &mine, "wgmma.mma_async");
}

template <class T, int kCount>
void wgmma_registers(float (&d)[kCount], const uint32_t* a, uint64_t b) {
  emulation::IssuedProduct mine = {};
  mine.product.columns = 2 * kCount;
  mine.product.decode = decode<T>;
  mine.product.b = b;
  mine.product.a_in_registers = mine.product.accumulate = mine.product.transposed = true;
  mine.product.d[0] = d;
  mine.product.fragments[0] = a;
  emulation::warpgroup_collective(emulation::IssuedProduct::run, &mine, "wgmma.mma_async");
}

}  // namespace cptool::cuda::ptx
