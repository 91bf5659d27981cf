// The C interface of the library to Python (see ../simulator.py). Calls return 0, or 1 for a fault of the kernel, 2 for an
// exception of the host code; simt_message() has the words.
#pragma once
#include <cstddef>
#include <functional>

namespace simt_host {
// Runs host code that launches kernels, then the stream it has filled.
int run_guarded(const std::function<void()>& host_code);
}  // namespace simt_host
