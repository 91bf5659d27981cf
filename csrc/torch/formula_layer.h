// One layer of a cell that is a formula, checked: what the ops (formula_ops.cpp) and the gradients of parameters
// (formula_gradients.cpp) have in common.
//
//   params of a direction: weight_ih [Gi*H, I], weight_hh [Gr*H, H] or of n heads [n, Gr*H/n, H/n], bias_ih, bias_hh, the
//   cell's vectors [H] and numbers [], then of each phase a product's matrix [H, H] or a norm's weight and bias [H]. What a
//   cell lacks is left out. The last K input gates may have no weights: their values come with the call
//   (StepOptions.values), and Gi here is the number of the others.
#pragma once
#include <string>
#include <vector>

#include "cpu/formula/formula.h"
#include "torch/layer.h"
#include "torch/products.h"

namespace fused_rnn {

// A checked call of a layer.
struct FormulaLayer {
  const cpu::FormulaLibrary* cell;  // null where the kernels are a GPU's
  const cpu::FormulaTraits& facts;
  const Call& call;
  LayerShapes shapes;
  int heads;
  int given;  // K

  const cpu::FormulaTraits& traits() const { return facts; }
  int input_gates() const { return traits().input_gates - given; }  // with weights
  bool recurs() const { return traits().recurrent_gates > 0; }
  // Of a direction's parameters.
  size_t first_bias() const { return 1 + recurs(); }
  size_t first_own() const { return first_bias() + (call.recipe.has_biases ? 1 + recurs() : 0); }
  cpu::FormulaPhase phase(int k) const { return static_cast<cpu::FormulaPhase>(traits().phase_kinds[k]); }
  // The place of a phase's first parameter; of `phases`: the number of all parameters.
  size_t first_of_phase(int k) const {
    size_t place = first_own() + static_cast<size_t>(traits().parameters);
    for (int i = 0; i < k; ++i) place += phase(i) == cpu::FormulaPhase::kLayerNorm ? 2 : 1;
    return place;
  }
  // Whether forward keeps every state of this index for backward, beside y.
  bool keeps(int state) const {
    return state != traits().output && (traits().reads_series[state] || (recurs() && state == traits().recurrent));
  }
};

// Checks a call of the op; the formula's kernels must be there for its device.
FormulaLayer check_formula(const Call& call, const std::string& formula);

// What forward and backward of the kernels both take.
void fill(cpu::FormulaParams& p, const FormulaLayer& layer, Copies& copies);

// What backward makes of the call, and has beside it: d [D, N, S + U + Q, H], gradients of the states and of what resets put
// there, y and series by state, and what phases took.
struct FormulaGradients {
  Tensor d;
  std::vector<Tensor> d_states;
  std::vector<Tensor> d_reset;  // [D, N, H] of each state
  std::vector<Tensor> series;   // [N, D * H] of each state, undefined where forward kept none
  std::vector<Tensor> v;        // [D, N, H] of each phase

  // Blocks [first, first + count) of direction k [rows, count * H].
  Tensor blocks(int k, int64_t first, int64_t count) const {
    const int64_t N = d.size(1), H = d.size(3);
    return part(d.select(0, k).view({N, d.size(2) * H}), 1, first * H, (first + count) * H);
  }
};

// Of the parameters of direction k, appended. given: the rows [n, I] or the ids [n] of the input that `rows` chooses.
void direction_gradients(const FormulaLayer& layer, const FormulaGradients& made, const RowChoice& rows, const Tensor& given,
                         int k, std::vector<Tensor>& gradients);
Tensor input_gradient(const FormulaLayer& layer, const FormulaGradients& made, const RowChoice& rows);
// Of StepOptions.values [D, N, K, H], in memory of its own; 0 at inactive rows.
Tensor values_gradient(const FormulaLayer& layer, const FormulaGradients& made);
// Of what resets put into the states, appended.
void reset_state_gradients(const FormulaLayer& layer, const FormulaGradients& made, std::vector<Tensor>& gradients);

}  // namespace fused_rnn
