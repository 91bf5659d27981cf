#include "cpu/thread_plan.h"

#include <algorithm>
#include <cmath>

namespace fused_rnn::cpu {
namespace {

// Costs count multiply-adds of one vector (two of them take a cycle). The figures are rough, of a core with two 512-bit
// units: what matters is the order of the candidates.
constexpr double kFmaPerByteL2 = 1.0 / 20;  // weights that stream from L2 at about 40 bytes a cycle
constexpr double kFmaPerByteL3 = 1.0 / 5;   // from L3 or memory at about 10
constexpr double kBarrier = 4000;           // 2000 cycles
constexpr double kRegion = 12000;           // entering a parallel region
constexpr int kVectorColumns = 16;

double cost(const ThreadPlanInput& in, const ThreadPlan& plan) {
  const double rows = static_cast<double>((in.B + plan.batch_teams - 1) / plan.batch_teams);
  const double panels = static_cast<double>((in.panels + plan.split - 1) / plan.split);
  const double columns = panels * static_cast<double>(in.columns) / static_cast<double>(in.panels);
  const double rounds = in.D / plan.direction_teams;
  const double weight_bytes = columns * static_cast<double>(in.step_depth * in.element_size);
  const double stream = weight_bytes * (weight_bytes < kL2Bytes ? kFmaPerByteL2 : kFmaPerByteL3);
  const double groups = columns / kVectorColumns;
  // A tile of one row takes as long as one of two: loads of the weights from L1 hold both back.
  const double compute_rows =
      in.step_part_pairs ? in.step_part_pairs * std::ceil(rows / in.parts_rate) : std::max(rows, 2.0);
  const double outside_rows = in.outside_part_pairs ? in.outside_part_pairs * rows / in.parts_rate : rows;
  const double compute = groups * static_cast<double>(in.step_depth) * compute_rows;
  const double outside = groups * static_cast<double>(in.outside_depth) * outside_rows;
  double step = std::max(stream, compute) + outside;
  if (plan.split > 1) step += kBarrier * in.barriers;
  return rounds * step * static_cast<double>(in.T) + (plan.threads() > 1 ? kRegion : 0);
}

}  // namespace

ThreadPlan choose_thread_plan(const ThreadPlanInput& in) {
  ThreadPlan best{1, 1, 1};
  double best_cost = cost(in, best);
  for (int directions = 1; directions <= in.D; ++directions) {
    const int per_direction = in.max_threads / directions;
    const int64_t batch_limit = std::min<int64_t>(per_direction, std::max<int64_t>(in.B, 1));
    for (int batch = 1; batch <= batch_limit; ++batch) {
      const int64_t split_limit = std::min<int64_t>(per_direction / batch, in.panels);
      for (int split = 1; split <= split_limit; ++split) {
        const ThreadPlan plan{directions, batch, split};
        const double plan_cost = cost(in, plan);
        if (plan_cost < best_cost) {
          best = plan;
          best_cost = plan_cost;
        }
      }
    }
  }
  return best;
}

}  // namespace fused_rnn::cpu
