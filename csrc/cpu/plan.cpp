#include "cpu/plan.h"

#include <algorithm>
#include <cmath>

namespace fused_rnn::cpu {
namespace {

// In units of one vector multiply-add of a tile column (2 per cycle), per vector-sized column group; rough figures of a core
// with two 512-bit FMA units: what matters is the order of the candidates.
constexpr double kFmaPerByteL2 = 1.0 / 20;  // weights streamed from L2 at about 40 bytes a cycle
constexpr double kFmaPerByteL3 = 1.0 / 5;   // from L3 or memory at about 10
constexpr double kL2Bytes = 1.6e6;
constexpr double kBarrier = 4000;  // 2000 cycles
constexpr double kRegion = 12000;  // entering a parallel region
constexpr int kVectorColumns = 16;

double cost(const PlanInput& in, const Plan& plan) {
  const double rows = static_cast<double>((in.B + plan.batch_teams - 1) / plan.batch_teams);
  const double panels = static_cast<double>((in.panels + plan.split - 1) / plan.split);
  const double columns = panels * static_cast<double>(in.columns) / static_cast<double>(in.panels);
  const double rounds = in.D / plan.direction_teams;
  const double weight_bytes = columns * static_cast<double>(in.step_depth * in.element_size);
  const double stream = weight_bytes * (weight_bytes < kL2Bytes ? kFmaPerByteL2 : kFmaPerByteL3);
  const double groups = columns / kVectorColumns;
  // A tile of one or two rows is held back by the loads of the weights from L1.
  const double compute_rows = in.split_products ? in.split_products * std::ceil(rows / in.split_rate) : std::max(rows, 2.0);
  const double outside_rows = in.outside_products ? in.outside_products * rows / in.split_rate : rows;
  const double compute = groups * static_cast<double>(in.step_depth) * compute_rows;
  const double outside = groups * static_cast<double>(in.outside_depth) * outside_rows;
  double step = std::max(stream, compute) + outside;
  if (plan.split > 1) step += kBarrier * in.barriers;
  return rounds * step * static_cast<double>(in.T) + (plan.threads() > 1 ? kRegion : 0);
}

// Up to this many rows in all (T * B) the weights are used as they lie. With 12 and 16 rows that takes 0.7 to 0.85 of the time of packed
// weights that are kept, and 0.4 to 0.8 of packing; with 24 and 32 rows and H=128 it takes 1.1 to 1.5 times as long as kept weights
// (inference, fp32, Sapphire Rapids, 2026-11-21).
constexpr int64_t kDirectRows = 16;

}  // namespace

SplitParts split_parts(int storage, bool rounded_rows) {
  if (storage == 0) return {3, 3};
  if (storage == 1) return {2, 2};
  return {rounded_rows ? 1 : 2, 1};
}

Form choose_form(const FormInput& in) {
  if (in.all_rows <= kDirectRows) return Form::kDirect;
  if (!in.splits || in.depth == 0) return Form::kPacked;  // without depth there are no tiles of parts
  if (in.parts.panels == 1) return Form::kSplit;          // half the bytes, and faster for one row too
  // Cycles per vector of columns: the matrix unit's, with a quarter more for the rows' parts, and those of two vector units, which
  // reach four fifths of their peak.
  const int64_t blocks = split_blocks(in.depth) * ((in.rows + kSplitRows - 1) / kSplitRows);
  const double unit = 1.25 * 16 * split_products(in.parts) * static_cast<double>(blocks);
  const double vectors = static_cast<double>(in.rows * in.depth) / (2 * 0.8);
  if (unit > vectors) return Form::kPacked;
  // Where every step reads the weights from beyond L2, two more bytes each cost more than a few rows gain.
  const double bytes = static_cast<double>(in.depth * in.columns * in.parts.panels * 2);
  return bytes > kL2Bytes && in.rows < 24 ? Form::kPacked : Form::kSplit;
}

const char* to_string(Form form) {
  switch (form) {
    case Form::kDirect: return "as they lie";
    case Form::kSplit: return "split into bfloat16 parts";
    case Form::kPacked: break;
  }
  return "packed into panels";
}

Plan choose_plan(const PlanInput& in) {
  Plan best{1, 1, 1};
  double best_cost = cost(in, best);
  for (int directions = 1; directions <= in.D; ++directions) {
    const int per_direction = in.max_threads / directions;
    const int64_t batch_limit = std::min<int64_t>(per_direction, std::max<int64_t>(in.B, 1));
    for (int batch = 1; batch <= batch_limit; ++batch) {
      const int64_t split_limit = std::min<int64_t>(per_direction / batch, in.panels);
      for (int split = 1; split <= split_limit; ++split) {
        const Plan plan{directions, batch, split};
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
