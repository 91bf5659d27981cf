// Host side of family `gemm`: for each time step a library's product of all rows of the batch (one for each direction), then
// a pointwise kernel, back to back on the caller's stream; twice that with a projection.
#include <launch.cuh>
#include <simt.cuh>

#include "cuda/family.h"
#include "cuda/gemm/pointwise_kernels.h"
#include "cuda/library_product.h"
#include "cuda/step/arguments.h"
#include "plan/gemm.h"

namespace fused_rnn::cuda {
namespace {

LibraryProductFunction installed = nullptr;

// A kernel of the plan.
template <class Step>
struct PointwiseKernel {
  void (*kernel)(Step);
  simt::LaunchConfig config;

  void operator()(const Step& step, void* stream) const { simt::launch(kernel, config, stream, step); }
};

template <class F>
auto dispatch_pointwise(MathKind math, F&& f) {
  return dispatch_math(math, [&](auto kind) {
    constexpr MathKind kMath = decltype(kind)::value;
    return f(PointwiseKernels<kMath == MathKind::kTf32 ? MathKind::kFp32 : kMath>{});
  });
}

PointwiseKernel<PointwiseForwardStep> pointwise_forward_of(const Plan& plan, KernelRole role, CellKind cell) {
  const KernelPlan& kernel = kernel_of(plan, role);
  return {dispatch_pointwise(kernel.math, [&](auto kernels) { return kernels.forward(role, cell); }), config_of(kernel)};
}
PointwiseKernel<PointwiseBackwardStep> pointwise_backward_of(const Plan& plan, KernelRole role, CellKind cell) {
  const KernelPlan& kernel = kernel_of(plan, role);
  return {dispatch_pointwise(kernel.math, [&](auto kernels) { return kernels.backward(role, cell); }), config_of(kernel)};
}

// Rows of a batch in memory, of direction 0: `data` may be null (there are none). Distances in elements.
struct BatchRows {
  const void* data;
  int64_t direction, row;
};

// The products of a layer's steps.
struct Products {
  MathKind math;
  DType dtype;
  int64_t batch;
  int directions;
  void* sums;
  void* stream;

  // sums [D, B, columns] = rows times a matrix of each direction, [columns, inner] if it is transposed, else [inner,
  // columns].
  template <class Matrix>
  void operator()(const BatchRows& rows, int64_t inner, int64_t columns, bool transposed, const Matrix& matrix) const {
    if (!rows.data) return;
    const int64_t size = dtype_size(dtype);
    for (int d = 0; d < directions; ++d) {
      const auto* a = static_cast<const unsigned char*>(rows.data) + d * rows.direction * size;
      auto* out = static_cast<unsigned char*>(sums) + d * batch * columns * accumulator_bytes(math);
      installed({math, batch, columns, inner, a, rows.row, matrix(d).data, transposed, out}, stream);
    }
  }
};

template <class Params>
Products products_of(const Params& p, const Plan& plan, void* sums, void* stream) {
  if (!installed) throw LaunchRefused("no library of matrix products is installed");
  return {plan.kernels[0].math, p.dtype, p.seq.B, p.D, sums, stream};
}

// Whether the rows of a step are at a place that depends on the row, or on offsets, which the host does not know.
bool rows_lie_apart(const Sequence& seq, int directions) { return seq.offsets || (seq.lengths && directions > 1); }

}  // namespace

void set_library_product(LibraryProductFunction function) { installed = function; }

void gemm_forward(const ForwardParams& p, const Plan& plan, const StepRange&, void* stream) {
  const bool projected = p.weights[0].w_hr.data != nullptr;
  const GemmWorkspace layout = gemm_workspace(problem_of(p));
  auto* const workspace = static_cast<unsigned char*>(p.workspace);
  const Products multiply = products_of(p, plan, workspace + layout.sums, stream);
  const int64_t gates = gate_count(p.cell) * p.H, size = dtype_size(p.dtype);

  PointwiseForwardStep step{arguments_of(p, layout.step), workspace + layout.sums, nullptr};
  const auto launch = pointwise_forward_of(plan, forward_role(false, problem_of(p).modified), p.cell);
  const auto project = projected ? pointwise_forward_of(plan, KernelRole::kProject, p.cell) : launch;
  if (rows_lie_apart(p.seq, p.D) || puts_states(p.modifier) || p.modifier.product) {
    step.states = workspace + layout.rows;
    const auto first = dispatch_pointwise(multiply.math, [](auto kernels) { return kernels.first_states(); });
    PointwiseKernel<PointwiseForwardStep>{first, project.config}(step, stream);  // of as many units as outputs
  }

  for (int64_t s = 0; s < p.seq.T; ++s) {
    step.step.step = s;
    BatchRows states{s == 0 ? p.h0 : p.y, p.seq.B * p.P, p.P};
    if (step.states) {
      states.data = step.states;
    } else if (s > 0) {  // direction 1 is at time T - s, which it has made before
      const int64_t last = (s - 1) * p.seq.B, last_of_reverse = (p.seq.T - s) * p.seq.B;
      states.data = static_cast<const unsigned char*>(p.y) + last * p.D * p.P * size;
      states.direction = (last_of_reverse - last) * p.D * p.P + p.P;
      states.row = p.D * p.P;
    }
    multiply(states, p.P, gates, true, [&](int d) { return p.weights[d].w_hh; });
    launch(step, stream);
    if (!projected) continue;
    multiply({step.step.hidden, p.seq.B * p.H, p.H}, p.H, p.P, true, [&](int d) { return p.weights[d].w_hr; });
    project(step, stream);
  }
}

void gemm_backward(const BackwardParams& p, const Plan& plan, const StepRange&, void* stream) {
  const bool projected = p.weights[0].w_hr.data != nullptr;
  const GemmWorkspace layout = gemm_workspace(problem_of(p));
  auto* const workspace = static_cast<unsigned char*>(p.workspace);
  const Products multiply = products_of(p, plan, workspace + layout.sums, stream);
  const int64_t slots = slot_count(p.cell) * p.H, gates = gate_count(p.cell) * p.H, size = dtype_size(p.dtype);

  PointwiseBackwardStep step{arguments_of(p, layout.step), workspace + layout.sums, nullptr, nullptr};
  if (rows_lie_apart(p.seq, p.D)) step.d_gates = workspace + layout.rows;
  if (projected && p.seq.offsets) step.d_h = workspace + layout.d_h;
  const auto launch = pointwise_backward_of(plan, backward_role(problem_of(p).modified), p.cell);
  const auto state_grad = pointwise_backward_of(plan, KernelRole::kStateGrad, p.cell);

  // The rows of one step of a tensor [D, N, width], where these lie beside each other, from column `first` on.
  const auto rows_of_step = [&](const void* tensor, int64_t s, int64_t width, int64_t first) {
    const int64_t t = s * p.seq.B, t_of_reverse = (p.seq.T - 1 - s) * p.seq.B;
    const auto* data = static_cast<const unsigned char*>(tensor) + (t * width + first) * size;
    return BatchRows{data, (p.seq.N + t_of_reverse - t) * width, width};
  };
  // The part of the gradient of h that comes from step s: d_gates W_hh.
  const auto multiply_gates = [&](int64_t s) {
    const BatchRows rows =
        step.d_gates ? BatchRows{step.d_gates, p.seq.B * gates, gates} : rows_of_step(p.d_gates, s, slots, slots - gates);
    multiply(rows, gates, p.P, false, [&](int d) { return p.weights[d].w_hh; });
  };
  for (int64_t s = p.seq.T - 1; s >= 0; --s) {
    step.step.step = s;
    if (s + 1 < p.seq.T) multiply_gates(s + 1);
    if (projected) {
      state_grad(step, stream);
      const BatchRows rows = step.d_h ? BatchRows{step.d_h, p.seq.B * p.P, p.P} : rows_of_step(p.d_h, s, p.P, 0);
      multiply(rows, p.P, p.H, false, [&](int d) { return p.weights[d].w_hr; });
    }
    launch(step, stream);
  }
  if (!p.d_h0) return;
  multiply_gates(0);
  step.step.step = -1;
  state_grad(step, stream);
}

}  // namespace fused_rnn::cuda
