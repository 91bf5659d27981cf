// The ops of a layer's backward, the same on every device: a call of the arguments, the scan, the products after it.
#pragma once
#include "torch/ops.h"

namespace fused_rnn {

// Device::run_backward(call, given, wanted, f) runs the scan and returns f(made); what products of the device need, such as
// its precision, holds while f runs.
template <class Device>
class BackwardOps {
 public:
  static LayerGradients layer(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x, at::TensorList states,
                              at::TensorList params, at::TensorList rows, at::TensorList saved, int64_t recipe,
                              std::array<bool, 3> mask) {
    return with_call(dy, dlast, x, states, params, rows, saved, recipe, gradients({recipe, mask, /*samples=*/0}));
  }
  static LayerGradients samples(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x, at::TensorList states,
                                at::TensorList params, at::TensorList rows, at::TensorList saved, at::IntArrayRef call) {
    const BackwardNumbers numbers = BackwardNumbers::of(call);
    return with_call(dy, dlast, x, states, params, rows, saved, numbers.recipe, gradients(numbers));
  }
  static GateGradients gates(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x, at::TensorList states,
                             at::TensorList params, at::TensorList rows, at::TensorList saved, int64_t recipe) {
    return with_call(dy, dlast, x, states, params, rows, saved, recipe, [](const Call& call, const ResultGradients& given) {
      return Device::run_backward(call, given, {false, true, false},
                                  [&](const BackwardCall& made) { return gates_of_layer(call, made); });
    });
  }

 private:
  // f(call, given)
  template <class F>
  static auto with_call(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x, at::TensorList states,
                        at::TensorList params, at::TensorList rows, at::TensorList saved, int64_t recipe, const F& f) {
    const Rows given_rows = rows_of(rows, recipe);
    const Call call{x, states, params, given_rows, layer_recipe_of(recipe)};
    return f(call, {dy, gradients_of_last(call.recipe, dlast), saved_of(call.recipe.cell, given_rows, saved)});
  }
  static auto gradients(const BackwardNumbers& numbers) {
    return [numbers](const Call& call, const ResultGradients& given) {
      const GradientMask wanted{numbers.mask[0], numbers.mask[1], numbers.mask[2]};
      return Device::run_backward(call, given, wanted, [&](const BackwardCall& made) {
        return gradients_of_layer(call, given, made, wanted, numbers.samples);
      });
    };
  }
};

}  // namespace fused_rnn
