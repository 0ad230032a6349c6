// Messages between processes of one machine: one copy, from the memory of one into that of the
// other, and words in shared memory that tell when. Linux alone.
#pragma once

#include <cstdint>

namespace cptool {

// Copies `bytes` at `from` in process `pid` to `to` in this one (process_vm_readv). 0, or the errno
// of what failed: EPERM where this process may not, ESRCH where that one is gone.
int read_peer(int64_t pid, uint64_t from, void* to, int64_t bytes);

// Stores `value` for waiting processes to see, after all that this thread has written before, and
// wakes them.
void signal_word(uint32_t* word, uint32_t value);

// Waits until the word is `value`: some `spin_us` microseconds awake, then asleep, at most
// `sleep_ms` milliseconds. Whether it is.
bool wait_word(const uint32_t* word, uint32_t value, int64_t spin_us, int64_t sleep_ms);

}  // namespace cptool
