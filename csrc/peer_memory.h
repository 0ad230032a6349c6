// Messages between processes of one machine: one copy, from the memory of one process into that of
// the other, and words in shared memory that signal when to copy. Linux only.
#pragma once

#include <cstdint>

namespace cptool {

// Copies `bytes` at `from` in process `pid` to `to` in this process (process_vm_readv). Returns 0
// or an errno: EPERM if this process lacks permission, ESRCH if the other one has ended.
int read_peer(int64_t pid, uint64_t from, void* to, int64_t bytes);

// Stores `value` and wakes a process that waits for the word. Everything that this thread wrote
// before is visible to a process that has seen `value`.
void signal_word(uint32_t* word, uint32_t value);

// Blocks until the word is `value`: spins for about `spin_us` microseconds, then sleeps for at most
// `sleep_ms` milliseconds. Returns whether the word is `value`.
bool wait_word(const uint32_t* word, uint32_t value, int64_t spin_us, int64_t sleep_ms);

}  // namespace cptool
