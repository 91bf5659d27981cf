// What cuDNN can serve, and which of its algorithms torch asks for (ATen/native/cudnn/RNN.cpp, torch 2.11 to 2.13).
#include "plan/cudnn.h"

#include <string>

#include "plan/machine.h"
#include "plan/plan.h"

namespace fused_rnn {
namespace {

constexpr int64_t kMostSteps = 65535;  // of cuDNN's launches

// For which problems of a cell torch asks for which algorithm; a row a mode, in the order of cudnn_mode.
struct ModeLimits {
  int64_t small_forward, small_backward;  // units of the small-H algorithm at most
  bool persistent;                        // the persistent algorithm is there
  bool wide_persistent;                   // also with 96 rows or more of 896 units or more
};
constexpr ModeLimits kModes[] = {
    {384, 256, true, false},   // relu
    {384, 256, true, false},   // tanh
    {192, 128, true, true},    // LSTM
    {192, 128, false, false},  // GRU
};

// One of cuDNN's algorithms, the least that a step of it takes, and why torch asks for it.
struct Algorithm {
  const char* name;
  double forward_us, backward_us;
  std::string reason;
};

Algorithm algorithm_of(const Problem& p, const DeviceInfo& device) {
  const auto standard = [](const std::string& reason) {
    return Algorithm{"standard", kCudnnForwardUs, kCudnnBackwardUs, reason};
  };
  const ModeLimits& limits = kModes[cudnn_mode(p.cell)];
  if (p.P != p.H) return standard("it has a projection");
  if (p.ragged) return standard("the input is packed");
  if (p.dtype == DType::kFloat64) return standard("it is in fp64");
  const int64_t small = p.backward ? limits.small_backward : limits.small_forward;
  if (p.H <= small) {
    const double share = double(p.H) / limits.small_forward;
    const double us = kCudnnSmallestUs + (kCudnnLargestUs - kCudnnSmallestUs) * share * share;
    return {"small-H persistent", us, kCudnnSmallBackward * us, "H is " + std::to_string(small) + " at most"};
  }
  if (p.dtype != DType::kFloat16) return standard("the persistent one is for fp16");
  if (!limits.persistent) return standard("the persistent one is not for GRUs");
  if (p.D > 1 || p.H > 1024 || p.H % 128 || (!p.backward && p.I % 128)) {
    return standard("the persistent one takes one layer in one direction, H up to 1024, H and I multiples of 128");
  }
  if (p.B % 8 || p.B > 128 || (!limits.wide_persistent && p.B >= 96 && p.H >= 896)) {
    return standard("the persistent one takes multiples of 8 batch rows, up to 128");
  }
  if (device.compute_capability < 80 || device.compute_capability % 10 == 6 || device.sm_count < 98) {
    return standard("the persistent one is not for this device");
  }
  return {"persistent", kCudnnPersistentForwardUs, kCudnnPersistentBackwardUs,
          "fp16, H and I multiples of 128, B of 8; if it is the only layer"};
}

}  // namespace

std::string cudnn_lacks(const CudnnCall& call) {
  if (!call.enabled) return "is not there, or torch.backends.cudnn.enabled is False";
  if (!call.plain) return "runs on plain tensors of the device, outside of torch's transforms and modes";
  if (call.deterministic) return "is not bitwise repeatable";
  if (cudnn_mode(call.cell) < 0) return std::string("has no cell ") + traits_of(call.cell).name;
  if (call.one_step) return "makes no single steps";
  if (call.lengths) return "takes no lengths: ragged input must be packed";
  if (call.resets) return "has no resets";
  if (call.modified) return kNoModifiedKernels;
  if (!call.offsets_on_host) return "needs the offsets of packed rows on the host";
  if (call.empty) return "takes no empty input";
  if (call.T > kMostSteps) return "makes " + std::to_string(kMostSteps) + " steps at most";
  if (!call.contiguous_states) return "needs contiguous states";
  if (call.wide_c) return "has no c of another dtype than x";
  return "";
}

std::string cudnn_obstacle(const Problem& problem, const DeviceInfo&) {
  if (problem.dual) return kNoDualKernels;
  CudnnCall call{problem.cell, problem.T};
  call.modified = problem.modified;
  call.empty = problem.I == 0;
  return cudnn_lacks(call);
}

void plan_cudnn(const Problem& problem, const DeviceInfo& device, Plan& plan) {
  const Algorithm algorithm = algorithm_of(problem, device);
  plan.us_per_step = problem.backward ? algorithm.backward_us : algorithm.forward_us;
  plan.reason = std::string("torch asks cuDNN for its ") + algorithm.name + " algorithm: " + algorithm.reason;
}

}  // namespace fused_rnn
