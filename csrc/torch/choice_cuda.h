// Which kernel family serves a call on a GPU, forward and backward: the one that FUSED_RNN_PLAN forces, else the one that
// was chosen for the call's problem (fused_rnn/tuning), else cuDNN where it can, else the planner's.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "plan/family.h"
#include "torch/ops.h"

namespace fused_rnn {

// What is asked of the chooser. Letters: core/params.h.
struct Question {
  Problem problem;  // of the first layer, forward
  int64_t layers;
  bool one_step;             // a cell's call
  bool training;             // backward will follow
  std::string rows;          // "dense", "lengths" or "packed", and what else matters: "+resets", "+dropout", "+wide c"
  int device;                // -1: the simulated one
  bool cudnn;                // cuDNN can serve the call
  std::vector<Family> ours;  // the other families that can, forward and backward; the planner's own first
  bool may_time;             // neither captured, nor seen by modes and tracing
  bool deterministic;        // torch.use_deterministic_algorithms

  const Call* call;  // null: an answer for one layer of a call that others see, without results
};

struct Answer {
  std::optional<Family> family;    // serves the call; none: `results` are there, or the static rule decides
  std::optional<Results> results;  // of the call, made by the chooser itself
  bool lasting;                    // holds for all such calls of this process
};

// The chooser of this process, or none. Calls ask it until an answer lasts.
using Chooser = std::function<Answer(const Question&)>;
void set_chooser(Chooser chooser);
bool has_chooser();
// Forgets the answers that last.
void forget_choices();

// fused_rnn::rnn or fused_rnn::cell of a call on the device, by `rest` with the family in the recipe where cuDNN does not
// serve it.
Results run_chosen(const Call& call, const std::function<Results(const Call&)>& rest);

// Whether a call asks for what torch.nn's results have, of an input like torch.nn's, with resets, if any, to zeros, and
// without options of steps.
bool is_plain_call(const Call& call);

// What serves a layer's call that nobody has chosen a family for, since modes or tracing have seen the stack's.
struct LayerChoice {
  Recipe recipe;                   // with the family, if one was chosen
  std::optional<Results> results;  // by cuDNN, which serves calls that keep nothing for backward
};
LayerChoice chosen_for_layer(const Call& layer, bool training);

// Forward for training of a part of a stack that a recorded graph runs (graph_stack_cuda.h): by cuDNN, or by `rest`, whose
// recipe has the family if one was chosen.
LayerOutputs run_chosen_part(const Call& part, const std::function<LayerOutputs()>& by_cudnn,
                             const std::function<LayerOutputs(const Recipe&)>& rest);

}  // namespace fused_rnn
