// One layer of a cell that is a formula, on a GPU: what the host gives its kernels. Letters: core/formula.h, core/params.h.
// The same structs are compiled with the kernels, by nvcc or NVRTC, and with the host's loop over time (scan.h).
//
// A product or a norm inside of a step needs all units of a row, so a step is several launches, its segments. Phases that do
// not depend on each other share one: a phase's level, of forward and of backward, is the number of phases that it has to
// wait for, one behind the other (fused_rnn/formula/plan.py).
//   forward segment 0       the recurrent product, then what the phases of level 0 take
//   forward segment l + 1   the phases of level l one after the other, then what those of level l + 1 take, or in the last
//                           segment the whole step
//   backward segment 0      d_rec W_hh, then the gradients of the results of the phases of level 0
//   backward segment l + 1  the gradients of what the phases of level l took, then those of the results of level l + 1, or
//                           in the last segment the whole step's
// A cell without phases has one launch per step, forward and backward.
//
// Family `single` serves one time step, forward: its segment 0 makes the input products too. Where there are further
// segments it leaves them their sums.
#pragma once
#include "core/active.h"
#include "core/formula.h"
#include "core/modifier.h"
#include "plan/formula_persistent_shape.h"

namespace fused_rnn::cuda {

// The parameters of one direction, in the layer's dtype. Everything contiguous.
struct FormulaDirection {
  const void* w_ih;                        // [Gi, H, I], of family `single`
  const void* b_ih;                        // [Gi, H] or null, likewise
  const void* w_hh;                        // [heads][Gr][H / heads][H / heads]; null where Gr is 0
  const void* b_hh;                        // [Gr, H] or null
  const void* parameters;                  // [U, H], numbers repeated; null where U is 0
  const void* weight[kMostFormulaPhases];  // a product's matrix [H, H], or a norm's weight [H]
  const void* bias[kMostFormulaPhases];    // of a layer norm [H]
};

struct FormulaLayer {
  int64_t H;
  int D, heads;
  Sequence seq;
  Modifier modifier;                            // without its states
  ResetState reset_states[kMostFormulaStates];  // what resets put there
  FormulaDirection weights[2];
  const void* initial[kMostFormulaStates];  // [D, B, H] in dtype, or null (zeros)
};

// Working memory is in the arithmetic type (A): double for float64, else float.
struct FormulaForward : FormulaLayer {
  // [D, N, Gi, H] input products with their biases, in dtype. In family `single` memory for them, or null where there is no
  // further segment to read them.
  void* x;
  const void* input;                 // [N, I], of family `single`
  int64_t I;                         // likewise
  void* y;                           // [N, D * H]: the output state; 0 at inactive rows of a dense batch
  void* last[kMostFormulaStates];    // [D, B, H]
  void* series[kMostFormulaStates];  // [N, D * H], or null: not kept. Never the output's, which is y. 0 at inactive rows
  void* v[kMostFormulaPhases];       // [D, N, H] what each phase took, or null; 0 at inactive rows of a dense batch
  void* saved;                       // [D, N, K, H] or null; not written at inactive rows
  // Working memory.
  void* states[kMostFormulaStates];   // A [D, B, H]: states that are neither the output nor read by the recurrent product
  void* recurrent;                    // dtype [2][D, B, H] the recurrent state after odd and even steps, unless it is y's
  void* rec;                          // A [D, B, Gr, H] recurrent products of the step; null where Q is 0
  void* taken[kMostFormulaPhases];    // [D, B, H] what a phase takes: of a product in dtype, of a norm A
  void* results[kMostFormulaPhases];  // A [D, B, H]
};

struct FormulaBackward : FormulaLayer {
  const void* y;  // as forward left them
  const void* series[kMostFormulaStates];
  const void* v[kMostFormulaPhases];
  const void* saved;
  const void* dy;                          // [N, D * H] or null (zeros)
  const void* d_last[kMostFormulaStates];  // [D, B, H] or null (zeros)
  // [N, D * H] or null (zeros): gradients of states after each step beside what passes through the steps; of the output: dy.
  const void* d_series[kMostFormulaStates];
  void* d;                              // [D, N, S + U + Q, H] out; 0 at inactive rows of a dense batch
  void* d_initial[kMostFormulaStates];  // [D, B, H] out, or null where nobody asks
  // [D, N, H] out at rows that are reset, or null where nobody asks: gradients of the states that their step begins from, of
  // the recurrent one less what passes through weight_hh.
  void* d_reset[kMostFormulaStates];
  // Working memory.
  void* d_states[kMostFormulaStates];   // A [D, B, H] gradients of the states before the step done last
  void* d_rec;                          // dtype [2][D, B, Gr, H], head by head; null with one head: d has it
  void* rec;                            // A [D, B, H] gradient of the recurrent state through the weights; null: Q is 0
  void* d_results[kMostFormulaPhases];  // A [D, B, H] gradients of what norms gave
  void* d_taken[kMostFormulaPhases];    // A [D, B, H] gradients of what phases took
};

// Arguments of a launch. step: in the order of the scan; -1 asks the kernel kInitialGradients for d_initial.
struct FormulaForwardStep {
  FormulaForward p;
  int64_t step;
  int stages;            // of the rings of the product
  int copy_bytes;        // bytes that may be copied at once between rows of the product's operands
  int input_copy_bytes;  // the same of the input product's, of family `single`
};
struct FormulaBackwardStep {
  FormulaBackward p;
  int64_t step;
  int stages;
  int copy_bytes;
};

// Those of the persistent families (formula_persistent.cuh), of which a launch makes all steps.
struct FormulaPersistentForward {
  FormulaForward p;
  FormulaPersistentShape shape;
  FormulaTeams teams;
};
struct FormulaPersistentBackward {
  FormulaBackward p;
  FormulaPersistentShape shape;
  FormulaTeams teams;
};

// The kernels of a formula: of family `step`, of `cluster` and of `grid`; segment 0 of `single`, whose others are those of
// `step`.
enum class FormulaRole : int {
  kForward,
  kBackward,
  kInitialGradients,
  kClusterForward,
  kClusterBackward,
  kGridForward,
  kGridBackward,
  kSingleForward
};

}  // namespace fused_rnn::cuda
