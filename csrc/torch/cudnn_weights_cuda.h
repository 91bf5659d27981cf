// The weights of a stack as cuDNN wants them: one buffer.
#pragma once
#include "torch/call.h"

namespace fused_rnn {

// cuDNN's numbers of a stack, in the order in which torch's ops take them.
struct CudnnStack {
  int64_t mode, input_size, hidden_size, proj_size, num_layers;
  bool bidirectional;
  int64_t per_layer;  // parameters of one direction of one layer

  explicit CudnnStack(const Call& stack);
};

// The buffer of a stack's parameters: their own memory where it is such a buffer already, as torch.nn's modules make it,
// else a copy by one cat. A copy is not kept for the next call: writes through Tensor.data, as of target networks, change no
// version, and a captured graph has to read the weights of its replay.
Tensor cudnn_weights(const CudnnStack& numbers, at::TensorList params);

}  // namespace fused_rnn
