// A formula's scan as the planner sees it.
#include "cpu/formula/scan.h"

namespace fused_rnn::cpu {

FormulaProblem formula_problem(const FormulaParams& p, bool backward, bool training) {
  FormulaProblem problem{};
  ScanProblem& scan = problem.scan;
  scan.dtype = p.dtype;
  scan.T = p.seq.T;
  scan.B = p.seq.B;
  scan.I = p.I;
  scan.H = scan.P = p.H;
  scan.D = p.D;
  scan.ragged = p.seq.lengths || p.seq.offsets;
  scan.training = training;
  scan.backward = backward;
  scan.N = p.seq.N;
  scan.weights = p.dtype;
  problem.input_gates = p.cell->traits.input_gates - p.given_gates;
  problem.recurrent_gates = p.cell->traits.recurrent_gates;
  problem.heads = p.heads;
  problem.phases = p.cell->traits.phases;
  for (int k = 0; k < problem.phases; ++k) {
    problem.products |= static_cast<FormulaPhase>(p.cell->traits.phase_kinds[k]) == FormulaPhase::kProduct;
  }
  return problem;
}

}  // namespace fused_rnn::cpu
