// Gradients of a layer's input, states and weights, from the gradients of its gates: matrix products.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/index_copy.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/remainder.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "core/cells.h"
#include "core/dispatch.h"
#include "cpu/scan/previous.h"
#include "torch/device.h"
#include "torch/ids.h"
#include "torch/layer.h"
#include "torch/products.h"

namespace fused_rnn {

Tensor active_rows(const Call& call, const LayerShapes& s) {
  const Tensor t = at::arange(s.T, call.x.options().dtype(at::kLong)).unsqueeze(1);
  return (t < call.rows.lengths->unsqueeze(0)).reshape({s.N, 1});
}

bool has_padding(const Call& call, const LayerShapes& s) {
  if (!call.rows.lengths || !call.rows.lengths->is_cpu()) return call.rows.lengths.has_value();
  const Tensor lengths = call.rows.lengths->contiguous();
  const int64_t* const of = lengths.const_data_ptr<int64_t>();
  return std::any_of(of, of + s.B, [&](int64_t length) { return length < s.T; });
}

Tensor RowChoice::of(const Tensor& t, int64_t dim) const {
  if (all()) return t;
  at::DimVector shape(t.sizes());
  shape[dim] = indices_.size(0);
  Tensor out = empty_inside(t, shape);
  return at::index_select_out(out, t, dim, indices_);
}

Tensor RowChoice::spread(const Tensor& rows, const LayerShapes& s) const {
  return all() ? rows : at::zeros({s.N, rows.size(1)}, rows.options()).index_copy_(0, indices_, rows);
}

RowChoice::RowChoice(const Call& call, const LayerShapes& s) {
  if (!call.rows.lengths || !call.rows.lengths->is_cpu()) return;
  const Tensor lengths = call.rows.lengths->contiguous();
  // A copy, which stays what was counted.
  std::vector<int64_t> of(lengths.const_data_ptr<int64_t>(), lengths.const_data_ptr<int64_t>() + s.B);
  int64_t count = 0;
  for (int64_t& length : of) count += length = std::clamp<int64_t>(length, 0, s.T);
  if (count * kOf > s.N * kMost) return;
  indices_ = at::empty({count}, lengths.options());
  int64_t* to = indices_.data_ptr<int64_t>();
  for (int64_t t = 0; t < s.T; ++t) {
    for (int64_t b = 0; b < s.B; ++b) {
      if (t < of[b]) *to++ = t * s.B + b;
    }
  }
}

namespace {

// The factors of the product of every row [N, P] in direction d.
Tensor factors_of_product(const Call& call, const LayerShapes& s, int d) {
  const Tensor of_batch = call.rows.options.product->select(0, d);
  if (!call.rows.offsets) return of_batch.expand({s.T, s.B, s.P}).reshape({s.N, s.P});
  return of_batch.index_select(0, RowPlaces(call, s, at::arange(s.N, call.x.options().dtype(at::kLong))).b);
}

}  // namespace

Tensor unprojected(const Saved& saved, int64_t d) {
  return at::mul(saved.gates.select(0, d).select(1, 3), at::tanh(saved.cs.select(0, d)));
}

Tensor previous_states(const Call& call, const LayerShapes& s, const Tensor& y, int d) {
  Copies copies;
  const Tensor rows = y.stride(1) == 1 ? y : y.contiguous();
  const int64_t size = static_cast<int64_t>(y.element_size());
  const Tensor h_prev = empty_like(y, {s.N, s.P});
  PreviousParams p{};
  p.seq = sequence_of(call, s, copies);
  p.modifier = modifier_of(call, copies);
  p.reverse = d == 1;
  p.row_bytes = s.P * size;
  p.y = rows.const_data_ptr(), p.y_stride = rows.stride(0) * size;
  p.h0 = call.h0() ? copies.contiguous(call.h0()->select(0, d)) : nullptr;
  p.out = h_prev.data_ptr();
#ifdef FUSED_RNN_WITH_CUDA
  if (is_on_device(y)) {
    previous_rows_on_device(p);
    if (call.rows.options.product) h_prev.mul_(factors_of_product(call, s, d));
    return h_prev;
  }
#endif
  cpu::previous_rows(p);
  if (call.rows.options.product) h_prev.mul_(factors_of_product(call, s, d));
  return h_prev;
}

Tensor output_of_direction(const Tensor& y, const LayerShapes& s, int d) {
  return part(y.reshape({s.N, s.D * s.P}), 1, d * s.P, (d + 1) * s.P);
}

namespace {

// d_rg^T h_prev where every row takes part in every step: h_prev is y moved by one step and never stored.
void multiply_shifted(const Tensor& dw, const Tensor& d_rg, const Call& call, const LayerShapes& s, const OptionalTensor& y,
                      int d) {
  const bool reverse = d == 1, later_steps = s.T > 1;
  if (later_steps) {
    const Tensor y_of_direction = output_of_direction(*y, s, d);
    const Tensor later = part(d_rg, 0, reverse ? 0 : s.B, reverse ? s.N - s.B : s.N);
    const Tensor earlier = part(y_of_direction, 0, reverse ? s.B : 0, reverse ? s.N : s.N - s.B);
    multiply_into(dw, later, /*transposed=*/true, earlier, /*add=*/false);
  }
  if (call.h0()) {
    const int64_t begin = reverse ? s.N - s.B : 0;  // of the first step
    const Tensor first = part(d_rg, 0, begin, begin + s.B);
    multiply_into(dw, first, /*transposed=*/true, call.h0()->select(0, d), /*add=*/later_steps);
  } else if (!later_steps) {
    dw.zero_();
  }
}

}  // namespace

// Rows that take no part get zeros for h_prev: their y and h0 may be NaN, and 0 * NaN is not 0.
Tensor recurrent_weight_gradient(const Call& call, const LayerShapes& s, const RowChoice& rows, const Tensor& d_rg,
                                 const OptionalTensor& y, int d) {
  const Tensor dw = empty_like(call.like(), {d_rg.size(1), s.P});
  if (call.rows.all() && !call.rows.options.product) {
    multiply_shifted(dw, d_rg, call, s, y, d);
  } else {
    // y of a single step is never read.
    const Tensor of_direction = y ? output_of_direction(*y, s, d) : empty_like(call.like(), {s.N, s.P});
    const Tensor h_prev = rows.of(previous_states(call, s, of_direction, d));
    multiply_into(dw, d_rg, /*transposed=*/true, h_prev, /*add=*/false);
  }
  return dw;
}

namespace {

// d_gates of one direction [N, S * H].
Tensor gate_gradients(const BackwardCall& made, int64_t columns, int d) {
  const LayerShapes& s = made.shapes;
  return (s.D == 1 ? made.d_gates : made.d_gates.select(0, d)).view({s.N, columns});
}

// The gradients of one direction's parameters, in their order. x [chosen rows, I], dg [chosen rows, S * H]
void weight_gradients(const Call& call, const ResultGradients& given, const BackwardCall& made, const RowChoice& rows,
                      const Tensor& x, const Tensor& dg, int d, std::vector<Tensor>& gradients) {
  const LayerShapes& s = made.shapes;
  const CellKind cell = call.recipe.cell;
  const int64_t G = gate_count(cell), S = slot_count(cell), H = s.H;
  const Tensor d_rg = part(dg, 1, (S - G) * H, S * H);
  const Tensor dw_ih = empty_like(call.like(), {G * H, s.I});
  const Tensor db_ih = empty_like(call.like(), {G * H}), db_hh = empty_like(call.like(), {G * H});
  input_weight_gradients(cell, x, dg, dw_ih, call.recipe.has_biases ? db_ih : Tensor(), /*add=*/false);
  gradients.push_back(dw_ih);
  gradients.push_back(recurrent_weight_gradient(call, s, rows, d_rg, given.saved.y, d));
  if (call.recipe.has_biases) {
    if (S > G) {  // the gradient of b_hh is not that of b_ih
      sum_rows_into(db_hh, d_rg);
    } else {
      db_hh.copy_(db_ih);
    }
    gradients.push_back(db_ih);
    gradients.push_back(db_hh);
  }
  if (s.projection) {
    gradients.push_back(empty_like(call.like(), {s.P, H}));
    multiply_into(gradients.back(), rows.of(made.d_h.select(0, d)), /*transposed=*/true,
                  rows.of(unprojected(given.saved, d)), /*add=*/false);
  }
}

// Of the states that were given.
std::vector<Tensor> state_gradients(const Call& call, const BackwardCall& made, bool wanted) {
  std::vector<Tensor> gradients;
  if (call.h0()) gradients.push_back(wanted ? made.d_h0 : empty_like(call.like(), {0}));
  if (call.c0()) gradients.push_back(wanted ? made.d_c0.to(call.c0()->scalar_type()) : empty_like(call.like(), {0}));
  return gradients;
}

#ifdef FUSED_RNN_WITH_CUDA
// As reset_state_gradients, of all rows.
void reset_state_gradients_on_device(const Call& call, const BackwardCall& made, const std::vector<Tensor>& sums) {
  const LayerShapes& s = made.shapes;
  const int64_t S = slot_count(call.recipe.cell), G = gate_count(call.recipe.cell);
  for (int d = 0; d < s.D; ++d) {
    Tensor dh = empty_like(call.like(), {s.N, s.P});
    multiply_into(dh, part(gate_gradients(made, S * s.H, d), 1, (S - G) * s.H, S * s.H), /*transposed=*/false,
                  call.params_of_direction(d)[1], /*add=*/false);
    if (call.rows.options.product) dh.mul_(factors_of_product(call, s, d));
    if (made.d_reset_h.defined()) dh = at::add(dh, made.d_reset_h.select(0, d));
    add_reset_gradients_on_device(call, s, dh, d, sums[0]);
    if (made.d_reset_c.defined()) add_reset_gradients_on_device(call, s, made.d_reset_c.select(0, d), d, sums[1]);
  }
}
#endif

}  // namespace

void reset_state_gradients(const Call& call, const BackwardCall& made, bool wanted, std::vector<Tensor>& gradients) {
  const std::vector<Tensor>& given = call.rows.reset_states;
  if (given.empty()) return;
  if (!wanted) {
    gradients.insert(gradients.end(), given.size(), empty_like(call.like(), {0}));
    return;
  }
  const LayerShapes& s = made.shapes;
  std::vector<Tensor> sums;
  for (const Tensor& t : given) sums.push_back(at::zeros(t.sizes(), t.options().dtype(at::toOpMathType(t.scalar_type()))));
  const auto append = [&] {
    for (size_t i = 0; i < given.size(); ++i) gradients.push_back(sums[i].to(given[i].scalar_type()));
  };
#ifdef FUSED_RNN_WITH_CUDA
  if (is_on_device(call.x)) {
    reset_state_gradients_on_device(call, made, sums);
    return append();
  }
#endif
  const int64_t S = slot_count(call.recipe.cell), G = gate_count(call.recipe.cell);
  const RowPlaces resets = RowPlaces::of_resets(call, s);
  const int64_t n = resets.rows.size(0);
  for (int d = 0; n > 0 && d < s.D; ++d) {
    const Tensor d_rg = part(gate_gradients(made, S * s.H, d), 1, (S - G) * s.H, S * s.H).index_select(0, resets.rows);
    Tensor dh = empty_like(call.like(), {n, s.P});
    multiply_into(dh, d_rg, /*transposed=*/false, call.params_of_direction(d)[1], /*add=*/false);
    if (const auto& factors = call.rows.options.product) dh.mul_(factors->select(0, d).index_select(0, resets.b));
    if (made.d_reset_h.defined()) dh = at::add(dh, made.d_reset_h.select(0, d).index_select(0, resets.rows));
    add_reset_gradients(resets, dh, d, sums[0]);
    if (made.d_reset_c.defined()) {
      add_reset_gradients(resets, made.d_reset_c.select(0, d).index_select(0, resets.rows), d, sums[1]);
    }
  }
  append();
}

RowPlaces RowPlaces::of_resets(const Call& call, const LayerShapes& s) {
  Tensor mask = call.rows.resets->reshape({s.N});
  if (call.rows.lengths) mask = at::logical_and(mask, active_rows(call, s).view({s.N}));
  return {call, s, at::nonzero(mask).view({-1})};
}

RowPlaces::RowPlaces(const Call& call, const LayerShapes& s, const Tensor& of) : rows(of) {
  if (call.rows.offsets) {
    t = at::sub(at::searchsorted(*call.rows.offsets, rows, /*out_int32=*/false, /*right=*/true), 1);
    b = at::sub(rows, call.rows.offsets->index_select(0, t));
  } else {
    t = at::floor_divide(rows, s.B);
    b = at::remainder(rows, s.B);
  }
}

void add_reset_gradients(const RowPlaces& resets, const Tensor& gradients, int64_t d, const Tensor& sums) {
  const int64_t dim = sums.dim() - 3, n = resets.rows.size(0), size = sums.size(-1);  // dim: of the direction
  const int64_t directions = sums.size(dim), rows = sums.size(dim + 1);
  const Tensor values = gradients.to(sums.scalar_type()).contiguous();
  const auto* const t = resets.t.const_data_ptr<int64_t>();
  const auto* const b = resets.b.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(sums.scalar_type(), "add_reset_gradients", [&] {
    const scalar_t* from = values.const_data_ptr<scalar_t>();
    for (int64_t i = 0; i < n; ++i, from += size) {
      const int64_t place = ((dim ? t[i] : 0) * directions + d) * rows + (rows == 1 ? 0 : b[i]);
      scalar_t* const to = sums.data_ptr<scalar_t>() + place * size;
      for (int64_t u = 0; u < size; ++u) to[u] += from[u];
    }
  });
}

#ifdef FUSED_RNN_WITH_CUDA
void add_reset_gradients_on_device(const Call& call, const LayerShapes& s, const Tensor& gradients, int64_t d,
                                   const Tensor& sums) {
  Tensor mask = call.rows.resets->reshape({s.N});
  if (call.rows.lengths) mask = at::logical_and(mask, active_rows(call, s).view({s.N}));
  Tensor of_rows = at::where(mask.unsqueeze(1), gradients.to(sums.scalar_type()), 0);
  if (call.rows.offsets) {
    const RowPlaces all(call, s, at::arange(s.N, call.x.options().dtype(at::kLong)));
    of_rows = at::zeros({s.T * s.B, of_rows.size(1)}, of_rows.options())
                  .index_copy_(0, at::add(at::mul(all.t, s.B), all.b), of_rows);
  }
  of_rows = of_rows.view({s.T, s.B, sums.size(-1)});
  const int64_t dim = sums.dim() - 3;  // of the direction
  if (dim == 0) of_rows = at::sum(of_rows, sums.size(1) == 1 ? at::IntArrayRef{0, 1} : at::IntArrayRef{0});
  sums.select(dim, d).add_(of_rows);
}
#endif

InputColumns input_columns(CellKind cell, int64_t H, const Tensor& dg) {
  return dispatch_cell(cell, [&](auto tag) -> InputColumns {
    using C = Cell<decltype(tag)::value>;
    if constexpr (C::kSlots == C::kGates) return {{dg, 0}};
    InputColumns all;
    for (int gate = 0, end = 0; gate < C::kGates; gate = end) {
      const int slot = input_gradient_slot<C>(gate);
      for (end = gate + 1; end < C::kGates && input_gradient_slot<C>(end) == slot + end - gate;) ++end;
      all.emplace_back(dg.slice(1, slot * H, (slot + end - gate) * H), gate * H);
    }
    return all;
  });
}

void input_weight_gradients(CellKind cell, const Tensor& x, const Tensor& dg, const Tensor& dw_ih, const Tensor& db_ih,
                            bool add) {
  for (const auto& [columns, first] : input_columns(cell, dg.size(1) / slot_count(cell), dg)) {
    const int64_t end = first + columns.size(1);
    if (x.scalar_type() == at::kLong) {
      scatter_columns_into(part(dw_ih, 0, first, end), columns, x);
    } else {
      multiply_into(part(dw_ih, 0, first, end), columns, /*transposed=*/true, x, add);
    }
    if (db_ih.defined()) sum_rows_into(part(db_ih, 0, first, end), columns, add);
  }
}

void input_gradient(const Call& call, const InputColumns& all, const Tensor& dx, int64_t d) {
  const Tensor& w_ih = call.params_of_direction(d)[0];
  bool add = d > 0;
  for (const auto& [columns, first] : all) {
    multiply_into(dx, columns, /*transposed=*/false, part(w_ih, 0, first, first + columns.size(1)), add);
    add = true;
  }
}

std::tuple<Tensor, std::vector<Tensor>> gates_of_layer(const Call& call, const BackwardCall& made) {
  std::vector<Tensor> dstates = state_gradients(call, made, /*wanted=*/true);
  reset_state_gradients(call, made, /*wanted=*/true, dstates);
  return {made.d_gates, std::move(dstates)};
}

LayerGradients gradients_of_layer(const Call& call, const ResultGradients& given, const BackwardCall& made,
                                  GradientMask mask, int64_t samples) {
  const LayerShapes& s = made.shapes;
  const int64_t columns = slot_count(call.recipe.cell) * s.H;
  const RowChoice rows = samples ? RowChoice() : RowChoice(call, s);  // every sample has as many rows
  TORCH_CHECK_VALUE(!(mask.x && call.has_ids()), "mask: expected no gradient of an input of ids to be asked for");
  const bool reads_x = mask.weights && !call.has_ids();
  Tensor x = reads_x        ? rows.of(call.x.contiguous().view({s.N, s.I}))
             : mask.weights ? rows.of(ids_of_rows(call, s))
                            : Tensor();
  // The d_gates of padding are 0, but its x may hold anything, and 0 * NaN is not 0.
  if (reads_x && rows.all() && has_padding(call, s)) x = at::where(active_rows(call, s), x, 0);
  Tensor dx = empty_like(call.like(), mask.x ? at::DimVector{rows.count(s), s.I} : at::DimVector{0});
  std::vector<Tensor> dparams;
  for (int d = 0; d < s.D; ++d) {
    const Tensor dg = mask.x || mask.weights ? rows.of(gate_gradients(made, columns, d)) : Tensor();
    if (mask.x) input_gradient(call, input_columns(call.recipe.cell, s.H, dg), dx, d);
    if (mask.weights && samples) {
      sample_weight_gradients(call, given, made, x, dg, d, samples, dparams);
    } else if (mask.weights) {
      weight_gradients(call, given, made, rows, x, dg, d, dparams);
    } else {
      for (int64_t i = 0; i < s.per_direction; ++i) dparams.push_back(empty_like(call.like(), {0}));
    }
  }
  if (mask.x) dx = rows.spread(dx, s).view(call.x.sizes());
  std::vector<Tensor> dstates = state_gradients(call, made, mask.states);
  reset_state_gradients(call, made, mask.states, dstates);
  return {dx, std::move(dstates), std::move(dparams)};
}

}  // namespace fused_rnn
