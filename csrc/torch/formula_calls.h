// Calls of a formula's kernels: what forward and backward take and give, allocated (formula_calls.cpp). The ops of whole
// layers (formula_ops.cpp) and of checkpointed ones (formula_checkpoint.cpp) run them.
#pragma once
#include "torch/formula_layer.h"
#include "torch/formula_ops.h"

namespace fused_rnn {

Recipe formula_recipe_of(int64_t flags);

// A forward call with its results: y, of each state the last one, then with all_states every one but the output's
// [N, D * H], and what is saved for backward.
struct FormulaForwardCall {
  cpu::FormulaForward params{};
  Tensor y;
  std::vector<Tensor> last, saved;
  Tensor columns;  // of ids
  Copies copies;
};
FormulaForwardCall formula_inputs(const FormulaLayer& layer);  // without results
FormulaForwardCall prepare_formula(const FormulaLayer& layer, bool save);
// The input products of ids on a CPU, for the scan to read.
void gather_input_products(const FormulaLayer& layer, FormulaForwardCall& made);

// A backward call without what forward has made (saved values, series, v, y), which the caller adds to both parts.
struct FormulaBackwardCall {
  cpu::FormulaBackward params{};
  FormulaGradients made;
  Copies copies;
};
FormulaBackwardCall prepare_formula_backward(const FormulaLayer& layer, const OptionalTensor& dy, at::TensorList dlast,
                                             bool wants_states);
// Gradients of the products from elsewhere, [D, N, S or more, H], come to those that the scan makes.
void add_gradients_of_products(FormulaBackwardCall& made, const FormulaLayer& layer, const Tensor& added);
// What follows the scan: the gradients that flags ask for.
LayerGradients gradients_of_formula(const FormulaLayer& layer, FormulaGradients& made, int64_t flags);

}  // namespace fused_rnn
