// Threads and their scratch memory for the CPU kernels.
#pragma once

#include <cstddef>

namespace cptool::cpu {

// Runs body(context, thread) on the calling thread (as thread 0) and concurrently on up to
// threads - 1 others, and returns when all that began have finished. A worker that has not begun
// when the caller finishes its own body does not run at all, so bodies must share work dynamically:
// each takes pieces until none is left. Rethrows an exception that a body throws.
void run_parallel(int threads, void (*body)(void* context, int thread), void* context);

// Memory of the calling thread, aligned to 64 bytes, contents undefined, valid until the thread's
// next call.
void* thread_scratch(size_t bytes);

}  // namespace cptool::cpu
