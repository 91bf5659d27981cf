// Under autocast a stack or a cell runs in the autocast dtype: all floating-point tensors are cast once, weights through
// autocast's cache, as for torch's matrix products.
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
