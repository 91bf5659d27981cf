// The loop over time of a formula's layer on a GPU: the host's side of formula_forward.cuh and formula_backward.cuh. It
// knows neither torch nor CUDA: a launcher launches the kernels, the driver's (driver.h) or the simulator's.
#pragma once
#include <functional>

#include "cuda/formula/formula_params.h"
#include "plan/formula.h"
#include "plan/formula_persistent.h"

namespace fused_rnn::cuda {

// A kernel of formula_kernels.cuh and how it is launched.
struct FormulaLaunch {
  FormulaRole role;
  int segment;
  TileSize tile;
  int grid_x, grid_y, grid_z;
  int threads, smem_bytes;
  bool pdl;          // may start before the preceding grid of the stream has ended
  int cluster;       // blocks of a cluster, neighbours in x; 0 or 1: none
  bool cooperative;  // all blocks run at the same time, or the launch fails
};
// arguments: what the kernel takes (FormulaForwardStep, FormulaPersistentForward, ...), of so many bytes, read before the
// call returns.
using FormulaLauncher = std::function<void(const FormulaLaunch& launch, const void* arguments, size_t bytes)>;

// p without working memory, but of family `single` with p.x where there are phases. workspace: plan.workspace.bytes,
// 256-byte aligned, contents irrelevant. Nothing is synchronised.
void run_formula_forward(const FormulaForward& p, const FormulaTraits& cell, const FormulaStepPlan& plan, void* workspace,
                         const FormulaLauncher& launch);
void run_formula_backward(const FormulaBackward& p, const FormulaTraits& cell, const FormulaStepPlan& plan, void* workspace,
                          const FormulaLauncher& launch);

// The same by a persistent family. exchange: plan.exchange_bytes of zeros, 256-byte aligned.
void run_formula_persistent_forward(const FormulaForward& p, const FormulaTraits& cell, const FormulaPersistentPlan& plan,
                                    void* exchange, const FormulaLauncher& launch);
void run_formula_persistent_backward(const FormulaBackward& p, const FormulaTraits& cell, const FormulaPersistentPlan& plan,
                                     void* exchange, const FormulaLauncher& launch);

}  // namespace fused_rnn::cuda
