#include "torch/call.h"

#include <ATen/core/grad_mode.h>

#include <array>
#include <iterator>

#include "plan/family.h"

namespace fused_rnn {
namespace {

// Raises unless the offsets of packed rows, on a CPU, are those of N rows in all and at most B in a step: from 0 to N, in
// steps that never grow.
void check_offsets(const Tensor& offsets, int64_t B, int64_t N) {
  const Tensor contiguous = offsets.contiguous();
  const int64_t* at = contiguous.const_data_ptr<int64_t>();
  const int64_t T = contiguous.size(0) - 1;
  TORCH_CHECK_VALUE(at[0] == 0 && at[T] == N, "offsets: expected numbers from 0 to ", N, " (input's rows), got ", at[0],
                    " to ", at[T]);
  int64_t most = B;
  for (int64_t t = 0; t < T; ++t) {
    // Each lies in [0, N] by now, so that the difference does not overflow.
    TORCH_CHECK_VALUE(at[t + 1] >= at[t] && at[t + 1] <= N && at[t + 1] - at[t] <= most, "offsets: expected steps of 0 to ",
                      B, " rows (the batch size) that never grow, got ", at[t], " and ", at[t + 1], " around step ", t);
    most = at[t + 1] - at[t];
  }
}

// T, B and N of packed rows.
void measure_packed(const Call& call, LayerShapes& s) {
  const Tensor *h0 = call.h0(), &offsets = *call.rows.offsets;
  TORCH_CHECK(h0, "h0: expected a tensor with offsets (it gives the batch size), got None");
  TORCH_CHECK(!call.rows.lengths, "lengths: expected None with offsets");
  TORCH_CHECK(h0->dim() == 3, "h0: expected 3-D, got ", h0->dim(), "-D");
  TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) >= 2, "offsets: expected shape [T + 1], got ", offsets.sizes());
  s.T = offsets.size(0) - 1;
  s.B = h0->size(1);
  s.N = call.x.size(0);
  check_tensor("offsets", offsets, {s.T + 1}, call.x, at::kLong);
  if (offsets.is_cpu()) check_offsets(offsets, s.B, s.N);
}

// All sizes, of the dimensions of x, the states and the weights.
LayerShapes measure(const Call& call) {
  const Recipe& r = call.recipe;
  const int64_t G = gate_count(r.cell), count = static_cast<int64_t>(call.params.size()), base = r.has_biases ? 4 : 2;
  LayerShapes s{};
  s.D = static_cast<int>(r.directions());
  s.per_direction = count / s.D;
  s.projection = traits_of(r.cell).may_project && s.per_direction == base + 1;
  TORCH_CHECK_VALUE(count % s.D == 0 && (s.per_direction == base || s.projection), "params: expected ", base * s.D,
                    " tensors, got ", count);
  check_dimensions(call);
  const Tensor& w_hh = call.params[1];
  TORCH_CHECK(w_hh.dim() == 2 && w_hh.size(0) % G == 0, "w_hh: expected shape [", G, "*H, P], got ", w_hh.sizes());
  TORCH_CHECK(call.params[0].dim() == 2, "w_ih: expected shape [", G, "*H, I], got ", call.params[0].sizes());
  s.I = call.has_ids() ? call.params[0].size(1) : call.x.size(-1);
  s.H = w_hh.size(0) / G;
  s.P = w_hh.size(1);
  TORCH_CHECK(s.H > 0 && s.P > 0, "w_hh: expected H and P of at least 1, got ", w_hh.sizes());
  TORCH_CHECK(s.projection || s.P == s.H, "w_hh: expected shape [", G * s.H, ", ", s.H, "], got ", w_hh.sizes());
  measure_rows(call, s);
  return s;
}

void check_weights(const Call& call, const LayerShapes& s) {
  const Tensor& x = call.like();
  const auto dtype = x.scalar_type();
  const int64_t rows = gate_count(call.recipe.cell) * s.H;
  for (int d = 0; d < s.D; ++d) {
    const auto w = call.params_of_direction(d);
    check_tensor("w_ih", w[0], {rows, s.I}, x, dtype);
    check_tensor("w_hh", w[1], {rows, s.P}, x, dtype);
    if (call.recipe.has_biases) {
      check_tensor("b_ih", w[2], {rows}, x, dtype);
      check_tensor("b_hh", w[3], {rows}, x, dtype);
    }
    if (s.projection) check_tensor("w_hr", w.back(), {s.P, s.H}, x, dtype);
  }
}

// The sizes of a layer's call, of which x alone is checked.
LayerShapes check_input(const Call& call) {
  TORCH_CHECK_VALUE(!call.params.empty(), "params: expected the weights of a layer, got none");
  dtype_of(call.like());
  check_memory("input", call.x);
  return measure(call);
}

void check_states(const Call& call, at::IntArrayRef h_shape, at::IntArrayRef c_shape) {
  const size_t states = state_count(call.recipe.cell);
  TORCH_CHECK_VALUE(call.states.empty() || call.states.size() == states, "states: expected ", states, " (",
                    states == 2 ? "h0 and c0" : "h0", ") or none, got ", call.states.size());
  const auto dtype = call.like().scalar_type();
  if (call.h0()) check_tensor("h0", *call.h0(), h_shape, call.x, dtype);
  if (call.c0()) check_tensor("c0", *call.c0(), c_shape, call.x, call.has_wide_c() ? at::kFloat : dtype);
}

constexpr std::array<int64_t, 6> kOptionBits = {kHasZoneoutH, kHasZoneoutC,  kHasClip,
                                                kHasProduct,  kHasCandidate, kHasValues};

// A number, which the host reads.
void check_number(const char* name, const Tensor& t) {
  TORCH_CHECK(t.is_cpu(), name, ": expected a number on the host, got one on ", t.device());
  check_tensor(name, t, {}, t, at::kDouble);
}

// Flags, or a share of 0 to 1.
void check_zoneout(const char* name, const OptionalTensor& t, at::IntArrayRef shape, const Call& call) {
  if (!t) return;
  if (t->dim() > 0) return check_tensor(name, *t, shape, call.x, at::kBool);
  check_number(name, *t);
  const double share = *t->const_data_ptr<double>();
  TORCH_CHECK_VALUE(share >= 0 && share <= 1, name, ": expected a share of 0 to 1, got ", share);
}

}  // namespace

RowList list_of(const Rows& rows) {
  RowList list;
  const auto add = [&](const OptionalTensor& t, int64_t bit) {
    if (!t) return;
    list.tensors.push_back(*t);
    list.bits |= bit;
  };
  add(rows.lengths, kHasLengths);
  add(rows.offsets, kHasOffsets);
  add(rows.resets, kHasResets);
  if (rows.options.any()) {
    StepOptions options = rows.options;
    for (size_t i = 0; i < kOptionBits.size(); ++i) add(*options.all()[i], kOptionBits[i]);
  }
  for (const Tensor& t : rows.reset_states) add(t, kHasResetStates);
  return list;
}

Rows rows_of(at::TensorList list, int64_t packed) {
  Rows rows;
  size_t next = 0;
  const auto take = [&](OptionalTensor& to, int64_t bit) {
    if (!(packed & bit)) return;
    if (next < list.size()) to = list[next];
    ++next;
  };
  take(rows.lengths, kHasLengths);
  take(rows.offsets, kHasOffsets);
  take(rows.resets, kHasResets);
  if (packed & kHasStepOptions) {
    for (size_t i = 0; i < kOptionBits.size(); ++i) take(*rows.options.all()[i], kOptionBits[i]);
  }
  if (packed & kHasResetStates) {
    for (; next < list.size(); ++next) rows.reset_states.push_back(list[next]);
    TORCH_CHECK_VALUE(!rows.reset_states.empty(), "rows: expected reset states at the end (recipe says so), got none");
  }
  TORCH_CHECK_VALUE(next == list.size(), "rows: expected ", next,
                    " of lengths, offsets, resets and options of steps (recipe says which), got ", list.size());
  return rows;
}

Recipe recipe_of(int64_t packed, double dropout) {
  TORCH_CHECK_VALUE(is_packed(packed), "recipe: expected a number that fused_rnn._recipe makes (a cell of 0 to ",
                    kCellCount - 1, " in its last byte), got ", packed);
  Recipe recipe = unpack(packed);
  TORCH_CHECK_VALUE(recipe.family <= static_cast<int>(std::size(kFamilies)),
                    "recipe: expected a number that fused_rnn._recipe makes (a family of 0 to ", std::size(kFamilies),
                    "), got ", packed);
  recipe.dropout = dropout;
  return recipe;
}

Recipe layer_recipe_of(int64_t packed) {
  const Recipe recipe = recipe_of(packed, 0);
  TORCH_CHECK_VALUE((packed & ~kHasRows) == pack(recipe.of_layer()),
                    "recipe: expected that of one layer (num_layers=1, and neither ", "batch_first nor training), got ",
                    packed);
  return recipe;
}

States states_of_layer(const Call& stack, int64_t layer) {
  const int64_t layers = stack.recipe.num_layers, directions = stack.recipe.directions();
  States states(stack.states.begin(), stack.states.end());
  if (layers == 1) return states;
  for (Tensor& t : states) {
    TORCH_CHECK(t.dim() == 3 && t.sym_size(0) == layers * directions, "h0, c0: expected shape [", layers * directions,
                ", B, .] (num_layers * directions), got ", t.sym_sizes());
    t = t.slice(0, layer * directions, (layer + 1) * directions);
  }
  return states;
}

std::vector<Tensor> reset_states_of_layer(const Call& stack, int64_t layer) {
  const int64_t layers = stack.recipe.num_layers, directions = stack.recipe.directions();
  std::vector<Tensor> states = stack.rows.reset_states;
  if (layers == 1) return states;
  for (Tensor& t : states) {
    const int64_t dim = t.dim() == 4 ? 1 : 0;
    TORCH_CHECK((t.dim() == 3 || t.dim() == 4) && t.sym_size(dim) == layers * directions,
                "reset_state: expected shape [L*D, 1 or B, .] or [T, L*D, B, .] with L*D=", layers * directions, ", got ",
                t.sym_sizes());
    t = t.slice(dim, layer * directions, (layer + 1) * directions);
  }
  return states;
}

StepOptions options_of_layer(const Call& stack, int64_t layer) {
  const int64_t layers = stack.recipe.num_layers, directions = stack.recipe.directions();
  StepOptions options = stack.rows.options;
  if (layers == 1) return options;
  for (OptionalTensor* t : options.all()) {
    if (!*t || (*t)->dim() == 0) continue;
    TORCH_CHECK((*t)->dim() == 3 && (*t)->sym_size(0) == layers * directions, "rows: expected options of shape [",
                layers * directions, ", ., .] (num_layers * directions), got ", (*t)->sym_sizes());
    *t = (*t)->slice(0, layer * directions, (layer + 1) * directions);
  }
  return options;
}

at::TensorList params_of_layer(const Call& stack, int64_t layer) {
  const size_t count = stack.params.size() / stack.recipe.num_layers;
  return stack.params.slice(layer * count, count);
}

void check_memory(const char* name, const Tensor& t) {
  TORCH_CHECK(t.layout() == at::kStrided, name, ": expected a dense tensor (torch.strided), got layout ", t.layout());
  if (t.numel() == 0) return;
  int64_t elements = t.storage_offset() + t.numel();
  if (!t.is_contiguous()) {
    elements = t.storage_offset() + 1;
    for (int64_t d = 0; d < t.dim(); ++d) elements += (t.size(d) - 1) * t.stride(d);
  }
  const auto available = static_cast<int64_t>(t.storage().nbytes());
  TORCH_CHECK(elements * static_cast<int64_t>(t.element_size()) <= available, name,
              ": expected memory for a tensor of shape ", t.sizes(), ", got a storage of ", available,
              " bytes (freed or resized after the tensor was made)");
}

void check_tensor(const char* name, const Tensor& t, at::IntArrayRef shape, const Tensor& x, at::ScalarType dtype) {
  TORCH_CHECK(t.device() == x.device(), name, ": expected device ", x.device(), " (input's), got ", t.device());
  TORCH_CHECK(t.scalar_type() == dtype, name, ": expected dtype ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK(t.sizes() == shape, name, ": expected shape ", shape, ", got ", t.sizes());
  check_memory(name, t);
}

void check_optional(const char* name, const OptionalTensor& t, at::IntArrayRef shape, const Tensor& x,
                    at::ScalarType dtype) {
  if (t && t->defined()) check_tensor(name, *t, shape, x, dtype);
}

void check_dimensions(const Call& call) {
  const int64_t dim = (call.rows.offsets || call.one_step ? 2 : 3) - call.has_ids();
  TORCH_CHECK(call.x.dim() == dim, "input: expected ", dim, "-D, got ", call.x.dim(), "-D");
}

void measure_rows(const Call& call, LayerShapes& s) {
  if (call.rows.offsets) {
    measure_packed(call, s);
  } else {
    s.T = call.one_step ? 1 : call.x.size(0);
    s.B = call.x.size(call.one_step ? 0 : 1);
    s.N = s.T * s.B;
  }
  TORCH_CHECK(s.T > 0, "input: expected at least 1 time step, got 0");
}

void check_rows(const Call& call, const LayerShapes& s) {
  check_optional("lengths", call.rows.lengths, {s.B}, call.x, at::kLong);
  const auto resets_shape = call.rows.offsets ? at::DimVector{s.N} : at::DimVector{s.T, s.B};
  check_optional("resets", call.rows.resets, resets_shape, call.x, at::kBool);
}

void check_reset_states(const Call& call, const LayerShapes& s, at::IntArrayRef sizes) {
  const std::vector<Tensor>& given = call.rows.reset_states;
  if (given.empty()) return;
  TORCH_CHECK_VALUE(call.rows.resets, "reset_state: expected none without resets, got ", given.size(), " tensors");
  TORCH_CHECK_VALUE(given.size() == sizes.size(), "reset_state: expected ", sizes.size(), " tensors or none, got ",
                    given.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    const bool of_steps = given[i].dim() == 4, shared = given[i].dim() == 3 && given[i].size(1) == 1;
    const auto shape = of_steps ? at::DimVector{s.T, s.D, s.B, sizes[i]} : at::DimVector{s.D, shared ? 1 : s.B, sizes[i]};
    check_tensor("reset_state", given[i], shape, call.x, call.like().scalar_type());
  }
}

void check_options(const Call& call, const LayerShapes& s) {
  const StepOptions& o = call.rows.options;
  if (!o.any()) return;
  TORCH_CHECK_VALUE(!o.values, "values: expected none but of a cell that is a formula");
  const CellTraits traits = traits_of(call.recipe.cell);
  check_zoneout("zoneout of h", o.zoneout_h, {s.D, s.N, s.H}, call);
  check_zoneout("zoneout of c", o.zoneout_c, {s.D, s.N, s.H}, call);
  TORCH_CHECK_VALUE(!(s.projection && (o.zoneout_h || o.zoneout_c)), "zoneout: expected none with a projection");
  TORCH_CHECK_VALUE(traits.has_c || !o.zoneout_c, "zoneout of c: expected none for a cell without c");
  TORCH_CHECK_VALUE(traits.gates > 1 || !o.candidate, "candidate: expected none for a cell without gates");
  check_optional("product", o.product, {s.D, s.B, s.P}, call.x, call.like().scalar_type());
  check_optional("candidate", o.candidate, {s.D, s.B, s.H}, call.x, call.like().scalar_type());
  if (!o.clip) return;
  check_number("clip", *o.clip);
  const double clip = *o.clip->const_data_ptr<double>();
  TORCH_CHECK_VALUE(clip > 0, "clip: expected more than 0, got ", clip);
}

LayerShapes check_layer(const Call& call) {
  const LayerShapes s = check_input(call);
  check_states(call, s.state(call, s.P), s.state(call, s.H));
  check_rows(call, s);
  check_reset_states(call, s, at::IntArrayRef(std::array<int64_t, 2>{s.P, s.H}.data(), state_count(call.recipe.cell)));
  check_weights(call, s);
  check_options(call, s);
  return s;
}

void check_stack(const Call& stack) {
  const Recipe& recipe = stack.recipe;
  const int64_t layers = recipe.num_layers, groups = layers * recipe.directions();
  TORCH_CHECK_VALUE(stack.params.size() % layers == 0, "weights: expected a multiple of num_layers=", layers,
                    " tensors, got ", stack.params.size());
  const auto layer = [&](int64_t l) {
    return Call{stack.x, stack.states, params_of_layer(stack, l), stack.rows, recipe.of_layer()};
  };
  LayerShapes s = check_input(layer(0));
  check_states(stack, {groups, s.B, s.P}, {groups, s.B, s.H});
  check_rows(stack, s);
  for (int64_t l = 0; l < layers; ++l) {
    check_weights(layer(l), s);
    s.I = s.D * s.P;  // of the layers above
  }
}

bool differentiates(const Call& call) {
  return at::GradMode::is_enabled() && (call.x.requires_grad() || any_requires_grad(call.states) ||
                                        any_requires_grad(call.params) || any_requires_grad(call.rows.reset_states));
}

}  // namespace fused_rnn
