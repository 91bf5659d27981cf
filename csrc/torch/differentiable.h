// What the autograd functions share.
#pragma once
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "torch/layer.h"

namespace fused_rnn {

inline bool requires_grad(const OptionalTensor& t) { return t && t->defined() && t->requires_grad(); }

inline bool any_requires_grad(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.requires_grad(); });
}

// Whether a call on these tensors is to be a node of the graph.
inline bool differentiates(const Tensor& x, const OptionalTensor& h, const OptionalTensor& c, at::TensorList params) {
  return at::GradMode::is_enabled() &&
         (x.requires_grad() || requires_grad(h) || requires_grad(c) || any_requires_grad(params));
}

inline OptionalTensor optional_of(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
inline Tensor tensor_of(const OptionalTensor& t) { return t ? *t : Tensor(); }

// Lengths or resets for backward: callers write into one buffer for call after call.
inline Tensor own(const OptionalTensor& t) { return t && t->defined() ? t->clone() : Tensor(); }

}  // namespace fused_rnn
