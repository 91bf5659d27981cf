// What compiled formulas (fused_rnn/formula) have in common on every device. No torch, no CUDA include.
#pragma once
#include "core/host_device.h"

namespace fused_rnn {

constexpr int kMostFormulaStates = 8, kMostFormulaPhases = 12;

// What a step computes over all units of a row, between its pointwise parts (fused_rnn/formula/language.py's Phase): a
// product with a matrix [H, H], or a norm.
enum class FormulaPhase : int { kProduct = 0, kLayerNorm = 1, kRmsNorm = 2 };

// Letters: Gi gates with an input product, Gr with a recurrent one, S = Gi + Gr less the gates of which the step reads only
// the sum of both: the gradients of products. K saved values, U vectors and numbers of the cell itself, Q phases.
struct FormulaTraits {
  int states, output, recurrent;  // output, recurrent: indices among the states
  int input_gates, recurrent_gates;
  int gradients;               // S; the last Gr of them are those of the recurrent products
  int saved;                   // K
  int parameters;              // U
  int phases;                  // Q
  const int* input_gradients;  // [Gi] place among the gradients
  const bool* reads_series;    // [states] backward reads the state before or after a step
  const int* phase_kinds;      // [Q] FormulaPhase
  // [Q] how many phases, one behind the other, come before the phase, in forward and in backward: those of one level do not
  // depend on each other.
  const int* forward_levels;
  const int* backward_levels;
};

// The number of levels.
FUSED_RNN_HD int level_count(const int* levels, int phases) {
  int count = 0;
  for (int k = 0; k < phases; ++k) count = levels[k] < count ? count : levels[k] + 1;
  return count;
}

// Family `single` has the medium tile for cells of so many accumulators a unit: more would not fit the registers.
constexpr int kMostMediumSlots = 6;

constexpr double kFormulaNormEpsilon = 1e-5;  // torch.nn.LayerNorm's

}  // namespace fused_rnn
