#include "cpu/scan/scan.h"

namespace fused_rnn::cpu {

Teams::Teams(const ThreadPlan& plan, const Sequence& seq, int D) : teams(new Team[plan.direction_teams * plan.batch_teams]) {
  std::vector<TeamRow> rows(static_cast<size_t>(seq.B));
  for (int64_t b = 0; b < seq.B; ++b) rows[b] = {b, active_steps(seq, b)};
  const bool ragged = seq.lengths || seq.offsets;
  if (ragged) std::stable_sort(rows.begin(), rows.end(), [](auto& x, auto& y) { return x.length > y.length; });
  for (int i = 0; i < plan.direction_teams * plan.batch_teams; ++i) {
    Team& team = teams[i];
    const int batch_team = i % plan.batch_teams;
    team.first_direction = plan.direction_teams == 1 ? 0 : i / plan.batch_teams;
    team.last_direction = plan.direction_teams == 1 ? D : team.first_direction + 1;
    // Ragged rows are dealt out one by one, longest first, so that every team has about as many steps to do.
    const Range dealt{batch_team, seq.B};
    const auto [begin, end] = ragged ? dealt : share_of(seq.B, plan.batch_teams, batch_team);
    for (int64_t j = begin; j < end; j += ragged ? plan.batch_teams : 1) team.rows.push_back(rows[j]);
    team.barrier.reset(plan.split);
  }
  all.reset(plan.threads());
}

namespace {

// Matrices of fewer bytes stay in L2 by themselves.
constexpr int64_t kNearBytes = 1280 * 1024;

// A single step whose packed matrices take this much packs them anew, each panel just before its rows. Weights kept packed
// would be read beside those that their hash reads, and memory holds such a step back. Time with the cache / so, inference
// of cells, one thread, Sapphire Rapids, 2026-12-01:
//   fp32  LSTM H=1024 (32 MB) AVX-512 17 rows 1.3, 32 rows 1.2, 64 rows 1.1, AVX2 34 rows 1.25, 64 rows 1.05; GRU H=1024 (24
//         MB) 64 rows 1.08; LSTM H=768 (18 MB) 1.0 to 1.02; with 8 MB 0.94 to 0.99
//   fp64  LSTM H=1024 AVX-512 32 rows 1.6, AVX2 64 rows 1.2
// Weights that are converted as they are packed take longer so: 1.1 to 1.3 times (bfloat16, float16, H=1024).
constexpr int64_t kPassingBytes = int64_t{16} << 20;

template <class A>
class Planner {
 public:
  Planner(const ScanProblem& problem, const Kernels<A>& kernels) : p_(problem), kernels_(kernels) {}

  ScanPlan<A> plan(int max_threads) const {
    ScanPlan<A> plan;
    const int width = kernels_.width, gates = gate_count(p_.cell);
    if (p_.backward) {
      plan.h = straight_matrix(Shape(gates * p_.H, p_.P, 1, width));
      plan.r = straight_matrix(p_.projects ? Shape(p_.P, p_.H, 1, width) : Shape());
    } else {
      plan.x = matrix(Shape(p_.I, p_.H, gates, width), p_.N, /*rounded_rows=*/true);
      plan.h = matrix(Shape(p_.P, p_.H, gates, width), p_.B, /*rounded_rows=*/true);
      plan.r = matrix(p_.projects ? Shape(p_.H, p_.P, 1, width) : Shape(), p_.B, /*rounded_rows=*/false);
    }
    set_far(plan);
    plan.threads = thread_plan(plan, max_threads, /*heads=*/1, /*barriers=*/p_.projects ? 2 : 1);
    set_passing(plan);
    return plan;
  }

  ScanPlan<A> plan_formula(const FormulaProblem& problem, int max_threads) const {
    ScanPlan<A> plan;
    const int64_t units = p_.H / problem.heads, columns = problem.recurrent_gates * units;
    const bool recurs = problem.recurrent_gates > 0;
    if (p_.backward) {
      plan.h = straight_matrix(recurs ? Shape(columns, units, 1, kernels_.width) : Shape());
      plan.r = straight_matrix(problem.products ? Shape(p_.H, p_.H, 1, kernels_.width) : Shape());
    } else {
      plan.x = matrix(Shape(p_.I, problem.input_gates * p_.H, 1, kernels_.width), p_.N, /*rounded_rows=*/true);
      plan.h = matrix(recurs ? Shape(units, columns, 1, kernels_.width) : Shape(), p_.B, /*rounded_rows=*/true);
      plan.r = matrix(problem.products ? Shape(p_.H, p_.H, 1, kernels_.width) : Shape(), p_.B, /*rounded_rows=*/false);
    }
    set_far(plan);
    plan.threads = thread_plan(plan, max_threads, problem.heads, /*barriers=*/2 + 2 * problem.phases);
    return plan;
  }

 private:
  // rounded_rows: the rows are values of the layer's dtype.
  Matrix<A> matrix(const Shape& shape, int64_t rows, bool rounded_rows, bool straight = false) const {
    Matrix<A> m;
    m.shape = shape;
    m.straight = straight;
    m.source.storage = p_.weights;
    m.parts = parts_of(p_.weights, rounded_rows && p_.weights == p_.dtype);
    FormInput in{};
    in.depth = shape.depth;
    in.columns = shape.columns();
    in.rows = rows;
    in.all_rows = p_.T * p_.B;
    in.gains_from_parts = gains_from_parts(kernels_, storage_index(p_.weights));
    in.parts = m.parts;
    in.direct_parts = in.gains_from_parts && kernels_.parts->direct[storage_index(p_.weights)] != nullptr;
    in.straight = straight;
    in.gates = shape.gates;
    in.vector_bytes = kernels_.width * static_cast<int>(sizeof(A));
    m.form = choose_form(in);
    return m;
  }

  // A scan reads a matrix at every step. A single step reads each once, after the hash of what it was packed from, or after
  // the packing: whether it is in L2 then depends on what all such matrices of a call read.
  void set_far(ScanPlan<A>& plan) const {
    Matrix<A>* const matrices[] = {&plan.x, &plan.h, &plan.r};
    int64_t of_call = 0;
    for (const Matrix<A>* m : matrices) {
      if (m->bytes() > 0) of_call += m->bytes() + m->shape.depth * m->shape.units * m->shape.gates * dtype_size(p_.weights);
    }
    for (Matrix<A>* m : matrices) m->far = m->bytes() > 0 && (p_.T == 1 ? of_call : m->bytes()) >= kNearBytes;
  }

  void set_passing(ScanPlan<A>& plan) const {
    const bool converts = dtype_size(p_.weights) != static_cast<int64_t>(sizeof(A));
    if (p_.T != 1 || p_.backward || converts || plan.threads.batch_teams != 1) return;
    Matrix<A>* const matrices[] = {&plan.x, &plan.h, &plan.r};
    int64_t of_call = 0;
    for (const Matrix<A>* m : matrices) of_call += m->packed_elements() * static_cast<int64_t>(sizeof(A));
    if (of_call < kPassingBytes) return;
    for (Matrix<A>* m : matrices) {
      if (m->form == Form::kPacked) m->packing = Packing::kPassing;
    }
  }

  // Such a matrix can be used as it lies where its rows are whole vectors of the arithmetic type.
  Matrix<A> straight_matrix(const Shape& shape) const {
    Matrix<A> m = matrix(shape, p_.B, /*rounded_rows=*/false, /*straight=*/true);
    const bool whole = shape.units % kernels_.width == 0 && dtype_size(p_.weights) == static_cast<int64_t>(sizeof(A));
    if (m.form == Form::kDirect && !whole) m.form = Form::kPacked;
    return m;
  }

  ThreadPlan thread_plan(const ScanPlan<A>& plan, int max_threads, int heads, int barriers) const {
    ThreadPlanInput in{};
    in.T = p_.T;
    in.B = p_.B;
    in.D = p_.D;
    in.step_depth = plan.h.shape.depth;
    in.outside_depth = plan.x.shape.depth;
    in.columns = heads * plan.h.shape.columns();
    in.panels = std::max<int64_t>(heads * plan.h.shape.panels, 1);  // without recurrent weights threads divide rows alone
    in.barriers = barriers;
    in.element_size = plan.h.element_size();
    in.step_part_pairs = plan.h.part_pairs();
    in.outside_part_pairs = plan.x.part_pairs();
    in.parts_rate = kernels_.parts ? kernels_.parts->rate : 1;
    in.max_threads = max_threads;
    ThreadPlan threads = choose_thread_plan(in);
    threads.form = plan.h.form;
    return threads;
  }

  const ScanProblem& p_;
  const Kernels<A>& kernels_;
};

template <class Params>
ScanProblem problem_of(const Params& p) {
  ScanProblem problem{};
  problem.cell = p.cell;
  problem.dtype = p.dtype;
  problem.T = p.seq.T;
  problem.B = p.seq.B;
  problem.H = p.H;
  problem.P = p.P;
  problem.D = p.D;
  problem.ragged = p.seq.lengths || p.seq.offsets;
  problem.N = p.seq.N;
  problem.projects = p.weights[0].w_hr.data != nullptr;
  problem.weights = p.weights[0].w_hh.storage;
  return problem;
}

}  // namespace

ScanProblem scan_problem(const ForwardParams& p) {
  ScanProblem problem = problem_of(p);
  problem.I = p.I;
  problem.training = p.training;
  return problem;
}

ScanProblem scan_problem(const BackwardParams& p) {
  ScanProblem problem = problem_of(p);
  problem.training = problem.backward = true;
  return problem;
}

template <class A>
ScanPlan<A> plan_scan(const ScanProblem& problem, const Kernels<A>& kernels, int max_threads) {
  return Planner<A>(problem, kernels).plan(max_threads);
}
template ScanPlan<float> plan_scan(const ScanProblem&, const Kernels<float>&, int);
template ScanPlan<double> plan_scan(const ScanProblem&, const Kernels<double>&, int);

template <class A>
ScanPlan<A> plan_formula_scan(const FormulaProblem& problem, const Kernels<A>& kernels, int max_threads) {
  return Planner<A>(problem.scan, kernels).plan_formula(problem, max_threads);
}
template ScanPlan<float> plan_formula_scan(const FormulaProblem&, const Kernels<float>&, int);
template ScanPlan<double> plan_formula_scan(const FormulaProblem&, const Kernels<double>&, int);

ThreadPlan plan_of(const Problem& problem) {
  const ScanProblem scan{problem, problem.T * problem.B, problem.P != problem.H, problem.dtype};
  ThreadPlan plan{};
  with_arithmetic(problem.dtype, [&](auto a) {
    using A = decltype(a);
    plan = plan_scan(scan, kernels_of<A>(selected_kernels()), thread_limit()).threads;
  });
  return plan;
}

}  // namespace fused_rnn::cpu
