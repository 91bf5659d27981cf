// One recurrent layer on torch tensors: what the CPU and the CUDA op share. Checks, allocation, the parameter structs, and the
// matrix products of the weight and input gradients. Layouts: params.h.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "core/params.h"

namespace fused_rnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// (y, h_n, c_n, gates, cs); c_n, gates and cs are empty where params.h says that there are none.
using LayerOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
// (dx, dh0, dc0, dparams...), empty tensors where the mask says that nobody asked and for states that were not given.
using LayerGradients = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;

// The arguments of a layer in one place; references live as long as the op call.
struct LayerInputs {
  const Tensor& x;
  const OptionalTensor& h0;
  const OptionalTensor& c0;
  at::TensorList params;
  bool has_biases;
  const OptionalTensor& lengths;
  const OptionalTensor& offsets;
  const OptionalTensor& resets;
  CellKind cell;
  bool bidirectional;
  bool one_step = false;  // a cell's: x [B, I], states [B, H]
};

// The checked sizes of a layer's call; letters as in params.h.
struct LayerShapes {
  int64_t T, B, N, I, H, P;
  int D;
  int64_t per_direction;  // parameters of one direction
  bool projection;
};

// A filled ForwardParams with the tensors that own its memory.
struct ForwardCall {
  ForwardParams params;
  Tensor y, h_n, c_n, gates, cs;  // undefined where there is none
  std::vector<Tensor> kept;       // contiguous copies of inputs that were not
};
struct BackwardCall {
  BackwardParams params;
  LayerShapes shapes;
  Tensor d_gates, d_h, d_h0, d_c0;
  std::vector<Tensor> kept;
};

struct BackwardInputs {
  const OptionalTensor& dy;
  const OptionalTensor& dh_n;
  const OptionalTensor& dc_n;
  const OptionalTensor& y;  // none where backward does not read it
  const Tensor& gates;
  const Tensor& cs;
};

// Which gradients a backward call makes.
struct GradientMask {
  bool x, state, weights;
};

// Uninitialised memory like x's; on a CPU without the dispatcher, whose share of a small step would be a tenth.
Tensor empty_like(const Tensor& x, at::IntArrayRef shape);
// Raises for a dtype that no kernel has.
DType dtype_of(const Tensor& x);
// An op's argument `cell`; raises for a number that is no cell's.
CellKind cell_of(int64_t cell);

// Whether backward of `steps` steps reads forward's output y. An RNN's kernels compute the derivative from y. The others
// read y only as the state before a later step: a GRU for its derivative, an LSTM for the gradient of W_hh.
bool backward_reads_output(CellKind cell, int64_t steps, bool weight_gradients);

// Raises unless the offsets of packed rows, on a CPU, are those of N rows in all and at most B in a step: from 0 to N, in
// steps that never grow.
void check_offsets(const Tensor& offsets, int64_t B, int64_t N);

// Both check everything that memory safety depends on, and raise with the name of the argument: device, dtype, layout, shape
// and memory of every tensor, and the values of offsets on a CPU. On CUDA, where reading them would wait for the device,
// offsets are cut to [0, N] instead; lengths are cut by the kernels.
ForwardCall prepare_forward(const LayerInputs& in, bool save);
BackwardCall prepare_backward(const LayerInputs& in, const BackwardInputs& grads, GradientMask mask);

// Gives the call its gates buffer even when nothing is saved: room for the input projection.
void allocate_gates(ForwardCall& call);

// Results of a finished ForwardCall in the op's order.
LayerOutputs forward_outputs(const ForwardCall& call, bool save);

// Columns of rows of d_gates, dg [rows, S * H], that are the gradient of the input product, in weight order: all of them, or a
// GRU's r and z, then n_x (params.h). Each with its first row in w_ih.
using InputColumns = std::vector<std::pair<Tensor, int64_t>>;
InputColumns input_columns(CellKind cell, int64_t H, const Tensor& dg);

// Their product with W_ih of direction d into dx [rows, I]; that of the second direction is added.
void input_gradient(const LayerInputs& in, const InputColumns& all, const Tensor& dx, int64_t d);

// dW and dx from call.d_gates by matrix products; dh0 and dc0 are taken from the call.
LayerGradients gradients_of_layer(const LayerInputs& in, const BackwardInputs& grads, const BackwardCall& call,
                                  GradientMask mask);

}  // namespace fused_rnn
