// layer_backward on batched gradients: torch.autograd.grad(is_grads_batched=True) and jacobian(vectorize=True), which use
// torch's first vmap (dispatch key Batched). Each sample is a call of its own: the gradients of weights are sums over the
// rows of one sample. torch.func.vmap has its rule in fused_rnn/_ops.py.
#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include "torch/ops.h"

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

 private:
  int64_t level_ = -1, count_ = 0;
};

LayerGradients layer_backward_batched(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                                      const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                      at::TensorList params, bool has_biases, const OptionalTensor& lengths,
                                      const OptionalTensor& offsets, const OptionalTensor& resets, const OptionalTensor& y,
                                      const Tensor& gates, const Tensor& cs, int64_t cell, bool bidirectional,
                                      std::array<bool, 3> mask) {
  Samples samples;
  for (const OptionalTensor* t : {&dy, &dh_n, &dc_n, &h0, &c0, &lengths, &offsets, &resets, &y}) samples.include(*t);
  for (const Tensor* t : {&x, &gates, &cs}) samples.include(*t);
  samples.include(params);
  TORCH_CHECK_VALUE(samples.count() > 0, "fused_rnn::layer_backward: expected at least one gradient in the batch, got 0");
  std::vector<Tensor> dx, dh0, dc0;
  std::vector<std::vector<Tensor>> dparams(params.size());
  for (int64_t i = 0; i < samples.count(); ++i) {
    auto made = layer_backward_op().call(
        samples.at(dy, i), samples.at(dh_n, i), samples.at(dc_n, i), samples.at(x, i), samples.at(h0, i), samples.at(c0, i),
        samples.at(params, i), has_biases, samples.at(lengths, i), samples.at(offsets, i), samples.at(resets, i),
        samples.at(y, i), samples.at(gates, i), samples.at(cs, i), cell, bidirectional, mask);
    dx.push_back(std::get<0>(made));
    dh0.push_back(std::get<1>(made));
    dc0.push_back(std::get<2>(made));
    for (size_t p = 0; p < dparams.size(); ++p) dparams[p].push_back(std::get<3>(made)[p]);
  }
  std::vector<Tensor> joined;
  for (const auto& of_samples : dparams) joined.push_back(samples.joined(of_samples));
  return {samples.joined(dx), samples.joined(dh0), samples.joined(dc0), std::move(joined)};
}

}  // namespace
}  // namespace fused_rnn

TORCH_LIBRARY_IMPL(fused_rnn, Batched, m) { m.impl("layer_backward", fused_rnn::layer_backward_batched); }
