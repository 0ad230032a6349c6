// Threads and their scratch memory for the CPU kernels.
#pragma once

#include <cstddef>

namespace cptool::cpu {

// Runs body(context, thread) on the calling thread (as thread 0) and on up to threads - 1 others at
// the same time, and returns when all that began have ended. A thread that would begin after the
// caller has ended its own body is not waited for and does not begin, so bodies must share work
// dynamically: each takes pieces until none is left. An exception that a body throws is rethrown
// here.
void run_parallel(int threads, void (*body)(void* context, int thread), void* context);

// Memory of the calling thread, aligned to 64 bytes, contents undefined, valid until the thread's
// next call.
void* thread_scratch(size_t bytes);

}  // namespace cptool::cpu
