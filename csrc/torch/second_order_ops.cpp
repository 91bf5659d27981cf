// The ops of second derivatives and of tangents: checks, then second_order.h.
#include "torch/second_order_ops.h"

#include "torch/ops.h"
#include "torch/second_order.h"

namespace fused_rnn {

std::vector<Tensor> layer_second_order(at::TensorList grads, const OptionalTensor& dy, at::TensorList dlast, const Tensor& x,
                                       at::TensorList states, at::TensorList params, at::TensorList rows,
                                       at::TensorList saved, at::IntArrayRef wanted) {
  TORCH_CHECK_VALUE(wanted.size() == 4, "wanted: expected a recipe and 3 flags, got ", wanted.size(), " numbers");
  const auto dtype = x.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kDouble, "x: expected float32 or float64, got ", dtype);
  BackwardRecord record = record_of(grads, dy, dlast, x, states, params, rows, saved, wanted[0]);
  TORCH_CHECK_VALUE(!record.rows.options.any(), "rows: expected no options of steps");
  if (const Tensor& dh = record.dh; dh.defined()) {
    const LayerShapes s = check_layer(record.call());
    TORCH_CHECK_VALUE(!s.projection && dh.is_contiguous(), "saved: expected no dh of a layer with a projection");
    check_tensor("dh", dh, {s.D, s.N, s.H}, x, dtype);
  }
  SecondOrder second(std::move(record));
  std::vector<Tensor> found = second.of_results();
  auto [dx, dstates, dparams] = second.of_arguments(std::nullopt, {}, {wanted[1] != 0, wanted[2] != 0, wanted[3] != 0});
  found.push_back(dx);
  found.insert(found.end(), dstates.begin(), dstates.end());
  found.insert(found.end(), dparams.begin(), dparams.end());
  return found;
}

namespace {

void check_saved(const Call& call, const LayerShapes& s, const Saved& saved) {
  const auto dtype = call.x.scalar_type();
  check_optional("y", saved.y, s.output(call), call.x, dtype);
  check_optional("gates", optional_of(saved.gates), {s.D, s.N, slot_count(call.recipe.cell), s.H}, call.x, dtype);
  check_optional("cs", optional_of(saved.cs), {s.D, s.N, s.H}, call.x, dtype);
}

// Of what is given; tangents of params are those of each sample where there are samples.
void check_tangents(const BackwardRecord& record) {
  std::vector<Tensor> of{record.x};
  for (const std::vector<Tensor>* several : {&record.states, &record.rows.reset_states, &record.params}) {
    of.insert(of.end(), several->begin(), several->end());
  }
  for (size_t i = 0; i < of.size(); ++i) {
    if (!is_given(record.v[i])) continue;
    at::DimVector shape(of[i].sizes());
    if (record.samples && i >= of.size() - record.params.size()) shape.insert(shape.begin(), record.samples);
    check_tensor("tangents", record.v[i], shape, record.x, record.x.scalar_type());
  }
}

}  // namespace

std::vector<Tensor> layer_jvp(at::TensorList tangents, const Tensor& x, at::TensorList states, at::TensorList params,
                              at::TensorList rows, at::TensorList saved, at::IntArrayRef call) {
  TORCH_CHECK_VALUE(call.size() == 2, "call: expected a recipe and samples, got ", call.size(), " numbers");
  const auto dtype = x.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kDouble, "x: expected float32 or float64, got ", dtype);
  BackwardRecord record = record_of(tangents, std::nullopt, {}, x, states, params, rows, saved, call[0]);
  TORCH_CHECK_VALUE(!record.rows.options.any(), "rows: expected no options of steps");
  const LayerShapes s = check_layer(record.call());
  record.samples = call[1];
  TORCH_CHECK_VALUE(record.samples >= 0 && (record.samples == 0 || s.B % record.samples == 0),
                    "call: expected samples that divide the batch of ", s.B, ", got ", record.samples);
  check_tangents(record);
  check_saved(record.call(), s, record.given.saved);
  return SecondOrder(std::move(record)).of_results();
}

}  // namespace fused_rnn
