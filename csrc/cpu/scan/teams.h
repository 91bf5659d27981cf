// The teams of a thread plan with their batch rows.
#pragma once
#include <memory>
#include <vector>

#include "core/active.h"
#include "cpu/thread_plan.h"
#include "cpu/threads.h"

namespace fused_rnn::cpu {

// A batch row of a team.
struct TeamRow {
  int64_t b, length;  // active at t = 0 .. length - 1

  // Steps that the row has done before step t (an active one) of direction d.
  int64_t steps_before(int64_t t, int d) const { return d == 0 ? t : length - 1 - t; }
};

struct Team {
  int first_direction, last_direction;
  std::vector<TeamRow> rows;
  Barrier barrier;  // of its threads
};

struct Teams {
  std::unique_ptr<Team[]> teams;
  Barrier all;  // of the threads of all teams

  Teams(const ThreadPlan& plan, const Sequence& seq, int D);
};

// The most rows that a team has.
constexpr int64_t rows_of_team(const ThreadPlan& plan, int64_t B) { return ceil_div(B, plan.batch_teams); }

}  // namespace fused_rnn::cpu
