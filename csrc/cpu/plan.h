// How the threads of one call divide the work: a pure function of the sizes.
//
// A team of `split` threads owns a set of batch rows of one direction (or of each in turn) for the whole sequence, and each
// of its threads a range of hidden units: they meet at a barrier at every step. Teams never wait for each other. Results do
// not depend on the plan: every sum is made by one thread, in one order.
#pragma once
#include <cstdint>

#include "cpu/isa/blocks.h"
#include "cpu/isa/parts.h"

namespace fused_rnn::cpu {

// How a matrix is kept for the products of a call.
enum class Form : int {
  kDirect,  // as torch keeps it
  kPacked,  // [panels][K][vectors][W]
  kSplit,   // split.h
};

// A matrix, and the rows that it meets: at a time, and in the whole call. Not those of one thread: results must not depend on
// how threads share the work.
struct FormInput {
  int64_t depth, columns;
  int64_t rows, all_rows;
  bool splits;  // the instruction set has SplitKernels that gain for this storage type
  SplitParts parts;
};
Form choose_form(const FormInput& in);
const char* to_string(Form form);
// Parts of the stored elements of a matrix (storage index, kernels.h), and of rows that are rounded to that storage or not.
SplitParts split_parts(int storage, bool rounded_rows);

struct Plan {
  int direction_teams;  // 1: a team does both directions, one after the other; 2: one each
  int batch_teams;
  int split;
  Form form = Form::kPacked;  // of the recurrent weights
  int threads() const { return direction_teams * batch_teams * split; }
};

struct PlanInput {
  int64_t T, B;
  int D;
  int64_t step_depth;     // multiply-adds of one row, unit and gate inside the recurrence: K
  int64_t outside_depth;  // the same for what is done in large chunks (the input projection)
  int64_t columns;        // gate matrix columns, padded to panels
  int64_t panels;         // what a split can divide
  int barriers;           // per step
  int64_t element_size;   // of the weights of a step
  int split_products;     // pairs of parts that a split matrix multiplies, 0 for another form
  int outside_products;   // the same outside the recurrence
  int split_rate;         // SplitKernels::rate
  int max_threads;
};

Plan choose_plan(const PlanInput& in);

}  // namespace fused_rnn::cpu
