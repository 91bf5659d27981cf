#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt_host {

namespace {
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
// Stacks with a guard page below. Those beyond have none: a guard makes two mappings of one, and a process has 65530.
constexpr int kGuardedStacks = 16384;
std::vector<void*> free_stacks;
int stacks = 0;
}  // namespace

void* acquire_stack(size_t* bytes) {
  *bytes = kStackBytes;
  if (!free_stacks.empty()) {
    void* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || (stacks++ < kGuardedStacks && mprotect(memory, page, PROT_NONE) != 0)) {
    std::perror("simulator: no memory for another thread's stack");
    std::abort();
  }
  return static_cast<char*>(memory) + page;
}

void release_stack(void* stack) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
  free_stacks.push_back(stack);
}

void unmap_free_stacks() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (void* stack : free_stacks) munmap(static_cast<char*>(stack) - page, kStackBytes + page);
  stacks -= static_cast<int>(free_stacks.size());
  free_stacks.clear();
}

#if !defined(SIMT_UCONTEXT)
extern "C" void simt_host_switch(void** save, void* load);
// Callee-saved registers and the floating-point control words; everything else is the caller's by the System V ABI.
asm(R"(
.text
.globl simt_host_switch
.type simt_host_switch, @function
simt_host_switch:
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
.size simt_host_switch, .-simt_host_switch
)");

void prepare_fiber(Fiber& fiber, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(fiber.stack) + fiber.stack_bytes;
  auto* words = reinterpret_cast<void**>(top & ~uintptr_t{15});
  *--words = nullptr;  // the caller of entry: none; keeps the stack 16-byte aligned after ret
  *--words = nullptr;
  words[0] = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--words = nullptr;
  fiber.stack_pointer = words;
  fiber.asan_fake_stack = nullptr;
}
#else
void prepare_fiber(Fiber& fiber, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
  fiber.asan_fake_stack = nullptr;
}
#endif

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.asan_fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(SIMT_UCONTEXT)
  swapcontext(&from.context, &to.context);
#else
  simt_host_switch(&from.stack_pointer, to.stack_pointer);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

void enter_fiber([[maybe_unused]] Fiber& previous) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  previous.stack = const_cast<void*>(bottom);
  previous.stack_bytes = bytes;
#endif
}

}  // namespace simt_host
