// One layer of a cell that is a formula (fused_rnn/formula), on a CPU or a GPU: the ops formula and formula_backward. Fake
// kernels, autograd and the double backward are in fused_rnn/formula/ops.py.
//
//   params of a direction: weight_ih [Gi*H, I], weight_hh [Gr*H, H] or of n heads [n, Gr*H/n, H/n], bias_ih, bias_hh, the
//   cell's vectors [H] and numbers [], then of each phase a product's matrix [H, H] or a norm's weight and bias [H]. What a
//   cell lacks is left out.
#include "torch/formula_ops.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <mutex>
#include <unordered_map>

#include "cpu/formula/formula.h"
#include "cpu/isa/kernels.h"
#include "torch/device.h"
#include "torch/layer.h"
#include "torch/products.h"
#include "torch/workspace.h"
#ifdef FUSED_RNN_WITH_CUDA
#include "torch/formula_device.h"
#include "torch/ops_cuda.h"
#endif

namespace fused_rnn {
namespace {

using cpu::FormulaLibrary;

// The libraries that were loaded, by formula, dtype and instruction set.
std::mutex formulas_mutex;
std::unordered_map<std::string, const FormulaLibrary*>& formulas() {
  static auto* const all = new std::unordered_map<std::string, const FormulaLibrary*>;
  return *all;
}
std::string key_of(const std::string& formula, DType dtype) {
  return formula + "/" + std::to_string(static_cast<int>(dtype)) + "/" + cpu::instruction_set();
}
const FormulaLibrary* find(const std::string& formula, DType dtype) {
  const std::lock_guard<std::mutex> lock(formulas_mutex);
  const auto found = formulas().find(key_of(formula, dtype));
  return found == formulas().end() ? nullptr : found->second;
}

// A checked call of a layer.
struct FormulaLayer {
  const FormulaLibrary* cell;  // null where the kernels are a GPU's
  const cpu::FormulaTraits& facts;
  const Call& call;
  LayerShapes shapes;
  int heads;

  const cpu::FormulaTraits& traits() const { return facts; }
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

Recipe recipe_of_flags(int64_t flags) {
  Recipe recipe;
  recipe.has_biases = flags & kFormulaBiases;
  recipe.bidirectional = flags & kFormulaBidirectional;
  recipe.all_states = flags & kFormulaAllStates;
  return recipe;
}

void check_direction(const FormulaLayer& layer, at::TensorList w) {
  const LayerShapes& s = layer.shapes;
  const cpu::FormulaTraits& traits = layer.traits();
  const Tensor& x = layer.call.x;
  const auto dtype = x.scalar_type();
  const int64_t in = traits.input_gates * s.H, rec = traits.recurrent_gates * s.H;
  check_tensor("weight_ih", w[0], {in, s.I}, x, dtype);
  if (layer.recurs()) {
    const auto shape = layer.heads == 1 && w[1].dim() == 2
                           ? at::DimVector{rec, s.H}
                           : at::DimVector{layer.heads, rec / layer.heads, s.H / layer.heads};
    check_tensor("weight_hh", w[1], shape, x, dtype);
  }
  if (layer.call.recipe.has_biases) {
    check_tensor("bias_ih", w[layer.first_bias()], {in}, x, dtype);
    if (layer.recurs()) check_tensor("bias_hh", w[layer.first_bias() + 1], {rec}, x, dtype);
  }
  for (size_t i = layer.first_own(); i < layer.first_of_phase(0); ++i) {
    check_tensor("parameters", w[i], w[i].dim() == 0 ? at::DimVector{} : at::DimVector{s.H}, x, dtype);
  }
  for (int k = 0; k < traits.phases; ++k) {
    const bool product = layer.phase(k) == cpu::FormulaPhase::kProduct;
    for (size_t i = layer.first_of_phase(k); i < layer.first_of_phase(k + 1); ++i) {
      check_tensor("parameters", w[i], product ? at::DimVector{s.H, s.H} : at::DimVector{s.H}, x, dtype);
    }
  }
}

FormulaLayer check_formula(const Call& call, const std::string& formula) {
  const Tensor& x = call.x;
  const FormulaLibrary* cell = nullptr;
  const cpu::FormulaTraits* facts = nullptr;
#ifdef FUSED_RNN_WITH_CUDA
  if (is_on_device(x)) {
    TORCH_CHECK_NOT_IMPLEMENTED(call.rows.reset_states.empty() && !call.recipe.all_states,
                                "no CUDA kernel of a formula has reset states or gives every state of every step");
    facts = formula_traits_on_device(formula, dtype_of(x), x.get_device());
  } else
#endif
  {
    TORCH_CHECK(x.is_cpu(), "input: expected a CPU tensor, got one on ", x.device());
    cell = find(formula, dtype_of(x));
    if (cell) facts = &cell->traits;
  }
  TORCH_CHECK(facts, "cell: the formula ", formula, " has no kernels in this process for ", x.scalar_type(), " on ",
              x.device(), ": make a fused_rnn.Layer of the cell first");
  FormulaLayer layer{cell, *facts, call, {}, 1};
  LayerShapes& s = layer.shapes;
  const cpu::FormulaTraits& traits = layer.traits();
  s.D = static_cast<int>(call.recipe.directions());
  s.per_direction = static_cast<int64_t>(call.params.size()) / s.D;
  const auto wanted = static_cast<int64_t>(layer.first_of_phase(traits.phases));
  TORCH_CHECK_VALUE(static_cast<int64_t>(call.params.size()) == wanted * s.D, "params: expected ", wanted * s.D,
                    " tensors, got ", call.params.size());
  check_memory("input", x);
  check_dimensions(call);
  const Tensor& w_ih = call.params[0];
  TORCH_CHECK(w_ih.dim() == 2 && w_ih.size(0) > 0 && w_ih.size(0) % traits.input_gates == 0, "weight_ih: expected shape [",
              traits.input_gates, "*H, I], got ", w_ih.sizes());
  s.I = x.size(-1);
  s.H = s.P = w_ih.size(0) / traits.input_gates;
  if (layer.recurs() && call.params[1].dim() == 3) layer.heads = static_cast<int>(call.params[1].size(0));
  TORCH_CHECK(layer.heads > 0 && s.H % layer.heads == 0, "weight_hh: expected heads that divide H=", s.H, ", got ",
              layer.heads);
  measure_rows(call, s);
  check_rows(call, s);
  const auto states = static_cast<size_t>(traits.states);
  TORCH_CHECK_VALUE(call.states.empty() || call.states.size() == states, "states: expected ", states, " or none, got ",
                    call.states.size());
  for (const Tensor& t : call.states) check_tensor("states", t, {s.D, s.B, s.H}, x, x.scalar_type());
  check_reset_states(call, s, std::vector<int64_t>(states, s.H));
  for (int d = 0; d < s.D; ++d) check_direction(layer, call.params_of_direction(d));
  return layer;
}

// The cell's own vectors and numbers of one direction, [U, H].
Tensor own_parameters(const FormulaLayer& layer, int d) {
  const at::TensorList w = layer.call.params_of_direction(d);
  std::vector<Tensor> rows;
  for (size_t i = layer.first_own(); i < layer.first_of_phase(0); ++i) rows.push_back(w[i].expand({layer.shapes.H}));
  return at::stack(rows);
}

void fill(cpu::FormulaParams& p, const FormulaLayer& layer, Copies& copies) {
  const LayerShapes& s = layer.shapes;
  const Call& call = layer.call;
  p.cell = layer.cell;
  p.dtype = dtype_of(call.x);
  p.I = s.I, p.H = s.H, p.D = s.D, p.heads = layer.heads;
  p.seq = sequence_of(call, s, copies);
  p.modifier.resets = modifier_of(call, copies).resets;
  for (size_t i = 0; i < call.rows.reset_states.size(); ++i) {
    p.reset_states[i] = reset_state_of(call.rows.reset_states[i], copies);
  }
  for (size_t i = 0; i < call.states.size(); ++i) p.states[i] = copies.contiguous(call.states[i]);
  for (int d = 0; d < s.D; ++d) {
    const at::TensorList w = call.params_of_direction(d);
    cpu::FormulaWeights& weights = p.weights[d];
    weights.w_ih = {copies.contiguous(w[0]), p.dtype};
    weights.w_hh = {layer.recurs() ? copies.contiguous(w[1]) : nullptr, p.dtype};
    if (call.recipe.has_biases) {
      weights.b_ih = copies.contiguous(w[layer.first_bias()]);
      if (layer.recurs()) weights.b_hh = copies.contiguous(w[layer.first_bias() + 1]);
    }
    if (layer.traits().parameters > 0) weights.parameters = copies.keep(own_parameters(layer, d));
    for (int k = 0; k < layer.traits().phases; ++k) {
      const size_t first = layer.first_of_phase(k);
      cpu::FormulaPhaseWeights& phase = weights.phases[k];
      switch (layer.phase(k)) {
        case cpu::FormulaPhase::kProduct: phase.matrix = {copies.contiguous(w[first]), p.dtype}; break;
        case cpu::FormulaPhase::kLayerNorm: phase.bias = copies.contiguous(w[first + 1]); [[fallthrough]];
        case cpu::FormulaPhase::kRmsNorm: phase.weight = copies.contiguous(w[first]); break;
      }
    }
  }
}

#ifdef FUSED_RNN_WITH_CUDA
// What holds during an op on CUDA tensors: their device is the current one, and matrix products are as exact as the kernels,
// which do not round float32 to TF32.
struct DeviceBlock {
  std::optional<c10::DeviceGuard> device;
  std::optional<MatmulPrecision> precision;

  explicit DeviceBlock(const Tensor& x) {
    if (!is_on_device(x)) return;
    device.emplace(x.device());
    precision.emplace(/*allow_tf32=*/false);
  }
};

// x W_ih^T + b_ih of all directions [D, N, Gi * H].
Tensor input_products(const FormulaLayer& layer) {
  const LayerShapes& s = layer.shapes;
  const Call& call = layer.call;
  const Tensor x = call.x.reshape({s.N, s.I});
  const Tensor products = empty_inside(x, {s.D, s.N, layer.traits().input_gates * s.H});
  for (int d = 0; d < s.D; ++d) {
    const at::TensorList w = call.params_of_direction(d);
    Tensor out = products.select(0, d);
    if (call.recipe.has_biases) {
      at::addmm_out(out, w[layer.first_bias()], x, w[0].t());
    } else {
      at::mm_out(out, x, w[0].t());
    }
  }
  return products;
}
#endif

LayerOutputs formula_on(const Tensor& x, at::TensorList states, at::TensorList params, at::TensorList rows,
                        std::string_view cell, int64_t flags) {
#ifdef FUSED_RNN_WITH_CUDA
  const DeviceBlock block(x);
#endif
  const Rows given = rows_of(rows, flags);
  const Call call{x, states, params, given, recipe_of_flags(flags)};
  const FormulaLayer layer = check_formula(call, std::string(cell));
  const LayerShapes& s = layer.shapes;
  const cpu::FormulaTraits& traits = layer.traits();
  cpu::FormulaForward p{};
  Copies copies;
  fill(p, layer, copies);
  p.x = copies.contiguous(x);
  p.training = flags & kFormulaSave;
  Tensor y = empty_like(x, s.output(call));
  p.y = data_or_null(y);
  std::vector<Tensor> last, saved;
  for (int i = 0; i < traits.states; ++i) {
    last.push_back(empty_like(x, {s.D, s.B, s.H}));
    p.last[i] = data_or_null(last.back());
  }
  for (int i = 0; call.recipe.all_states && i < traits.states; ++i) {
    if (i == traits.output) continue;
    last.push_back(empty_like(x, {s.N, s.D * s.H}));
    p.series[i] = data_or_null(last.back());
  }
  if (p.training && traits.saved > 0) {
    saved.push_back(empty_inside(x, {s.D, s.N, traits.saved, s.H}));
    p.saved = data_or_null(saved.back());
  }
  for (int i = 0; p.training && i < traits.states; ++i) {
    if (!layer.keeps(i) || call.recipe.all_states) continue;
    saved.push_back(empty_inside(x, {s.N, s.D * s.H}));
    p.series[i] = data_or_null(saved.back());
  }
  for (int k = 0; p.training && k < traits.phases; ++k) {
    saved.push_back(empty_inside(x, {s.D, s.N, s.H}));
    p.v[k] = data_or_null(saved.back());
  }
  if (s.B == 0) return {std::move(y), std::move(last), std::move(saved)};
#ifdef FUSED_RNN_WITH_CUDA
  if (is_on_device(x)) {
    formula_forward_on_device(std::string(cell), p, input_products(layer));
    return {std::move(y), std::move(last), std::move(saved)};
  }
#endif
  Workspace workspace;
  cpu::forward(p, [&](int64_t bytes) { return workspace.take(bytes); });
  return {std::move(y), std::move(last), std::move(saved)};
}

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

// The gradients of states after each step, which follow those of the last states in dlast.
void fill_gradients_of_series(cpu::FormulaBackward& p, const FormulaLayer& layer, at::TensorList dlast, Copies& copies) {
  const LayerShapes& s = layer.shapes;
  const Tensor& x = layer.call.x;
  auto next = static_cast<size_t>(layer.traits().states);
  for (int i = 0; i < layer.traits().states && next < dlast.size(); ++i) {
    if (i == layer.traits().output) continue;
    const Tensor& d = dlast[next++];
    if (d.dim() == 1 && d.numel() == 0) continue;
    check_tensor("dlast", d, {s.N, s.D * s.H}, x, x.scalar_type());
    p.d_series[i] = copies.contiguous(d);
  }
}

FormulaGradients run_backward(const FormulaLayer& layer, [[maybe_unused]] const std::string& cell, const OptionalTensor& dy,
                              at::TensorList dlast, at::TensorList saved, bool wants_states) {
  const LayerShapes& s = layer.shapes;
  const Call& call = layer.call;
  const cpu::FormulaTraits& traits = layer.traits();
  const Tensor& x = call.x;
  const auto dtype = x.scalar_type();
  const bool all_states = call.recipe.all_states;
  const auto has_series = [&](int i) { return all_states ? i != traits.output : layer.keeps(i); };
  size_t kept = 1 + (traits.saved > 0) + static_cast<size_t>(traits.phases);
  for (int i = 0; i < traits.states; ++i) kept += has_series(i);
  const auto results = static_cast<size_t>(all_states ? 2 * traits.states - 1 : traits.states);
  TORCH_CHECK_VALUE(saved.size() == kept, "saved: expected ", kept, " tensors of forward, its output last, got ",
                    saved.size());
  TORCH_CHECK_VALUE(dlast.empty() || dlast.size() == results, "dlast: expected ", results,
                    " gradients ([0]: none), or no list of them, got ", dlast.size());
  cpu::FormulaBackward p{};
  Copies copies;
  fill(p, layer, copies);
  FormulaGradients made;
  made.series.resize(traits.states);
  size_t next = 0;
  if (traits.saved > 0) {
    check_tensor("saved", saved[next], {s.D, s.N, traits.saved, s.H}, x, dtype);
    p.saved = copies.contiguous(saved[next++]);
  }
  const auto take_series = [&] {
    for (int i = 0; i < traits.states; ++i) {
      if (!has_series(i)) continue;
      check_tensor("saved", saved[next], {s.N, s.D * s.H}, x, dtype);
      made.series[i] = saved[next];
      p.series[i] = copies.contiguous(saved[next++]);
    }
  };
  if (!all_states) take_series();
  for (int k = 0; k < traits.phases; ++k) {
    check_tensor("saved", saved[next], {s.D, s.N, s.H}, x, dtype);
    made.v.push_back(saved[next]);
    p.v[k] = copies.contiguous(saved[next++]);
  }
  if (all_states) take_series();  // they are results, not among what forward saved
  check_tensor("y", saved[next], s.output(call), x, dtype);
  made.series[traits.output] = saved[next];
  p.y = copies.contiguous(saved[next]);
  check_optional("dy", dy, s.output(call), x, dtype);
  p.dy = copies.contiguous(dy);
  made.d = empty_inside(x, {s.D, s.N, traits.gradients + traits.parameters + traits.phases, s.H});
  p.d = data_or_null(made.d);
  for (int i = 0; i < traits.states; ++i) {
    const bool given = !dlast.empty() && !(dlast[i].dim() == 1 && dlast[i].numel() == 0);
    if (given) check_tensor("dlast", dlast[i], {s.D, s.B, s.H}, x, dtype);
    p.d_last[i] = given ? copies.contiguous(dlast[i]) : nullptr;
    made.d_states.push_back(wants_states && !call.states.empty() ? empty_like(x, {s.D, s.B, s.H}) : Tensor());
    p.d_states[i] = data_or_null(made.d_states.back());
  }
  fill_gradients_of_series(p, layer, dlast, copies);
  for (size_t i = 0; wants_states && i < call.rows.reset_states.size(); ++i) {
    made.d_reset.push_back(empty_inside(x, {s.D, s.N, s.H}));
    p.d_reset[i] = data_or_null(made.d_reset.back());
  }
  if (s.B == 0) return made;
#ifdef FUSED_RNN_WITH_CUDA
  if (is_on_device(x)) {
    formula_backward_on_device(cell, p, x);
    return made;
  }
#endif
  Workspace workspace;
  cpu::backward(p, [&](int64_t bytes) { return workspace.take(bytes); });
  return made;
}

// Gradients of the input products, as runs of blocks that are neighbours in d and in weight_ih: f(first gate, first block,
// count).
template <class F>
void for_input_blocks(const cpu::FormulaTraits& traits, F&& f) {
  const int* const place = traits.input_gradients;
  for (int gate = 0; gate < traits.input_gates;) {
    int count = 1;
    while (gate + count < traits.input_gates && place[gate + count] == place[gate] + count) ++count;
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
  const Tensor dw = empty_like(call.x, w_hh.sizes());
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

// Gradients of the parameters of phase q of direction k.
void phase_gradients(const FormulaLayer& layer, const FormulaGradients& made, int k, int q, std::vector<Tensor>& gradients) {
  const cpu::FormulaTraits& traits = layer.traits();
  const int64_t H = layer.shapes.H;
  const Tensor &x = layer.call.x, v = made.v[q].select(0, k);
  const Tensor d = made.blocks(k, traits.gradients + traits.parameters + q, 1);
  const auto sums_of = [&](const Tensor& rows) {
    const Tensor sums = empty_like(x, {H});
    sum_rows_into(sums, rows);
    return sums;
  };
  switch (layer.phase(q)) {
    case cpu::FormulaPhase::kProduct:
      gradients.push_back(empty_like(x, {H, H}));
      multiply_into(gradients.back(), d, /*transposed=*/true, v, /*add=*/false);
      break;
    case cpu::FormulaPhase::kLayerNorm:
      gradients.push_back(sums_of(at::mul(d, at::layer_norm(v, {H}, {}, {}, cpu::kFormulaNormEpsilon))));
      gradients.push_back(sums_of(d));
      break;
    case cpu::FormulaPhase::kRmsNorm:
      gradients.push_back(sums_of(at::mul(d, at::rms_norm(v, {H}, {}, cpu::kFormulaNormEpsilon))));
      break;
  }
}

void direction_gradients(const FormulaLayer& layer, const FormulaGradients& made, const RowChoice& rows, const Tensor& x,
                         int k, std::vector<Tensor>& gradients) {
  const LayerShapes& s = layer.shapes;
  const cpu::FormulaTraits& traits = layer.traits();
  const int64_t in = traits.input_gates * s.H, G = traits.recurrent_gates;
  const Tensor dw_ih = empty_like(x, {in, s.I}), db_ih = empty_like(x, {in});
  const bool biases = layer.call.recipe.has_biases;
  for_input_blocks(traits, [&](int64_t gate, int64_t block, int64_t count) {
    const Tensor d = made.blocks(k, block, count);
    multiply_into(part(dw_ih, 0, gate * s.H, (gate + count) * s.H), d, /*transposed=*/true, x, /*add=*/false);
    if (biases) sum_rows_into(part(db_ih, 0, gate * s.H, (gate + count) * s.H), d);
  });
  gradients.push_back(dw_ih);
  if (layer.recurs()) gradients.push_back(recurrent_gradient(layer, made, rows, k));
  if (biases) gradients.push_back(db_ih);
  if (biases && layer.recurs()) {
    gradients.push_back(empty_like(x, {G * s.H}));
    sum_rows_into(gradients.back(), made.blocks(k, traits.gradients - G, G));
  }
  const at::TensorList w = layer.call.params_of_direction(k);
  for (int i = 0; i < traits.parameters; ++i) {
    const Tensor sums = empty_like(x, {s.H});
    sum_rows_into(sums, made.blocks(k, traits.gradients + i, 1));
    gradients.push_back(w[layer.first_own() + i].dim() == 0 ? sums.sum() : sums);
  }
  for (int q = 0; q < traits.phases; ++q) phase_gradients(layer, made, k, q, gradients);
}

Tensor input_gradient(const FormulaLayer& layer, const FormulaGradients& made, const RowChoice& rows) {
  const LayerShapes& s = layer.shapes;
  const Tensor dx = empty_like(layer.call.x, {rows.count(s), s.I});
  bool add = false;
  for (int k = 0; k < s.D; ++k) {
    const Tensor& w_ih = layer.call.params_of_direction(k)[0];
    for_input_blocks(layer.traits(), [&](int64_t gate, int64_t block, int64_t count) {
      multiply_into(dx, made.blocks(k, block, count), /*transposed=*/false, part(w_ih, 0, gate * s.H, (gate + count) * s.H),
                    add);
      add = true;
    });
  }
  return rows.spread(dx, s).view(layer.call.x.sizes());
}

// The gradient of the recurrent state before the rows of d_rec [n, Gr * H], through weight_hh of direction k: [n, H].
Tensor through_recurrent_weights(const FormulaLayer& layer, const Tensor& d_rec, int k) {
  const LayerShapes& s = layer.shapes;
  const Tensor& w_hh = layer.call.params_of_direction(k)[1];
  const Tensor out = empty_like(layer.call.x, {d_rec.size(0), s.H});
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

// Of what resets put into the states, appended.
void reset_state_gradients(const FormulaLayer& layer, const FormulaGradients& made, std::vector<Tensor>& gradients) {
  const LayerShapes& s = layer.shapes;
  const cpu::FormulaTraits& traits = layer.traits();
  const RowPlaces resets = RowPlaces::of_resets(layer.call, s);
  const std::vector<Tensor>& given = layer.call.rows.reset_states;
  for (size_t i = 0; i < given.size(); ++i) {
    const Tensor sums = at::zeros(given[i].sizes(), given[i].options().dtype(at::toOpMathType(given[i].scalar_type())));
    for (int k = 0; resets.rows.size(0) > 0 && k < s.D; ++k) {
      Tensor d = made.d_reset[i].select(0, k).index_select(0, resets.rows);
      if (layer.recurs() && static_cast<int>(i) == traits.recurrent) {
        const int64_t G = traits.recurrent_gates;
        const Tensor d_rec = made.blocks(k, traits.gradients - G, G).index_select(0, resets.rows);
        d = at::add(d, through_recurrent_weights(layer, d_rec, k));
      }
      add_reset_gradients(resets, d, k, sums);
    }
    gradients.push_back(sums.to(given[i].scalar_type()));
  }
}

LayerGradients formula_backward_on(const OptionalTensor& dy, at::TensorList dlast, const Tensor& x, at::TensorList states,
                                   at::TensorList params, at::TensorList rows, at::TensorList saved, std::string_view cell,
                                   int64_t flags) {
#ifdef FUSED_RNN_WITH_CUDA
  const DeviceBlock block(x);
#endif
  const Rows given = rows_of(rows, flags);
  const Call call{x, states, params, given, recipe_of_flags(flags)};
  const FormulaLayer layer = check_formula(call, std::string(cell));
  const bool wants_states = flags & kFormulaGradStates;
  FormulaGradients made = run_backward(layer, std::string(cell), dy, dlast, saved, wants_states);
  const auto none = [&] { return empty_like(x, {0}); };
  std::vector<Tensor> d_states, d_params;
  for (size_t i = 0; i < states.size(); ++i) d_states.push_back(wants_states ? made.d_states[i] : none());
  if (wants_states && !given.reset_states.empty()) {
    reset_state_gradients(layer, made, d_states);
  } else {
    for (size_t i = 0; i < given.reset_states.size(); ++i) d_states.push_back(none());
  }
  const RowChoice chosen(call, layer.shapes);
  made.d = chosen.of(made.d, 1);
  for (Tensor& v : made.v) v = chosen.of(v, 1);
  if (flags & kFormulaGradParams) {
    Tensor rows_of_x = chosen.of(x.contiguous().view({layer.shapes.N, layer.shapes.I}));
    // The d of padding is 0, but its x may hold anything, and 0 * NaN is not 0.
    if (given.lengths && chosen.all()) rows_of_x = at::where(active_rows(call, layer.shapes), rows_of_x, 0);
    for (int k = 0; k < layer.shapes.D; ++k) direction_gradients(layer, made, chosen, rows_of_x, k, d_params);
  } else {
    for (size_t i = 0; i < params.size(); ++i) d_params.push_back(none());
  }
  return {flags & kFormulaGradX ? input_gradient(layer, made, chosen) : none(), std::move(d_states), std::move(d_params)};
}

}  // namespace

void register_formula(const std::string& formula, const std::string& path) {
  const FormulaLibrary* const library = cpu::load_formula(path);
  const int width = library->dtype == static_cast<int>(DType::kFloat64) ? cpu::selected_kernels().f64.width
                                                                        : cpu::selected_kernels().f32.width;
  TORCH_CHECK(library->width == width, "path: expected a formula's library with vectors of ", width, " numbers, got ",
              library->width);
  TORCH_CHECK(library->traits.states <= cpu::kMostFormulaStates && library->traits.phases <= cpu::kMostFormulaPhases,
              "path: expected at most ", cpu::kMostFormulaStates, " states and ", cpu::kMostFormulaPhases, " phases, got ",
              library->traits.states, " and ", library->traits.phases);
  const std::lock_guard<std::mutex> lock(formulas_mutex);
  formulas()[key_of(formula, static_cast<DType>(library->dtype))] = library;
}

void forget_formula(const std::string& formula, int dtype) {
  const std::lock_guard<std::mutex> lock(formulas_mutex);
  formulas().erase(key_of(formula, static_cast<DType>(dtype)));
}

FormulaFacts formula_facts(const std::string& formula, int dtype) {
  const FormulaLibrary* const library = find(formula, static_cast<DType>(dtype));
  const cpu::FormulaTraits* found = library ? &library->traits : nullptr;
#ifdef FUSED_RNN_WITH_CUDA
  if (!found) found = formula_traits_on_device(formula, static_cast<DType>(dtype), /*device=*/-1);
#endif
  TORCH_CHECK_VALUE(found, "formula: expected one with kernels in this process, got ", formula);
  const cpu::FormulaTraits& traits = *found;
  return {traits.saved, traits.phases, std::vector<bool>(traits.reads_series, traits.reads_series + traits.states)};
}

std::map<std::string, int64_t> formula_constants() {
  using cpu::FormulaPhase;
  return {{"BIASES", kFormulaBiases},
          {"BIDIRECTIONAL", kFormulaBidirectional},
          {"SAVE", kFormulaSave},
          {"ALL_STATES", kFormulaAllStates},
          {"GRAD_X", kFormulaGradX},
          {"GRAD_STATES", kFormulaGradStates},
          {"GRAD_PARAMS", kFormulaGradParams},
          {"MOST_STATES", cpu::kMostFormulaStates},
          {"MOST_PHASES", cpu::kMostFormulaPhases},
          {"product", static_cast<int64_t>(FormulaPhase::kProduct)},
          {"layer_norm", static_cast<int64_t>(FormulaPhase::kLayerNorm)},
          {"rms_norm", static_cast<int64_t>(FormulaPhase::kRmsNorm)}};
}

bool has_formula(const std::string& formula, int dtype) { return find(formula, static_cast<DType>(dtype)) != nullptr; }

}  // namespace fused_rnn

TORCH_LIBRARY_FRAGMENT(fused_rnn, m) {
  m.def(
      "formula(Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, str cell, int flags) "
      "-> (Tensor y, Tensor[] last, Tensor[] saved)");
  m.def(
      "formula_backward(Tensor? dy, Tensor[] dlast, Tensor x, Tensor[] states, Tensor[] params, Tensor[] rows, "
      "Tensor[] saved, str cell, int flags) -> (Tensor dx, Tensor[] dstates, Tensor[] dparams)");
}

TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("formula", fused_rnn::formula_on);
  m.impl("formula_backward", fused_rnn::formula_backward_on);
}

#ifdef FUSED_RNN_WITH_CUDA
TORCH_LIBRARY_IMPL(fused_rnn, CUDA, m) {
  m.impl("formula", fused_rnn::formula_on);
  m.impl("formula_backward", fused_rnn::formula_backward_on);
}
#endif
