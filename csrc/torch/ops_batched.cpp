// layer_backward, layer_jvp, formula and formula_backward on a batch of gradients or tangents:
// torch.autograd.grad(is_grads_batched=True) and jacobian(vectorize=True), which use torch's first vmap (dispatch key
// Batched). Each sample is a call of its own: the gradients of weights are sums over the rows of one sample. torch.func.vmap
// has its rules in fused_rnn/_transforms.py and torch/ops_vmap.cpp.

// Of functorch first, also where files are compiled together (ops_vmap.cpp): its functions call others by names that the
// legacy header has too.
// clang-format off
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/LegacyBatchedTensorImpl.h>
// clang-format on
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include "torch/ops.h"
#include "torch/tangents.h"

namespace fused_rnn {
namespace {

// The innermost vmap among the arguments of a call, and a sample of it.
class Samples {
 public:
  void include(const Tensor& t) {
    const at::BatchedTensorImpl* batched = t.defined() ? at::maybeGetBatchedImpl(t) : nullptr;
    if (!batched) return;
    const at::BatchDim& last = batched->bdims().back();
    if (last.level() < level_) return;
    level_ = last.level();
    count_ = batched->value().size(last.dim());
  }
  void include(const OptionalTensor& t) {
    if (t) include(*t);
  }
  void include(at::TensorList tensors) {
    for (const Tensor& t : tensors) include(t);
  }
  int64_t count() const { return count_; }

  Tensor at(const Tensor& t, int64_t index) const {
    const at::BatchedTensorImpl* batched = t.defined() ? at::maybeGetBatchedImpl(t) : nullptr;
    if (!batched || batched->bdims().back().level() != level_) return t;
    const int64_t dim = batched->bdims().back().dim();
    const Tensor sample = batched->value().select(dim, index);
    at::BatchDims outer;
    for (const at::BatchDim& d : batched->bdims()) {
      if (d.level() != level_) outer.emplace_back(d.level(), d.dim() - (d.dim() > dim));
    }
    return outer.empty() ? sample : at::makeBatched(sample, std::move(outer));
  }
  OptionalTensor at(const OptionalTensor& t, int64_t index) const { return t ? OptionalTensor(at(*t, index)) : t; }
  std::vector<Tensor> at(at::TensorList tensors, int64_t index) const {
    std::vector<Tensor> result;
    for (const Tensor& t : tensors) result.push_back(at(t, index));
    return result;
  }
  Tensor joined(const std::vector<Tensor>& of_samples) const {
    return at::addBatchDim(at::stack(of_samples), level_, /*dim=*/0);
  }
  // of_samples: for each sample a list of tensors.
  std::vector<Tensor> joined(const std::vector<std::vector<Tensor>>& of_samples) const {
    std::vector<Tensor> result;
    for (size_t i = 0; i < of_samples[0].size(); ++i) {
      std::vector<Tensor> one;
      for (const std::vector<Tensor>& sample : of_samples) one.push_back(sample[i]);
      result.push_back(joined(one));
    }
    return result;
  }

 private:
  int64_t level_ = -1, count_ = 0;
};

LayerGradients layer_backward_batched(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x, at::TensorList states,
                                      at::TensorList params, at::TensorList rows, at::TensorList saved, int64_t recipe,
                                      std::array<bool, 3> mask) {
  Samples samples;
  samples.include(dy);
  samples.include(x);
  for (const at::TensorList& tensors : {dlast, states, params, rows, saved}) samples.include(tensors);
  TORCH_CHECK_VALUE(samples.count() > 0, "fused_rnn::layer_backward: expected at least one gradient in the batch, got 0");
  std::vector<Tensor> dx;
  std::vector<std::vector<Tensor>> dstates, dparams;
  for (int64_t i = 0; i < samples.count(); ++i) {
    auto made = layer_backward_op().call(samples.at(dy, i), samples.at(dlast, i), samples.at(x, i), samples.at(states, i),
                                         samples.at(params, i), samples.at(rows, i), samples.at(saved, i), recipe, mask);
    dx.push_back(std::move(std::get<0>(made)));
    dstates.push_back(std::move(std::get<1>(made)));
    dparams.push_back(std::move(std::get<2>(made)));
  }
  return {samples.joined(dx), samples.joined(dstates), samples.joined(dparams)};
}

// What forward-mode AD makes of them: torch.autograd.functional.jacobian(strategy="forward-mode", vectorize=True).
std::vector<Tensor> layer_jvp_batched(at::TensorList tangents, const Tensor& x, at::TensorList states, at::TensorList params,
                                      at::TensorList rows, at::TensorList saved, at::IntArrayRef call) {
  static const auto op = find_op<LayerJvpSignature>("fused_rnn::layer_jvp");
  Samples samples;
  samples.include(x);
  for (const at::TensorList& tensors : {tangents, states, params, rows, saved}) samples.include(tensors);
  TORCH_CHECK_VALUE(samples.count() > 0, "fused_rnn::layer_jvp: expected at least one tangent in the batch, got 0");
  std::vector<std::vector<Tensor>> found;
  for (int64_t i = 0; i < samples.count(); ++i) {
    found.push_back(op.call(samples.at(tangents, i), samples.at(x, i), samples.at(states, i), samples.at(params, i),
                            samples.at(rows, i), samples.at(saved, i), call));
  }
  return samples.joined(found);
}

using FormulaResults = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>;
using FormulaSignature = FormulaResults(const Tensor&, at::TensorList, at::TensorList, at::TensorList, std::string_view,
                                        int64_t);
using FormulaBackwardSignature = FormulaResults(const OptionalTensor&, at::TensorList, const Tensor&, at::TensorList,
                                                at::TensorList, at::TensorList, at::TensorList, std::string_view, int64_t);

// call(index) for each sample.
template <class Call>
FormulaResults formula_of_samples(const Samples& samples, const Call& call) {
  TORCH_CHECK_VALUE(samples.count() > 0, "fused_rnn::formula: expected at least one sample in the batch, got 0");
  std::vector<Tensor> first;
  std::vector<std::vector<Tensor>> second, third;
  for (int64_t i = 0; i < samples.count(); ++i) {
    FormulaResults made = call(i);
    first.push_back(std::move(std::get<0>(made)));
    second.push_back(std::move(std::get<1>(made)));
    third.push_back(std::move(std::get<2>(made)));
  }
  return {samples.joined(first), samples.joined(second), samples.joined(third)};
}

// The tangents of a layer of a formula are such a layer too, and their gradients its backward.
FormulaResults formula_batched(const Tensor& x, at::TensorList states, at::TensorList params, at::TensorList rows,
                               std::string_view cell, int64_t flags) {
  static const auto op = find_op<FormulaSignature>("fused_rnn::formula");
  Samples samples;
  samples.include(x);
  for (const at::TensorList& tensors : {states, params, rows}) samples.include(tensors);
  return formula_of_samples(samples, [&](int64_t i) {
    return op.call(samples.at(x, i), samples.at(states, i), samples.at(params, i), samples.at(rows, i), cell, flags);
  });
}

FormulaResults formula_backward_batched(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x,
                                        at::TensorList states, at::TensorList params, at::TensorList rows,
                                        at::TensorList saved, std::string_view cell, int64_t flags) {
  static const auto op = find_op<FormulaBackwardSignature>("fused_rnn::formula_backward");
  Samples samples;
  samples.include(dy);
  samples.include(x);
  for (const at::TensorList& tensors : {dlast, states, params, rows, saved}) samples.include(tensors);
  return formula_of_samples(samples, [&](int64_t i) {
    return op.call(samples.at(dy, i), samples.at(dlast, i), samples.at(x, i), samples.at(states, i), samples.at(params, i),
                   samples.at(rows, i), samples.at(saved, i), cell, flags);
  });
}

}  // namespace
}  // namespace fused_rnn

TORCH_LIBRARY_IMPL(fused_rnn, Batched, m) {
  m.impl("layer_backward", fused_rnn::layer_backward_batched);
  m.impl("layer_jvp", fused_rnn::layer_jvp_batched);
  m.impl("formula", fused_rnn::formula_batched);
  m.impl("formula_backward", fused_rnn::formula_backward_batched);
}
