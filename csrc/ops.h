// C++ signatures of the ops' schemas (ops.cpp), for typed dispatch and for their registration in other files.
#pragma once
#include <array>

#include "layer.h"

namespace fused_rnn {

using LayerSignature = LayerOutputs(const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                    at::TensorList params, bool has_biases, const OptionalTensor& lengths,
                                    const OptionalTensor& offsets, const OptionalTensor& resets, int64_t cell,
                                    bool bidirectional, bool save);

using LayerBackwardSignature = LayerGradients(const OptionalTensor& dy, const OptionalTensor& dh_n,
                                              const OptionalTensor& dc_n, const Tensor& x, const OptionalTensor& h0,
                                              const OptionalTensor& c0, at::TensorList params, bool has_biases,
                                              const OptionalTensor& lengths, const OptionalTensor& offsets,
                                              const OptionalTensor& resets, const Tensor& y, const Tensor& gates,
                                              const Tensor& cs, int64_t cell, bool bidirectional, std::array<bool, 3> mask);

using RnnSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor& input, const OptionalTensor& h0,
                                                        const OptionalTensor& c0, at::TensorList weights,
                                                        const OptionalTensor& lengths, const OptionalTensor& offsets,
                                                        const OptionalTensor& resets, int64_t cell, int64_t num_layers,
                                                        bool has_biases, bool bidirectional, double dropout, bool training,
                                                        bool batch_first);

using CellSignature = std::tuple<Tensor, Tensor>(const Tensor& input, const OptionalTensor& h, const OptionalTensor& c,
                                                 at::TensorList params, bool has_biases, int64_t cell);

// Whether a call on these tensors concerns the CPU kernels, and autograd, alone: autocast, dispatch modes, tracing, subclasses and
// the profiler have no part in it, so that it need not go through the dispatcher.
bool runs_plainly_on_cpu(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights);
// fused_rnn::rnn and fused_rnn::cell for such calls; c_n and c are undefined where the ops return an empty tensor.
RnnSignature rnn_on_cpu;
CellSignature cell_on_cpu;

// The part of states [layers * directions, B, H], and of the weights, that belongs to one layer.
OptionalTensor states_of_layer(const OptionalTensor& states, int64_t layer, int64_t directions, int64_t layers);
at::TensorList params_of_layer(at::TensorList weights, int64_t layer, int64_t layers);

#ifdef FUSED_RNN_WITH_CUDA
// The arguments of a stack; x: [T, B, I] or packed [N, I]; dropout: whether there is any between the layers.
struct StackCall {
  const Tensor& x;
  const OptionalTensor& h0;
  const OptionalTensor& c0;
  at::TensorList weights;
  bool has_biases;
  const OptionalTensor& lengths;
  const OptionalTensor& offsets;
  const OptionalTensor& resets;
  CellKind cell;
  bool bidirectional, dropout;
};

// The results of all layers, on CUDA tensors, as a wavefront of chunks (plan_overlap.h); none where the layers are to be called
// in turn. saves: of each layer, whether it keeps what its backward needs. Not differentiable.
std::optional<std::vector<LayerOutputs>> overlapped_layers(const StackCall& stack, const std::vector<bool>& saves);
#endif

}  // namespace fused_rnn
