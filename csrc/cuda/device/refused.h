// A launch that the device does not take, before any of it has run.
#pragma once
#include <stdexcept>

namespace fused_rnn {

// There is no code of the kernel for the device, or not as much room as the kernel needs at once: a MIG slice, MPS or a
// green context leaves fewer SMs than the device says it has, and a graph may not take cooperative launches. Another kernel
// may do.
struct LaunchRefused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace fused_rnn
