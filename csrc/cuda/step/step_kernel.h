// A kernel of a plan with launches for every step, as host code launches it.
#pragma once
#include <launch.cuh>

#include "cuda/step/arguments.h"

namespace fused_rnn::cuda {

// A kernel of the plan, ready to be launched once per step.
template <class Step>
struct StepKernel {
  void (*kernel)(Step);
  simt::LaunchConfig config;
  int stages;
  bool may_overlap;

  StepKernel(void (*kernel_address)(Step), const KernelPlan& plan, bool pdl)
      : kernel(kernel_address), config(config_of(plan)), stages(plan.stages), may_overlap(pdl) {
    simt::prepare(kernel, config.name, plan.smem_bytes);
  }

  // The first launch of a layer waits for all earlier work of the stream. Later launches may then read weights early.
  void operator()(Step& step, bool first, void* stream) {
    config.pdl = may_overlap && !first;
    step.stages = stages;
    simt::launch(kernel, config, stream, step);
  }
};

}  // namespace fused_rnn::cuda
