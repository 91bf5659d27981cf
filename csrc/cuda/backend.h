// The CUDA backend without torch and without CUDA headers: what csrc/torch calls. The caller makes the device current, owns
// all memory and names the stream (a cudaStream_t). A call synchronises nothing, allocates nothing on the device and uses
// the given stream alone, so a CUDA graph can capture it. Errors are std::runtime_error with the kernel's name;
// LaunchRefused where another family may do. (The file's name is not cuda.h: this folder is on the include path, and torch
// includes CUDA's <cuda.h>.)
#pragma once
#include <optional>

#include "core/params.h"
#include "core/previous.h"
#include "cuda/device/refused.h"
#include "plan/plan.h"

namespace fused_rnn::cuda {

// Queried once per device and then remembered.
const DeviceInfo& device_info(int device);

// The problem that params describe. Backward does not know I: it passes 0.
Problem problem_of(const ForwardParams& params);
Problem problem_of(const BackwardParams& params);
Problem problem_of(const DualBackwardParams& params);

// make_plan for a device. The calling thread remembers its latest plans. A remembered plan may have been made for a layer
// with another number of steps beyond the first, which no family asks for: `us` and `cheapest` are then that layer's.
const Plan& plan_for(const Problem& problem, int device, const FamilyChoice& choice = {});

// params.workspace: plan.workspace_bytes bytes, 256-byte aligned, contents irrelevant.
// A family that reads x ignores what gates holds (null unless training). Any other finds the projection x W_ih^T + b_ih in
// the first G slots of gates and does not read params.x.
void forward(const ForwardParams& params, const Plan& plan, void* stream);
void backward(const BackwardParams& params, const Plan& plan, void* stream);
// Of params.value and params.tangent alike: cell, sizes, rows, resets and allow_tf32.
void dual_backward(const DualBackwardParams& params, const Plan& plan, void* stream);

// Some of the steps, by a plan of a persistent family: [first, end) in the order of the scan, which for backward begins at
// the end of the sequence. Calls for consecutive ranges that make up the sequence give, bit by bit, the results of one call.
struct StepRange {
  int64_t first, end;
  float* carry;  // [D, B, H], backward [2, D, B, H]: the same memory in all calls for a sequence
};
void forward_steps(const ForwardParams& params, const Plan& plan, const StepRange& range, void* stream);
void backward_steps(const BackwardParams& params, const Plan& plan, const StepRange& range, void* stream);

// Whether the device's driver lets a graph's conditional body hold cooperative launches: from CUDA 12.6 on.
bool conditional_graphs_take_cooperative_launches();

// Writes every row's h before its step (core/previous.h), all pointers being device memory, in one launch.
void previous_rows(const PreviousParams& params, void* stream);

// Writes integers of the host to device memory. They travel as arguments of launches: a capture holds them, and the host's
// memory is free when the call returns.
void write_integers(int64_t* to, const int64_t* integers, int64_t count, void* stream);
// The same for flags, 32000 a launch.
void write_flags(bool* to, const bool* flags, int64_t count, void* stream);

}  // namespace fused_rnn::cuda
