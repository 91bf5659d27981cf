// In place of cuDNN: torch's ops for it, for CPU tensors, by the CPU's own layers. What torch documents of them, or does, is
// demanded: weights come from the buffer alone, states are contiguous, backward wants a forward for training and writes into
// its reserve.
#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <vector>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

int forwards = 0, backwards = 0, flattened = 0;
bool refuses = false;
const void* latest_buffer = nullptr;

constexpr int64_t kGap = 8;  // between the parameters of the buffer

// The numbers of a stack, as torch's ops have them.
struct Stack {
  int64_t mode, hidden_size, proj_size, num_layers;
  bool bidirectional;

  int64_t directions() const { return bidirectional ? 2 : 1; }
};

// The shapes of all parameters in the buffer's order: the matrices of all layers, then all biases.
struct Placed {
  size_t index;  // in the list
  int64_t offset;
};

std::vector<Placed> places(at::TensorList params, int64_t& size) {
  std::vector<Placed> result;
  size = 0;
  for (int64_t dims : {2, 1}) {
    for (size_t i = 0; i < params.size(); ++i) {
      if (params[i].dim() != dims) continue;
      result.push_back({i, size});
      size += params[i].numel() + kGap;
    }
  }
  return result;
}

std::vector<Tensor> params_of(const Tensor& buffer, at::TensorList shapes) {
  int64_t size = 0;
  std::vector<Tensor> params(shapes.size());
  for (const Placed& place : places(shapes, size)) {
    const Tensor& shape = shapes[place.index];
    params[place.index] = buffer.slice(0, place.offset, place.offset + shape.numel()).view(shape.sizes()).clone();
  }
  TORCH_CHECK(buffer.dim() == 1 && buffer.numel() == size, "weight_buf: expected ", size, " elements");
  return params;
}

Tensor flatten_weight(at::TensorList params, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool) {
  ++flattened;
  int64_t size = 0;
  const std::vector<Placed> all = places(params, size);
  const Tensor buffer = at::zeros({size}, params[0].options());
  for (const Placed& place : all) {
    const Tensor& param = params[place.index];
    const Tensor view = buffer.slice(0, place.offset, place.offset + param.numel()).view(param.sizes());
    view.copy_(param);
    param.set_(view);
  }
  return buffer;
}

// (y, h_n, c_n or undefined)
std::array<Tensor, 3> run(const Tensor& x, at::TensorList params, int64_t per_layer, const Tensor& h0,
                          const OptionalTensor& c0, const Stack& s, at::IntArrayRef batch_sizes) {
  const bool biases = per_layer >= 4;
  const Tensor sizes = at::tensor(batch_sizes, at::kLong);
  const bool packed = !batch_sizes.empty();
  if (s.mode == 2) {
    const std::vector<Tensor> states{h0, *c0};
    auto [y, h, c] = packed ? at::lstm(x, sizes, states, params, biases, s.num_layers, 0, false, s.bidirectional)
                            : at::lstm(x, states, params, biases, s.num_layers, 0, false, s.bidirectional, false);
    return {y, h, c};
  }
  const auto layers = [&](auto op) -> std::array<Tensor, 3> {
    auto [y, h] = op();
    return {y, h, Tensor()};
  };
  const int64_t L = s.num_layers;
  const bool bi = s.bidirectional;
  if (packed) {
    if (s.mode == 3) return layers([&] { return at::gru(x, sizes, h0, params, biases, L, 0, false, bi); });
    if (s.mode == 1) return layers([&] { return at::rnn_tanh(x, sizes, h0, params, biases, L, 0, false, bi); });
    return layers([&] { return at::rnn_relu(x, sizes, h0, params, biases, L, 0, false, bi); });
  }
  if (s.mode == 3) return layers([&] { return at::gru(x, h0, params, biases, L, 0, false, bi, false); });
  if (s.mode == 1) return layers([&] { return at::rnn_tanh(x, h0, params, biases, L, 0, false, bi, false); });
  return layers([&] { return at::rnn_relu(x, h0, params, biases, L, 0, false, bi, false); });
}

void demand(const Tensor& h0, const OptionalTensor& c0, bool batch_first, double dropout) {
  TORCH_CHECK(h0.is_contiguous() && (!c0 || c0->is_contiguous()), "rnn: hx is not contiguous");
  TORCH_CHECK(!batch_first && dropout == 0, "transposes and dropout are the caller's");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, at::TensorList params, int64_t per_layer,
                                                           const OptionalTensor& buffer, const Tensor& h0,
                                                           const OptionalTensor& c0, int64_t mode, int64_t hidden_size,
                                                           int64_t proj_size, int64_t num_layers, bool batch_first,
                                                           double dropout, bool train, bool bidirectional,
                                                           at::IntArrayRef batch_sizes, const OptionalTensor&) {
  TORCH_CHECK(!refuses, "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED");
  ++forwards;
  demand(h0, c0, batch_first, dropout);
  TORCH_CHECK(buffer, "RNN module weights are not part of single contiguous chunk of memory");
  latest_buffer = buffer->const_data_ptr();
  const Stack s{mode, hidden_size, proj_size, num_layers, bidirectional};
  const at::NoGradGuard no_grad;
  auto [y, h, c] = run(x, params_of(*buffer, params), per_layer, h0, c0, s, batch_sizes);
  const Tensor reserve = at::ones({train ? y.numel() + 3 : 0}, x.options().dtype(at::kByte));
  return {y.contiguous(), h, c.defined() ? c : at::empty({0}, x.options()), reserve, *buffer};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> backward(
    const Tensor& x, at::TensorList params, int64_t per_layer, const Tensor& buffer, const Tensor& h0,
    const OptionalTensor& c0, const Tensor& y, const OptionalTensor& dy, const OptionalTensor& dh, const OptionalTensor& dc,
    int64_t mode, int64_t hidden_size, int64_t proj_size, int64_t num_layers, bool batch_first, double dropout, bool train,
    bool bidirectional, at::IntArrayRef batch_sizes, const OptionalTensor&, const Tensor& reserve,
    std::array<bool, 4> mask) {
  ++backwards;
  demand(h0, c0, batch_first, dropout);
  const bool reserved = reserve.scalar_type() == at::kByte && reserve.numel() == y.numel() + 3;
  TORCH_CHECK(train && reserved, "cudnn RNN backward can only be called in training mode");
  TORCH_CHECK(reserve.eq(1).all().item<bool>(), "a second backward from the same reserve");
  const Stack s{mode, hidden_size, proj_size, num_layers, bidirectional};
  const c10::impl::ForceDispatchKeyGuard with_autograd(c10::default_included_set, c10::default_excluded_set);
  const at::AutoGradMode grad_mode(true);
  const auto leaf = [](const Tensor& t) { return t.detach().clone().requires_grad_(); };
  std::vector<Tensor> inputs{leaf(x), leaf(h0)};
  const OptionalTensor c = c0 ? OptionalTensor(leaf(*c0)) : std::nullopt;
  if (c) inputs.push_back(*c);
  std::vector<Tensor> leaves;
  for (const Tensor& p : params_of(buffer, params)) leaves.push_back(leaf(p));
  const auto results = run(inputs[0], leaves, per_layer, inputs[1], c, s, batch_sizes);
  // Of the same numbers: a forward with gradients and one without round differently.
  TORCH_CHECK(at::allclose(results[0].detach(), y, 1e-5, 1e-6), "output: not that of this forward");
  std::vector<Tensor> outputs, gradients;
  const OptionalTensor given[] = {dy, dh, dc};
  for (int i = 0; i < 3; ++i) {
    if (!given[i] || !results[i].defined()) continue;
    outputs.push_back(results[i]);
    gradients.push_back(*given[i]);
  }
  inputs.insert(inputs.end(), leaves.begin(), leaves.end());
  const auto made = torch::autograd::grad(outputs, inputs, gradients, std::nullopt, false, /*allow_unused=*/true);
  const auto of = [&](size_t i) { return made[i].defined() ? made[i] : at::zeros_like(inputs[i]); };
  std::vector<Tensor> dparams;
  for (size_t i = 0; i < leaves.size() && mask[3]; ++i) dparams.push_back(of(i + (c ? 3 : 2)));
  reserve.zero_();
  return {of(0), of(1), c ? of(2) : Tensor(), dparams};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("_cudnn_rnn", forward);
  m.impl("_cudnn_rnn_backward", backward);
  m.impl("_cudnn_rnn_flatten_weight", flatten_weight);
}

// Calls of forward, of backward, and of what moves weights.
extern "C" __attribute__((visibility("default"))) void torch_host_cudnn_calls(int* counts) {
  counts[0] = forwards, counts[1] = backwards, counts[2] = flattened;
}
// Where the weights of the latest forward lay.
extern "C" __attribute__((visibility("default"))) const void* torch_host_cudnn_buffer() { return latest_buffer; }
// Whether forwards fail from now on, as cuDNN does for what it does not support.
extern "C" __attribute__((visibility("default"))) void torch_host_cudnn_refuses(bool all) { refuses = all; }
