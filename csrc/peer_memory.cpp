#include "peer_memory.h"

#include <cerrno>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#endif

namespace cptool {

#if defined(__linux__)

namespace {

int64_t now_us() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1000000} + now.tv_nsec / 1000;
}

}  // namespace

int read_peer(int64_t pid, uint64_t from, void* to, int64_t bytes) {
  iovec here{to, static_cast<size_t>(bytes)};
  iovec there{reinterpret_cast<void*>(from), static_cast<size_t>(bytes)};
  while (here.iov_len > 0) {  // one call copies at most 2 GiB
    const ssize_t done = process_vm_readv(static_cast<pid_t>(pid), &here, 1, &there, 1, 0);
    if (done <= 0) return done < 0 ? errno : EFAULT;
    here.iov_base = static_cast<char*>(here.iov_base) + done;
    there.iov_base = static_cast<char*>(there.iov_base) + done;
    here.iov_len = there.iov_len -= static_cast<size_t>(done);
  }
  return 0;
}

void signal_word(uint32_t* word, uint32_t value) {
  __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
  syscall(SYS_futex, word, FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

bool wait_word(const uint32_t* word, uint32_t value, int64_t spin_us, int64_t sleep_ms) {
  uint32_t seen = __atomic_load_n(word, __ATOMIC_ACQUIRE);
  if (seen == value) return true;
  const int64_t began = now_us();
  while (now_us() - began < spin_us) {
    // The process that will signal may need this core.
    sched_yield();
    if (__atomic_load_n(word, __ATOMIC_ACQUIRE) == value) return true;
  }
  for (;;) {
    seen = __atomic_load_n(word, __ATOMIC_ACQUIRE);
    if (seen == value) return true;
    const int64_t left = began + spin_us + 1000 * sleep_ms - now_us();
    if (left <= 0) return false;
    const timespec patience{left / 1000000, left % 1000000 * 1000};
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &patience, nullptr, 0);
  }
}

#else

int read_peer(int64_t, uint64_t, void*, int64_t) { return ENOSYS; }
void signal_word(uint32_t* word, uint32_t value) { *word = value; }
bool wait_word(const uint32_t* word, uint32_t value, int64_t, int64_t) { return *word == value; }

#endif

}  // namespace cptool
