#pragma once
#include <signal.h>

namespace simt_host {

// While it lives, a kernel that touches no memory at all is reported, instead of ending the process. AddressSanitizer has
// reports of its own.
class CrashReports {
 public:
  CrashReports();
  ~CrashReports();
  CrashReports(const CrashReports&) = delete;

 private:
  [[maybe_unused]] stack_t old_stack_;
  [[maybe_unused]] struct sigaction old_segv_, old_bus_;
};

}  // namespace simt_host
