// A CUDA grid on one CPU thread: every CUDA thread is a fiber.
//
// A fiber runs until it waits: at a barrier, at a warp's collective, for an asynchronous copy. Then
// the scheduler continues with another one, drawn at random from a seed. Threads, warps and blocks
// therefore run in any order that the barriers allow, and a missing barrier has consequences:
// something is read before it is written, or overwritten before it is read. If no thread can
// continue, a deadlock is reported, with what the threads wait for.
//
// fail() ends the launch with an exception from run_grid(), whichever thread calls it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "races.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct uint3 {
  unsigned x, y, z;
};

namespace emulation {

constexpr int kWarp = 32;
constexpr int kBarriers = 16;

struct Fiber;

// Runs a warp's collective when all lanes of its mask have arrived: lanes[i] is the argument of
// lane i, null outside the mask.
using Collective = void (*)(void* const* lanes);

struct Pending {
  uint32_t mask, arrived;
  Collective run;
  const char* name;
  void* lanes[kWarp];
};

struct Warp {
  std::vector<Pending> pending;
  Fiber* lanes[kWarp] = {};
};

struct Barrier {
  int expected = 0, arrived = 0;  // threads
  std::vector<Fiber*> waiting;
  Publication published;
};

struct Block {
  uint3 index;
  unsigned threads, running;
  uint8_t* shared;  // aligned to 1024 bytes
  size_t shared_bytes;
  Barrier barriers[kBarriers];
  std::vector<Warp> warps;
  // The state of extensions (mbarriers, transactions), freed with the block.
  std::shared_ptr<void> extension;
  std::unique_ptr<Races> races;
};

// cp.async of one thread: dropped into shared memory at a moment of the scheduler's choice between
// its issue and the wait that covers it.
struct Copy {
  uint8_t* to;
  const uint8_t* from;
  uint32_t bytes, zeros;  // bytes copied, and zeros written after them
  int group;
};

struct Fiber {
  void* stack_pointer = nullptr;
  uint8_t* stack = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  uint3 thread = {};
  const char* waits_for = nullptr;  // null: runs, or is ready to
  std::deque<Copy> copies;          // not yet dropped, oldest first
  int group = 0;                    // cp.async groups committed
  Knowledge knows;
};

struct Options {
  uint64_t seed = 0;
  unsigned resident = 2;  // blocks that run at the same time
  unsigned multiprocessors = 4;
  unsigned l2_bytes = 1 << 20;
  int compute_capability = 80;
  bool races = true;  // are looked for
  int mistake = 0;    // the one that a kernel built with planted mistakes makes; 0: none
};

// Counts over launches until they are reset.
struct Counters {
  uint64_t blocks, switches, collectives;
  uint64_t bank_conflicts;  // of ldmatrix and the like: accesses beyond the one that is needed
  uint64_t votes_won;       // threads to which __any_sync returned true
};

extern Options options;
extern Counters counters;
extern Fiber* current;  // the running thread
extern dim3 grid_size, block_size;

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

[[noreturn]] void fail(const std::string& message);

// Returns the next 64 random bits.
uint64_t random_bits();

// Lets other threads run. wait() returns after another thread or an action calls wake();
// `waits_for`, a literal, goes into the message of a deadlock.
void yield();
void wait(const char* waits_for);
void wake(Fiber* fiber);

// Runs `action` outside every thread at a moment of the scheduler's choice: an asynchronous copy,
// its signal to a barrier. A grid ends when all its actions are done.
void later(std::function<void()> action);

// bar.sync and bar.arrive.
void barrier(int id, int threads, bool wait_there);
void warp_collective(uint32_t mask, Collective run, void* mine, const char* name);

// A 32-bit shared address is an offset into the block's dynamic shared memory; addresses outside it
// fail.
uint32_t shared_address(const void* pointer);
uint8_t* shared_pointer(uint32_t address, size_t bytes, size_t alignment);

// Global memory that kernels may read through wrappers that check (cp.async, TMA). No range at all:
// no check. Bytes that no kernel may read are left out.
extern std::vector<std::pair<const uint8_t*, const uint8_t*>> readable;
void check_readable(const void* from, size_t bytes, size_t alignment);

void drop(const Copy& copy);
// Drops the copies of the running thread whose group is below `group`, in any order.
void drop_copies(int group);

}  // namespace emulation
