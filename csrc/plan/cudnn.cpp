// What cuDNN can serve, and which of its algorithms torch asks for (ATen/native/cudnn/RNN.cpp, torch 2.11 to 2.13).
#include "plan/cudnn.h"

#include <string>

#include "plan/plan.h"

namespace fused_rnn {
namespace {

constexpr int64_t kMostSteps = 65535;

// The small-H algorithm: a step takes 0.45 to 2.3 us forward. How it depends on the size is not published; the model takes
// it to grow with the weights, since these stay on one SM.
constexpr double kSmallestUs = 0.45, kLargestUs = 2.3, kSmallBackward = 1.5;

// One of cuDNN's algorithms, the least that a step of it takes (published for an H100), and why torch asks for it.
struct Algorithm {
  const char* name;
  double forward_us, backward_us;
  std::string reason;
};

Algorithm algorithm_of(const Problem& p, const DeviceInfo& device) {
  const auto standard = [](const std::string& reason) { return Algorithm{"standard", 7, 10, reason}; };
  if (p.P != p.H) return standard("it has a projection");
  if (p.ragged) return standard("the input is packed");
  if (p.dtype == DType::kFloat64) return standard("it is in fp64");
  const bool gated = p.cell == CellKind::kLstm || p.cell == CellKind::kGru;
  const int64_t largest = gated ? 192 : 384, small = !p.backward ? largest : gated ? 128 : 256;
  if (p.H <= small) {
    const double share = double(p.H) / largest, us = kSmallestUs + (kLargestUs - kSmallestUs) * share * share;
    return {"small-H persistent", us, kSmallBackward * us, "H is " + std::to_string(small) + " at most"};
  }
  if (p.dtype != DType::kFloat16) return standard("the persistent one is for fp16");
  if (p.cell == CellKind::kGru) return standard("the persistent one is not for GRUs");
  if (p.D > 1 || p.H > 1024 || p.H % 128 || (!p.backward && p.I % 128)) {
    return standard("the persistent one takes one layer in one direction, H up to 1024, H and I multiples of 128");
  }
  const bool lstm = p.cell == CellKind::kLstm;
  if (p.B % 8 || p.B > 128 || (!lstm && p.B >= 96 && p.H >= 896)) {
    return standard("the persistent one takes multiples of 8 batch rows, up to 128");
  }
  if (device.compute_capability < 80 || device.compute_capability % 10 == 6 || device.sm_count < 98) {
    return standard("the persistent one is not for this device");
  }
  return {"persistent", 1.96, 3.1, "fp16, H and I multiples of 128, B of 8; if it is the only layer"};
}

}  // namespace

std::string cudnn_obstacle(const Problem& problem, const DeviceInfo&) {
  if (cudnn_mode(problem.cell) < 0) return std::string("has no cell ") + traits_of(problem.cell).name;
  if (problem.modified) return kNoModifiedKernels;
  if (problem.T > kMostSteps) return "makes " + std::to_string(kMostSteps) + " steps at most";
  return "";
}

void plan_cudnn(const Problem& problem, const DeviceInfo& device, Plan& plan) {
  const Algorithm algorithm = algorithm_of(problem, device);
  plan.us_per_step = problem.backward ? algorithm.backward_us : algorithm.forward_us;
  plan.reason = std::string("torch asks cuDNN for its ") + algorithm.name + " algorithm: " + algorithm.reason;
}

}  // namespace fused_rnn
