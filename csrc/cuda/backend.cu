// The calls of backend.h: devices, plans, and each layer handed to the launchers of its family.
#include <array>
#include <launch.cuh>
#include <mutex>
#include <simt.cuh>
#include <stdexcept>
#include <string>
#include <tuple>

#include "core/recent.h"
#include "cuda/backend.h"
#include "cuda/family.h"
#include "plan/persistent.h"
#include "plan/persistent_geometry.h"

namespace fused_rnn::cuda {
namespace {

// p: ForwardParams or BackwardParams.
template <class Params>
void check_params(const Params& p) {
  if (p.seq.T < 1) throw std::invalid_argument("expected at least one time step");
  if (p.seq.lengths && p.seq.offsets) throw std::invalid_argument("at most one of lengths and offsets may be given");
  if ((p.weights[0].w_hr.data != nullptr) != (p.P != p.H)) {
    throw std::invalid_argument("w_hr must be given where P is not H, and only there");
  }
}

void check_range(const Sequence& seq, const Plan& plan, const StepRange& range) {
  if (!traits_of(plan.family).persistent) {
    throw std::invalid_argument("only a persistent family makes some of the steps");
  }
  if (range.first < 0 || range.first >= range.end || range.end > seq.T) {
    throw std::invalid_argument("expected 0 <= first < end <= T");
  }
}

struct Nothing {};
// Asked about in the place of all kernels when a device tells of its code and its clusters: all are compiled for the same
// architectures.
__global__ void __launch_bounds__(kPersistentThreads) query_kernel(const Nothing) {}

}  // namespace

const DeviceInfo& device_info(int device) {
  static std::mutex mutex;
  static std::array<std::optional<DeviceInfo>, 128> known;
  if (device < 0 || device >= static_cast<int>(known.size())) {
    throw std::invalid_argument("no CUDA device " + std::to_string(device));
  }
  std::lock_guard<std::mutex> lock(mutex);
  if (!known[device]) {
    DeviceInfo info = simt::query_device(device);
    simt::query_code(info, device, query_kernel, kPersistentThreads);
    known[device] = info;
  }
  return *known[device];
}

bool conditional_graphs_take_cooperative_launches() { return simt::driver_version() >= 12060; }

Problem problem_of(const ForwardParams& p) {
  const bool modified = modifies_steps(p.modifier) || puts_states(p.modifier);
  return {
      p.cell, p.dtype,  p.allow_tf32,       p.seq.T, p.seq.B, p.I, p.H, p.P, p.D, p.seq.lengths || p.seq.offsets, p.training,
      false,  modified, p.primal != nullptr};
}

Problem problem_of(const BackwardParams& p) {
  const bool modified = modifies_steps(p.modifier) || puts_states(p.modifier) || p.d_cs;
  return {p.cell, p.dtype, p.allow_tf32, p.seq.T, p.seq.B, 0, p.H, p.P, p.D, p.seq.lengths || p.seq.offsets,
          true,   true,    modified};
}

Problem problem_of(const DualBackwardParams& p) {
  Problem problem = problem_of(p.value);
  problem.dual = true;
  return problem;
}

const Plan& plan_for(const Problem& problem, int device, const FamilyChoice& choice) {
  // A layer's forward and backward ask in turn.
  static thread_local Recent<std::tuple<Problem, int, FamilyChoice>, Plan, 16> recent;
  // Families tell one step from several steps, and the persistent ones ask whether the steps are too many for them. Only the
  // choice of the cheapest family depends on their number.
  Problem key = problem;
  if (!choice.cheapest && problem.T > 1 && numbers_rows(problem)) key.T = 2;
  return recent.get({key, device, choice}, [&] { return make_plan(problem, device_info(device), choice); });
}

void forward(const ForwardParams& p, const Plan& plan, void* stream) {
  check_params(p);
  if (p.seq.B > 0) launchers_of(plan.family).forward(p, plan, {0, p.seq.T, nullptr}, stream);
}

void backward(const BackwardParams& p, const Plan& plan, void* stream) {
  check_params(p);
  if (p.seq.B > 0) launchers_of(plan.family).backward(p, plan, {0, p.seq.T, nullptr}, stream);
}

void dual_backward(const DualBackwardParams& p, const Plan& plan, void* stream) {
  check_params(p.value);
  if (p.value.seq.B > 0) step_dual_backward(p, plan, stream);
}

void forward_steps(const ForwardParams& p, const Plan& plan, const StepRange& range, void* stream) {
  check_params(p);
  check_range(p.seq, plan, range);
  if (p.seq.B > 0) launchers_of(plan.family).forward(p, plan, range, stream);
}

void backward_steps(const BackwardParams& p, const Plan& plan, const StepRange& range, void* stream) {
  check_params(p);
  check_range(p.seq, plan, range);
  if (p.seq.B > 0) launchers_of(plan.family).backward(p, plan, range, stream);
}

}  // namespace fused_rnn::cuda
