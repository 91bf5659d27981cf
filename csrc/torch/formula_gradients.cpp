// Gradients of a formula's layer that are made behind its scan: of the parameters, of the input, and of what resets put into
// the states.
#include <ATen/OpMathType.h>
#include <ATen/ops/add.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/zeros.h>

#include "torch/device.h"
#include "torch/formula_layer.h"
#include "torch/ids.h"

namespace fused_rnn {
namespace {

// Gradients of the input products, as runs of blocks that are neighbours in d and in weight_ih: f(first gate, first block,
// count). Gates without weights have none.
template <class F>
void for_input_blocks(const FormulaLayer& layer, F&& f) {
  const int* const place = layer.traits().input_gradients;
  for (int gate = 0; gate < layer.input_gates();) {
    int count = 1;
    while (gate + count < layer.input_gates() && place[gate + count] == place[gate] + count) ++count;
    f(gate, place[gate], count);
    gate += count;
  }
}

// The gradient of weight_hh of direction k.
Tensor recurrent_gradient(const FormulaLayer& layer, const FormulaGradients& made, const RowChoice& rows, int k) {
  const LayerShapes& s = layer.shapes;
  const cpu::FormulaTraits& traits = layer.traits();
  const int64_t G = traits.recurrent_gates, units = s.H / layer.heads;
  const Tensor d_rec = made.blocks(k, traits.gradients - G, G), &series = made.series[traits.recurrent];
  // The call with the recurrent state as its first.
  const at::TensorList states = layer.call.states;
  Rows of_state = layer.call.rows;
  if (!of_state.reset_states.empty()) of_state.reset_states = {of_state.reset_states[traits.recurrent]};
  const Call call{layer.call.x, states.empty() ? states : states.slice(traits.recurrent, 1), layer.call.params, of_state,
                  layer.call.recipe};
  const Tensor& w_hh = layer.call.params_of_direction(k)[1];
  if (layer.heads == 1) return recurrent_weight_gradient(call, s, rows, d_rec, series, k).view(w_hh.sizes());
  const Tensor before = rows.of(previous_states(call, s, output_of_direction(series, s, k), k));
  const Tensor dw = empty_like(call.like(), w_hh.sizes());
  for (int64_t head = 0; head < layer.heads; ++head) {
    const Tensor of_head = part(before, 1, head * units, (head + 1) * units);
    for (int64_t g = 0; g < G; ++g) {
      const int64_t first = g * s.H + head * units;
      multiply_into(part(dw.select(0, head), 0, g * units, (g + 1) * units), part(d_rec, 1, first, first + units),
                    /*transposed=*/true, of_head, /*add=*/false);
    }
  }
  return dw;
}

// The gradient of the recurrent state before the rows of d_rec [n, Gr * H], through weight_hh of direction k: [n, H].
Tensor through_recurrent_weights(const FormulaLayer& layer, const Tensor& d_rec, int k) {
  const LayerShapes& s = layer.shapes;
  const Tensor& w_hh = layer.call.params_of_direction(k)[1];
  const Tensor out = empty_like(layer.call.like(), {d_rec.size(0), s.H});
  const int64_t units = s.H / layer.heads;
  if (layer.heads == 1) {
    multiply_into(out, d_rec, /*transposed=*/false, w_hh.view({-1, s.H}), /*add=*/false);
    return out;
  }
  for (int64_t head = 0; head < layer.heads; ++head) {
    for (int64_t g = 0; g < layer.traits().recurrent_gates; ++g) {
      const int64_t first = g * s.H + head * units;
      multiply_into(part(out, 1, head * units, (head + 1) * units), part(d_rec, 1, first, first + units),
                    /*transposed=*/false, part(w_hh.select(0, head), 0, g * units, (g + 1) * units), /*add=*/g > 0);
    }
  }
  return out;
}

// The gradient of state i of direction k before the rows that `choose` takes of all [N, H]: what d_reset has, and of the
// recurrent state what passes through weight_hh.
template <class Choose>
Tensor reset_state_gradient(const FormulaLayer& layer, const FormulaGradients& made, int i, int k, const Choose& choose) {
  const cpu::FormulaTraits& traits = layer.traits();
  const Tensor d = choose(made.d_reset[i].select(0, k));
  if (!layer.recurs() || i != traits.recurrent) return d;
  const int64_t G = traits.recurrent_gates;
  return at::add(d, through_recurrent_weights(layer, choose(made.blocks(k, traits.gradients - G, G)), k));
}

// Sums over the rows of all blocks of d of a direction that a gradient needs: each block is read once, also where bias_ih
// and bias_hh have the same gradient.
class BlockSums {
 public:
  BlockSums(const FormulaLayer& layer, const FormulaGradients& made, int k) : H_(layer.shapes.H) {
    const cpu::FormulaTraits& traits = layer.traits();
    bool norms = false;
    for (int q = 0; q < traits.phases; ++q) norms |= layer.phase(q) == cpu::FormulaPhase::kLayerNorm;
    const int64_t first = layer.call.recipe.has_biases ? 0 : traits.gradients;
    const int64_t last = traits.gradients + traits.parameters + (norms ? traits.phases : 0);
    sums_ = empty_like(layer.call.like(), {last * H_});
    if (first < last) sum_rows_into(part(sums_, 0, first * H_, last * H_), made.blocks(k, first, last - first));
  }
  // Of `count` blocks [count * H]: memory that others see too.
  Tensor of(int64_t block, int64_t count = 1) const { return part(sums_, 0, block * H_, (block + count) * H_); }

 private:
  int64_t H_;
  Tensor sums_;
};

// Gradients of the parameters of phase q of direction k.
void phase_gradients(const FormulaLayer& layer, const FormulaGradients& made, const BlockSums& sums, int k, int q,
                     std::vector<Tensor>& gradients) {
  const cpu::FormulaTraits& traits = layer.traits();
  const int64_t H = layer.shapes.H, block = traits.gradients + traits.parameters + q;
  const Tensor &x = layer.call.like(), v = made.v[q].select(0, k);
  const Tensor d = made.blocks(k, block, 1);
  const auto sums_of = [&](const Tensor& rows) {
    const Tensor made_sums = empty_like(x, {H});
    sum_rows_into(made_sums, rows);
    return made_sums;
  };
  switch (layer.phase(q)) {
    case cpu::FormulaPhase::kProduct:
      gradients.push_back(empty_like(x, {H, H}));
      multiply_into(gradients.back(), d, /*transposed=*/true, v, /*add=*/false);
      break;
    case cpu::FormulaPhase::kLayerNorm:
      gradients.push_back(sums_of(at::mul(d, at::layer_norm(v, {H}, {}, {}, cpu::kFormulaNormEpsilon))));
      gradients.push_back(sums.of(block).clone());
      break;
    case cpu::FormulaPhase::kRmsNorm:
      gradients.push_back(sums_of(at::mul(d, at::rms_norm(v, {H}, {}, cpu::kFormulaNormEpsilon))));
      break;
  }
}

}  // namespace

void direction_gradients(const FormulaLayer& layer, const FormulaGradients& made, const RowChoice& rows, const Tensor& given,
                         int k, std::vector<Tensor>& gradients) {
  const Tensor& x = layer.call.like();
  const LayerShapes& s = layer.shapes;
  const cpu::FormulaTraits& traits = layer.traits();
  const int64_t in = layer.input_gates() * s.H, G = traits.recurrent_gates;
  const Tensor dw_ih = empty_like(x, {in, s.I}), db_ih = empty_like(x, {in});
  const bool biases = layer.call.recipe.has_biases;
  const BlockSums sums(layer, made, k);
  for_input_blocks(layer, [&](int64_t gate, int64_t block, int64_t count) {
    const Tensor d = made.blocks(k, block, count);
    const Tensor dw = part(dw_ih, 0, gate * s.H, (gate + count) * s.H);
    if (layer.call.has_ids()) {
      scatter_columns_into(dw, d, given);
    } else {
      multiply_into(dw, d, /*transposed=*/true, given, /*add=*/false);
    }
    if (biases) part(db_ih, 0, gate * s.H, (gate + count) * s.H).copy_(sums.of(block, count));
  });
  gradients.push_back(dw_ih);
  if (layer.recurs()) gradients.push_back(recurrent_gradient(layer, made, rows, k));
  if (biases) gradients.push_back(db_ih);
  if (biases && layer.recurs()) gradients.push_back(sums.of(traits.gradients - G, G).clone());
  const at::TensorList w = layer.call.params_of_direction(k);
  for (int i = 0; i < traits.parameters; ++i) {
    const Tensor of_units = sums.of(traits.gradients + i);
    gradients.push_back(w[layer.first_own() + i].dim() == 0 ? of_units.sum() : of_units.clone());
  }
  for (int q = 0; q < traits.phases; ++q) phase_gradients(layer, made, sums, k, q, gradients);
}

Tensor input_gradient(const FormulaLayer& layer, const FormulaGradients& made, const RowChoice& rows) {
  const LayerShapes& s = layer.shapes;
  const Tensor dx = empty_like(layer.call.x, {rows.count(s), s.I});
  bool add = false;
  for (int k = 0; k < s.D; ++k) {
    const Tensor& w_ih = layer.call.params_of_direction(k)[0];
    for_input_blocks(layer, [&](int64_t gate, int64_t block, int64_t count) {
      multiply_into(dx, made.blocks(k, block, count), /*transposed=*/false, part(w_ih, 0, gate * s.H, (gate + count) * s.H),
                    add);
      add = true;
    });
  }
  return rows.spread(dx, s).view(layer.call.x.sizes());
}

Tensor values_gradient(const FormulaLayer& layer, const FormulaGradients& made) {
  const cpu::FormulaTraits& traits = layer.traits();
  TORCH_CHECK_VALUE(layer.given > 0, "flags: expected no gradient of values, of which the call has none");
  // Gates without weights are the last input gates, and no recurrent ones: their gradients are neighbours.
  const int first = traits.input_gradients[traits.input_gates - layer.given];
  return made.d.slice(2, first, first + layer.given).clone();
}

void reset_state_gradients(const FormulaLayer& layer, const FormulaGradients& made, std::vector<Tensor>& gradients) {
  const LayerShapes& s = layer.shapes;
  const std::vector<Tensor>& given = layer.call.rows.reset_states;
  std::vector<Tensor> sums;
  for (const Tensor& t : given) sums.push_back(at::zeros(t.sizes(), t.options().dtype(at::toOpMathType(t.scalar_type()))));
  const auto append = [&] {
    for (size_t i = 0; i < given.size(); ++i) gradients.push_back(sums[i].to(given[i].scalar_type()));
  };
  const int states = static_cast<int>(given.size());
#ifdef FUSED_RNN_WITH_CUDA
  if (is_on_device(layer.call.like())) {
    const auto all = [](const Tensor& t) { return t; };
    for (int i = 0; i < states; ++i) {
      for (int k = 0; k < s.D; ++k) {
        add_reset_gradients_on_device(layer.call, s, reset_state_gradient(layer, made, i, k, all), k, sums[i]);
      }
    }
    return append();
  }
#endif
  const RowPlaces resets = RowPlaces::of_resets(layer.call, s);
  const auto at_resets = [&](const Tensor& t) { return t.index_select(0, resets.rows); };
  for (int i = 0; resets.rows.size(0) > 0 && i < states; ++i) {
    for (int k = 0; k < s.D; ++k) {
      add_reset_gradients(resets, reset_state_gradient(layer, made, i, k, at_resets), k, sums[i]);
    }
  }
  append();
}

}  // namespace fused_rnn
