// Accesses to addresses that are no memory at all: the signal becomes a fault report of the thread that made the access.
#include "crash.h"

#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <vector>

#include "device.h"

namespace simt_host {

namespace {
uintptr_t instruction_of(void* context) {
  const auto* machine = &static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  return static_cast<uintptr_t>(machine->gregs[REG_RIP]);
#elif defined(__aarch64__)
  return static_cast<uintptr_t>(machine->pc);
#else
  return 0;
#endif
}

void handle(int signal, siginfo_t* info, void* context) {
  const Thread* thread = current_thread();
  if (!thread) {  // not in a kernel: what would have happened without us
    ::signal(signal, SIG_DFL);
    return;
  }
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  const auto stack = reinterpret_cast<uintptr_t>(thread->fiber.stack);
  const uintptr_t pc = instruction_of(context);
  char text[64];
  std::snprintf(text, sizeof text, "access to 0x%jx", static_cast<uintmax_t>(address));
  const bool overflow = address < stack && stack - address <= 65536;
  // Does not return: the fibre is given up, and the alternate stack is free again.
  fault("out of bounds",
        thread->name() + " at " + where(pc) + ": " + text + (overflow ? ", beyond its stack" : ", which is no memory"), pc);
}
}  // namespace

CrashReports::CrashReports() {
#if !defined(__SANITIZE_ADDRESS__)
  static std::vector<char> stack(64 << 10);
  stack_t alternate{};
  alternate.ss_sp = stack.data();
  alternate.ss_size = stack.size();
  sigaltstack(&alternate, &old_stack_);
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &old_segv_);
  sigaction(SIGBUS, &action, &old_bus_);
#endif
}

CrashReports::~CrashReports() {
#if !defined(__SANITIZE_ADDRESS__)
  sigaction(SIGSEGV, &old_segv_, nullptr);
  sigaction(SIGBUS, &old_bus_, nullptr);
  sigaltstack(&old_stack_, nullptr);
#endif
}

}  // namespace simt_host
