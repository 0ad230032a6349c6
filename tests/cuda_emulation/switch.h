// Stacks of emulated threads, and the switch between one and the scheduler. Only for fibers.cpp.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "fibers.h"

namespace emulation {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStack = 128 * 1024;

void* scheduler = nullptr;  // its stack pointer while a thread runs

// Stacks, kept for later launches. Each ends in a page without access, so that an overflow faults
// immediately.
struct Stacks {
  std::vector<uint8_t*> all, unused;

  uint8_t* take() {
    if (unused.empty()) {
      void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stack of a thread");
      mprotect(memory, kPage, PROT_NONE);
      all.push_back(static_cast<uint8_t*>(memory));
      unused.push_back(all.back());
    }
    uint8_t* stack = unused.back();
    unused.pop_back();
    return stack;
  }
} stacks;

[[noreturn]] void thread_main();

#if defined(__x86_64__)

// Pushes the registers that a function must preserve, stores the stack pointer in *from and
// continues where `to` was left. swapcontext() would also work, but makes two system calls.
extern "C" __attribute__((visibility("hidden"))) void emulation_switch(void** from, void* to);
asm(R"(
.text
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void prepare(Fiber& fiber) {
  // thread_main starts as if called: the stack pointer is 8 bytes off a multiple of 16.
  void** top = reinterpret_cast<void**>(fiber.stack + kStack) - 2;
  *top = reinterpret_cast<void*>(thread_main);
  top -= 6;
  std::fill(top, top + 6, nullptr);
  fiber.stack_pointer = top;
}

void enter(Fiber& fiber) { emulation_switch(&scheduler, fiber.stack_pointer); }
void leave(Fiber& fiber) { emulation_switch(&fiber.stack_pointer, scheduler); }

#else

ucontext_t scheduler_context;

void prepare(Fiber& fiber) {
  ucontext_t* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = fiber.stack + kPage;
  context->uc_stack.ss_size = kStack - kPage;
  context->uc_link = nullptr;
  makecontext(context, reinterpret_cast<void (*)()>(thread_main), 0);
  fiber.stack_pointer = context;
}

void enter(Fiber& fiber) {
  swapcontext(&scheduler_context, static_cast<ucontext_t*>(fiber.stack_pointer));
}
void leave(Fiber& fiber) {
  swapcontext(static_cast<ucontext_t*>(fiber.stack_pointer), &scheduler_context);
}

#endif

}  // namespace
}  // namespace emulation
