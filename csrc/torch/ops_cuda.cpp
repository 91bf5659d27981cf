// The layer op on CUDA tensors: input projection and weight gradients by cuBLAS, the recurrence by the planned kernel
// family.
#include "torch/ops_cuda.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/backend.h"
#include "torch/backward_ops.h"
#include "torch/choice_cuda.h"
#include "torch/device.h"
#include "torch/families_cuda.h"
#include "torch/ids.h"
#include "torch/ops.h"
#include "torch/tf32_cuda.h"

namespace fused_rnn {

bool allows_tf32(const Tensor& x) {
  return x.scalar_type() == at::kFloat && at::globalContext().allowTF32CuDNN(at::Float32Op::RNN);
}

Tensor on_cuda(const Tensor& rows, const Tensor& input) {
  const c10::cuda::CUDAGuard device_guard(input.device());
  Tensor result = at::empty(rows.sizes(), input.options().dtype(rows.scalar_type()));
  const Tensor from = rows.contiguous();
  void* const stream = c10::cuda::getCurrentCUDAStream().stream();
  if (rows.scalar_type() == at::kBool) {
    cuda::write_flags(result.data_ptr<bool>(), from.const_data_ptr<bool>(), result.numel(), stream);
  } else {
    cuda::write_integers(result.data_ptr<int64_t>(), from.const_data_ptr<int64_t>(), result.numel(), stream);
  }
  return result;
}

void project_rows(const Call& call, const ForwardCall& made, const Tensor& x, int64_t d, int64_t first, int64_t end) {
  const ForwardParams& p = made.params;
  const int64_t columns = gate_count(p.cell) * p.H;
  const auto w = call.params_of_direction(d);
  const Tensor rows = x.slice(0, first, end);
  Tensor out = made.gates.select(0, d).view({p.seq.N, slot_count(p.cell) * p.H}).slice(0, first, end).slice(1, 0, columns);
  if (call.has_ids()) {
    gather_columns_into(out, w[0], rows);
    if (call.recipe.has_biases) out.add_(w[2]);
  } else if (made.params.allow_tf32 && device_has_tf32()) {
    if (call.recipe.has_biases) out.copy_(w[2].expand_as(out));
    multiply_tf32(out, rows, w[0].t(), /*add=*/call.recipe.has_biases);
  } else if (call.recipe.has_biases) {
    at::addmm_out(out, w[2], rows, w[0].t());
  } else {
    at::mm_out(out, rows, w[0].t());
  }
}

void previous_rows_on_device(const PreviousParams& params) {
  cuda::previous_rows(params, c10::cuda::getCurrentCUDAStream().stream());
}

Tensor workspace_of(const Plan& plan, const Tensor& x) {
  return at::empty({plan.workspace_bytes}, x.options().dtype(at::kByte));
}

namespace {

LayerOutputs layer_cuda(const Tensor& x, at::TensorList states, at::TensorList params, at::TensorList rows, int64_t recipe,
                        bool save) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  const Rows given = rows_of(rows, recipe);
  const Call call{x, states, params, given, layer_recipe_of(recipe)};
  const LayerChoice chosen = chosen_for_layer(call, save);
  if (chosen.results) return {chosen.results->y, {chosen.results->last.begin(), chosen.results->last.end()}, {}};
  ForwardCall made = prepare_forward(call, save);
  ForwardParams& p = made.params;
  if (made.gives_cs) p.training = true;  // kernels give every c where they save it, with the gates
  if (p.seq.B > 0) {
    p.allow_tf32 = allows_tf32(call.like());
    const MatmulPrecision precision(p.allow_tf32);
    const auto run = [&](const Plan& plan) {
      const bool reads_x = traits_of(plan.family).reads_x;
      if (!reads_x || made.gives_cs) allocate_gates(made);
      if (!reads_x) {
        const Tensor all = call.has_ids() ? ids_of_rows(call, p.seq, params[0].size(1)) : x.reshape({p.seq.N, p.I});
        for (int d = 0; d < p.D; ++d) project_rows(call, made, all, d, 0, p.seq.N);
      }
      const Tensor workspace = workspace_of(plan, x);
      p.workspace = workspace.data_ptr();
      cuda::forward(p, plan, c10::cuda::getCurrentCUDAStream().stream());
    };
    run_planned(cuda::problem_of(p), x.get_device(), chosen.recipe, run, /*has_x=*/!call.has_ids());
  }
  return forward_outputs(made, save);
}

struct OnCuda {
  template <class F>
  static auto run_backward(const Call& call, const ResultGradients& given, GradientMask wanted, const F& f) {
    const Tensor& x = call.x;
    const c10::cuda::CUDAGuard device_guard(x.device());
    BackwardCall made = prepare_backward(call, given, wanted);
    BackwardParams& p = made.params;
    p.allow_tf32 = allows_tf32(call.like());
    const MatmulPrecision precision(p.allow_tf32);
    if (p.seq.B > 0) {
      const Recipe chosen = chosen_for_layer(call, /*training=*/true).recipe;
      if (!(wanted.states && call.h0())) p.d_h0 = nullptr;  // one launch less
      run_planned(cuda::problem_of(p), x.get_device(), chosen, [&](const Plan& plan) {
        const Tensor workspace = workspace_of(plan, x);
        p.workspace = workspace.data_ptr();
        cuda::backward(p, plan, c10::cuda::getCurrentCUDAStream().stream());
      });
    }
    return f(made);
  }
};

}  // namespace
}  // namespace fused_rnn

TORCH_LIBRARY_IMPL(fused_rnn, FUSED_RNN_DEVICE_KEY, m) {
  m.impl("layer", fused_rnn::layer_cuda);
  m.impl("layer_backward", fused_rnn::BackwardOps<fused_rnn::OnCuda>::layer);
  m.impl("layer_backward_samples", fused_rnn::BackwardOps<fused_rnn::OnCuda>::samples);
  m.impl("layer_backward_gates", fused_rnn::BackwardOps<fused_rnn::OnCuda>::gates);
}
