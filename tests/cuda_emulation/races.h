// Finds races, whatever the order in which the threads happen to run.
//
// The kernels are compiled with -fsanitize=thread, which calls a function at every load and store;
// races.cpp defines these functions instead of the sanitizer's runtime. What orders two accesses is
// kept as vector clocks (Flanagan and Freund, FastTrack, 2009): a slot for each thread, and one for
// each unit that accesses shared memory asynchronously (the cp.async of a thread, an mbarrier's TMA
// loads, a warpgroup's products), whose time is the number of its groups or phases. A barrier, an
// mbarrier or __syncwarp passes on what its arrivals know to those that wait; a wait for copies or
// products adds what has ended. Shuffles, votes and ldmatrix order nothing, as the programming
// guide says. Two accesses to the same 4 bytes, one of them a write, of which the later one's
// thread does not know the earlier one, are a race.
//
// Seen are shared memory and the ranges of global memory in `watched`; nothing orders thread
// blocks of one launch. Atomics are not seen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

// Of the emulation's own functions, whose accesses are none of the kernel's.
#define UNREPORTED __attribute__((no_sanitize("thread")))

namespace emulation {

struct Block;
struct Fiber;

using Times = std::vector<uint32_t>;          // by slot; a slot beyond the end: 0
using Moment = std::shared_ptr<const Times>;  // null: nothing is known

constexpr uint32_t kNoSlot = UINT32_MAX;

// What a thread knows: of itself all, of others what was published to it.
struct Knowledge {
  uint32_t slot = 0, now = 1;
  uint32_t copies_slot = kNoSlot, copies_done = 0;  // of its cp.async
  Moment others;
};

// What threads have published since the last take().
class Publication {
 public:
  void add(Fiber& from);
  void add(uint32_t slot, uint32_t time);
  Moment take();

 private:
  Times times_;
  Moment last_;  // joined last
};

void learn(Fiber& fiber, const Moment& moment);

// Some threads of the running one's warp wait for each other.
void meet(uint32_t mask);

struct Access {
  uint32_t block = 0, slot = 0, time = 0;  // time 0: none
};

// What happened to 4 bytes.
struct Cell {
  Access written, read;
  uint32_t readers = 0;   // 1 + index of the list of all readers since, if there are several
  uint32_t unfenced = 0;  // 1 + the thread that wrote last, unless a fence of its followed
};

// What happened to a range of memory.
struct Shadow {
  uintptr_t begin = 0;
  std::vector<Cell> cells;
  std::vector<std::vector<Access>> lists;
  std::vector<uint32_t> unused_lists;
  bool shared = false;  // else global memory

  Shadow(const void* begin, size_t bytes, bool shared);
};

// Of a block.
struct Races {
  uint32_t block;
  Shadow shadow;
  std::vector<std::string> slots;               // names
  std::vector<std::vector<uint32_t>> unfenced;  // by thread: cells that it wrote
  std::vector<std::pair<std::pair<Moment, Moment>, Moment>> joined;  // lately
  size_t next_joined = 0;

  Races(uint32_t block, const void* shared, size_t bytes, unsigned threads);
};

// Global memory to watch in the launches that follow.
extern std::vector<std::pair<const uint8_t*, const uint8_t*>> watched;
void watch_launch();                // at the begin of a launch
void watch_thread(Block* running);  // a thread of it runs from now on; null: none

uint32_t new_slot(Block& block, const std::string& name);

// Asynchronous accesses to shared memory, which begin here and end when `as` is known.
void asynchronous_write(uint32_t offset, uint32_t bytes, Access as);
// `threads`: all that issue it.
void asynchronous_read(const std::vector<uint32_t>& offsets, uint32_t bytes, Access as,
                       Fiber* const* threads, int count);
// Of the running thread: copies that begin, and groups of them that have ended.
void copy_begins(uint32_t offset, uint32_t bytes, int group);
void copies_end(int group);

// A plain access of the running thread that the compiler does not report.
void touch(const void* at, size_t bytes, bool write);

// Returns the offsets of 4 bytes that the running thread wrote since its last call and nobody else
// has written since: what its fence makes visible to TMA and wgmma.
std::vector<uint32_t> take_unfenced();

}  // namespace emulation
