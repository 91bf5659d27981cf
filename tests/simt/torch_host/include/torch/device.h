// In place of csrc/torch/device.h: the ops for CUDA tensors serve CPU tensors, with the simulator as the device.
#pragma once
#include <ATen/Context.h>

#define FUSED_RNN_DEVICE_KEY CPU

namespace fused_rnn {

inline bool is_on_device(const at::Tensor& t) { return t.is_cpu(); }
inline bool has_cudnn() { return at::globalContext().userEnabledCuDNN(); }  // cudnn.cpp stands in for it

}  // namespace fused_rnn
