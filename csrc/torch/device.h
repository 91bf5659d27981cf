// What makes the ops for CUDA tensors theirs. tests/simt/torch_host has another file of this name: there they serve CPU
// tensors, with the simulator as the device.
#pragma once
#include <ATen/Context.h>

#define FUSED_RNN_DEVICE_KEY CUDA

namespace fused_rnn {

inline bool is_on_device(const at::Tensor& t) { return t.is_cuda(); }
inline bool has_cudnn() { return at::globalContext().hasCuDNN() && at::globalContext().userEnabledCuDNN(); }

}  // namespace fused_rnn
