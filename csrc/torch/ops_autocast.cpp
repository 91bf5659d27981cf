// Under autocast a stack or a cell runs in the autocast dtype: all floating-point tensors are cast once, weights through
// autocast's cache, as for torch's matrix products.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "torch/ops.h"

namespace fused_rnn {
namespace {

template <c10::DeviceType kDevice>
struct Autocast {
  static constexpr c10::DispatchKey kKey =
      kDevice == c10::DeviceType::CPU ? c10::DispatchKey::AutocastCPU : c10::DispatchKey::AutocastCUDA;

  static std::vector<Tensor> cast(at::TensorList tensors) {
    const auto dtype = at::autocast::get_autocast_dtype(kDevice);
    std::vector<Tensor> result;
    result.reserve(tensors.size());
    for (const Tensor& t : tensors) result.push_back(at::autocast::cached_cast(dtype, t, kDevice));
    return result;
  }
  static OptionalTensor cast(const OptionalTensor& t) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), t, kDevice);
  }

  static std::tuple<Tensor, Tensor, Tensor> rnn(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                                                at::TensorList weights, const OptionalTensor& lengths,
                                                const OptionalTensor& offsets, const OptionalTensor& resets, int64_t cell,
                                                int64_t num_layers, bool has_biases, bool bidirectional, double dropout,
                                                bool training, bool batch_first) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_rnn::rnn", "").typed<RnnSignature>();
    return op.call(*cast(OptionalTensor(input)), cast(h0), cast(c0), cast(weights), lengths, offsets, resets, cell,
                   num_layers, has_biases, bidirectional, dropout, training, batch_first);
  }

  static std::tuple<Tensor, Tensor> cell(const Tensor& input, const OptionalTensor& h, const OptionalTensor& c,
                                         at::TensorList params, bool has_biases, int64_t cell) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_rnn::cell", "").typed<CellSignature>();
    return op.call(*cast(OptionalTensor(input)), cast(h), cast(c), cast(params), has_biases, cell);
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
