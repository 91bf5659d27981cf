// What a compiled formula (fused_rnn/formula) gives the scan of csrc/cpu/formula: facts of the cell, and its step on vectors
// of units, forward and backward. A formula is compiled by itself, for one instruction set and one dtype, into a library
// with one symbol, fused_rnn_formula, of type FormulaLibrary.
#pragma once
#include <cstdint>

#include "core/formula.h"

namespace fused_rnn::cpu {

using fused_rnn::FormulaPhase, fused_rnn::FormulaTraits;
using fused_rnn::kFormulaNormEpsilon, fused_rnn::kMostFormulaPhases, fused_rnn::kMostFormulaStates;

// Letters: core/formula.h.
// Arrays of A hold whole vectors, and one more than the units need: a load of a full vector may start at any unit. Arrays in
// storage have no such room. With heads, the products of a row lie head by head: [heads][columns of a head], a head's
// columns [gates][H / heads], rounded up to a whole vector.
template <class A>
struct FormulaForwardRow {
  const A* x;                           // [Gi, H] input products
  const A* rec;                         // [heads][..] recurrent products
  const A* before[kMostFormulaStates];  // [H]
  A* after[kMostFormulaStates];         // [H]; may be the same as before
  void* series[kMostFormulaStates];     // [H] storage, or null; the output's is y
  A* v[kMostFormulaPhases];             // [H] what a phase takes
  void* v_series[kMostFormulaPhases];   // [H] storage, or null
  const A* ph[kMostFormulaPhases];      // [H] its result
  void* saved;                          // [K, H] storage, or null
};
template <class A>
struct FormulaBackwardRow {
  const void* before[kMostFormulaStates];  // [H] storage, of the states whose series backward reads
  const void* after[kMostFormulaStates];   // [H] storage
  const void* v[kMostFormulaPhases];       // [H] storage
  const void* saved;                       // [K, H] storage
  const void* dy;                          // [H] storage
  const void* d_added;                     // [S, H] storage, or null: gradients of products from elsewhere
  const A* rec;                            // [heads][..] gradient of the recurrent state through the weights
  A* d_states[kMostFormulaStates];         // [H] gradients of the states after the step in, before the step out
  A* d_ph[kMostFormulaPhases];             // [H] gradient of a phase's result
  const A* dv[kMostFormulaPhases];         // [H] gradient of what it took
  void* d;                                 // [S + U + Q, H] storage
  A* d_rec;                                // [heads][Gr][H / heads] copy of the recurrent products' gradients, or null
  bool reset;                              // the step began from zeros: d_states become zero
};

// Units come in items: the vectors of each head, the last of a head with as many lanes as are left.
template <class Row>
struct FormulaCall {
  const Row* rows;
  int64_t n_rows;
  int64_t first, last;  // items
  int64_t H;
  int heads;
  int64_t rec_columns;     // of a head in `rec`
  const void* parameters;  // A [U][parameter_stride]
  int64_t parameter_stride;
};

// A norm over the H units of a row: out = v^ weight + bias, v^ = (v - mean) / sqrt(variance + eps); an RMS norm
// has no mean and no bias. Backward: out = the gradient of v, from d, the gradient of the result.
template <class A>
struct FormulaNorm {
  bool centred;  // a layer norm
  int64_t H;
  const A* v;            // forward
  const void* v_stored;  // backward; storage
  const A *weight, *bias;
  const A* d;  // backward
  A* out;
};

template <class A>
struct FormulaKernels {
  void (*forward)(const FormulaCall<FormulaForwardRow<A>>&);
  void (*backward)(const FormulaCall<FormulaBackwardRow<A>>&);
  // Of each level of phases: what they take, and in backward the gradients of their results.
  void (*phase_input[kMostFormulaPhases])(const FormulaCall<FormulaForwardRow<A>>&);
  void (*phase_gradient[kMostFormulaPhases])(const FormulaCall<FormulaBackwardRow<A>>&);
  void (*norm)(const FormulaNorm<A>&);
  void (*norm_gradient)(const FormulaNorm<A>&);
};

// Set anew with every change of the types above.
constexpr int kFormulaVersion = 5;

struct FormulaLibrary {
  int version;  // kFormulaVersion
  int width;    // of a vector
  int dtype;    // DType
  FormulaTraits traits;
  FormulaKernels<float> f32;  // of the dtypes that are computed in float, else null
  FormulaKernels<double> f64;
};

}  // namespace fused_rnn::cpu
