// C++ signatures of the ops' schemas (ops.cpp), for typed dispatch and for their registration in other files.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>

#include "torch/layer.h"

namespace fused_rnn {

using LayerSignature = LayerOutputs(const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                    at::TensorList params, bool has_biases, const OptionalTensor& lengths,
                                    const OptionalTensor& offsets, const OptionalTensor& resets, int64_t cell,
                                    bool bidirectional, bool save);

using LayerBackwardSignature = LayerGradients(const OptionalTensor& dy, const OptionalTensor& dh_n,
                                              const OptionalTensor& dc_n, const Tensor& x, const OptionalTensor& h0,
                                              const OptionalTensor& c0, at::TensorList params, bool has_biases,
                                              const OptionalTensor& lengths, const OptionalTensor& offsets,
                                              const OptionalTensor& resets, const OptionalTensor& y, const Tensor& gates,
                                              const Tensor& cs, int64_t cell, bool bidirectional, std::array<bool, 3> mask);

using RnnSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor& input, const OptionalTensor& h0,
                                                        const OptionalTensor& c0, at::TensorList weights,
                                                        const OptionalTensor& lengths, const OptionalTensor& offsets,
                                                        const OptionalTensor& resets, int64_t cell, int64_t num_layers,
                                                        bool has_biases, bool bidirectional, double dropout, bool training,
                                                        bool batch_first);

using CellSignature = std::tuple<Tensor, Tensor>(const Tensor& input, const OptionalTensor& h, const OptionalTensor& c,
                                                 at::TensorList params, bool has_biases, int64_t cell);

// The ops of one layer, through the dispatcher.
using LayerOp = c10::TypedOperatorHandle<LayerSignature>;
using LayerBackwardOp = c10::TypedOperatorHandle<LayerBackwardSignature>;
const LayerOp& layer_op();
const LayerBackwardOp& layer_backward_op();

// Whether a call on these tensors concerns the CPU kernels, and autograd, alone: autocast, dispatch modes, tracing, subclasses and
// the profiler have no part in it, so that it need not go through the dispatcher.
bool runs_plainly_on_cpu(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights);
// fused_rnn::rnn and fused_rnn::cell for such calls; c_n and c are undefined where the ops return an empty tensor.
RnnSignature rnn_on_cpu;
CellSignature cell_on_cpu;

// The part of states [layers * directions, B, H], and of the weights, that belongs to one layer.
OptionalTensor states_of_layer(const OptionalTensor& states, int64_t layer, int64_t directions, int64_t layers);
at::TensorList params_of_layer(at::TensorList weights, int64_t layer, int64_t layers);

// The final states of all layers.
Tensor joined(const std::vector<Tensor>& states);

// Whether neither tracing nor functorch nor a mode has a part in calls.
bool nothing_intercepts();
// No subclass, no view that is to be resolved.
bool is_plain(const Tensor& t);

#ifdef FUSED_RNN_WITH_CUDA
// fused_rnn::rnn as a wavefront of chunks (plan_overlap.h), or none where the layers are to be called in turn. host_offsets: the
// offsets where they were given on the host.
std::optional<std::tuple<Tensor, Tensor, Tensor>> overlapped_rnn(
    const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
    const OptionalTensor& lengths, const OptionalTensor& offsets, const OptionalTensor& host_offsets,
    const OptionalTensor& resets, int64_t cell, int64_t num_layers, bool has_biases, bool bidirectional, double dropout,
    bool training, bool batch_first);

// Integers of the host on input's device, without a copy that the host would have to wait for or that a capture would refuse.
Tensor on_cuda(const Tensor& integers, const Tensor& input);
#endif

}  // namespace fused_rnn
