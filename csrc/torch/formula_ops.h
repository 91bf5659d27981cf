// The ops of cells that are formulas: their flags, and the libraries that they run (formula_ops.cpp).
#pragma once
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "core/recipe.h"

namespace fused_rnn {

// Bits of the ops' argument `flags`, beside those of recipe.h's kHasRows, which say what `rows` has. With kFormulaAllStates
// the results `last` go on with all states but the output after every step, [N, D * H] each. With kFormulaGradValues the
// gradients of the states, and of what resets put there, are followed by that of StepOptions.values, [D, N, K, H]. With
// kFormulaAddsProducts the last of `dlast` is [D, N, S or more, H]: gradients of the products from elsewhere, in the order
// of BackwardParams::d_gates; on a CPU only.
// fused_rnn/formula/ops.py is the twin in Python.
constexpr int64_t kFormulaBiases = 1, kFormulaBidirectional = 2, kFormulaSave = 4, kFormulaAllStates = 64;
constexpr int64_t kFormulaGradX = 8, kFormulaGradStates = 16, kFormulaGradParams = 32, kFormulaGradValues = 128;
constexpr int64_t kFormulaAddsProducts = 256;

// From now on the library at this path serves the formula, on the instruction set in use.
void register_formula(const std::string& formula, const std::string& path);
// Its library does not serve it any more, for a dtype (a DType).
void forget_formula(const std::string& formula, int dtype);
// What its library says of the cell; throws where there is none. (saved values, phases, of each state whether backward reads
// its series)
using FormulaFacts = std::tuple<int, int, std::vector<bool>>;
FormulaFacts formula_facts(const std::string& formula, int dtype);
// What Python says too, by its names there (tests/test_formula_op.py compares them).
std::map<std::string, int64_t> formula_constants();
// Whether there is one for the dtype (a DType) and the instruction set in use.
bool has_formula(const std::string& formula, int dtype);

}  // namespace fused_rnn
