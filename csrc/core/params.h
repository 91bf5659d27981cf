// The arguments of one recurrent layer, forward and backward, as plain data: the same structs go to the CPU kernels and to
// every CUDA family. This is the one place where memory layouts are documented. No torch, no CUDA include.
//
//   T time steps, B batch rows, N rows in memory, I input size, H hidden size, P output size (H, or proj_size for an LSTM),
//   D directions, G gate blocks of the weights (RNN 1, GRU 3, LSTM 4), S slots of the gate buffers (RNN 1, GRU 4, LSTM 4).
//
// Gate order of the weights: LSTM i f g o, GRU r z n (torch.nn's).
// Slot order of `gates`:     LSTM i f g o, GRU r z n hn, where hn = W_hn h + b_hn. Before the recurrence the first G slots
//                            hold the input projection x W_ih^T + b_ih.
// Slot order of `d_gates`:   LSTM i f g o, GRU n_x r z n_h: gradients of pre-activations. The last G slots are always the
//                            gradient of the recurrent product, in weight order. The first S - G are the gradients of the
//                            input parts of gates whose recurrent part has an accumulator of its own (GRU's n), in weight
//                            order. So the gradient of the input product is slots (1, 2, 0) for a GRU, all slots otherwise
//                            (input_gradient_slot in cells.h).
#pragma once
#include "core/active.h"
#include "core/modifier.h"

namespace fused_rnn {

// Every cell, once. The enum, its counts, the dispatch, the CPU's tables and CUDA's instantiations are made of this list;
// the formulas are in cells.h, and fused_rnn/_kinds.py is its twin in Python (tests/test_kinds.py compares them).
//   X(kind, name, gates, slots, saved, has_c, reads_h, may_project)
//   gates        blocks of the weights
//   slots        accumulators of a unit
//   saved        slots kept for backward; 0: y alone suffices
//   has_c        a second state c
//   reads_h      the step reads h outside the recurrent product: backward hands a part of the gradient of h past the product
//   may_project  a product with W_hr may follow the step (proj_size)
#define FUSED_RNN_CELLS(X)                                      \
  X(kRnnTanh, "rnn_tanh", 1, 1, 0, false, false, false)         \
  X(kRnnRelu, "rnn_relu", 1, 1, 0, false, false, false)         \
  X(kRnnIdentity, "rnn_identity", 1, 1, 0, false, false, false) \
  X(kLstm, "lstm", 4, 4, 4, true, false, true)                  \
  X(kGru, "gru", 3, 4, 4, false, true, false)

enum class CellKind : int {
#define FUSED_RNN_CELL(kind, ...) kind,
  FUSED_RNN_CELLS(FUSED_RNN_CELL)
#undef FUSED_RNN_CELL
};

// What the list says of one cell.
struct CellTraits {
  const char* name;
  int gates, slots, saved;
  bool has_c, reads_h, may_project;
};

constexpr FUSED_RNN_HD CellTraits traits_of(CellKind cell) {
  switch (cell) {
#define FUSED_RNN_CELL(kind, ...) \
  case CellKind::kind: return {__VA_ARGS__};
    FUSED_RNN_CELLS(FUSED_RNN_CELL)
#undef FUSED_RNN_CELL
  }
  return {};
}

#define FUSED_RNN_CELL(...) +1
constexpr int kCellCount = 0 FUSED_RNN_CELLS(FUSED_RNN_CELL);
#undef FUSED_RNN_CELL

enum class DType : int { kFloat64 = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3 };
constexpr const char* kDTypeNames[] = {"float64", "float32", "float16", "bfloat16"};  // torch's

constexpr FUSED_RNN_HD int gate_count(CellKind cell) { return traits_of(cell).gates; }
constexpr FUSED_RNN_HD int slot_count(CellKind cell) { return traits_of(cell).slots; }
constexpr FUSED_RNN_HD int state_count(CellKind cell) { return traits_of(cell).has_c ? 2 : 1; }
constexpr int64_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 8;
    case DType::kFloat32: return 4;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
  }
  return 0;
}

// A matrix of weights, row by row. What else a kernel must know to read it (scales of integers) belongs here.
struct WeightMatrix {
  const void* data;  // or null
  DType storage;     // of its elements: the layer's dtype today
};

// The parameters of one direction. Everything contiguous.
struct Weights {
  WeightMatrix w_ih;  // [G, H, I]
  WeightMatrix w_hh;  // [G, H, P]
  const void* b_ih;   // [G, H] or null
  const void* b_hh;   // [G, H] or null
  WeightMatrix w_hr;  // [P, H] or null (no projection, P == H)
};

// A layer's forward whose tangents another forward computes: what it read and what it left, as in BackwardParams.
struct Primal {
  const void *h0, *c0, *y, *gates, *cs;
  Modifier modifier;
  // Terms that are added to the tangents, beside those of x and h through the layer's own weights.
  const void* source;    // [D, N, S, H] of the accumulators, or null
  const void* source_y;  // [D, N, P] of the projected output, or null
};

// One layer forward. Direction 0 scans t = 0 .. T-1, direction 1 scans t = T-1 .. 0; a row of a ragged batch keeps its
// initial state until its first active step in scan order. Arithmetic is fp32 for 16-bit dtypes (fp64 for fp64), converted
// at loads and stores; the running c is kept in that arithmetic type between steps.
struct ForwardParams {
  CellKind cell;
  DType dtype;
  bool allow_tf32;  // CUDA fp32 only: tensor cores in TF32 instead of strict fp32
  int64_t I, H, P;
  int D;
  Sequence seq;
  Modifier modifier;
  const void* x;   // [N, I]; null where columns are there, and then I is 0
  const void* h0;  // [D, B, P] or null (zeros)
  const void* c0;  // [D, B, H] or null (zeros), in float where wide_c; of cells that have c
  Weights weights[2];
  void* y;      // [N, D * P]; inactive rows of a dense batch are written with 0
  void* h_n;    // [D, B, P]: state after each row's last active step (its initial state if it has none)
  void* c_n;    // [D, B, H], in float where wide_c; of cells that have c
  void* gates;  // [D, N, S, H]: activated gates for backward, 0 at inactive rows when training. CUDA: holds the projection
                // on entry, unless the family makes it itself (reads_x). CPU: null unless training.
  void* cs;     // [D, N, H]: c after each step, in dtype, 0 at inactive rows; of cells that have c; null unless training,
                // or on a CPU where every c is asked for
  // Of ids in place of one-hot rows (CPU): [D, N, G, H], columns_stride elements from row to row: the columns of W_ih that
  // are the input product, without biases. Null where x is there. It may be the memory of gates, whose rows are read first.
  const void* columns;
  int64_t columns_stride;
  bool wide_c;      // 16-bit dtypes: c0 and c_n are float, so that c is not rounded between calls
  bool training;    // gates (of cells that save slots, and of modified steps) and cs (of cells that have c) are written
  void* workspace;  // CUDA: Plan::workspace_bytes, 256-byte aligned; CPU: set by the call
  // If set, the call computes tangents: x, h0, c0 and the modifier's states hold tangents of this forward's arguments, the
  // results are tangents of its results, and training is true. float32 and float64 only.
  const Primal* primal;
};

// The recurrent part of one layer's backward: from gradients of the outputs to gradients of the pre-activations and of the
// initial state. Weight and input gradients are matrix products of d_gates made by the caller.
struct BackwardParams {
  CellKind cell;
  DType dtype;
  bool allow_tf32;
  int64_t H, P;
  int D;
  Sequence seq;
  Modifier modifier;
  const void* h0;  // as in forward
  const void* c0;  // as in forward
  Weights weights[2];
  const void* y;      // [N, D * P]: forward's output
  const void* gates;  // [D, N, S, H]: forward's, activated; null where forward wrote none
  const void* cs;     // [D, N, H]; of cells that have c
  const void* dy;     // [N, D * P] or null (zeros)
  const void* dh_n;   // [D, B, P] or null (zeros)
  const void* dc_n;   // [D, B, H] or null (zeros); of cells that have c
  const void* d_cs;   // [D, N, H] or null (zeros): gradient of c after each step beside what passes through the steps; of
                      // cells that have c
  void* d_gates;      // [D, N, S, H] out; 0 at inactive rows
  // [D, N, P] out: total gradient of every h, 0 at inactive rows. Null without a projection, or (on a CPU) where nobody asks
  // for it and nothing but resets modifies steps.
  void* d_h;
  void* d_h0;  // [D, B, P] out, or null where nobody asks for it
  void* d_c0;  // [D, B, H] out; of cells that have c
  // Out at rows that are reset: the gradients of the state that their step begins from, of h less what passes through W_hh.
  // Null where nobody asks.
  void* d_reset_h;  // [D, N, P]; of cells that read h outside of the product
  void* d_reset_c;  // [D, N, H]; of cells that have c
  void* workspace;  // as in forward
};

// Backward on dual numbers: `tangent` has the tangents of all that `value` has, gradients and weights included; its w_hh and
// w_hr may be null (zeros). float32 and float64 only; of modifiers, resets only.
// Writes the values' d_gates (and d_h with a projection) and every output of the tangents that is not null. Without a
// projection, a value.d_h that is given is read, and its product is skipped.
struct DualBackwardParams {
  BackwardParams value, tangent;
  DType dtype;
  void* workspace;  // as in forward
};

}  // namespace fused_rnn
