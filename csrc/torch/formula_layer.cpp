// The libraries of formulas in this process, and the checks of a call.
#include "torch/formula_layer.h"

#include <ATen/ops/stack.h>

#include <mutex>
#include <unordered_map>

#include "cpu/isa/kernels.h"
#include "plan/formula_persistent.h"
#include "torch/device.h"
#include "torch/formula_ops.h"
#include "torch/ids.h"
#ifdef FUSED_RNN_WITH_CUDA
#include "torch/formula_device.h"
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

void check_direction(const FormulaLayer& layer, at::TensorList w) {
  const LayerShapes& s = layer.shapes;
  const cpu::FormulaTraits& traits = layer.traits();
  const Tensor& x = layer.call.like();
  const auto dtype = x.scalar_type();
  const int64_t in = layer.input_gates() * s.H, rec = traits.recurrent_gates * s.H;
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

// The cell's own vectors and numbers of one direction, [U, H].
Tensor own_parameters(const FormulaLayer& layer, int d) {
  const at::TensorList w = layer.call.params_of_direction(d);
  std::vector<Tensor> rows;
  for (size_t i = layer.first_own(); i < layer.first_of_phase(0); ++i) rows.push_back(w[i].expand({layer.shapes.H}));
  return at::stack(rows);
}

// Of a call the number of gates whose values are given; their tensor is checked when the sizes are known.
int given_gates(const Call& call, const cpu::FormulaTraits& traits) {
  const StepOptions& o = call.rows.options;
  TORCH_CHECK_VALUE(!(o.zoneout_h || o.zoneout_c || o.clip || o.product || o.candidate),
                    "rows: expected no options of steps of a cell that is a formula, which contains them");
  if (!o.values) return 0;
  TORCH_CHECK(o.values->dim() == 4 && o.values->size(2) < traits.input_gates,
              "values: expected shape [D, N, K, H] with K less than ", traits.input_gates, ", got ", o.values->sizes());
  return static_cast<int>(o.values->size(2));
}

}  // namespace

FormulaLayer check_formula(const Call& call, const std::string& formula) {
  TORCH_CHECK_VALUE(!call.params.empty(), "params: expected the weights of a layer, got none");
  const Tensor& x = call.like();
  const FormulaLibrary* cell = nullptr;
  const cpu::FormulaTraits* facts = nullptr;
#ifdef FUSED_RNN_WITH_CUDA
  if (is_on_device(x)) {
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
  FormulaLayer layer{cell, *facts, call, {}, 1, given_gates(call, *facts)};
  LayerShapes& s = layer.shapes;
  const cpu::FormulaTraits& traits = layer.traits();
  s.D = static_cast<int>(call.recipe.directions());
  s.per_direction = static_cast<int64_t>(call.params.size()) / s.D;
  const auto wanted = static_cast<int64_t>(layer.first_of_phase(traits.phases));
  TORCH_CHECK_VALUE(static_cast<int64_t>(call.params.size()) == wanted * s.D, "params: expected ", wanted * s.D,
                    " tensors, got ", call.params.size());
  check_memory("input", call.x);
  TORCH_CHECK(call.x.device() == x.device(), "input: expected device ", x.device(), " (the weights'), got ",
              call.x.device());
  check_dimensions(call);
  const Tensor& w_ih = call.params[0];
  TORCH_CHECK(w_ih.dim() == 2 && w_ih.size(0) > 0 && w_ih.size(0) % layer.input_gates() == 0, "weight_ih: expected shape [",
              layer.input_gates(), "*H, I], got ", w_ih.sizes());
  s.I = call.has_ids() ? w_ih.size(1) : x.size(-1);
  s.H = s.P = w_ih.size(0) / layer.input_gates();
  if (layer.recurs() && call.params[1].dim() == 3) layer.heads = static_cast<int>(call.params[1].size(0));
  TORCH_CHECK(layer.heads > 0 && s.H % layer.heads == 0, "weight_hh: expected heads that divide H=", s.H, ", got ",
              layer.heads);
  measure_rows(call, s);
  check_rows(call, s);
  check_optional("values", call.rows.options.values, {s.D, s.N, layer.given, s.H}, x, x.scalar_type());
  const auto states = static_cast<size_t>(traits.states);
  TORCH_CHECK_VALUE(call.states.empty() || call.states.size() == states, "states: expected ", states, " or none, got ",
                    call.states.size());
  for (const Tensor& t : call.states) check_tensor("states", t, {s.D, s.B, s.H}, x, x.scalar_type());
  check_reset_states(call, s, std::vector<int64_t>(states, s.H));
  for (int d = 0; d < s.D; ++d) check_direction(layer, call.params_of_direction(d));
  return layer;
}

void fill(cpu::FormulaParams& p, const FormulaLayer& layer, Copies& copies) {
  const LayerShapes& s = layer.shapes;
  const Call& call = layer.call;
  p.cell = layer.cell;
  p.dtype = dtype_of(call.like());
  p.I = call.has_ids() ? 0 : s.I, p.H = s.H, p.D = s.D, p.heads = layer.heads;
  p.given_gates = layer.given;
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
          {"GRAD_VALUES", kFormulaGradValues},
          {"ADDS_PRODUCTS", kFormulaAddsProducts},
          {"MOST_STATES", cpu::kMostFormulaStates},
          {"MOST_PHASES", cpu::kMostFormulaPhases},
          {"MOST_MEDIUM_SLOTS", kMostMediumSlots},
          {"CLUSTER_CAPABILITY", kFormulaClusterCapability},
          {"GRID_CAPABILITY", kFormulaGridCapability},
          {"product", static_cast<int64_t>(FormulaPhase::kProduct)},
          {"layer_norm", static_cast<int64_t>(FormulaPhase::kLayerNorm)},
          {"rms_norm", static_cast<int64_t>(FormulaPhase::kRmsNorm)}};
}

bool has_formula(const std::string& formula, int dtype) { return find(formula, static_cast<DType>(dtype)) != nullptr; }

}  // namespace fused_rnn
