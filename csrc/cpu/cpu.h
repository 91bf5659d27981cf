// The CPU backend: one recurrent layer, forward and backward, for every cell and dtype. Layouts: params.h.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/params.h"
#include "cpu/thread_plan.h"
#include "plan/problem.h"

namespace fused_rnn::cpu {

// Gives a workspace of that many bytes, aligned to 64, which lasts as long as the call. Asked again, it gives a new
// workspace, and the old one is gone.
using Allocate = std::function<void*(int64_t bytes)>;

// forward computes the input projection too. Both run on at most thread_limit() threads (threads.h) of the caller's OpenMP,
// and set p.workspace.
void forward(ForwardParams& p, const Allocate& allocate);
void backward(BackwardParams& p, const Allocate& allocate);
void dual_backward(DualBackwardParams& p, const Allocate& allocate);

// How the threads of a call made here and now would divide the work, where all rows are in memory (N = T * B).
ThreadPlan plan_of(const Problem& problem);

// The instruction set in use: the one that was set, else the best available.
const char* instruction_set();
// FUSED_RNN_CPU (settings.h); empty: the best available. Throws std::invalid_argument if that one is not available.
void set_instruction_set(const std::string& name);
// The instruction sets that were compiled in and that this machine can run, best first.
std::vector<std::string> available_instruction_sets();

}  // namespace fused_rnn::cpu
