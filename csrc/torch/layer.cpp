#include "torch/layer.h"

#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/accumulate.h>

#include "cpu/scan/previous.h"
#include "torch/memory.h"
#include "torch/products.h"

namespace fused_rnn {

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kDouble: return DType::kFloat64;
    case at::kFloat: return DType::kFloat32;
    case at::kHalf: return DType::kFloat16;
    case at::kBFloat16: return DType::kBFloat16;
    default: TORCH_CHECK(false, "input: expected dtype float64, float32, float16 or bfloat16, got ", x.scalar_type());
  }
}

Tensor empty_like(const Tensor& x, at::IntArrayRef shape) {
  return x.is_cpu() ? Tensor(at::detail::empty_cpu(shape, x.scalar_type())) : at::empty(shape, x.options());
}

namespace {

// The same for what only this library reads.
Tensor empty_inside(const Tensor& x, at::IntArrayRef shape) {
  const int64_t bytes = c10::multiply_integers(shape) * static_cast<int64_t>(x.element_size());
  return x.is_cpu() && bytes >= KeptMemory::kLeast ? KeptMemory::empty(shape, x.scalar_type(), bytes) : empty_like(x, shape);
}

// Rows or columns [begin, end) of a matrix.
Tensor part(const Tensor& t, int64_t dim, int64_t begin, int64_t end) {
  return begin == 0 && end == t.size(dim) ? t : t.slice(dim, begin, end);
}

// A storage may be smaller than its tensors: FSDP and others free it by resizing it to 0.
void check_memory(const char* name, const Tensor& t) {
  TORCH_CHECK(t.layout() == at::kStrided, name, ": expected a dense tensor (torch.strided), got layout ", t.layout());
  if (t.numel() == 0) return;
  int64_t elements = t.storage_offset() + 1;
  for (int64_t d = 0; d < t.dim(); ++d) elements += (t.size(d) - 1) * t.stride(d);
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

at::DimVector state_shape(const LayerInputs& in, const LayerShapes& s, int64_t size) {
  return in.one_step ? at::DimVector{s.B, size} : at::DimVector{s.D, s.B, size};
}

// Whether c0 is float where the others have 16 bits: c_n is then float too.
bool has_wide_c(const LayerInputs& in) {
  return in.x.element_size() == 2 && in.c0 && in.c0->defined() && in.c0->scalar_type() == at::kFloat;
}

LayerShapes check_layer(const LayerInputs& in) {
  dtype_of(in.x);
  check_memory("input", in.x);
  const int64_t G = gate_count(in.cell);
  LayerShapes s{};
  s.D = in.bidirectional ? 2 : 1;
  const int64_t count = static_cast<int64_t>(in.params.size());
  const int64_t base = in.has_biases ? 4 : 2;
  s.per_direction = count / s.D;
  s.projection = in.cell == CellKind::kLstm && s.per_direction == base + 1;
  TORCH_CHECK_VALUE(count % s.D == 0 && (s.per_direction == base || s.projection), "params: expected ", base * s.D,
                    " tensors, got ", count);
  const bool packed = in.offsets.has_value();
  const int64_t dim = packed || in.one_step ? 2 : 3;
  TORCH_CHECK(in.x.dim() == dim, "input: expected ", dim, "-D, got ", in.x.dim(), "-D");
  TORCH_CHECK(in.params[1].dim() == 2 && in.params[1].size(0) % G == 0, "w_hh: expected shape [", G, "*H, P], got ",
              in.params[1].sizes());
  s.I = in.x.size(-1);
  s.H = in.params[1].size(0) / G;
  s.P = in.params[1].size(1);
  TORCH_CHECK(s.H > 0 && s.P > 0, "w_hh: expected H and P of at least 1, got ", in.params[1].sizes());
  TORCH_CHECK(s.projection || s.P == s.H, "w_hh: expected shape [", G * s.H, ", ", s.H, "], got ", in.params[1].sizes());
  if (packed) {
    TORCH_CHECK(in.h0.has_value(), "h0: expected a tensor with offsets (it gives the batch size), got None");
    TORCH_CHECK(!in.lengths.has_value(), "lengths: expected None with offsets");
    TORCH_CHECK(in.h0->dim() == 3, "h0: expected 3-D, got ", in.h0->dim(), "-D");
    TORCH_CHECK(in.offsets->dim() == 1 && in.offsets->size(0) >= 2, "offsets: expected shape [T + 1], got ",
                in.offsets->sizes());
    s.T = in.offsets->size(0) - 1;
    s.B = in.h0->size(1);
    s.N = in.x.size(0);
    check_tensor("offsets", *in.offsets, {s.T + 1}, in.x, at::kLong);
    if (in.offsets->is_cpu()) check_offsets(*in.offsets, s.B, s.N);
  } else {
    s.T = in.one_step ? 1 : in.x.size(0);
    s.B = in.x.size(in.one_step ? 0 : 1);
    s.N = s.T * s.B;
  }
  TORCH_CHECK(s.T > 0, "input: expected at least 1 time step, got 0");
  const auto dtype = in.x.scalar_type();
  check_optional("h0", in.h0, state_shape(in, s, s.P), in.x, dtype);
  TORCH_CHECK_VALUE(traits_of(in.cell).has_c || !in.c0 || !in.c0->defined(), "c0: expected None for a cell without c, got ",
                    in.c0->sizes());
  check_optional("c0", in.c0, state_shape(in, s, s.H), in.x, has_wide_c(in) ? at::kFloat : dtype);
  check_optional("lengths", in.lengths, {s.B}, in.x, at::kLong);
  if (packed) {
    check_optional("resets", in.resets, {s.N}, in.x, at::kBool);
  } else {
    check_optional("resets", in.resets, {s.T, s.B}, in.x, at::kBool);
  }
  for (int d = 0; d < s.D; ++d) {
    const auto w = in.params.slice(d * s.per_direction, s.per_direction);
    check_tensor("w_ih", w[0], {G * s.H, s.I}, in.x, dtype);
    check_tensor("w_hh", w[1], {G * s.H, s.P}, in.x, dtype);
    if (in.has_biases) {
      check_tensor("b_ih", w[2], {G * s.H}, in.x, dtype);
      check_tensor("b_hh", w[3], {G * s.H}, in.x, dtype);
    }
    if (s.projection) check_tensor("w_hr", w[s.per_direction - 1], {s.P, s.H}, in.x, dtype);
  }
  return s;
}

// A pointer to contiguous memory of t; a copy, if one must be made, is kept alive in `kept`.
const void* contiguous(const Tensor& t, std::vector<Tensor>& kept) {
  if (t.is_contiguous()) return t.const_data_ptr();
  kept.push_back(t.contiguous());
  return kept.back().const_data_ptr();
}
const void* contiguous(const OptionalTensor& t, std::vector<Tensor>& kept) {
  return t && t->defined() ? contiguous(*t, kept) : nullptr;
}

// The same of t in another dtype: of a wide c backward reads what it reads of every other, values and gradients of the
// layer's dtype.
const void* contiguous(const OptionalTensor& t, at::ScalarType dtype, std::vector<Tensor>& kept) {
  if (!t || !t->defined() || t->scalar_type() == dtype) return contiguous(t, kept);
  kept.push_back(t->to(dtype).contiguous());
  return kept.back().const_data_ptr();
}

void* data_or_null(const Tensor& t) { return t.defined() && t.numel() ? t.data_ptr() : nullptr; }

const int64_t* offsets_of(const LayerInputs& in, const LayerShapes& s, std::vector<Tensor>& kept) {
  if (!in.offsets) return nullptr;
  if (!in.offsets->is_cuda()) return static_cast<const int64_t*>(contiguous(in.offsets, kept));
  kept.push_back(at::clamp(*in.offsets, 0, s.N).contiguous());
  return kept.back().const_data_ptr<int64_t>();
}

Sequence sequence_of(const LayerInputs& in, const LayerShapes& s, std::vector<Tensor>& kept) {
  return {s.T, s.B, s.N, static_cast<const int64_t*>(contiguous(in.lengths, kept)), offsets_of(in, s, kept)};
}

Modifier modifier_of(const LayerInputs& in, std::vector<Tensor>& kept) {
  return {static_cast<const bool*>(contiguous(in.resets, kept))};
}

WeightMatrix matrix_of(const Tensor& t, std::vector<Tensor>& kept) { return {contiguous(t, kept), dtype_of(t)}; }

Weights weights_of(const LayerInputs& in, const LayerShapes& s, int d, std::vector<Tensor>& kept) {
  const auto w = in.params.slice(d * s.per_direction, s.per_direction);
  return {matrix_of(w[0], kept), matrix_of(w[1], kept), in.has_biases ? contiguous(w[2], kept) : nullptr,
          in.has_biases ? contiguous(w[3], kept) : nullptr,
          s.projection ? matrix_of(w[s.per_direction - 1], kept) : WeightMatrix{}};
}

// [N, 1] bool, true at rows that take part; only for dense batches with lengths.
Tensor active_rows(const LayerInputs& in, const LayerShapes& s) {
  const Tensor t = at::arange(s.T, in.x.options().dtype(at::kLong)).unsqueeze(1);
  return (t < in.lengths->unsqueeze(0)).reshape({s.N, 1});
}

// For every row of memory the row of cat(y, h0) that was its h before the step: [N].
Tensor previous_rows(const LayerInputs& in, const LayerShapes& s, bool reverse) {
  const auto options = in.x.options().dtype(at::kLong);
  const Tensor row = at::arange(s.N, options);
  if (in.offsets) {
    const Tensor& offsets = *in.offsets;
    const Tensor t = at::searchsorted(offsets, row, /*out_int32=*/false, /*right=*/true).sub_(1);
    const Tensor b = row - offsets.index_select(0, t);
    if (!reverse) {
      const Tensor before = offsets.index_select(0, (t - 1).clamp_min_(0)) + b;
      return at::where(t == 0, b + s.N, before);
    }
    const Tensor next = (t + 1).clamp_max_(s.T - 1);
    const Tensor begin = offsets.index_select(0, next);
    const Tensor active = (t + 1 < s.T).logical_and_(b < offsets.index_select(0, next + 1) - begin);
    return at::where(active, begin + b, b + s.N);
  }
  const Tensor t = row.div(s.B, "floor");
  const Tensor b = row - t * s.B;
  if (!reverse) return at::where(t == 0, b + s.N, row - s.B);
  const Tensor active = in.lengths ? t + 1 < in.lengths->index_select(0, b) : t + 1 < s.T;
  return at::where(active, row + s.B, b + s.N);
}

// Of every row the h before its step [N, P]; y [N, P] is a strided view.
Tensor previous_states(const LayerInputs& in, const LayerShapes& s, const Tensor& y, int d) {
  const bool has_h0 = in.h0 && in.h0->defined();
  if (in.x.is_cpu() && y.stride(1) == 1) {
    std::vector<Tensor> kept;
    const int64_t size = static_cast<int64_t>(y.element_size());
    const Tensor h_prev = empty_like(y, {s.N, s.P});
    const void* h0 = has_h0 ? contiguous(in.h0->select(0, d), kept) : nullptr;
    cpu::previous_rows({sequence_of(in, s, kept), modifier_of(in, kept), d == 1, s.P * size, y.const_data_ptr(),
                        y.stride(0) * size, h0, h_prev.data_ptr()});
    return h_prev;
  }
  const Tensor h0 = has_h0 ? in.h0->select(0, d) : at::zeros({s.B, s.P}, y.options());
  Tensor h_prev = at::cat({y, h0}).index_select(0, previous_rows(in, s, d == 1));
  if (in.resets) h_prev.masked_fill_(in.resets->reshape({s.N, 1}), 0);
  if (in.lengths) h_prev.masked_fill_(active_rows(in, s).logical_not_(), 0);
  return h_prev;
}

// d_rg^T h_prev [G*H, P] of direction d. d_rg [N, G*H] is a strided view. Where every row takes part in every step, h_prev
// is y moved by one step and never stored; otherwise rows that take no part get zeros, as their y and h0 may be NaN, and 0 *
// NaN is not 0.
Tensor recurrent_weight_gradient(const LayerInputs& in, const LayerShapes& s, const Tensor& d_rg,
                                 const OptionalTensor& y_of_all, int d) {
  const bool reverse = d == 1;
  const bool has_h0 = in.h0 && in.h0->defined();
  const bool shifted = !in.offsets && !in.resets && !in.lengths;
  const bool later_steps = s.T > 1;
  Tensor y;
  if (y_of_all) {
    y = part(y_of_all->reshape({s.N, s.D * s.P}), 1, d * s.P, (d + 1) * s.P);
  } else if (!shifted) {
    y = empty_like(in.x, {s.N, s.P});  // of a single step: never read
  }
  const Tensor dw = empty_like(in.x, {d_rg.size(1), s.P});
  if (!shifted) {
    multiply_into(dw, d_rg, /*transposed=*/true, previous_states(in, s, y, d), /*add=*/false);
    return dw;
  }
  const int64_t begin = reverse ? s.N - s.B : 0;  // of the first step
  if (later_steps) {
    const Tensor later = part(d_rg, 0, reverse ? 0 : s.B, reverse ? s.N - s.B : s.N);
    const Tensor earlier = part(y, 0, reverse ? s.B : 0, reverse ? s.N : s.N - s.B);
    multiply_into(dw, later, /*transposed=*/true, earlier, /*add=*/false);
  }
  if (has_h0) {
    const Tensor first = part(d_rg, 0, begin, begin + s.B);
    multiply_into(dw, first, /*transposed=*/true, in.h0->select(0, d), /*add=*/later_steps);
  } else if (!later_steps) {
    dw.zero_();
  }
  return dw;
}

}  // namespace

CellKind cell_of(int64_t cell) {
  TORCH_CHECK_VALUE(cell >= 0 && cell < kCellCount, "cell: expected 0 to ", kCellCount - 1, ", got ", cell);
  return static_cast<CellKind>(cell);
}

bool backward_reads_output(CellKind cell, int64_t steps, bool weight_gradients) {
  const CellTraits traits = traits_of(cell);
  return traits.saved == 0 || (steps > 1 && (traits.reads_h || weight_gradients));
}

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

ForwardCall prepare_forward(const LayerInputs& in, bool save) {
  const LayerShapes s = check_layer(in);
  ForwardCall call;
  const bool has_c = traits_of(in.cell).has_c;
  call.h_n = empty_like(in.x, state_shape(in, s, s.P));
  if (in.one_step) {
    call.y = call.h_n;  // the same values
  } else {
    call.y = empty_like(in.x, in.offsets ? at::DimVector{s.N, s.D * s.P} : at::DimVector{s.T, s.B, s.D * s.P});
  }
  if (has_c) call.c_n = empty_like(has_wide_c(in) ? *in.c0 : in.x, state_shape(in, s, s.H));
  if (save && has_c) call.cs = empty_inside(in.x, {s.D, s.N, s.H});

  ForwardParams& p = call.params;
  p = {};
  p.cell = in.cell;
  p.dtype = dtype_of(in.x);
  p.wide_c = has_wide_c(in);
  p.I = s.I, p.H = s.H, p.P = s.P, p.D = s.D;
  p.seq = sequence_of(in, s, call.kept);
  p.modifier = modifier_of(in, call.kept);
  p.x = contiguous(in.x, call.kept);
  p.h0 = contiguous(in.h0, call.kept);
  p.c0 = contiguous(in.c0, call.kept);
  for (int d = 0; d < s.D; ++d) p.weights[d] = weights_of(in, s, d, call.kept);
  p.y = data_or_null(call.y);
  p.h_n = data_or_null(call.h_n);
  p.c_n = data_or_null(call.c_n);
  p.cs = data_or_null(call.cs);
  p.training = save;
  if (save && traits_of(in.cell).saved > 0) allocate_gates(call);
  return call;
}

void allocate_gates(ForwardCall& call) {
  if (call.gates.defined()) return;
  ForwardParams& p = call.params;
  call.gates = empty_inside(call.y, {p.D, p.seq.N, slot_count(p.cell), p.H});
  p.gates = data_or_null(call.gates);
}

LayerOutputs forward_outputs(const ForwardCall& call, bool save) {
  const auto empty = [&] { return empty_like(call.y, {0}); };
  const bool keep_gates = save && traits_of(call.params.cell).saved > 0;
  return {call.y, call.h_n, call.c_n.defined() ? call.c_n : empty(), keep_gates ? call.gates : empty(),
          call.cs.defined() ? call.cs : empty()};
}

BackwardCall prepare_backward(const LayerInputs& in, const BackwardInputs& grads, GradientMask mask) {
  const LayerShapes s = check_layer(in);
  const auto dtype = in.x.scalar_type();
  const bool has_c = traits_of(in.cell).has_c;
  const int64_t S = slot_count(in.cell);
  const bool saves = traits_of(in.cell).saved > 0;
  const auto y_shape = in.offsets ? at::DimVector{s.N, s.D * s.P} : at::DimVector{s.T, s.B, s.D * s.P};
  TORCH_CHECK_VALUE(grads.y || !backward_reads_output(in.cell, s.T, mask.weights), "y: expected forward's output, got None");
  check_optional("y", grads.y, y_shape, in.x, dtype);
  check_optional("dy", grads.dy, y_shape, in.x, dtype);
  check_optional("dh_n", grads.dh_n, {s.D, s.B, s.P}, in.x, dtype);
  if (has_c) check_optional("dc_n", grads.dc_n, {s.D, s.B, s.H}, in.x, has_wide_c(in) ? at::kFloat : dtype);
  if (saves) check_tensor("gates", grads.gates, {s.D, s.N, S, s.H}, in.x, dtype);
  if (has_c) check_tensor("cs", grads.cs, {s.D, s.N, s.H}, in.x, dtype);

  BackwardCall call;
  call.shapes = s;
  call.d_gates = empty_inside(in.x, {s.D, s.N, S, s.H});
  if (s.projection) call.d_h = empty_inside(in.x, {s.D, s.N, s.P});
  call.d_h0 = empty_like(in.x, {s.D, s.B, s.P});
  call.d_c0 = has_c ? empty_like(in.x, {s.D, s.B, s.H}) : empty_like(in.x, {0});

  BackwardParams& p = call.params;
  p = {};
  p.cell = in.cell;
  p.dtype = dtype_of(in.x);
  p.H = s.H, p.P = s.P, p.D = s.D;
  p.seq = sequence_of(in, s, call.kept);
  p.modifier = modifier_of(in, call.kept);
  p.h0 = contiguous(in.h0, call.kept);
  p.c0 = contiguous(in.c0, dtype, call.kept);
  for (int d = 0; d < s.D; ++d) p.weights[d] = weights_of(in, s, d, call.kept);
  p.y = contiguous(grads.y, call.kept);
  p.gates = saves ? contiguous(grads.gates, call.kept) : nullptr;
  p.cs = has_c ? contiguous(grads.cs, call.kept) : nullptr;
  p.dy = contiguous(grads.dy, call.kept);
  p.dh_n = contiguous(grads.dh_n, call.kept);
  p.dc_n = has_c ? contiguous(grads.dc_n, dtype, call.kept) : nullptr;
  p.d_gates = data_or_null(call.d_gates);
  p.d_h = data_or_null(call.d_h);
  p.d_h0 = data_or_null(call.d_h0);
  p.d_c0 = data_or_null(call.d_c0);
  return call;
}

InputColumns input_columns(CellKind cell, int64_t H, const Tensor& dg) {
  const int64_t G = gate_count(cell);
  if (slot_count(cell) == G) return {{dg, 0}};
  return {{dg.slice(1, H, G * H), 0}, {dg.slice(1, 0, H), (G - 1) * H}};
}

void input_gradient(const LayerInputs& in, const InputColumns& all, const Tensor& dx, int64_t d) {
  const Tensor& w_ih = in.params[d * (static_cast<int64_t>(in.params.size()) / (in.bidirectional ? 2 : 1))];
  bool add = d > 0;
  for (const auto& [columns, first] : all) {
    multiply_into(dx, columns, /*transposed=*/false, part(w_ih, 0, first, first + columns.size(1)), add);
    add = true;
  }
}

LayerGradients gradients_of_layer(const LayerInputs& in, const BackwardInputs& grads, const BackwardCall& call,
                                  GradientMask mask) {
  const LayerShapes& s = call.shapes;
  const int64_t G = gate_count(in.cell), S = slot_count(in.cell), H = s.H;
  const bool apart = S > G;  // the gradient of b_hh is not that of b_ih
  const auto empty = [&] { return empty_like(in.x, {0}); };
  Tensor x = mask.weights ? in.x.contiguous().view({s.N, s.I}) : Tensor();
  // The d_gates of padding are 0, but its x may hold anything, and 0 * NaN is not 0.
  if (in.lengths && mask.weights) x = at::where(active_rows(in, s), x, 0);

  Tensor dx;
  std::vector<Tensor> dparams;
  for (int d = 0; d < s.D; ++d) {
    const Tensor dg = (s.D == 1 ? call.d_gates : call.d_gates.select(0, d)).view({s.N, S * H});
    const Tensor d_rg = part(dg, 1, (S - G) * H, S * H);
    const InputColumns columns_of_input = input_columns(in.cell, H, dg);
    if (mask.x) {
      if (!dx.defined()) dx = empty_like(in.x, {s.N, s.I});
      input_gradient(in, columns_of_input, dx, d);
    }
    if (!mask.weights) {
      for (int64_t i = 0; i < s.per_direction; ++i) dparams.push_back(empty());
      continue;
    }
    const Tensor dw_ih = empty_like(in.x, {G * H, s.I});
    const Tensor db_ih = empty_like(in.x, {G * H}), db_hh = empty_like(in.x, {G * H});
    for (const auto& [columns, first] : columns_of_input) {
      const Tensor rows = part(dw_ih, 0, first, first + columns.size(1));
      multiply_into(rows, columns, /*transposed=*/true, x, /*add=*/false);
      if (in.has_biases) sum_rows_into(part(db_ih, 0, first, first + columns.size(1)), columns);
    }
    dparams.push_back(dw_ih);
    dparams.push_back(recurrent_weight_gradient(in, s, d_rg, grads.y, d));
    if (in.has_biases) {
      if (apart) {
        sum_rows_into(db_hh, d_rg);
      } else {
        db_hh.copy_(db_ih);
      }
      dparams.push_back(db_ih);
      dparams.push_back(db_hh);
    }
    if (s.projection) {
      const Tensor m = at::mul(grads.gates.select(0, d).select(1, 3), at::tanh(grads.cs.select(0, d)));
      dparams.push_back(empty_like(in.x, {s.P, s.H}));
      multiply_into(dparams.back(), call.d_h.select(0, d), /*transposed=*/true, m, /*add=*/false);
    }
  }
  if (mask.x) dx = dx.view(in.x.sizes());
  return {mask.x ? dx : empty(), mask.state && in.h0 ? call.d_h0 : empty(),
          mask.state && in.c0 ? call.d_c0.to(in.c0->scalar_type()) : empty(), dparams};
}

}  // namespace fused_rnn
