// What the forward and the backward scan share: the teams of a plan with their batch rows, and where a row is at a step.
#pragma once
#include <memory>
#include <vector>

#include "cpu/gemm/matrix.h"
#include "cpu/threads.h"

namespace fused_rnn::cpu {

// A batch row of a team.
struct TeamRow {
  int64_t b, length;

  // Steps that the row has done before step t (an active one) of direction d.
  int64_t steps_before(int64_t t, int d) const { return d == 0 ? t : length - 1 - t; }
};

struct Team {
  int first_direction, last_direction;
  std::vector<TeamRow> rows;
  Barrier barrier;
};

struct Teams {
  std::unique_ptr<Team[]> teams;
  Barrier all;

  Teams(const Plan& plan, const Sequence& seq, int D) : teams(new Team[plan.direction_teams * plan.batch_teams]) {
    std::vector<TeamRow> rows(static_cast<size_t>(seq.B));
    for (int64_t b = 0; b < seq.B; ++b) rows[b] = {b, active_steps(seq, b)};
    const bool ragged = seq.lengths || seq.offsets;
    if (ragged) std::stable_sort(rows.begin(), rows.end(), [](auto& x, auto& y) { return x.length > y.length; });
    for (int i = 0; i < plan.direction_teams * plan.batch_teams; ++i) {
      Team& team = teams[i];
      const int part = i % plan.batch_teams;
      team.first_direction = plan.direction_teams == 1 ? 0 : i / plan.batch_teams;
      team.last_direction = plan.direction_teams == 1 ? D : team.first_direction + 1;
      // Ragged rows are dealt out longest first, so that every team has about as many steps to do.
      const int64_t begin = ragged ? part : share_begin(seq.B, plan.batch_teams, part);
      const int64_t end = ragged ? seq.B : share_begin(seq.B, plan.batch_teams, part + 1);
      for (int64_t j = begin; j < end; j += ragged ? plan.batch_teams : 1) team.rows.push_back(rows[j]);
      team.barrier.reset(plan.split);
    }
    all.reset(plan.threads());
  }
};

constexpr int64_t rows_of_team(const Plan& plan, int64_t B) { return (B + plan.batch_teams - 1) / plan.batch_teams; }

// Calls f with a value of the arithmetic type of a dtype.
template <class F>
auto with_arithmetic(DType dtype, F&& f) {
  return dtype == DType::kFloat64 ? f(double{}) : f(float{});
}

}  // namespace fused_rnn::cpu
