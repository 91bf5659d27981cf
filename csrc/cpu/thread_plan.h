// How the threads of one call divide the work: a pure function of the sizes.
//
// A team of `split` threads owns some batch rows of one direction (or of both, one after the other) for the whole sequence.
// Each thread of a team owns a range of hidden units. The threads of a team meet at a barrier at every step; teams never
// wait for each other. Results do not depend on the plan: one thread makes each sum, in one order.
#pragma once
#include <cstdint>

#include "cpu/matrix_form.h"

namespace fused_rnn::cpu {

struct ThreadPlan {
  int direction_teams;  // 1: a team does both directions, one after the other; 2: one direction each
  int batch_teams;
  int split;                  // threads of a team
  Form form = Form::kPacked;  // of the recurrent weights
  int threads() const { return direction_teams * batch_teams * split; }
};

struct ThreadPlanInput {
  int64_t T, B;
  int D;
  int64_t step_depth;      // K of the products of a step
  int64_t outside_depth;   // K of the products outside the recurrence (the input projection), or 0
  int64_t columns;         // of the gate matrix, padded to panels
  int64_t panels;          // that the threads of a team divide
  int barriers;            // of a step
  int64_t element_size;    // of the weights of a step
  int step_part_pairs;     // pairs of parts that a product of a step multiplies; 0: its matrix is in another form
  int outside_part_pairs;  // the same outside the recurrence
  int parts_rate;          // PartsKernels::rate
  int max_threads;
};

ThreadPlan choose_thread_plan(const ThreadPlanInput& in);

}  // namespace fused_rnn::cpu
