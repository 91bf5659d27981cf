// The layer op on CUDA tensors: input projection and weight gradients by cuBLAS, the recurrence by the planned kernel family.
#include "torch/ops_cuda.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/backend.h"
#include "torch/ops.h"
#include "torch/settings.h"

namespace fused_rnn {

bool allows_tf32(const Tensor& x) {
  return x.scalar_type() == at::kFloat && at::globalContext().allowTF32CuDNN(at::Float32Op::RNN);
}

Tensor on_cuda(const Tensor& integers, const Tensor& input) {
  const c10::cuda::CUDAGuard device_guard(input.device());
  Tensor result = at::empty(integers.sizes(), input.options().dtype(at::kLong));
  cuda::write_integers(result.data_ptr<int64_t>(), integers.contiguous().const_data_ptr<int64_t>(), result.numel(),
                       c10::cuda::getCurrentCUDAStream().stream());
  return result;
}

void project_rows(const LayerInputs& in, const ForwardCall& call, const Tensor& x, int64_t d, int64_t first, int64_t end) {
  const ForwardParams& p = call.params;
  const int64_t columns = gate_count(p.cell) * p.H;
  const int64_t per_direction = static_cast<int64_t>(in.params.size()) / p.D;
  const auto w = in.params.slice(d * per_direction, per_direction);
  const Tensor rows = x.slice(0, first, end);
  Tensor out = call.gates.select(0, d).view({p.seq.N, slot_count(p.cell) * p.H}).slice(0, first, end).slice(1, 0, columns);
  if (in.has_biases) {
    at::addmm_out(out, w[2], rows, w[0].t());
  } else {
    at::mm_out(out, rows, w[0].t());
  }
}

namespace {

LayerOutputs layer_cuda(const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList params,
                        bool has_biases, const OptionalTensor& lengths, const OptionalTensor& offsets,
                        const OptionalTensor& resets, int64_t cell, bool bidirectional, bool save) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  const LayerInputs in{x, h0, c0, params, has_biases, lengths, offsets, resets, cell_of(cell), bidirectional};
  ForwardCall call = prepare_forward(in, save);
  if (call.params.seq.B > 0) {
    call.params.allow_tf32 = allows_tf32(x);
    const MatmulPrecision precision(call.params.allow_tf32);
    const Plan& plan = cuda::plan_for(cuda::problem_of(call.params), x.get_device(), family_setting());
    if (plan.family != Family::kCell) {
      allocate_gates(call);
      const Tensor rows = x.reshape({call.params.seq.N, call.params.I});
      for (int d = 0; d < call.params.D; ++d) project_rows(in, call, rows, d, 0, call.params.seq.N);
    }
    const Tensor workspace = at::empty({plan.workspace_bytes}, x.options().dtype(at::kByte));
    call.params.workspace = workspace.data_ptr();
    cuda::forward(call.params, plan, c10::cuda::getCurrentCUDAStream().stream());
  }
  return forward_outputs(call, save);
}

LayerGradients layer_backward_cuda(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                                   const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                   at::TensorList params, bool has_biases, const OptionalTensor& lengths,
                                   const OptionalTensor& offsets, const OptionalTensor& resets, const OptionalTensor& y,
                                   const Tensor& gates, const Tensor& cs, int64_t cell, bool bidirectional,
                                   std::array<bool, 3> mask) {
  const c10::cuda::CUDAGuard device_guard(x.device());
  const LayerInputs in{x, h0, c0, params, has_biases, lengths, offsets, resets, cell_of(cell), bidirectional};
  const BackwardInputs grads{dy, dh_n, dc_n, y, gates, cs};
  const GradientMask wanted{mask[0], mask[1], mask[2]};
  BackwardCall call = prepare_backward(in, grads, wanted);
  const bool allow_tf32 = allows_tf32(x);
  const MatmulPrecision precision(allow_tf32);
  if (call.params.seq.B > 0) {
    call.params.allow_tf32 = allow_tf32;
    if (!(mask[1] && h0)) call.params.d_h0 = nullptr;  // one launch less
    const Plan& plan = cuda::plan_for(cuda::problem_of(call.params), x.get_device(), family_setting());
    const Tensor workspace = at::empty({plan.workspace_bytes}, x.options().dtype(at::kByte));
    call.params.workspace = workspace.data_ptr();
    cuda::backward(call.params, plan, c10::cuda::getCurrentCUDAStream().stream());
  }
  return gradients_of_layer(in, grads, call, wanted);
}

}  // namespace
}  // namespace fused_rnn

TORCH_LIBRARY_IMPL(fused_rnn, CUDA, m) {
  m.impl("layer", fused_rnn::layer_cuda);
  m.impl("layer_backward", fused_rnn::layer_backward_cuda);
}
