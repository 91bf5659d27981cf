// The derivative of a layer's backward: what gradient penalties and Hessian-vector products need.
//
// The gradients (dx, dh0, dc0, dW) are linear in (dy, dh_n, dc_n), and gradients of one function of the other arguments. So
// with v, gradients of these gradients, <v, gradients> has the derivatives
//   by dy, dh_n, dc_n       the tangents of y, h_n, c_n in the direction v (symmetry of <dy, J v>)
//   by x, states, weights   the tangents of the gradients in the direction v (symmetry of second derivatives)
// which are a scan forward of tangents, a scan backward of dual numbers, and products of all rows:
//   dx' = d' W_ih + d V_ih    dW_ih' = d'^T x + d^T v_x    dW_hh' = d'^T h + d^T h'    ' marks a tangent
// d: gradients of the gates; V_ih, V_hh, V_hr, v_x: the part of v for W_ih, W_hh, W_hr, x.
//
// d' is linear in what comes to the tangents of y from outside, as the layer's own gradients are in its dy. So where a pass
// wants both, dy goes to the scan of dual numbers, and d' and the products are those of the sum: 6 products of an RNN's rows
// and weights instead of 10.
#include "torch/second_order.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "core/cells.h"
#include "core/dispatch.h"
#include "torch/device.h"
#include "torch/ops.h"
#include "torch/products.h"

namespace fused_rnn {
namespace {

const SecondOrderScans& scans_for([[maybe_unused]] const Tensor& t) {
#ifdef FUSED_RNN_WITH_CUDA
  if (is_on_device(t)) return second_order_on_device();
#endif
  return second_order_on_cpu();
}

Tensor or_zeros(const Tensor& v, const Tensor& like) { return is_given(v) ? v : at::zeros_like(like); }
std::vector<Tensor> or_zeros(at::TensorList v, at::TensorList like) {
  std::vector<Tensor> all;
  for (size_t i = 0; i < like.size(); ++i) all.push_back(or_zeros(v[i], like[i]));
  return all;
}

// The parameters of one direction of a list like params.
struct Parameters {
  Tensor ih, hh, b_ih, b_hh, hr;  // undefined where there is none

  static Parameters of(at::TensorList list, const Call& call, int64_t d) {
    const size_t count = call.params.size() / call.recipe.directions();
    const at::TensorList own = list.slice(d * count, count);
    const bool biases = call.recipe.has_biases;
    Parameters p{own[0], own[1], {}, {}, {}};
    if (biases) p.b_ih = own[2], p.b_hh = own[3];
    if (count > (biases ? 4u : 2u)) p.hr = own[count - 1];
    return p;
  }
};

// The tangent of unprojected(saved, d).
Tensor unprojected_tangent(const Saved& saved, const Saved& tangent, int64_t d) {
  const Tensor o = saved.gates.select(0, d).select(1, 3), y = at::tanh(saved.cs.select(0, d));
  const Tensor slope = 1 - y * y;
  return tangent.gates.select(0, d).select(1, 3) * y + o * slope * tangent.cs.select(0, d);
}

}  // namespace

class SecondOrder::Scans {
 public:
  explicit Scans(BackwardRecord record)
      : record_(std::move(record)),
        call_(record_.call()),
        device_(scans_for(call_.x)),
        shapes_(check_layer(call_)),
        given_(std::move(record_.given)),
        dh_(record_.dh),
        v_x_(record_.v[0]),
        v_params_(at::TensorList(record_.v).slice(record_.v.size() - call_.params.size())),
        samples_(record_.samples),
        states_(or_zeros(at::TensorList(record_.v).slice(1), call_.states)),
        rows_(call_.rows),
        d_(shapes_.D) {
    const at::TensorList v = record_.v;
    rows_.reset_states = or_zeros(v.slice(1 + call_.states.size()), call_.rows.reset_states);
  }
  Scans(const Scans&) = delete;
  Scans& operator=(const Scans&) = delete;

  std::vector<Tensor> of_results() {
    device_.within(call_.x, [this] {
      if (!given_.saved.y) make_output();
      tangents();
    });
    std::vector<Tensor> found{forward_.y};
    for (const Tensor& t : forward_.last()) found.push_back(t);
    return found;
  }
  LayerGradients of_arguments(const OptionalTensor& dy, std::vector<OptionalTensor> of_last, GradientMask wanted) {
    tangent_given_ = {dy, std::move(of_last), {forward_.gates, forward_.cs, forward_.y}};
    LayerGradients made;
    device_.within(call_.x, [&] {
      gradients();
      made = products(wanted);
    });
    return made;
  }

 private:
  Parameters v_of(int64_t d) const { return Parameters::of(v_params_, call_, d); }
  Tensor none() const { return empty_like(call_.like(), {0}); }

  void make_output() {
    const at::AutoDispatchBelowADInplaceOrView guard;
    given_.saved.y = std::get<0>(call_layer(call_, /*save=*/false));
  }

  // Of one direction, what the tangents of the accumulators have of V_ih and V_hh, added to zeros [N, S * H].
  void add_source(const Tensor& source, int64_t d) const {
    const LayerShapes& s = shapes_;
    const Parameters v = v_of(d);
    const int64_t G = gate_count(call_.recipe.cell), H = s.H;
    if (is_given(v.ih)) {
      multiply_into(part(source, 1, 0, G * H), call_.x.reshape({s.N, s.I}), /*transposed=*/false, v.ih.t().contiguous(),
                    /*add=*/true);
    }
    if (!is_given(v.hh)) return;
    const Tensor h_prev = previous_states(call_, s, output_of_direction(*given_.saved.y, s, d), d);
    const Tensor right = v.hh.t().contiguous();  // [P, G * H]
    dispatch_cell(call_.recipe.cell, [&](auto tag) {
      using C = Cell<decltype(tag)::value>;
      for (int gate = 0, end = 0; gate < C::kGates; gate = end) {  // gates whose slots follow each other together
        const int slot = C::recurrent_slot(gate);
        for (end = gate + 1; end < C::kGates && C::recurrent_slot(end) == slot + end - gate;) ++end;
        multiply_into(part(source, 1, slot * H, (slot + end - gate) * H), h_prev, /*transposed=*/false,
                      right.slice(1, gate * H, end * H), /*add=*/true);
      }
    });
  }

  // The same of samples, with what V_b adds.
  void add_source_of_samples(const Tensor& source, int64_t d) const {
    const LayerShapes& s = shapes_;
    const Parameters v = v_of(d);
    const int64_t G = gate_count(call_.recipe.cell), H = s.H;
    const Tensor to = source.view({s.N / samples_, samples_, -1});
    if (is_given(v.ih)) to.narrow(2, 0, G * H).add_(product_of_samples(call_.x.reshape({s.N, s.I}), v.ih));
    const bool has_b_ih = call_.recipe.has_biases && is_given(v.b_ih),
               has_b_hh = call_.recipe.has_biases && is_given(v.b_hh);
    if (has_b_ih) to.narrow(2, 0, G * H).add_(v.b_ih);
    Tensor of_h;
    if (is_given(v.hh)) {
      of_h = product_of_samples(previous_states(call_, s, output_of_direction(*given_.saved.y, s, d), d), v.hh);
      if (has_b_hh) of_h.add_(v.b_hh);
    } else if (has_b_hh) {
      of_h = v.b_hh.expand({s.N / samples_, samples_, G * H});
    }
    if (!of_h.defined()) return;
    dispatch_cell(call_.recipe.cell, [&](auto tag) {
      using C = Cell<decltype(tag)::value>;
      for (int gate = 0; gate < C::kGates; ++gate) {
        to.narrow(2, C::recurrent_slot(gate) * H, H).add_(of_h.narrow(2, gate * H, H));
      }
    });
  }
  // rows [N, K], of [samples, M, K] -> [N / samples, samples, M]
  Tensor product_of_samples(const Tensor& rows, const Tensor& of) const {
    const Tensor by_samples = rows.reshape({rows.size(0) / samples_, samples_, rows.size(1)}).transpose(0, 1);
    return at::bmm(by_samples, of.transpose(1, 2)).transpose(0, 1);
  }

  // The scan of tangents.
  void tangents() {
    const LayerShapes& s = shapes_;
    const int64_t gates = gate_count(call_.recipe.cell) * s.H;
    const Tensor& like = call_.x;
    const bool has_x = is_given(v_x_);
    const at::DimVector narrow = call_.rows.offsets ? at::DimVector{s.N, 1} : at::DimVector{s.T, s.B, 1};
    x_ = has_x ? v_x_ : at::zeros(narrow, like.options());
    Recipe recipe = call_.recipe;
    recipe.has_biases = false;
    for (const Tensor& t : v_params_) {
      recipe.has_biases = recipe.has_biases || (!samples_ && t.dim() == 1 && is_given(t));
    }
    bool has_source = false, has_source_y = false;
    for (int64_t d = 0; d < d_; ++d) {
      const Parameters w = Parameters::of(call_.params, call_, d), v = v_of(d);
      params_.push_back(has_x ? w.ih : at::zeros({gates, 1}, like.options()));
      params_.push_back(w.hh);
      if (recipe.has_biases) params_.push_back(or_zeros(v.b_ih, w.b_ih)), params_.push_back(or_zeros(v.b_hh, w.b_hh));
      if (s.projection) params_.push_back(w.hr);
      has_source = has_source || is_given(v.ih) || is_given(v.hh);
      if (samples_) has_source = has_source || (call_.recipe.has_biases && (is_given(v.b_ih) || is_given(v.b_hh)));
      has_source_y = has_source_y || (s.projection && is_given(v.hr));
    }
    tangent_call_.emplace(Call{x_, states_, params_, rows_, recipe});
    forward_ = prepare_forward(*tangent_call_, /*save=*/true);
    Copies copies;
    Primal primal{copies.contiguous(call_.h0()),
                  copies.contiguous(call_.c0()),
                  copies.contiguous(given_.saved.y),
                  data_of(given_.saved.gates, copies),
                  data_of(given_.saved.cs, copies),
                  modifier_of(call_, copies),
                  nullptr,
                  nullptr};
    Tensor source, source_y;
    if (has_source) {
      source = at::zeros({s.D, s.N, slot_count(recipe.cell) * s.H}, like.options());
      for (int64_t d = 0; d < d_; ++d) {
        samples_ ? add_source_of_samples(source.select(0, d), d) : add_source(source.select(0, d), d);
      }
      primal.source = source.const_data_ptr();
    }
    if (has_source_y) {
      source_y = at::zeros({s.D, s.N, s.P}, like.options());
      for (int64_t d = 0; d < d_; ++d) {
        const Tensor v_hr = v_of(d).hr;
        if (!is_given(v_hr)) continue;
        if (samples_) {
          source_y.select(0, d)
              .view({s.N / samples_, samples_, s.P})
              .copy_(product_of_samples(unprojected(given_.saved, d), v_hr));
          continue;
        }
        multiply_into(source_y.select(0, d), unprojected(given_.saved, d), /*transposed=*/false, v_hr.t().contiguous(),
                      /*add=*/false);
      }
      primal.source_y = source_y.const_data_ptr();
    }
    forward_.params.primal = &primal;
    if (s.B > 0) device_.tangents(*tangent_call_, forward_);
    forward_.params.primal = nullptr;
  }

  static const void* data_of(const Tensor& t, Copies& copies) { return t.defined() ? copies.contiguous(t) : nullptr; }

  // The scan of dual numbers.
  void gradients() {
    value_ = prepare_backward(call_, given_, {true, /*states=*/false, true});
    if (dh_.defined()) value_.params.d_h = dh_.data_ptr();
    tangent_ = prepare_backward(*tangent_call_, tangent_given_, {true, /*states=*/true, true});
    Copies copies;
    for (int64_t d = 0; d < d_; ++d) {
      const Parameters v = v_of(d);
      Weights& weights = tangent_.params.weights[d];
      weights.w_hh.data = is_given(v.hh) ? copies.contiguous(v.hh) : nullptr;
      weights.w_hr.data = shapes_.projection && is_given(v.hr) ? copies.contiguous(v.hr) : nullptr;
    }
    if (!call_.h0()) tangent_.params.d_h0 = nullptr;
    DualBackwardParams p{value_.params, tangent_.params, value_.params.dtype, nullptr};
    if (shapes_.B > 0) device_.dual_backward(call_, p);
    tangent_.shapes = shapes_;
  }

  LayerGradients products(GradientMask wanted) {
    const LayerShapes& s = shapes_;
    LayerGradients made = gradients_of_layer(call_, given_, tangent_, wanted);
    auto& [dx, dstates, dparams] = made;
    const CellKind cell = call_.recipe.cell;
    const int64_t G = gate_count(cell), S = slot_count(cell), H = s.H;
    const RowChoice rows(call_, s);
    Tensor v_x;
    if (wanted.weights && is_given(v_x_)) {
      v_x = rows.of(v_x_.reshape({s.N, s.I}));
      if (rows.all() && has_padding(call_, s)) v_x = at::where(active_rows(call_, s), v_x, 0);
    }
    bool has_hh = false;
    for (int64_t d = 0; d < d_; ++d) {
      const Parameters v = v_of(d);
      has_hh = has_hh || is_given(v.hh);
      const Tensor dg = rows.of(value_.d_gates.select(0, d).view({s.N, S * H}));
      if (wanted.x && is_given(v.ih)) {
        Tensor more = at::zeros({dg.size(0), s.I}, dx.options());
        for (const auto& [columns, first] : input_columns(cell, H, dg)) {
          multiply_into(more, columns, /*transposed=*/false, part(v.ih, 0, first, first + columns.size(1)).contiguous(),
                        /*add=*/true);
        }
        dx.add_(rows.spread(more, s).view(dx.sizes()));
      }
      if (!wanted.weights) continue;
      Tensor* const of_direction = &dparams[d * s.per_direction];
      if (v_x.defined()) input_weight_gradients(cell, v_x, dg, of_direction[0], Tensor(), /*add=*/true);
      const Tensor d_rg = part(dg, 1, (S - G) * H, S * H);
      of_direction[1].add_(recurrent_weight_gradient(*tangent_call_, s, rows, d_rg, tangent_given_.saved.y, d));
      if (s.projection) {
        multiply_into(of_direction[s.per_direction - 1], rows.of(value_.d_h.select(0, d)), /*transposed=*/true,
                      rows.of(unprojected_tangent(given_.saved, tangent_given_.saved, d)), /*add=*/true);
      }
    }
    if (wanted.states && has_hh && !call_.rows.reset_states.empty()) add_reset_gradients_of_values(dstates);
    return made;
  }

  // d V_hh at resets; what goes past the product has no part in it.
  void add_reset_gradients_of_values(std::vector<Tensor>& dstates) {
    std::vector<Tensor> params, more;
    for (int64_t d = 0; d < d_; ++d) {
      const Parameters w = Parameters::of(call_.params, call_, d), v = v_of(d);
      params.push_back(w.ih), params.push_back(or_zeros(v.hh, w.hh));
    }
    Recipe recipe = call_.recipe;
    recipe.has_biases = false;
    const Call call{call_.x, call_.states, params, call_.rows, recipe};
    reset_state_gradients(call, value_, /*wanted=*/true, more);
    for (size_t i = 0; i < more.size(); ++i) dstates[dstates.size() - more.size() + i].add_(more[i]);
  }

  BackwardRecord record_;
  const Call call_;  // of record_
  const SecondOrderScans& device_;
  const LayerShapes shapes_;
  ResultGradients given_;
  ResultGradients tangent_given_;  // its dy, dh_n, dc_n: what the layer's own gradients are made of
  const Tensor dh_;
  const Tensor v_x_;
  const at::TensorList v_params_;
  const int64_t samples_;
  // The layer whose forward is the scan of tangents, and whose backward makes the sums.
  Tensor x_;
  std::vector<Tensor> states_, params_;
  Rows rows_;
  std::optional<Call> tangent_call_;
  const int64_t d_;
  ForwardCall forward_;
  BackwardCall value_, tangent_;
};

SecondOrder::SecondOrder(BackwardRecord record) : scans_(std::make_unique<Scans>(std::move(record))) {}
SecondOrder::~SecondOrder() = default;
std::vector<Tensor> SecondOrder::of_results() { return scans_->of_results(); }
LayerGradients SecondOrder::of_arguments(const OptionalTensor& dy, std::vector<OptionalTensor> of_last,
                                         GradientMask wanted) {
  return scans_->of_arguments(dy, std::move(of_last), wanted);
}

bool has_second_order(const Call& call) {
  const auto type = call.x.scalar_type();
  return (type == at::kFloat || type == at::kDouble) && call.x.numel() > 0 && !call.rows.options.any() &&
         second_order_serves(call.x);
}
bool second_order_serves(const Tensor& x) { return scans_for(x).serve(x); }

BackwardRecord record_of(at::TensorList v, const OptionalTensor& dy, at::TensorList dlast, const Tensor& x,
                         at::TensorList states, at::TensorList params, at::TensorList rows, at::TensorList saved,
                         int64_t recipe) {
  const Recipe of_layer = layer_recipe_of(recipe);
  const Rows given = rows_of(rows, recipe);
  TORCH_CHECK_VALUE(v.size() == 1 + states.size() + given.reset_states.size() + params.size(),
                    "grads: expected one for each result of backward, got ", v.size());
  const size_t before_dh = saved_count(of_layer.cell, given.options.any()) + 1;
  BackwardRecord record{x,
                        states.vec(),
                        params.vec(),
                        given,
                        of_layer,
                        {dy, gradients_of_last(of_layer, dlast),
                         saved_of(of_layer.cell, given, saved.slice(0, std::min(saved.size(), before_dh)))},
                        saved.size() > before_dh ? saved[before_dh] : Tensor(),
                        v.vec()};
  OptionalTensor& y = record.given.saved.y;
  if (y && y->dim() == 1) y = std::nullopt;
  return record;
}

}  // namespace fused_rnn
