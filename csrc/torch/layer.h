// One recurrent layer on torch tensors: what the CPU and the CUDA op share. Allocation, the parameter structs, results.
// Layouts: core/params.h.
#pragma once
#include <tuple>

#include "core/previous.h"
#include "torch/call.h"

namespace fused_rnn {

// (y, last states, saved); saved: what backward needs beside y, the tensors of `Saved` that the cell has, or none. With
// recipe.all_states the last states are followed by c after every step [D, N, H], of a cell that has one, and it is not
// among those saved.
using LayerOutputs = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>;
// (dx, dstates, dparams): empty tensors where the mask says that nobody asked; dstates of the states that were given, then
// of the reset states.
using LayerGradients = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>;

// A filled ForwardParams with the tensors that own its memory.
struct ForwardCall {
  ForwardParams params;
  Tensor y, h_n, c_n, gates, cs;  // undefined where there is none
  Tensor columns;                 // that p.columns points into
  bool gives_cs;                  // as a result
  bool saves_gates;
  Copies copies;

  // The last states, then what recipe.all_states adds.
  States last() const {
    States all = c_n.defined() ? States{h_n, c_n} : States{h_n};
    if (gives_cs) all.push_back(cs);
    return all;
  }
};
struct BackwardCall {
  BackwardParams params;
  LayerShapes shapes;
  Tensor d_gates, d_h, d_h0, d_c0, d_reset_h, d_reset_c;
  Copies copies;
};

// What forward leaves for backward, by name. A list of them has gates (saves_gates) and cs where the cell has it
// (core/params.h), then y where backward reads it.
struct Saved {
  Tensor gates, cs;  // undefined where there is none
  OptionalTensor y;
};
Saved saved_of(CellKind cell, const Rows& rows, at::TensorList list);
// Of every cell that keeps slots, and of a modified step.
bool saves_gates(CellKind cell, bool has_options);
// How many tensors of that list come before y.
size_t saved_count(CellKind cell, bool has_options);

// Gradients of a layer's results, and what forward saved. of_last: none, or of each state, then what recipe.all_states adds.
struct ResultGradients {
  OptionalTensor dy;
  std::vector<OptionalTensor> of_last;
  Saved saved;

  OptionalTensor dh_n() const { return of_last.empty() ? std::nullopt : of_last[0]; }
  OptionalTensor dc_n() const { return of_last.size() < 2 ? std::nullopt : of_last[1]; }
  OptionalTensor d_cs() const { return of_last.size() < 3 ? std::nullopt : of_last[2]; }
};
// How many tensors `last` has beside y.
inline size_t last_count(const Recipe& recipe) {
  return state_count(recipe.cell) + (recipe.all_states && traits_of(recipe.cell).has_c);
}
// Of a schema's list: empty, or of each of them, where a tensor of shape [0] stands for none.
std::vector<OptionalTensor> gradients_of_last(const Recipe& recipe, at::TensorList list);

// Which gradients a backward call makes.
struct GradientMask {
  bool x, states, weights;
};

// Whether backward of `steps` steps reads forward's output y. An RNN's kernels compute the derivative from y. The others
// read y only as the state before a later step: a GRU for its derivative, an LSTM for the gradient of W_hh.
bool backward_reads_output(CellKind cell, int64_t steps, bool weight_gradients);

// Both check the call (check_layer) and what comes with it.
ForwardCall prepare_forward(const Call& call, bool save);
BackwardCall prepare_backward(const Call& call, const ResultGradients& given, GradientMask mask);

// Gives the call its gates buffer even when nothing is saved: room for the input projection.
void allocate_gates(ForwardCall& call);

// Results of a finished ForwardCall in the op's order.
LayerOutputs forward_outputs(const ForwardCall& call, bool save);

// Columns of rows of d_gates, dg [rows, S * H], that are the gradient of the input product, in weight order; gates whose
// columns follow each other are together: all of them, or a GRU's r and z, then n_x. Each with its first row in w_ih.
using InputColumns = std::vector<std::pair<Tensor, int64_t>>;
InputColumns input_columns(CellKind cell, int64_t H, const Tensor& dg);

// Their product with W_ih of direction d into dx [rows, I]; that of the second direction is added.
void input_gradient(const Call& call, const InputColumns& all, const Tensor& dx, int64_t d);

// The gradients of W_ih and b_ih from rows of one direction: x [rows, I], dg [rows, S * H]; or that added to them. db_ih may
// be undefined. x may be ids [rows], without `add`.
void input_weight_gradients(CellKind cell, const Tensor& x, const Tensor& dg, const Tensor& dw_ih, const Tensor& db_ih,
                            bool add);

// dW and dx from made.d_gates by matrix products; those of the states are taken from `made`. With samples the gradients of
// weights are those of each sample [samples, ...]: row b of a step belongs to sample b % samples.
LayerGradients gradients_of_layer(const Call& call, const ResultGradients& given, const BackwardCall& made,
                                  GradientMask mask, int64_t samples = 0);
// Of reset states, appended to `gradients`. The gradient of h has a part that passes through the recurrent weights.
void reset_state_gradients(const Call& call, const BackwardCall& made, bool wanted, std::vector<Tensor>& gradients);
// d_gates [D, N, S, H], and the gradients of the states.
std::tuple<Tensor, std::vector<Tensor>> gates_of_layer(const Call& call, const BackwardCall& made);
// The gradients of one direction's parameters for each sample, appended. x [N, I], zeros at padding; dg [N, S * H]
void sample_weight_gradients(const Call& call, const ResultGradients& given, const BackwardCall& made, const Tensor& x,
                             const Tensor& dg, int d, int64_t samples, std::vector<Tensor>& gradients);

// Parts of it, for every scan. States, and outputs of all directions [N, D * P], as forward left them; h0: call.states[0].
// [N, 1] bool, true at rows that take part; only for dense batches with lengths.
Tensor active_rows(const Call& call, const LayerShapes& s);
// Whether lengths leave any row without a part; true where they lie on a GPU, which is not asked.
bool has_padding(const Call& call, const LayerShapes& s);
// Of every row the h that its step multiplies with W_hh [N, P]; y [N, P]: outputs of direction d.
Tensor previous_states(const Call& call, const LayerShapes& s, const Tensor& y, int d);
// The h of an LSTM's direction before its projection, o tanh(c): [N, H].
Tensor unprojected(const Saved& saved, int64_t d);
// Outputs of direction d [N, P].
Tensor output_of_direction(const Tensor& y, const LayerShapes& s, int d);

// Which rows of [N, .] the matrix products of backward read: all, or those that take part, where many are padding.
class RowChoice {
 public:
  RowChoice() = default;  // all rows
  RowChoice(const Call& call, const LayerShapes& s);
  bool all() const { return !indices_.defined(); }
  int64_t count(const LayerShapes& s) const { return all() ? s.N : indices_.size(0); }
  // The chosen rows of t, whose dimension `dim` is N; copied unless they are all.
  Tensor of(const Tensor& t, int64_t dim = 0) const;
  // [N, .] from the chosen rows; the others are zeros.
  Tensor spread(const Tensor& rows, const LayerShapes& s) const;

 private:
  // Copies gain on a CPU where a quarter of the rows or more is padding: with half of it (uniform lengths, 128x64x128x128)
  // forward and backward of an LSTM take 0.69 of the time of a full batch, and 0.80 without copies.
  static constexpr int64_t kOf = 4, kMost = 3;

  Tensor indices_;  // or undefined: all rows
};

// d_rg^T h_prev [G*H, P] of direction d. d_rg [chosen rows, G*H] is a strided view.
Tensor recurrent_weight_gradient(const Call& call, const LayerShapes& s, const RowChoice& rows, const Tensor& d_rg,
                                 const OptionalTensor& y, int d);

#ifdef FUSED_RNN_WITH_CUDA
// cuda::previous_rows on the current stream (ops_cuda.cpp).
void previous_rows_on_device(const PreviousParams& params);
#endif

// Pointers for kernels.
Sequence sequence_of(const Call& call, const LayerShapes& s, Copies& copies);
Modifier modifier_of(const Call& call, Copies& copies);
// t: a layer's reset state.
ResetState reset_state_of(const Tensor& t, Copies& copies);

// Rows of a layer, and whose they are.
struct RowPlaces {
  Tensor rows, t, b;  // [n] int64

  RowPlaces(const Call& call, const LayerShapes& s, const Tensor& of);
  static RowPlaces of_resets(const Call& call, const LayerShapes& s);  // where resets put a state
};
// Adds the gradients [n, size] of what the resets of direction d put into a state to `sums`, which is like the reset state
// but contiguous, and wider where that has 16 bits. On a CPU.
void add_reset_gradients(const RowPlaces& resets, const Tensor& gradients, int64_t d, const Tensor& sums);
#ifdef FUSED_RNN_WITH_CUDA
// The same on a GPU, without the host's knowledge of where resets are. gradients [N, size]: of every row, of which those at
// resets count, and others may be NaN. Sums are in the order of the rows.
void add_reset_gradients_on_device(const Call& call, const LayerShapes& s, const Tensor& gradients, int64_t d,
                                   const Tensor& sums);
#endif

}  // namespace fused_rnn
