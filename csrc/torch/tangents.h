// Forward-mode AD of the ops: tangents of dual tensors taken, and given to results. Of a layer a scan of the
// kernels makes them (second_order.cpp); torch's ops make tangents of tangents (fused_rnn/_tangents.py).
#pragma once
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <vector>

#include "torch/ops.h"

namespace fused_rnn {

inline bool has_tangent(const Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); }
inline bool any_has_tangent(at::TensorList tensors) { return std::any_of(tensors.begin(), tensors.end(), has_tangent); }
// Whether some tensor may have one.
inline bool tangents_exist() { return torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr; }

inline Tensor primal_of(const Tensor& t) { return t.defined() && t._fw_grad(0).defined() ? t._fw_primal(0) : t; }
inline std::vector<Tensor> primals_of(at::TensorList tensors) {
  std::vector<Tensor> result;
  for (const Tensor& t : tensors) result.push_back(primal_of(t));
  return result;
}
// Of each tensor its tangent, or a tensor of shape [0].
inline void append_tangents(at::TensorList tensors, std::vector<Tensor>& tangents) {
  for (const Tensor& t : tensors) {
    const Tensor tangent = t.defined() ? t._fw_grad(0) : Tensor();
    tangents.push_back(tangent.defined() ? tangent : at::empty({0}, t.options()));
  }
}
inline void set_tangent(const Tensor& t, const Tensor& tangent) {
  if (t.numel() > 0) t._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);  // [0]: nobody asked for it
}

// Tangents of (y, last), from those of x, states, reset states and params.
using LayerTangentsSignature = std::vector<Tensor>(at::TensorList tangents, const Tensor& y, const Tensor& x,
                                                   at::TensorList states, at::TensorList params, at::TensorList rows,
                                                   at::TensorList saved, int64_t recipe);
using LayerJvpSignature = std::vector<Tensor>(at::TensorList tangents, const Tensor& x, at::TensorList states,
                                              at::TensorList params, at::TensorList rows, at::TensorList saved,
                                              at::IntArrayRef call);
// Tangents of (dx, dstates, dparams), from those of dy, dlast, x, states, reset states and params.
using BackwardTangentsSignature = std::vector<Tensor>(at::TensorList tangents, const OptionalTensor& dy,
                                                      at::TensorList dlast, const Tensor& x, at::TensorList states,
                                                      at::TensorList params, at::TensorList rows, at::TensorList saved,
                                                      at::IntArrayRef call);

}  // namespace fused_rnn
