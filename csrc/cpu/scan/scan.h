// What the forward and the backward scan share: what is decided before memory is touched, the workspace of the threads, and
// running on the threads of a plan.
#pragma once
#include <algorithm>
#include <limits>

#include "core/params.h"
#include "cpu/cpu.h"
#include "cpu/gemm/product.h"
#include "cpu/scan/teams.h"
#include "cpu/threads.h"

namespace fused_rnn::cpu {

// What a scan is planned with: the problem, and what a problem leaves open.
struct ScanProblem : Problem {
  int64_t N;      // rows in memory
  bool projects;  // there is a w_hr; a square one has P == H
  DType weights;  // how the weights are stored, in both directions
};
ScanProblem scan_problem(const ForwardParams& p);
ScanProblem scan_problem(const BackwardParams& p);

// The matrices that a step multiplies with, in their forms, without memory; and how threads divide the work.
//   forward   x: W_ih, h: W_hh, r: W_hr
//   backward  h: W_hh and r: W_hr, both straight: gradients are multiplied from the other side
template <class A>
struct ScanPlan {
  Matrix<A> x, h, r;
  ThreadPlan threads;
};
template <class A>
ScanPlan<A> plan_scan(const ScanProblem& problem, const Kernels<A>& kernels, int max_threads);

// The same of a formula's scan, whose products are matrices of one gate each: x [Gi * H, I], h [Gr * H / heads, H / heads]
// of one head, r [H, H] of the products inside of a step, without panels where there is none.
struct FormulaProblem {
  ScanProblem scan;  // cell and projects say nothing
  int input_gates, recurrent_gates, heads;
  int phases;     // products and norms inside of a step
  bool products;  // there is a product among them
};
template <class A>
ScanPlan<A> plan_formula_scan(const FormulaProblem& problem, const Kernels<A>& kernels, int max_threads);

// What a scan must know of a cell.
struct ScanCell {
  int kind;  // of core/params.h's list; -1: a formula
  int slots, gates;
};

// The sizes of a scan.
struct ScanSizes {
  const Sequence& seq;
  int D;
  int64_t H, P;
  DType dtype;
};

// Bytes of a chunk's input projection: a fraction of L2 (of the sizes tried in a prototype on Zen 4 this one was fastest),
// or as many as the weights that each chunk reads, within reason.
constexpr int64_t kChunkBytes = 512 * 1024, kMaxChunkBytes = 8 * 1024 * 1024;

// The steps of a chunk of a forward scan; step_bytes: of a step's input projection.
inline int64_t steps_of_chunk(int64_t step_bytes, int64_t weight_bytes, int64_t T) {
  const int64_t chunk_bytes = std::clamp(weight_bytes, kChunkBytes, kMaxChunkBytes);
  return std::min(std::max<int64_t>(chunk_bytes / std::max<int64_t>(step_bytes, 1), 1), T);
}

template <class A>
class Scan {
 public:
  // Lays out the workspace; with a null base only counts its bytes.
  int64_t layout(void* base) {
    Arena arena(base);
    layout_shared(arena);
    threads_ = arena.take<char>(thread_bytes_ * plan_.threads.threads());
    return arena.used();
  }

 protected:
  // What one thread works with in one direction.
  struct Worker {
    int d, rank;  // rank: among the threads of its team
    Team* team;
    int64_t n;                 // rows of the team
    Range h_panels, r_panels;  // that the thread multiplies with, of plan_.h and plan_.r
    const A** pointers;        // [n] to the rows of the next product
    StoreRow<A>* store_rows;   // [n]
    A* tiles;                  // two
    PartsScratch parts;
  };

  template <class Params>
  Scan(const Params& p, const Kernels<A>& kernels, int max_threads)
      : Scan({p.seq, p.D, p.H, p.P, p.dtype}, {static_cast<int>(p.cell), slot_count(p.cell), gate_count(p.cell)}, kernels,
             plan_scan(scan_problem(p), kernels, max_threads)) {}
  Scan(const ScanSizes& sizes, const ScanCell& cell, const Kernels<A>& kernels, const ScanPlan<A>& plan)
      : kernels_(kernels),
        sizes_(sizes),
        seq_(sizes.seq),
        D_(sizes.D),
        cell_(cell.kind),
        slots_(cell.slots),
        gates_(cell.gates),
        storage_(storage_index(sizes.dtype)),
        size_(dtype_size(sizes.dtype)),
        converts_(static_cast<int64_t>(sizeof(A)) != size_),
        h_padded_(round_up(sizes.H, kernels.width)),
        p_padded_(round_up(sizes.P, kernels.width)),
        plan_(plan),
        projects_(plan_.r.shape.panels > 0),
        team_rows_(rows_of_team(plan_.threads, sizes.seq.B)) {
    parts_room_.include(plan_.h, team_rows_);
    parts_room_.include(plan_.r, team_rows_);
  }
  ~Scan() = default;  // never through a pointer to Scan

  // Takes all arrays but those of single threads.
  virtual void layout_shared(Arena& arena) = 0;
  // Packs share `share` of `shares` of the weights of all directions.
  virtual void pack_share(int share, int shares) const = 0;
  // All steps of one direction, for the rows and units of one thread.
  virtual void scan(int thread, int d, Teams& teams) const = 0;

  // The arrays of a Worker.
  void take_arrays(Arena& arena, Worker& w) const {
    w.pointers = arena.take<const A*>(team_rows_);
    w.store_rows = arena.take<StoreRow<A>>(team_rows_);
    w.tiles = reinterpret_cast<A*>(arena.take<char>(2 * kTileBytes));
    w.parts = parts_room_.take(arena);
  }
  Arena arena_of_thread(int thread) const { return Arena(threads_ + thread * thread_bytes_); }

  void set_place(int thread, int d, Teams& teams, Worker& w) const {
    const ThreadPlan& plan = plan_.threads;
    w.d = d;
    w.rank = thread % plan.split;
    w.team = &teams.teams[thread / plan.split];
    w.n = static_cast<int64_t>(w.team->rows.size());
    w.h_panels = share_of(plan_.h.shape.panels, plan.split, w.rank);
    w.r_panels = share_of(plan_.r.shape.panels, plan.split, w.rank);
  }
  // The rank's share of its team's rows, for what is done by row.
  Range rows_of(const Worker& w) const { return share_of(w.n, plan_.threads.split, w.rank); }
  // t of a step of the forward recurrence.
  int64_t time_of(const Worker& w, int64_t step) const { return w.d == 0 ? step : seq_.T - 1 - step; }

  // The units of panels of a matrix whose columns are those of units.
  static Range units_of_panels(const Range& panels, const Shape& shape) {
    return {std::min(shape.unit_vector(panels.first) * shape.width, shape.units),
            std::min(shape.unit_vector(panels.last) * shape.width, shape.units)};
  }
  // Adds stored numbers [units.first, units.last) to those of an array; scratch has room for them.
  void add_stored(const void* from, const Range& units, A* to, A* scratch) const {
    kernels_.load[storage_](stored_at(from, units.first, size_), scratch, units.size());
    for (int64_t u = 0; u < units.size(); ++u) to[units.first + u] += scratch[u];
  }
  // Stores these numbers of an array, which become zeros.
  void move_to_stored(A* from, const Range& units, void* to) const {
    kernels_.save[storage_](from + units.first, stored_at(to, units.first, size_), units.size());
    std::fill_n(from + units.first, units.size(), A(0));
  }

  // f(tile) for the tiles of w.pointers [n] with these panels of a matrix, at a step.
  template <class F>
  void for_tiles_of_step(const Worker& w, const Matrix<A>& m, const Range& panels, const A* init, int64_t n, int64_t step,
                         F&& f) const {
    for_tiles<A>({kernels_, m, init, w.pointers, n, panels_at(kernels_, m, n, panels, step)}, w.tiles, w.parts, f);
  }

  // False, with nothing done, if fewer threads were to be had than planned.
  bool run_on_threads() {
    Teams teams(plan_.threads, seq_, D_);
    return run_threads(plan_.threads.threads(), [this, &teams](int thread) {
      pack_share(thread, plan_.threads.threads());
      teams.all.wait();
      const Team& team = teams.teams[thread / plan_.threads.split];
      for (int d = team.first_direction; d < team.last_direction; ++d) scan(thread, d, teams);
      if (kernels_.parts) kernels_.parts->release();
    });
  }

  const Kernels<A>& kernels_;
  const ScanSizes sizes_;
  const Sequence& seq_;
  const int D_, cell_, slots_, gates_;
  const int storage_;    // storage_index of the dtype
  const int64_t size_;   // of a stored element
  const bool converts_;  // elements are stored in another type than A
  const int64_t h_padded_, p_padded_;
  const ScanPlan<A> plan_;
  const bool projects_;       // there is a W_hr
  const int64_t team_rows_;   // at most
  PartsRoom parts_room_;      // of a thread
  int64_t thread_bytes_ = 0;  // of the arrays of a thread; layout_shared sets it
  char* threads_ = nullptr;
};

// Rows of x for a product of many: in A, or as they are stored where the matrix is in parts.
template <class A>
class InputRows {
 public:
  // `most` rows of `depth` elements of a dtype.
  void take(Arena& arena, const Matrix<A>& m, int64_t most, int64_t depth, DType dtype) {
    storage_ = storage_index(dtype);
    depth_ = depth;
    const bool converts = dtype_size(dtype) != static_cast<int64_t>(sizeof(A)),
               packs = m.form == Form::kParts || m.form == Form::kDirectParts;
    stored_ = arena.take<const void*>(converts && packs ? most : 0);
    rows_ = arena.take<const A*>(converts && packs ? 0 : most);
    converted_ = arena.take<A>(converts && !packs ? most * depth : 0);
    kind_ = !converts ? kAsTheyLie : packs ? kStored : kConverted;
  }
  void clear() { count_ = 0; }
  void add(const Kernels<A>& kernels, const void* x) {
    if (kind_ == kStored) {
      stored_[count_++] = x;
      return;
    }
    if (kind_ == kConverted) {
      A* const converted = converted_ + count_ * depth_;
      kernels.load[storage_](x, converted, depth_);
      x = converted;
    }
    rows_[count_++] = static_cast<const A*>(x);
  }
  Product<A> product(const Kernels<A>& kernels, const Matrix<A>& m, const A* init, const Range& panels) const {
    Product<A> product{kernels, m, init, rows_, count_, {panels.first, panels.last}};
    if (kind_ == kStored) product.stored = stored_, product.storage = storage_;
    return product;
  }

 private:
  enum Kind { kAsTheyLie, kStored, kConverted };
  Kind kind_ = kAsTheyLie;
  int storage_ = 0;
  int64_t depth_ = 0, count_ = 0;
  const void** stored_ = nullptr;
  const A** rows_ = nullptr;
  A* converted_ = nullptr;
};

// h and c before step t of a row: what an earlier step stored, or the initial state.
struct StatesBefore {
  const void *h, *c;  // [P], [H] in the layer's dtype
};
// zeros: of H and P elements.
inline StatesBefore states_before(const Primal& p, const ScanSizes& s, int d, int64_t t, const TeamRow& row,
                                  const void* zeros) {
  const int64_t size = dtype_size(s.dtype), state = d * s.seq.B + row.b;
  const auto or_zeros = [&](const void* from) { return from ? from : zeros; };
  if (is_reset(p.modifier, row_of(s.seq, t, row.b))) {
    return {or_zeros(reset_row(p.modifier.h, t, d, row.b)), or_zeros(reset_row(p.modifier.c, t, d, row.b))};
  }
  if (row.steps_before(t, d) == 0) {
    return {p.h0 ? stored_at(p.h0, state * s.P, size) : zeros, p.c0 ? stored_at(p.c0, state * s.H, size) : zeros};
  }
  const int64_t previous = row_of(s.seq, d == 0 ? t - 1 : t + 1, row.b);
  return {stored_at(p.y, (previous * s.D + d) * s.P, size),
          p.cs ? stored_at(p.cs, (d * s.seq.N + previous) * s.H, size) : zeros};
}

// What a thread keeps of a modified step (core/modifier.h), for the rows of its team in one direction.
template <class A>
struct TeamOptions {
  StepRow<A>* rows;        // [n] of the active rows of a step, or null: steps are the cell's alone
  A *product, *candidate;  // [n, P padded], [n, H padded] factors, or null
  StepNumbers<A> numbers;

  // most: of the rows; p_padded, h_padded: P and H in whole vectors.
  void take(Arena& arena, const Modifier& m, int64_t most, int64_t p_padded, int64_t h_padded) {
    rows = modifies_steps(m) ? arena.take<StepRow<A>>(most) : nullptr;
    product = m.product ? arena.take<A>(most * p_padded) : nullptr;
    candidate = m.candidate ? arena.take<A>(most * h_padded) : nullptr;
  }
  // The factors of the rows of direction d, and the numbers.
  void load(const Kernels<A>& kernels, const Modifier& m, const std::vector<TeamRow>& team, int d, const ScanSizes& s) {
    const int64_t size = dtype_size(s.dtype), width = kernels.width;
    const auto copy = [&](const void* from, A* to, int64_t columns) {
      const int64_t padded = round_up(columns, width);
      for (size_t i = 0; i < team.size(); ++i) {
        std::fill_n(to + i * padded, padded, A(0));
        const void* const row = stored_at(from, (d * s.seq.B + team[i].b) * columns, size);
        kernels.load[storage_index(s.dtype)](row, to + i * padded, columns);
      }
    };
    if (m.product) copy(m.product, product, s.P);
    if (m.candidate) copy(m.candidate, candidate, s.H);
    const double none = std::numeric_limits<double>::infinity();
    numbers = {A(m.zoneout_h.share), A(m.zoneout_c.share), A(m.clip != 0 ? m.clip : none)};
  }
  // Of row i of the team, whose row in [D * N] is `saved`; with the factors of the product where the step is to apply them.
  StepRow<A> row(const Modifier& m, int64_t i, int64_t saved, const ScanSizes& s, int width, bool multiplies) const {
    return {m.zoneout_h.keep ? m.zoneout_h.keep + saved * s.H : nullptr,
            m.zoneout_c.keep ? m.zoneout_c.keep + saved * s.H : nullptr,
            candidate ? candidate + i * round_up(s.H, width) : nullptr,
            multiplies && product ? product + i * round_up(s.P, width) : nullptr};
  }
};

// Calls f with a value of the arithmetic type of a dtype.
template <class F>
void with_arithmetic(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64: return f(double{});
    case DType::kFloat32:
    case DType::kFloat16:
    case DType::kBFloat16: return f(float{});
  }
}

// Runs ScanOf<arithmetic type> on as many threads as there may be, or on one if OpenMP gives fewer than it offered.
// parts: what the scan takes beside.
template <template <class> class ScanOf, class Params, class... Parts>
void run_scan(Params& p, const Allocate& allocate, const Parts&... parts) {
  with_arithmetic(p.dtype, [&](auto a) {
    using A = decltype(a);
    const Kernels<A>& kernels = kernels_of<A>(selected_kernels());
    const auto run = [&](int threads) {
      ScanOf<A> scan(p, kernels, threads, parts...);
      p.workspace = allocate(scan.layout(nullptr));
      return scan.run();
    };
    if (!run(thread_limit())) run(1);
  });
}

}  // namespace fused_rnn::cpu
