// Host side of the families `cell` and `step`: one or two launches per time step, back to back on the caller's stream.
#include <array>
#include <cstdint>
#include <initializer_list>
#include <launch.cuh>
#include <mutex>
#include <simt.cuh>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "core/recent.h"
#include "cuda/backend.h"
#include "cuda/persistent/persistent_launch.h"
#include "cuda/persistent/sequence.h"
#include "cuda/step/kernels.h"
#include "plan/persistent.h"

namespace fused_rnn::cuda {
namespace {

const KernelPlan* find_kernel(const Plan& plan, KernelRole role) {
  for (const KernelPlan& kernel : plan.kernels) {
    if (kernel.role == role) return &kernel;
  }
  return nullptr;
}

const KernelPlan& require_kernel(const Plan& plan, KernelRole role) {
  const KernelPlan* kernel = find_kernel(plan, role);
  if (!kernel) throw std::invalid_argument(std::string("the plan has no kernel ") + to_string(role));
  return *kernel;
}

// The most bytes (16, 4 or one element) that may be copied at once from rows of row_bytes that start at these addresses.
int copy_width(std::initializer_list<const void*> addresses, int64_t row_bytes, int element_bytes) {
  uint64_t bits = static_cast<uint64_t>(row_bytes);
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  if (bits % 16 == 0) return 16;
  return bits % 4 == 0 && element_bytes < 4 ? 4 : element_bytes;
}

template <class F>
auto dispatch_math(MathKind math, F&& f) {
  switch (math) {
    case MathKind::kFp64: return f(Kernels<MathKind::kFp64>{});
    case MathKind::kFp32: return f(Kernels<MathKind::kFp32>{});
    case MathKind::kTf32: return f(Kernels<MathKind::kTf32>{});
    case MathKind::kFp16: return f(Kernels<MathKind::kFp16>{});
    case MathKind::kBf16: return f(Kernels<MathKind::kBf16>{});
  }
  throw std::invalid_argument("unknown kind of arithmetic");
}

// A kernel of the plan, ready to be launched once per step.
template <class Step>
struct Launcher {
  void (*kernel)(Step);
  simt::LaunchConfig config;
  int stages;
  bool may_overlap;

  Launcher(void (*kernel_address)(Step), const KernelPlan& plan, bool pdl)
      : kernel(kernel_address), stages(plan.stages), may_overlap(pdl) {
    config = {to_string(plan.role),
              static_cast<int>(plan.grid_x),
              static_cast<int>(plan.grid_y),
              static_cast<int>(plan.grid_z),
              plan.threads,
              plan.smem_bytes,
              1,
              false};
    simt::prepare(kernel, config.name, plan.smem_bytes);
  }

  // The first launch of a layer waits for everything before it in the stream, so that later ones may read weights early.
  void operator()(Step& step, bool first, void* stream) {
    config.pdl = may_overlap && !first;
    step.stages = stages;
    simt::launch(kernel, config, stream, step);
  }
};

Launcher<ForwardStep> forward_launcher(const Plan& plan, const KernelPlan& kernel, CellKind cell) {
  return {dispatch_math(kernel.math, [&](auto set) { return set.forward(kernel.role, cell, kernel.tile); }), kernel,
          plan.pdl};
}
Launcher<BackwardStep> backward_launcher(const Plan& plan, const KernelPlan& kernel, CellKind cell) {
  return {dispatch_math(kernel.math, [&](auto set) { return set.backward(kernel.role, cell, kernel.tile); }), kernel,
          plan.pdl};
}

void check_sequence(const Sequence& seq) {
  if (seq.T < 1) throw std::invalid_argument("expected at least one time step");
  if (seq.lengths && seq.offsets) throw std::invalid_argument("at most one of lengths and offsets may be given");
}

void check_range(const Sequence& seq, const Plan& plan, const StepRange& range) {
  check_sequence(seq);
  if (!plan.persistent) throw std::invalid_argument("only a persistent family makes some of the steps");
  if (range.first < 0 || range.first >= range.end || range.end > seq.T) {
    throw std::invalid_argument("expected 0 <= first < end <= T");
  }
}

void check_projection(const Weights& weights, int64_t H, int64_t P) {
  if ((weights.w_hr.data != nullptr) != (P != H))
    throw std::invalid_argument("w_hr must be given where P is not H, and only there");
}

}  // namespace

namespace {

struct Nothing {};
// Stands for all kernels where a device is asked for its code and its clusters: all are compiled for the same architectures.
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

Problem problem_of(const ForwardParams& p) {
  return {p.cell,     p.dtype, p.allow_tf32, p.seq.T, p.seq.B, p.I, p.H, p.P, p.D, p.seq.lengths || p.seq.offsets,
          p.training, false};
}

Problem problem_of(const BackwardParams& p) {
  return {p.cell, p.dtype, p.allow_tf32, p.seq.T, p.seq.B, 0, p.H, p.P, p.D, p.seq.lengths || p.seq.offsets, true, true};
}

const Plan& plan_for(const Problem& problem, int device, const FamilyChoice& choice) {
  // A layer's forward and backward ask in turn.
  static thread_local Recent<std::tuple<Problem, int, FamilyChoice>, Plan, 16> kept;
  // Families tell one step from several, not how many, unless these are too many for the persistent ones; which of them is the
  // cheapest depends on it.
  Problem key = problem;
  if (!choice.cheapest && problem.T > 1 && numbers_rows(problem)) key.T = 2;
  return kept.get({key, device, choice}, [&] { return make_plan(problem, device_info(device), choice); });
}

void forward(const ForwardParams& p, const Plan& plan, void* stream) {
  check_sequence(p.seq);
  check_projection(p.weights[0], p.H, p.P);
  if (p.seq.B == 0) return;
  if (plan.persistent) return persistent_forward(p, plan, {0, p.seq.T, nullptr}, stream);
  const bool projected = p.weights[0].w_hr.data != nullptr, input = plan.family == Family::kCell;
  const int bytes = static_cast<int>(dtype_size(p.dtype));
  const WorkspaceLayout layout = workspace_layout(problem_of(p));
  auto* workspace = static_cast<unsigned char*>(p.workspace);

  ForwardStep step{p, 0, 0, 0, 0, nullptr, nullptr};
  if (layout.carry_bytes) step.c = workspace + layout.carry;
  if (projected) step.hidden = workspace + layout.hidden;
  const Weights &w0 = p.weights[0], &w1 = p.weights[p.D - 1];
  step.copy_state = copy_width({w0.w_hh.data, w1.w_hh.data, p.y, p.h0}, p.P * bytes, bytes);
  if (input) step.copy_input = copy_width({w0.w_ih.data, w1.w_ih.data, p.x}, p.I * bytes, bytes);
  ForwardStep project_step = step;
  project_step.copy_state = copy_width({w0.w_hr.data, w1.w_hr.data, step.hidden}, p.H * bytes, bytes);

  auto launch =
      forward_launcher(plan, require_kernel(plan, input ? KernelRole::kForwardInput : KernelRole::kForward), p.cell);
  std::optional<Launcher<ForwardStep>> project;
  if (projected) project = forward_launcher(plan, require_kernel(plan, KernelRole::kProject), p.cell);
  for (int64_t s = 0; s < p.seq.T; ++s) {
    step.step = project_step.step = s;
    launch(step, s == 0, stream);
    if (project) (*project)(project_step, false, stream);
  }
}

void backward(const BackwardParams& p, const Plan& plan, void* stream) {
  check_sequence(p.seq);
  check_projection(p.weights[0], p.H, p.P);
  if (p.seq.B == 0) return;
  if (plan.persistent) return persistent_backward(p, plan, {0, p.seq.T, nullptr}, stream);
  const bool projected = p.weights[0].w_hr.data != nullptr;
  if (projected && !p.d_h) throw std::invalid_argument("backward of a projected LSTM needs d_h");
  const int bytes = static_cast<int>(dtype_size(p.dtype));
  const WorkspaceLayout layout = workspace_layout(problem_of(p));

  BackwardStep step{p, 0, 0, 0, nullptr};
  if (!projected) step.p.d_h = nullptr;
  if (layout.carry_bytes) step.carry = static_cast<unsigned char*>(p.workspace) + layout.carry;
  // A product with W_hh copies rows of W_hh and of d_gates; one with W_hr rows of W_hr and of d_h.
  const Weights &w0 = p.weights[0], &w1 = p.weights[p.D - 1];
  const int recurrent_width = copy_width({w0.w_hh.data, w1.w_hh.data, p.d_gates}, (p.P | p.H) * bytes, bytes);
  BackwardStep state_step = step;
  state_step.copy_bytes = recurrent_width;
  step.copy_bytes =
      projected ? copy_width({w0.w_hr.data, w1.w_hr.data, p.d_h}, (p.P | p.H) * bytes, bytes) : recurrent_width;

  auto launch = backward_launcher(plan, require_kernel(plan, KernelRole::kBackward), p.cell);
  auto state_grad = backward_launcher(plan, require_kernel(plan, KernelRole::kStateGrad), p.cell);
  bool first = true;
  for (int64_t s = p.seq.T - 1; s >= 0; --s) {
    step.step = state_step.step = s;
    if (projected) {
      state_grad(state_step, first, stream);
      first = false;
    }
    launch(step, first, stream);
    first = false;
  }
  if (!p.d_h0) return;
  state_step.step = -1;
  state_grad(state_step, first, stream);
}

void forward_steps(const ForwardParams& p, const Plan& plan, const StepRange& range, void* stream) {
  check_range(p.seq, plan, range);
  if (p.seq.B > 0) persistent_forward(p, plan, range, stream);
}

void backward_steps(const BackwardParams& p, const Plan& plan, const StepRange& range, void* stream) {
  check_range(p.seq, plan, range);
  if (p.seq.B > 0) persistent_backward(p, plan, range, stream);
}

}  // namespace fused_rnn::cuda
