#include "torch/cudnn_weights_cuda.h"

#include <ATen/ops/_cudnn_rnn_flatten_weight.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <tuple>

#include "core/recent.h"
#include "plan/cudnn.h"

namespace fused_rnn {
namespace {

// Where cuDNN wants each parameter, in elements of the buffer. torch's own op tells: it moves tensors into such a buffer.
// Which it moves here are made up, since it would move the user's parameters too.
struct Layout {
  int64_t size;
  std::vector<int64_t> offsets;
};

Layout ask_layout(const CudnnStack& n, at::TensorList params) {
  std::vector<Tensor> moved;
  for (const Tensor& p : params) moved.push_back(at::empty(p.sizes(), p.options()));
  const Tensor buffer = at::_cudnn_rnn_flatten_weight(moved, n.per_layer, n.input_size, n.mode, n.hidden_size, n.proj_size,
                                                      n.num_layers, /*batch_first=*/false, n.bidirectional);
  Layout layout{buffer.numel(), {}};
  for (const Tensor& t : moved) layout.offsets.push_back(t.storage_offset());
  return layout;
}

// The latest layouts of the calling thread are kept.
const Layout& layout_of(const CudnnStack& n, at::TensorList params) {
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, bool, int64_t, at::ScalarType, c10::DeviceIndex>;
  static thread_local Recent<Key, Layout, 16> recent;
  const Key key{n.mode,
                n.input_size,
                n.hidden_size,
                n.proj_size,
                n.num_layers,
                n.bidirectional,
                n.per_layer,
                params[0].scalar_type(),
                params[0].device().index()};
  return recent.get(key, [&] { return ask_layout(n, params); });
}

// The parameters' memory as the buffer, if it is one. Not without biases, whose places in the buffer have to be zeros.
OptionalTensor own_buffer(const CudnnStack& numbers, const Layout& layout, at::TensorList params) {
  constexpr uintptr_t kAlignment = 256;  // of torch's allocator
  if (numbers.per_layer < 4) return std::nullopt;
  const int64_t begin = params[0].storage_offset() - layout.offsets[0];
  for (size_t i = 0; i < params.size(); ++i) {
    if (!params[i].is_alias_of(params[0]) || !params[i].is_contiguous() ||
        params[i].storage_offset() - layout.offsets[i] != begin) {
      return std::nullopt;
    }
  }
  const auto elements = static_cast<int64_t>(params[0].storage().nbytes() / params[0].element_size());
  const auto address = reinterpret_cast<uintptr_t>(params[0].storage().data()) + begin * params[0].element_size();
  if (begin < 0 || begin + layout.size > elements || address % kAlignment) return std::nullopt;
  return params[0].detach().as_strided({layout.size}, {1}, begin);
}

}  // namespace

CudnnStack::CudnnStack(const Call& stack) {
  const at::TensorList first = params_of_layer(stack, 0);
  const Tensor &w_ih = first[0], &w_hh = first[1];
  mode = cudnn_mode(stack.recipe.cell);
  TORCH_INTERNAL_ASSERT(mode >= 0, "cuDNN has no such cell");
  input_size = w_ih.size(1);
  hidden_size = w_hh.size(0) / gate_count(stack.recipe.cell);
  proj_size = w_hh.size(1) == hidden_size ? 0 : w_hh.size(1);
  num_layers = stack.recipe.num_layers;
  bidirectional = stack.recipe.bidirectional;
  per_layer = static_cast<int64_t>(first.size()) / stack.recipe.directions();
}

Tensor cudnn_weights(const CudnnStack& numbers, at::TensorList params) {
  const Layout& layout = layout_of(numbers, params);
  if (OptionalTensor own = own_buffer(numbers, layout, params)) return *own;
  std::vector<size_t> order(params.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return layout.offsets[a] < layout.offsets[b]; });
  std::vector<Tensor> pieces;
  int64_t end = 0;
  const auto fill_up = [&](int64_t next) {  // biases that the stack lacks, and cuDNN's alignment
    if (next > end) pieces.push_back(at::zeros({next - end}, params[0].options().requires_grad(false)));
    end = next;
  };
  for (size_t i : order) {
    fill_up(layout.offsets[i]);
    pieces.push_back(params[i].detach().reshape({-1}));
    end += params[i].numel();
  }
  fill_up(layout.size);
  return at::cat(pieces);
}

}  // namespace fused_rnn
