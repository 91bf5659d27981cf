// One layer of a cell that is a formula, on a CPU. Layouts are those of core/params.h; letters as in cpu/isa/formula.h.
#pragma once
#include <string>

#include "core/params.h"
#include "cpu/cpu.h"
#include "cpu/isa/formula.h"
#include "cpu/scan/checkpoint.h"

namespace fused_rnn::cpu {

// The parameters of a phase: a product's matrix, or a norm's weight and, of a layer norm, bias [H].
struct FormulaPhaseWeights {
  WeightMatrix matrix;  // [H, H]
  const void *weight, *bias;
};

// The parameters of one direction.
struct FormulaWeights {
  WeightMatrix w_ih;       // [Gi - K, H, I]
  WeightMatrix w_hh;       // [heads, Gr * H / heads, H / heads]; null where Gr is 0
  const void* b_ih;        // [Gi - K, H] or null
  const void* b_hh;        // [Gr, H] or null
  const void* parameters;  // [U, H], numbers repeated; null where U is 0
  FormulaPhaseWeights phases[kMostFormulaPhases];
};

struct FormulaParams {
  const FormulaLibrary* cell;
  DType dtype;
  int64_t I, H;
  int D, heads;
  int given_gates;  // K: input gates without weights
  Sequence seq;
  Modifier modifier;                            // without its states
  ResetState reset_states[kMostFormulaStates];  // what resets put there
  FormulaWeights weights[2];
  const void* states[kMostFormulaStates];  // initial [D, B, H], or null (zeros)
  void* workspace;                         // set by the call
};

struct FormulaForward : FormulaParams {
  const void* x;  // [N, I]; null where columns are there, and then I is 0
  // Of ids in place of one-hot rows: [D, N, Gi - K, H], the columns of w_ih that are the input products, without biases.
  const void* columns;
  const void* given;  // [D, N, K, H]: the values of the last K input gates, which have no weights; null where K is 0
  void* y;            // [N, D * H]: the output state; 0 at inactive rows of a dense batch
  void* last[kMostFormulaStates];  // [D, B, H]
  // [N, D * H], or null: not kept. Never the output's, which is y. 0 at inactive rows of a dense batch.
  void* series[kMostFormulaStates];
  void* v[kMostFormulaPhases];  // [D, N, H] what each phase took, or null; 0 at inactive rows of a dense batch
  void* saved;                  // [D, N, K, H] or null
  bool training;
};

struct FormulaBackward : FormulaParams {
  const void* y;
  const void* series[kMostFormulaStates];
  const void* v[kMostFormulaPhases];
  const void* saved;
  const void* dy;                          // [N, D * H] or null (zeros)
  const void* d_last[kMostFormulaStates];  // [D, B, H] or null (zeros)
  // [N, D * H] or null (zeros): gradients of states after each step beside what passes through the steps; of the output: dy.
  const void* d_series[kMostFormulaStates];
  // [D, N, added_blocks, H] or null (zeros): gradients of the products from elsewhere, in the order of d's first S blocks.
  const void* d_added;
  int64_t added_blocks;
  void* d;                             // [D, N, S + U + Q, H] out; 0 at inactive rows
  void* d_states[kMostFormulaStates];  // [D, B, H] out, or null where nobody asks
  // [D, N, H] out at rows that are reset: gradients of the states that their step begins from, of the recurrent one less
  // what passes through weight_hh. All null where nobody asks.
  void* d_reset[kMostFormulaStates];
};

void forward(FormulaForward& p, const Allocate& allocate);
void backward(FormulaBackward& p, const Allocate& allocate);

// Which steps forward runs, and where it keeps states for checkpointing (cpu/scan/checkpoint.h).
struct FormulaPart {
  int64_t every = 0;  // k
  // [D, (T - 1) / k, states, B, H] of the arithmetic type: the first run writes it, a later one reads it.
  void* kept = nullptr;
  // A later run: steps [first, end) only. It leaves y, series and v of these steps where a whole run does, and before them
  // the states that backward reads.
  bool again = false;
  int64_t first = 0, end = 0;
  SavedRows saved{};  // of params.saved
};
void forward_part(FormulaForward& p, const FormulaPart& part, const Allocate& allocate);
// Backward with p.saved as part.again leaves it for a range of steps, the last range first; part.c_before: unused.
void backward_in_parts(FormulaBackward& p, const BackwardPart& part, const Allocate& allocate);

// The library of a compiled formula at this path, which stays loaded. Throws std::runtime_error if it cannot be loaded, or
// was not made for this build of the kernels.
const FormulaLibrary* load_formula(const std::string& path);

}  // namespace fused_rnn::cpu
