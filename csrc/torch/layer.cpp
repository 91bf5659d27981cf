#include "torch/layer.h"

#include <ATen/ops/clamp.h>

namespace fused_rnn {
namespace {

WeightMatrix matrix_of(const Tensor& t, Copies& copies) { return {copies.contiguous(t), dtype_of(t)}; }

Weights weights_of(const Call& call, const LayerShapes& s, int d, Copies& copies) {
  const auto w = call.params_of_direction(d);
  Weights weights{matrix_of(w[0], copies), matrix_of(w[1], copies), nullptr, nullptr, {}};
  if (call.recipe.has_biases) weights.b_ih = copies.contiguous(w[2]), weights.b_hh = copies.contiguous(w[3]);
  if (s.projection) weights.w_hr = matrix_of(w.back(), copies);
  return weights;
}

// Offsets that a GPU will read are cut to [0, N].
const int64_t* offsets_of(const Call& call, const LayerShapes& s, Copies& copies) {
  const OptionalTensor& offsets = call.rows.offsets;
  const bool unread = offsets && offsets->is_cuda();
  return static_cast<const int64_t*>(unread ? copies.keep(at::clamp(*offsets, 0, s.N).contiguous())
                                            : copies.contiguous(offsets));
}

}  // namespace

Sequence sequence_of(const Call& call, const LayerShapes& s, Copies& copies) {
  return {s.T, s.B, s.N, static_cast<const int64_t*>(copies.contiguous(call.rows.lengths)), offsets_of(call, s, copies)};
}

ResetState reset_state_of(const Tensor& t, Copies& copies) {
  const bool in_place = t.size(-1) <= 1 || t.stride(-1) == 1;
  const Tensor rows = in_place ? t : t.contiguous();
  if (!in_place) copies.keep(rows);
  const auto bytes = static_cast<int64_t>(t.element_size());
  const int64_t dim = t.dim() - 3;  // of the direction
  return {rows.const_data_ptr(), dim == 1 ? rows.stride(0) * bytes : 0, rows.stride(dim) * bytes,
          rows.size(dim + 1) == 1 ? 0 : rows.stride(dim + 1) * bytes};
}

Modifier modifier_of(const Call& call, Copies& copies) {
  Modifier modifier{};
  modifier.resets = static_cast<const bool*>(copies.contiguous(call.rows.resets));
  const std::vector<Tensor>& states = call.rows.reset_states;
  if (!states.empty()) modifier.h = reset_state_of(states[0], copies);
  if (states.size() > 1) modifier.c = reset_state_of(states[1], copies);
  const StepOptions& o = call.rows.options;
  const auto zoneout = [&](const OptionalTensor& t) -> Zoneout {
    if (!t) return {nullptr, 0};
    if (t->dim() == 0) return {nullptr, *t->const_data_ptr<double>()};
    return {static_cast<const bool*>(copies.contiguous(*t)), 0};
  };
  modifier.zoneout_h = zoneout(o.zoneout_h), modifier.zoneout_c = zoneout(o.zoneout_c);
  modifier.clip = o.clip ? *o.clip->const_data_ptr<double>() : 0;
  modifier.product = copies.contiguous(o.product), modifier.candidate = copies.contiguous(o.candidate);
  return modifier;
}

bool backward_reads_output(CellKind cell, int64_t steps, bool weight_gradients) {
  const CellTraits traits = traits_of(cell);
  return traits.saved == 0 || (steps > 1 && (traits.reads_h || weight_gradients));
}

bool saves_gates(CellKind cell, bool has_options) { return traits_of(cell).saved > 0 || has_options; }

size_t saved_count(CellKind cell, bool has_options) {
  return static_cast<size_t>(saves_gates(cell, has_options)) + static_cast<size_t>(traits_of(cell).has_c);
}

Saved saved_of(CellKind cell, const Rows& rows, at::TensorList list) {
  const bool has_options = rows.options.any();
  const size_t fixed = saved_count(cell, has_options);
  TORCH_CHECK_VALUE(list.size() == fixed || list.size() == fixed + 1, "saved: expected ", fixed,
                    " tensors of forward, and its output where backward reads it, got ", list.size());
  Saved saved;
  size_t i = 0;
  if (saves_gates(cell, has_options)) saved.gates = list[i++];
  if (traits_of(cell).has_c) saved.cs = list[i++];
  if (i < list.size()) saved.y = list[i];
  return saved;
}

std::vector<OptionalTensor> gradients_of_last(const Recipe& recipe, at::TensorList list) {
  const size_t states = last_count(recipe);
  TORCH_CHECK_VALUE(list.empty() || list.size() == states, "dlast: expected a gradient for each of ", states,
                    " states ([0]: none), or no list of them, got ", list.size());
  std::vector<OptionalTensor> gradients;
  for (const Tensor& t : list) gradients.push_back(t.dim() == 1 && t.numel() == 0 ? std::nullopt : OptionalTensor(t));
  return gradients;
}

ForwardCall prepare_forward(const Call& call, bool save) {
  const LayerShapes s = check_layer(call);
  const CellKind cell = call.recipe.cell;
  const bool has_c = traits_of(cell).has_c;
  ForwardCall made;
  made.h_n = empty_like(call.like(), s.state(call, s.P));
  made.y = call.one_step ? made.h_n : empty_like(call.like(), s.output(call));  // a step's are the same values
  if (has_c) made.c_n = empty_like(call.has_wide_c() ? *call.c0() : call.like(), s.state(call, s.H));
  made.gives_cs = has_c && call.recipe.all_states;
  if (made.gives_cs) {
    made.cs = empty_like(call.like(), {s.D, s.N, s.H});
  } else if (save && has_c) {
    made.cs = empty_inside(call.like(), {s.D, s.N, s.H});
  }

  ForwardParams& p = made.params;
  p = {};
  p.cell = cell;
  p.dtype = dtype_of(call.like());
  p.wide_c = call.has_wide_c();
  p.I = call.has_ids() ? 0 : s.I, p.H = s.H, p.P = s.P, p.D = s.D;
  p.seq = sequence_of(call, s, made.copies);
  p.modifier = modifier_of(call, made.copies);
  if (!call.has_ids()) p.x = made.copies.contiguous(call.x);
  p.h0 = made.copies.contiguous(call.h0());
  p.c0 = made.copies.contiguous(call.c0());
  for (int d = 0; d < s.D; ++d) p.weights[d] = weights_of(call, s, d, made.copies);
  p.y = data_or_null(made.y);
  p.h_n = data_or_null(made.h_n);
  p.c_n = data_or_null(made.c_n);
  p.cs = data_or_null(made.cs);
  p.training = save;
  made.saves_gates = save && saves_gates(cell, call.rows.options.any());
  if (made.saves_gates) allocate_gates(made);
  return made;
}

void allocate_gates(ForwardCall& call) {
  if (call.gates.defined()) return;
  ForwardParams& p = call.params;
  call.gates = empty_inside(call.y, {p.D, p.seq.N, slot_count(p.cell), p.H});
  p.gates = data_or_null(call.gates);
}

LayerOutputs forward_outputs(const ForwardCall& call, bool save) {
  const States last = call.last();
  std::vector<Tensor> saved;
  if (call.saves_gates) saved.push_back(call.gates);
  if (save && call.cs.defined() && !call.gives_cs) saved.push_back(call.cs);
  return {call.y, {last.begin(), last.end()}, std::move(saved)};
}

BackwardCall prepare_backward(const Call& call, const ResultGradients& given, GradientMask mask) {
  const LayerShapes s = check_layer(call);
  const CellKind cell = call.recipe.cell;
  const CellTraits traits = traits_of(cell);
  const Tensor& x = call.like();
  const auto dtype = x.scalar_type();
  const int64_t S = slot_count(cell);
  const OptionalTensor &y = given.saved.y, dh_n = given.dh_n(), dc_n = given.dc_n();
  TORCH_CHECK_VALUE(y || !backward_reads_output(cell, s.T, mask.weights), "saved: expected forward's output y, got None");
  check_optional("y", y, s.output(call), x, dtype);
  check_optional("dy", given.dy, s.output(call), x, dtype);
  check_optional("dh_n", dh_n, {s.D, s.B, s.P}, x, dtype);
  check_optional("dc_n", dc_n, {s.D, s.B, s.H}, x, call.has_wide_c() ? at::kFloat : dtype);
  check_optional("dcs", given.d_cs(), {s.D, s.N, s.H}, x, dtype);
  const bool has_gates = saves_gates(cell, call.rows.options.any());
  const OptionalTensor gates = has_gates ? optional_of(given.saved.gates) : std::nullopt, cs = optional_of(given.saved.cs);
  check_optional("gates", gates, {s.D, s.N, S, s.H}, x, dtype);
  check_optional("cs", cs, {s.D, s.N, s.H}, x, dtype);

  BackwardCall made;
  made.shapes = s;
  made.d_gates = empty_inside(x, {s.D, s.N, S, s.H});
  if (s.projection) made.d_h = empty_inside(x, {s.D, s.N, s.P});
  made.d_h0 = empty_like(x, {s.D, s.B, s.P});
  if (traits.has_c) made.d_c0 = empty_like(x, {s.D, s.B, s.H});

  Copies& copies = made.copies;
  BackwardParams& p = made.params;
  p = {};
  p.cell = cell;
  p.dtype = dtype_of(x);
  p.H = s.H, p.P = s.P, p.D = s.D;
  p.seq = sequence_of(call, s, copies);
  p.modifier = modifier_of(call, copies);
  p.h0 = copies.contiguous(call.h0());
  // Of a wide c backward reads what it reads of every other: values and gradients of the layer's dtype.
  p.c0 = copies.contiguous(call.c0(), dtype);
  p.dc_n = copies.contiguous(dc_n && dc_n->defined() ? &*dc_n : nullptr, dtype);
  for (int d = 0; d < s.D; ++d) p.weights[d] = weights_of(call, s, d, copies);
  p.y = copies.contiguous(y);
  p.gates = copies.contiguous(gates);
  p.cs = copies.contiguous(cs);
  p.dy = copies.contiguous(given.dy);
  p.dh_n = copies.contiguous(dh_n);
  p.d_gates = data_or_null(made.d_gates);
  p.d_h = data_or_null(made.d_h);
  p.d_h0 = data_or_null(made.d_h0);
  p.d_c0 = data_or_null(made.d_c0);
  p.d_cs = copies.contiguous(given.d_cs());
  if (mask.states && !call.rows.reset_states.empty()) {
    if (traits.reads_h || call.rows.options.zoneout_h) made.d_reset_h = empty_inside(x, {s.D, s.N, s.P});
    if (traits.has_c) made.d_reset_c = empty_inside(x, {s.D, s.N, s.H});
    p.d_reset_h = data_or_null(made.d_reset_h);
    p.d_reset_c = data_or_null(made.d_reset_c);
  }
  return made;
}

}  // namespace fused_rnn
