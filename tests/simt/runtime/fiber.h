// Fibres: a stack each, switched by hand. x86-64 has a few lines of assembly; other architectures, and builds with
// -DSIMT_UCONTEXT, use ucontext.
#pragma once
#include <cstddef>

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt_host {

struct Fiber {
  void* stack = nullptr;  // lowest usable byte
  size_t stack_bytes = 0;
#if defined(SIMT_UCONTEXT)
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  void* asan_fake_stack = nullptr;
};

// A stack with a guard page below it, taken from a pool.
void* acquire_stack(size_t* bytes);
void release_stack(void* stack);
// Gives the pool's memory back.
void unmap_free_stacks();

// Makes `fiber` start entry() at its first switch. entry never returns: its last act is a switch with `last`.
void prepare_fiber(Fiber& fiber, void (*entry)());
// Saves the running context in `from` and continues `to`. `last`: `from` will not run again.
void switch_fiber(Fiber& from, Fiber& to, bool last = false);
// To be called first in entry().
void enter_fiber(Fiber& previous);

}  // namespace simt_host
