// Forward of one layer of a formula: the input products of a chunk of steps, then those steps. Of a part of a call
// (FormulaPart): the steps of a range.
#include <cstring>
#include <memory>

#include "cpu/formula/scan.h"

namespace fused_rnn::cpu {

namespace {

template <class A>
class FormulaForwardScan final : public FormulaScan<A> {
 public:
  FormulaForwardScan(const FormulaForward& p, const Kernels<A>& kernels, int max_threads, const FormulaPart& part = {});
  bool run();

 private:
  using Base = FormulaScan<A>;
  using Row = FormulaForwardRow<A>;
  using Base::D_, Base::H_, Base::heads_, Base::items_, Base::kernels_, Base::plan_, Base::rec_columns_, Base::recurs_,
      Base::room_, Base::seq_, Base::size_, Base::storage_, Base::team_rows_, Base::traits_, Base::units_;

  struct Worker : Base::Worker {
    A* states;  // [copies of all states][n][room], of the team
    A* xg;      // [chunk rows][x columns], of the team
    Range x_panels;
    InputRows<A> x;    // [chunk rows, I]
    A *v, *ph;         // [Q][n][room], of the team: what phases take, and their results
    Row* rows;         // [n]
    const A** before;  // [n] the recurrent state
    A* reset;          // [states][n][room]: what resets put there; else not there
  };
  struct Direction : Base::Direction {
    Matrix<A> x;
    A *bias_x, *bias_h;
  };

  void layout_shared(Arena& arena) override;
  void pack_share(int share, int shares) const override;
  void scan(int thread, int d, Teams& teams) const override;

  int64_t chunk_rows() const { return chunk_steps_ * team_rows_; }
  bool has_copies(int s) const { return recurs_ && s == traits_.recurrent; }
  int copies() const { return traits_.states + recurs_; }
  // A row's state; a copied one's second copy lies behind all others.
  A* state(const Worker& w, int s, int64_t copy, int64_t i) const {
    const int64_t place = has_copies(s) && copy ? traits_.states : s;
    return w.states + (place * team_rows_ + i) * room_;
  }
  void lease_weights();
  void layout_direction(Arena& arena, int d);
  void take_arrays(Arena& arena, Worker& w) const;
  Worker make_worker(int thread, int d, Teams& teams) const;
  void start(Worker& w) const;
  template <class F>
  void for_kept(const Worker& w, int64_t step, F&& f) const;
  void start_again(Worker& w) const;
  void keep(const Worker& w, int64_t step) const;
  void project(Worker& w, int64_t begin, int64_t end) const;
  void load_columns(Worker& w, int64_t begin, int64_t end) const;
  void load_given(Worker& w, int64_t begin, int64_t end) const;
  int64_t gather(Worker& w, int64_t t, int64_t first_xg) const;
  const A* reset_state(const Worker& w, int s, int64_t t, int64_t b, int64_t active) const;
  void gather_row(Worker& w, int64_t i, int64_t t, int64_t xg_row, int64_t active) const;
  int64_t step(Worker& w, int64_t step, int64_t first_xg) const;
  void run_phase(Worker& w, int phase, int64_t active) const;
  int64_t matrices_of_direction() const { return 1 + heads_ + traits_.phases; }
  void zero_inactive(const Worker& w, int64_t row) const;
  void finish(Worker& w) const;

  const FormulaForward& p_;
  const FormulaPart part_;
  const int64_t first_, end_;  // steps
  const SavedRows saved_;
  int64_t own_columns_;  // of a row of input products
  int64_t x_columns_;    // of a row of xg: products, then given values
  int64_t chunk_steps_;
  std::unique_ptr<CacheLease[]> leases_;           // [D][matrices_of_direction]
  std::unique_ptr<std::atomic<bool>[]> infinite_;  // [D][matrices_of_direction]
  // Workspace.
  Direction directions_[2];
  A* zeros_;
  A* team_arrays_;
  int64_t team_elements_;
};

template <class A>
FormulaForwardScan<A>::FormulaForwardScan(const FormulaForward& p, const Kernels<A>& kernels, int max_threads,
                                          const FormulaPart& part)
    : Base(p, formula_problem(p, /*backward=*/false, p.training), kernels, max_threads),
      p_(p),
      part_(part),
      first_(part.again ? part.first : 0),
      end_(part.again ? part.end : p.seq.T),
      saved_(part.again ? part.saved : SavedRows{p.seq.N, {0, 0}}) {
  // A load of a whole vector may start at any unit of the last gate.
  own_columns_ = (traits_.input_gates - p.given_gates) * H_;
  x_columns_ = std::max(plan_.x.shape.columns(), traits_.input_gates * H_) + kernels.width;
  const int64_t step_bytes = team_rows_ * x_columns_ * static_cast<int64_t>(sizeof(A));
  const int64_t weight_bytes = plan_.x.shape.elements() * plan_.x.element_size();
  chunk_steps_ = steps_of_chunk(step_bytes, weight_bytes, p.seq.T);
  this->parts_room_.include(plan_.x, chunk_rows());
  leases_.reset(new CacheLease[D_ * matrices_of_direction()]);
  infinite_.reset(new std::atomic<bool>[D_ * matrices_of_direction()]());
  for (int d = 0; d < D_; ++d) {
    std::atomic<bool>* const infinite = &infinite_[d * matrices_of_direction()];
    directions_[d].x = plan_.x;
    directions_[d].x.source = p.weights[d].w_ih;
    directions_[d].x.infinite = infinite;
    directions_[d].heads = this->head_matrices(p.weights[d].w_hh, infinite + 1);
    directions_[d].phases = this->phase_matrices(p.weights[d], infinite + 1 + heads_);
  }
  if (!p.training || p.seq.T == 1 || part.again) lease_weights();
}

// What an inference, a step of a training loop, or a range of steps that runs again finds in the cache of packed weights,
// or leaves there.
template <class A>
void FormulaForwardScan<A>::lease_weights() {
  const auto lease = [](CacheLease& lease, Matrix<A>& m) {
    const Shape& s = m.shape;
    lease.take({m.source.data, s.depth, s.units, s.gates, s.width, m.source.storage, m.form, m.parts}, m.bytes(), s.panels);
    m.cached = lease.matrix();
  };
  for (int d = 0; d < D_; ++d) {
    CacheLease* const leases = &leases_[d * matrices_of_direction()];
    lease(leases[0], directions_[d].x);
    for (size_t k = 0; k < directions_[d].heads.size(); ++k) lease(leases[1 + k], directions_[d].heads[k]);
    for (int k = 0; k < traits_.phases; ++k) {
      if (this->is_product(k)) lease(leases[1 + heads_ + k], directions_[d].phases[k]);
    }
  }
}

template <class A>
void FormulaForwardScan<A>::layout_direction(Arena& arena, int d) {
  Direction& direction = directions_[d];
  const auto place = [&](Matrix<A>& m) {
    if (m.cached) {
      m.packed = static_cast<A*>(m.cached->aligned);
      m.tiles = static_cast<uint16_t*>(m.cached->aligned);
    } else {
      this->take_memory(arena, m);
    }
  };
  place(direction.x);
  for (Matrix<A>& m : direction.heads) place(m);
  for (Matrix<A>& m : direction.phases) place(m);
  direction.bias_x = arena.take<A>(plan_.x.shape.columns());
  direction.bias_h = arena.take<A>(heads_ * rec_columns_);
  this->layout_parameters(arena, direction);
}

template <class A>
void FormulaForwardScan<A>::layout_shared(Arena& arena) {
  for (int d = 0; d < D_; ++d) layout_direction(arena, d);
  zeros_ = arena.take<A>(room_);
  const int64_t products = chunk_rows() * x_columns_ + this->rec_elements();
  team_elements_ = round_up(copies() * team_rows_ * room_ + products + 2 * this->phase_elements(), 16);
  team_arrays_ = arena.take<A>(team_elements_ * plan_.threads.direction_teams * plan_.threads.batch_teams);
  Arena thread(nullptr);
  Worker counted;
  take_arrays(thread, counted);
  this->thread_bytes_ = thread.used();
}

template <class A>
void FormulaForwardScan<A>::take_arrays(Arena& arena, Worker& w) const {
  w.x.take(arena, plan_.x, chunk_rows(), p_.I, this->sizes_.dtype);
  w.rows = arena.take<Row>(team_rows_);
  w.reset = arena.take<A>(p_.reset_states[0].data ? traits_.states * team_rows_ * room_ : 0);
  w.before = arena.take<const A*>(team_rows_);
  Base::take_arrays(arena, w);
}

template <class A>
typename FormulaForwardScan<A>::Worker FormulaForwardScan<A>::make_worker(int thread, int d, Teams& teams) const {
  Worker w;
  this->set_place(thread, d, teams, directions_[d], w);
  w.x_panels = share_of(plan_.x.shape.panels, plan_.threads.split, w.rank);
  w.states = team_arrays_ + thread / plan_.threads.split * team_elements_;
  w.xg = w.states + copies() * team_rows_ * room_;
  w.rec = w.xg + chunk_rows() * x_columns_;
  w.v = w.rec + this->rec_elements();
  w.ph = w.v + this->phase_elements();
  Arena arena = this->arena_of_thread(thread);
  take_arrays(arena, w);
  if (p_.reset_states[0].data) std::fill_n(w.reset, traits_.states * team_rows_ * room_, A(0));
  return w;
}

template <class A>
void FormulaForwardScan<A>::pack_share(int share, int shares) const {
  for (int d = 0; d < D_; ++d) {
    const Direction& direction = directions_[d];
    const Range panels = share_of(plan_.x.shape.panels, shares, share);
    pack(kernels_, direction.x, panels.first, panels.last);
    this->pack_all(direction.heads, share, shares);
    this->pack_all(direction.phases, share, shares);
    if (d % shares != share) continue;
    const FormulaWeights& weights = p_.weights[d];
    const auto load = kernels_.load[storage_];
    std::fill_n(direction.bias_x, plan_.x.shape.columns(), A(0));
    std::fill_n(direction.bias_h, heads_ * rec_columns_, A(0));
    if (weights.b_ih) load(weights.b_ih, direction.bias_x, own_columns_);
    for (int k = 0; weights.b_hh && k < heads_; ++k) {
      for (int g = 0; g < traits_.recurrent_gates; ++g) {
        load(stored_at(weights.b_hh, g * H_ + k * units_, size_), direction.bias_h + k * rec_columns_ + g * units_, units_);
      }
    }
    this->load_parameters(weights, direction);
  }
}

// The rank's share of the rows gets its initial states.
template <class A>
void FormulaForwardScan<A>::start(Worker& w) const {
  const auto [begin, end] = this->rows_of(w);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = w.d * seq_.B + w.team->rows[i].b;
    for (int s = 0; s < traits_.states; ++s) {
      for (int copy = 0; copy <= has_copies(s); ++copy) std::fill_n(state(w, s, copy, i), room_, A(0));
      if (p_.states[s]) kernels_.load[storage_](stored_at(p_.states[s], row * H_, size_), state(w, s, 0, i), H_);
    }
  }
}

// f(i, s, state, kept) for the rank's share of the rows and all states: the state after the steps before step `step`, which
// is a multiple of `every`, and its place among the kept ones.
template <class A>
template <class F>
void FormulaForwardScan<A>::for_kept(const Worker& w, int64_t step, F&& f) const {
  const int64_t count = (seq_.T - 1) / part_.every, place = w.d * count + step / part_.every - 1;
  const auto [begin, end] = this->rows_of(w);
  for (int64_t i = begin; i < end; ++i) {
    const TeamRow& row = w.team->rows[i];
    const int64_t done = steps_done(seq_.T, row.length, w.d, step);
    for (int s = 0; s < traits_.states; ++s) {
      const int64_t kept = ((place * traits_.states + s) * seq_.B + row.b) * H_;
      f(i, s, state(w, s, done & 1, i), static_cast<A*>(part_.kept) + kept);
    }
  }
}

// The states after a step, if the next one is where they are kept.
template <class A>
void FormulaForwardScan<A>::keep(const Worker& w, int64_t step) const {
  if ((step + 1) % part_.every != 0 || step + 1 == seq_.T) return;
  for_kept(w, step + 1, [&](int64_t, int, const A* state, A* kept) { std::copy_n(state, H_, kept); });
}

// The rank's share of the rows gets the states before the range. Backward reads them where the step before would have
// stored them.
template <class A>
void FormulaForwardScan<A>::start_again(Worker& w) const {
  for_kept(w, first_, [&](int64_t i, int s, A* state, const A* kept) {
    std::copy_n(kept, H_, state);
    const TeamRow& row = w.team->rows[i];
    const int64_t done = steps_done(seq_.T, row.length, w.d, first_);
    void* const series = s == traits_.output ? p_.y : p_.series[s];
    if (done == 0 || !series) return;
    const int64_t last = row_of(seq_, time_of_last(row.length, w.d, done), row.b);
    kernels_.save[storage_](state, stored_at(series, (last * D_ + w.d) * H_, size_), H_);
  });
}

// The same where the products are there, in p_.columns: copies this rank's part, and adds the biases.
template <class A>
void FormulaForwardScan<A>::load_columns(Worker& w, int64_t begin, int64_t end) const {
  const Shape& shape = directions_[w.d].x.shape;
  const int64_t all = own_columns_, first = std::min(shape.columns_before(w.x_panels.first), all);
  const int64_t count = std::min(shape.columns_before(w.x_panels.last), all) - first;
  const A* const bias = directions_[w.d].bias_x + first;
  A* to = w.xg + first;
  for (int64_t step = begin; step < end; ++step) {
    const int64_t t = this->time_of(w, step);
    for (const TeamRow& row : w.team->rows) {
      if (t >= row.length) continue;
      const int64_t from = (w.d * seq_.N + row_of(seq_, t, row.b)) * all + first;
      kernels_.load[storage_](stored_at(p_.columns, from, size_), to, count);
      for (int64_t c = 0; c < count; ++c) to[c] += bias[c];
      to += x_columns_;
    }
  }
}

// The values of gates without weights, behind the products. The rank of the last panel copies them, after its products: the
// padding of that panel may lie where they do.
template <class A>
void FormulaForwardScan<A>::load_given(Worker& w, int64_t begin, int64_t end) const {
  const int64_t count = p_.given_gates * H_;
  if (count == 0 || w.x_panels.first == w.x_panels.last || w.x_panels.last < plan_.x.shape.panels) return;
  A* to = w.xg + own_columns_;
  for (int64_t step = begin; step < end; ++step) {
    const int64_t t = this->time_of(w, step);
    for (const TeamRow& row : w.team->rows) {
      if (t >= row.length) continue;
      kernels_.load[storage_](stored_at(p_.given, (w.d * seq_.N + row_of(seq_, t, row.b)) * count, size_), to, count);
      to += x_columns_;
    }
  }
}

// Input products of the active rows of steps [begin, end), in the order of the scan, into w.xg.
template <class A>
void FormulaForwardScan<A>::project(Worker& w, int64_t begin, int64_t end) const {
  if (p_.columns) return load_columns(w, begin, end);
  w.x.clear();
  for (int64_t step = begin; step < end; ++step) {
    const int64_t t = this->time_of(w, step);
    for (const TeamRow& row : w.team->rows) {
      if (t < row.length) w.x.add(kernels_, stored_at(p_.x, row_of(seq_, t, row.b) * p_.I, size_));
    }
  }
  const Matrix<A>& m = directions_[w.d].x;
  multiply<A>(w.x.product(kernels_, m, directions_[w.d].bias_x, w.x_panels), w.parts,
              {w.xg + m.shape.columns_before(w.x_panels.first), x_columns_, int64_t{m.shape.vectors} * m.shape.width,
               /*rows_first=*/true});
}

// What a state is before step t of batch row b, active row number `active`, which is reset.
template <class A>
const A* FormulaForwardScan<A>::reset_state(const Worker& w, int s, int64_t t, int64_t b, int64_t active) const {
  const void* const from = reset_row(p_.reset_states[s], t, w.d, b);
  if (!from) return zeros_;
  A* const to = w.reset + (s * team_rows_ + active) * room_;
  kernels_.load[storage_](from, to, H_);
  return to;
}

// Row i of the team, active at step t, as active row number `active`; xg_row: its row of input products.
template <class A>
void FormulaForwardScan<A>::gather_row(Worker& w, int64_t i, int64_t t, int64_t xg_row, int64_t active) const {
  const TeamRow& team_row = w.team->rows[i];
  const int64_t row = row_of(seq_, t, team_row.b), place = w.d * seq_.N + row;
  const int64_t copy = team_row.steps_before(t, w.d) & 1;
  const bool reset = is_reset(p_.modifier, row);
  Row& out = w.rows[active];
  out.x = w.xg + xg_row * x_columns_;
  out.rec = w.rec + active * heads_ * rec_columns_;
  for (int s = 0; s < traits_.states; ++s) {
    out.before[s] = reset ? reset_state(w, s, t, team_row.b, active) : state(w, s, copy, i);
    out.after[s] = state(w, s, 1 - copy, i);
    out.series[s] = stored_at(p_.series[s], (row * D_ + w.d) * H_, size_);
  }
  out.series[traits_.output] = stored_at(p_.y, (row * D_ + w.d) * H_, size_);
  for (int k = 0; k < traits_.phases; ++k) {
    out.v[k] = w.v + (k * team_rows_ + active) * room_;
    out.ph[k] = w.ph + (k * team_rows_ + active) * room_;
    out.v_series[k] = stored_at(p_.v[k], place * H_, size_);
  }
  out.saved = stored_at(p_.saved, saved_.at(w.d, row) * traits_.saved * H_, size_);
  w.before[active] = out.before[traits_.recurrent];
}

template <class A>
int64_t FormulaForwardScan<A>::gather(Worker& w, int64_t t, int64_t first_xg) const {
  int64_t active = 0;
  for (int64_t i = 0; i < w.n; ++i) {
    if (t < w.team->rows[i].length) {
      gather_row(w, i, t, first_xg + active, active);
      ++active;
    } else if (!seq_.offsets && w.rank == 0) {
      zero_inactive(w, row_of(seq_, t, w.team->rows[i].b));
    }
  }
  return active;
}

template <class A>
void FormulaForwardScan<A>::zero_inactive(const Worker& w, int64_t row) const {
  std::memset(stored_at(p_.y, (row * D_ + w.d) * H_, size_), 0, H_ * size_);
  for (int s = 0; s < traits_.states; ++s) {
    if (p_.series[s]) std::memset(stored_at(p_.series[s], (row * D_ + w.d) * H_, size_), 0, H_ * size_);
  }
  for (int k = 0; k < traits_.phases; ++k) {
    if (p_.v[k]) std::memset(stored_at(p_.v[k], (w.d * seq_.N + row) * H_, size_), 0, H_ * size_);
  }
}

// A phase of a step: the thread's panels of the product, or the norms of its share of the rows.
template <class A>
void FormulaForwardScan<A>::run_phase(Worker& w, int phase, int64_t active) const {
  const A* const v = w.v + phase * team_rows_ * room_;
  A* const ph = w.ph + phase * team_rows_ * room_;
  if (this->is_product(phase)) return this->multiply_phase(w, phase, v, active, ph);
  FormulaNorm<A> norm = this->norm_of(w, phase);
  const auto [begin, end] = share_of(active, plan_.threads.split, w.rank);
  for (int64_t i = begin; i < end; ++i) {
    norm.v = v + i * room_;
    norm.out = ph + i * room_;
    this->step_of(*p_.cell).norm(norm);
  }
}

// One step of the team's active rows; first_xg: its first row in w.xg. Returns the number of active rows.
template <class A>
int64_t FormulaForwardScan<A>::step(Worker& w, int64_t step, int64_t first_xg) const {
  const int64_t active = gather(w, this->time_of(w, step), first_xg);
  this->multiply_heads(w, w.before, active, directions_[w.d].bias_h, step);
  w.team->barrier.wait();
  const FormulaKernels<A>& cell = this->step_of(*p_.cell);
  const FormulaCall<Row> call = this->call_of(w, w.rows, active);
  this->for_levels(
      w, traits_.forward_levels, [&](int level) { cell.phase_input[level](call); }, [&](int k) { run_phase(w, k, active); });
  cell.forward(call);
  w.team->barrier.wait();
  return active;
}

template <class A>
void FormulaForwardScan<A>::finish(Worker& w) const {
  const auto [begin, end] = this->rows_of(w);
  for (int64_t i = begin; i < end; ++i) {
    const TeamRow& row = w.team->rows[i];
    for (int s = 0; s < traits_.states; ++s) {
      void* const to = stored_at(p_.last[s], (w.d * seq_.B + row.b) * H_, size_);
      kernels_.save[storage_](state(w, s, row.length & 1, i), to, H_);
    }
  }
}

template <class A>
void FormulaForwardScan<A>::scan(int thread, int d, Teams& teams) const {
  Worker w = make_worker(thread, d, teams);
  start(w);
  if (first_ > 0) start_again(w);
  for (int64_t begin = first_; begin < end_; begin += chunk_steps_) {
    const int64_t end = std::min(begin + chunk_steps_, end_);
    project(w, begin, end);
    load_given(w, begin, end);
    w.team->barrier.wait();
    int64_t first_xg = 0;
    for (int64_t s = begin; s < end; ++s) {
      first_xg += step(w, s, first_xg);
      if (part_.kept && !part_.again) keep(w, s);
    }
  }
  if (!part_.again) finish(w);
  w.team->barrier.wait();
}

template <class A>
bool FormulaForwardScan<A>::run() {
  prefer_huge_pages(p_.workspace, this->layout(p_.workspace));
  prefer_huge_pages(p_.y, seq_.N * D_ * H_ * size_);
  if (p_.saved) prefer_huge_pages(p_.saved, D_ * saved_.count * traits_.saved * H_ * size_);
  std::fill_n(zeros_, room_, A(0));
  return this->run_on_threads();
}

}  // namespace

void forward(FormulaForward& p, const Allocate& allocate) { run_scan<FormulaForwardScan>(p, allocate); }

void forward_part(FormulaForward& p, const FormulaPart& part, const Allocate& allocate) {
  run_scan<FormulaForwardScan>(p, allocate, part);
}

}  // namespace fused_rnn::cpu
