// Under autocast a stack or a cell runs in the autocast dtype: all floating-point tensors are cast once, weights through
// autocast's cache, as for torch's matrix products.
//
// torch.func.vmap comes before autocast and calls the composites as they are: what they consist of has rules
// (fused_rnn/_transforms.py), which know nothing of autocast. So the cast happens here, of the vmapped tensors.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "torch/ops.h"

namespace fused_rnn {
namespace {

template <c10::DeviceType kDevice>
struct Autocast {
  static constexpr c10::DispatchKey kKey =
      kDevice == c10::DeviceType::CPU ? c10::DispatchKey::AutocastCPU : c10::DispatchKey::AutocastCUDA;

  static Tensor cast(const Tensor& t) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), t, kDevice);
  }
  static std::vector<Tensor> cast(at::TensorList tensors) {
    std::vector<Tensor> result;
    result.reserve(tensors.size());
    for (const Tensor& t : tensors) result.push_back(cast(t));
    return result;
  }

  static std::tuple<Tensor, std::vector<Tensor>> rnn(const Tensor& input, at::TensorList states, at::TensorList weights,
                                                     at::TensorList rows, int64_t recipe, double dropout) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
    static const auto op = find_op<RnnSignature>("fused_rnn::rnn");
    constexpr int64_t kFloating = kHasResetStates | kHasProduct | kHasCandidate;  // numbers are double, and stay so
    if (recipe & kFloating) return op.call(cast(input), cast(states), cast(weights), cast(rows), recipe, dropout);
    return op.call(cast(input), cast(states), cast(weights), rows, recipe, dropout);
  }

  static std::vector<Tensor> cell(const Tensor& input, at::TensorList states, at::TensorList params, int64_t recipe) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
    static const auto op = find_op<CellSignature>("fused_rnn::cell");
    return op.call(cast(input), cast(states), cast(params), recipe);
  }
};

// Whether autocast is on for input's device; not inside of the functions above.
template <c10::DeviceType kDevice>
bool casts(const Tensor& input) {
  return input.device().type() == kDevice && at::autocast::is_autocast_enabled(kDevice);
}

std::tuple<Tensor, std::vector<Tensor>> rnn_vmap(const Tensor& input, at::TensorList states, at::TensorList weights,
                                                 at::TensorList rows, int64_t recipe, double dropout) {
  if (casts<c10::DeviceType::CPU>(input)) {
    return Autocast<c10::DeviceType::CPU>::rnn(input, states, weights, rows, recipe, dropout);
  }
  if (casts<c10::DeviceType::CUDA>(input)) {
    return Autocast<c10::DeviceType::CUDA>::rnn(input, states, weights, rows, recipe, dropout);
  }
  return rnn_op(input, states, weights, rows, recipe, dropout);
}

std::vector<Tensor> cell_vmap(const Tensor& input, at::TensorList states, at::TensorList params, int64_t recipe) {
  if (casts<c10::DeviceType::CPU>(input)) return Autocast<c10::DeviceType::CPU>::cell(input, states, params, recipe);
  if (casts<c10::DeviceType::CUDA>(input)) return Autocast<c10::DeviceType::CUDA>::cell(input, states, params, recipe);
  return cell_op(input, states, params, recipe);
}

}  // namespace
}  // namespace fused_rnn

TORCH_LIBRARY_IMPL(fused_rnn, AutocastCPU, m) {
  m.impl("rnn", fused_rnn::Autocast<c10::DeviceType::CPU>::rnn);
  m.impl("cell", fused_rnn::Autocast<c10::DeviceType::CPU>::cell);
}

TORCH_LIBRARY_IMPL(fused_rnn, AutocastCUDA, m) {
  m.impl("rnn", fused_rnn::Autocast<c10::DeviceType::CUDA>::rnn);
  m.impl("cell", fused_rnn::Autocast<c10::DeviceType::CUDA>::cell);
}

TORCH_LIBRARY_IMPL(fused_rnn, FuncTorchBatched, m) {
  m.impl("rnn", fused_rnn::rnn_vmap);
  m.impl("cell", fused_rnn::cell_vmap);
}
