// Backward of one layer's recurrence of a formula: forward's scan the other way round.
//
//   rec[t] = d_rec[t+1] W_hh    the gradient of the recurrent state through the weights, then the cell's backward makes
//   d[t], d_states[t]           from it, dy[t] and d_states[t+1]; d_rec[t] is the last Gr blocks of d[t]'s gradients
//
// The phases of a step come in between, the last one first: the cell makes the gradient of a phase's result, and the phase
// the gradient of what it took.
//
// Float and double of one head read d_rec back from there; else the d_rec of two steps is kept, unrounded, head by head.
#include <cstring>
#include <memory>

#include "cpu/formula/scan.h"

namespace fused_rnn::cpu {
namespace {

template <class A>
class FormulaBackwardScan final : public FormulaScan<A> {
 public:
  FormulaBackwardScan(const FormulaBackward& p, const Kernels<A>& kernels, int max_threads, const BackwardPart& part = {});
  bool run();

 private:
  using Base = FormulaScan<A>;
  using Row = FormulaBackwardRow<A>;
  using Base::D_, Base::H_, Base::heads_, Base::items_, Base::kernels_, Base::plan_, Base::rec_columns_, Base::recurs_,
      Base::room_, Base::seq_, Base::size_, Base::storage_, Base::team_rows_, Base::traits_, Base::units_;

  struct RowPlace {
    int64_t i, row;
  };
  struct Worker : Base::Worker {
    A* d_states;       // [states][n][room], of the team
    A* d_rec;          // [2][n][Gr * H], of the team, where it is kept
    A *d_ph, *dv;      // [Q][n][room], of the team
    const A** next;    // [n] d_rec of each row's step done last, or zeros
    const A** active;  // [n] the same of the active rows
    Row* rows;         // [n]
    Range units;       // of the thread's items
    A* scratch;        // [room], where there are d_series
    // Places in the team and in memory of all active rows, and of rows that begin from a state whose gradient is asked for.
    RowPlace *places, *reset;  // [n]
    int64_t resets;
  };
  void layout_shared(Arena& arena) override;
  void pack_share(int share, int shares) const override;
  void scan(int thread, int d, Teams& teams) const override;

  int64_t d_rec_elements() const { return traits_.recurrent_gates * H_; }
  int64_t blocks() const { return traits_.gradients + traits_.parameters + traits_.phases; }  // of a row of d
  A* d_state(const Worker& w, int s, int64_t i) const { return w.d_states + (s * team_rows_ + i) * room_; }
  void take_arrays(Arena& arena, Worker& w) const;
  Worker make_worker(int thread, int d, Teams& teams) const;
  void start(Worker& w) const;
  int64_t gather(Worker& w, int64_t t) const;
  void gather_row(Worker& w, int64_t i, int64_t t, int64_t active) const;
  void multiply_rec(Worker& w, const A* const* rows, int64_t n, int64_t s) const;
  void gather_states(Worker& w, Row& out, int64_t i, int64_t t) const;
  void run_phase(Worker& w, int phase, int64_t active) const;
  void add_gradients_of_series(Worker& w, int64_t active) const;
  void move_reset_gradients(Worker& w) const;
  void step(Worker& w, int64_t s) const;
  void finish(Worker& w) const;

  const FormulaBackward& p_;
  const BackwardPart part_;
  int64_t first_ = 0, end_;  // the steps that threads do now; between their runs the workspace keeps what it holds
  SavedRows saved_;
  const int copies_;         // of a thread's state: 2 where it alternates between directions, else 1
  const bool moves_resets_;  // somebody asks for gradients of what resets put into the states
  const bool adds_series_;   // there are gradients of states after each step
  const bool keeps_rec_;
  const bool multiplies_;  // by W_hh: not where the only step is the last one, and nobody asks for the state before it
  std::unique_ptr<std::atomic<bool>[]> infinite_;  // [D][heads + Q]
  // Workspace.
  typename Base::Direction directions_[2];
  A* zeros_;
  int64_t zeros_size_;
  A* team_arrays_;
  int64_t team_elements_;
  int64_t worker_bytes_;
};

template <class A>
FormulaBackwardScan<A>::FormulaBackwardScan(const FormulaBackward& p, const Kernels<A>& kernels, int max_threads,
                                            const BackwardPart& part)
    : Base(p, formula_problem(p, /*backward=*/true, /*training=*/true), kernels, max_threads),
      p_(p),
      part_(part),
      end_(p.seq.T),
      saved_{p.seq.N, {0, 0}},
      copies_(part.again ? p.D : 1),
      moves_resets_(p.d_reset[0] != nullptr),
      adds_series_(std::any_of(p.d_series, p.d_series + traits_.states, [](const void* d) { return d != nullptr; })),
      keeps_rec_(recurs_ && (this->converts_ || heads_ > 1)),
      multiplies_(recurs_ && (p.seq.T > 1 || p.d_states[traits_.recurrent])) {
  const int64_t matrices = heads_ + traits_.phases;
  infinite_.reset(new std::atomic<bool>[D_ * matrices]());
  for (int d = 0; d < D_; ++d) {
    directions_[d].heads = this->head_matrices(p.weights[d].w_hh, &infinite_[d * matrices]);
    directions_[d].phases = this->phase_matrices(p.weights[d], &infinite_[d * matrices] + heads_);
  }
}

template <class A>
void FormulaBackwardScan<A>::layout_shared(Arena& arena) {
  for (int d = 0; d < D_; ++d) {
    for (Matrix<A>& m : directions_[d].heads) this->take_memory(arena, m);
    for (Matrix<A>& m : directions_[d].phases) this->take_memory(arena, m);
    this->layout_parameters(arena, directions_[d]);
  }
  zeros_size_ = std::max(d_rec_elements(), H_) + kernels_.width;
  zeros_ = arena.take<A>(zeros_size_);
  const int64_t of_recs = keeps_rec_ ? 2 * team_rows_ * d_rec_elements() : 0;
  team_elements_ =
      round_up(traits_.states * team_rows_ * room_ + this->rec_elements() + of_recs + 2 * this->phase_elements(), 16);
  team_arrays_ = arena.take<A>(copies_ * team_elements_ * plan_.threads.direction_teams * plan_.threads.batch_teams);
  Arena thread(nullptr);
  Worker counted;
  take_arrays(thread, counted);
  worker_bytes_ = round_up(thread.used(), 64);
  this->thread_bytes_ = copies_ * worker_bytes_;
}

template <class A>
void FormulaBackwardScan<A>::take_arrays(Arena& arena, Worker& w) const {
  w.next = arena.take<const A*>(team_rows_);
  w.active = arena.take<const A*>(team_rows_);
  w.rows = arena.take<Row>(team_rows_);
  w.scratch = arena.take<A>(adds_series_ ? room_ : 0);
  w.places = arena.take<RowPlace>(adds_series_ ? team_rows_ : 0);
  w.reset = arena.take<RowPlace>(moves_resets_ ? team_rows_ : 0);
  w.resets = 0;
  Base::take_arrays(arena, w);
}

template <class A>
typename FormulaBackwardScan<A>::Worker FormulaBackwardScan<A>::make_worker(int thread, int d, Teams& teams) const {
  Worker w;
  this->set_place(thread, d, teams, directions_[d], w);
  const int copy = d % copies_;
  w.d_states = team_arrays_ + (thread / plan_.threads.split * copies_ + copy) * team_elements_;
  w.rec = w.d_states + traits_.states * team_rows_ * room_;
  w.d_rec = w.rec + this->rec_elements();
  w.d_ph = w.d_rec + (keeps_rec_ ? 2 * team_rows_ * d_rec_elements() : 0);
  w.dv = w.d_ph + this->phase_elements();
  w.units = this->units_of(w.items);
  Arena arena(this->threads_ + thread * this->thread_bytes_ + copy * worker_bytes_);
  take_arrays(arena, w);
  return w;
}

template <class A>
void FormulaBackwardScan<A>::pack_share(int share, int shares) const {
  if (end_ < seq_.T) return;
  for (int d = 0; d < D_; ++d) {
    if (multiplies_) this->pack_all(directions_[d].heads, share, shares);
    this->pack_all(directions_[d].phases, share, shares);
    if (d % shares == share) this->load_parameters(p_.weights[d], directions_[d]);
  }
}

// The rank's share of the rows gets the gradients of the last states.
template <class A>
void FormulaBackwardScan<A>::start(Worker& w) const {
  for (int64_t i = 0; i < w.n; ++i) w.next[i] = zeros_;
  const auto [begin, end] = this->rows_of(w);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = w.d * seq_.B + w.team->rows[i].b;
    for (int s = 0; s < traits_.states; ++s) {
      std::fill_n(d_state(w, s, i), room_, A(0));
      if (p_.d_last[s]) kernels_.load[storage_](stored_at(p_.d_last[s], row * H_, size_), d_state(w, s, i), H_);
    }
  }
}

// The states before and after step t of row i of the team.
template <class A>
void FormulaBackwardScan<A>::gather_states(Worker& w, Row& out, int64_t i, int64_t t) const {
  const TeamRow& team_row = w.team->rows[i];
  const int64_t row = row_of(seq_, t, team_row.b), done = team_row.steps_before(t, w.d);
  const bool reset = is_reset(p_.modifier, row);
  const int64_t previous = done > 0 ? row_of(seq_, w.d == 0 ? t - 1 : t + 1, team_row.b) : 0;
  for (int s = 0; s < traits_.states; ++s) {
    out.d_states[s] = d_state(w, s, i);
    if (!traits_.reads_series[s]) continue;
    const void* const series = s == traits_.output ? p_.y : p_.series[s];
    const auto at = [&](int64_t of) { return stored_at(series, (of * D_ + w.d) * H_, size_); };
    const void* const initial = stored_at(p_.states[s], (w.d * seq_.B + team_row.b) * H_, size_);
    const void* const put = reset ? reset_row(p_.reset_states[s], t, w.d, team_row.b) : nullptr;
    out.after[s] = at(row);
    out.before[s] = put ? put : reset ? zeros_ : done > 0 ? at(previous) : initial ? initial : zeros_;
  }
}

// Row i of the team, active at step t, as active row number `active`.
template <class A>
void FormulaBackwardScan<A>::gather_row(Worker& w, int64_t i, int64_t t, int64_t active) const {
  const TeamRow& team_row = w.team->rows[i];
  const int64_t row = row_of(seq_, t, team_row.b), place = w.d * seq_.N + row;
  Row& out = w.rows[active];
  const bool reset = is_reset(p_.modifier, row);
  out.reset = reset && !moves_resets_;  // else the cell makes the gradients as of every other step
  if (reset && moves_resets_) w.reset[w.resets++] = {i, row};
  if (adds_series_) w.places[active] = {i, row};
  gather_states(w, out, i, t);
  for (int k = 0; k < traits_.phases; ++k) {
    out.v[k] = stored_at(p_.v[k], place * H_, size_);
    out.d_ph[k] = w.d_ph + (k * team_rows_ + active) * room_;
    out.dv[k] = w.dv + (k * team_rows_ + active) * room_;
  }
  out.saved = stored_at(p_.saved, saved_.at(w.d, row) * traits_.saved * H_, size_);
  out.dy = p_.dy ? stored_at(p_.dy, (row * D_ + w.d) * H_, size_) : zeros_;
  out.d_added = p_.d_added ? stored_at(p_.d_added, place * p_.added_blocks * H_, size_) : nullptr;
  out.rec = w.rec + active * heads_ * rec_columns_;
  out.d = stored_at(p_.d, place * blocks() * H_, size_);
  const int64_t parity = team_row.steps_before(t, w.d) & 1;
  out.d_rec = keeps_rec_ ? w.d_rec + (parity * team_rows_ + i) * d_rec_elements() : nullptr;
  w.active[active] = w.next[i];
  const void* const stored_rec = stored_at(out.d, (traits_.gradients - traits_.recurrent_gates) * H_, size_);
  w.next[i] = reset ? zeros_ : keeps_rec_ ? out.d_rec : static_cast<const A*>(stored_rec);
}

template <class A>
int64_t FormulaBackwardScan<A>::gather(Worker& w, int64_t t) const {
  int64_t active = 0;
  w.resets = 0;
  for (int64_t i = 0; i < w.n; ++i) {
    if (t < w.team->rows[i].length) {
      gather_row(w, i, t, active++);
    } else if (!seq_.offsets && w.rank == 0) {
      const int64_t row = w.d * seq_.N + row_of(seq_, t, w.team->rows[i].b);
      std::memset(stored_at(p_.d, row * blocks() * H_, size_), 0, blocks() * H_ * size_);
    }
  }
  return active;
}

// The thread's panels of the product of rows [n] of d_rec and W_hh, to w.rec. At the last step all rows are zeros: so is
// their product.
template <class A>
void FormulaBackwardScan<A>::multiply_rec(Worker& w, const A* const* rows, int64_t n, int64_t s) const {
  if (!std::all_of(rows, rows + n, [&](const A* row) { return row == zeros_; })) {
    return this->multiply_heads(w, rows, n, nullptr, s);
  }
  const auto [begin, end] = share_of(n, plan_.threads.split, w.rank);
  std::fill_n(w.rec + begin * heads_ * rec_columns_, (end - begin) * heads_ * rec_columns_, A(0));
}

// dv of a phase from d_ph: the thread's panels of the product, or the norms of its share of the rows.
template <class A>
void FormulaBackwardScan<A>::run_phase(Worker& w, int phase, int64_t active) const {
  const A* const d_ph = w.d_ph + phase * team_rows_ * room_;
  A* const dv = w.dv + phase * team_rows_ * room_;
  if (this->is_product(phase)) return this->multiply_phase(w, phase, d_ph, active, dv);
  FormulaNorm<A> norm = this->norm_of(w, phase);
  const auto [begin, end] = share_of(active, plan_.threads.split, w.rank);
  for (int64_t i = begin; i < end; ++i) {
    norm.v_stored = w.rows[i].v[phase];
    norm.d = d_ph + i * room_;
    norm.out = dv + i * room_;
    this->step_of(*p_.cell).norm_gradient(norm);
  }
}

// The gradients of states that come from outside, to the thread's units.
template <class A>
void FormulaBackwardScan<A>::add_gradients_of_series(Worker& w, int64_t active) const {
  for (int s = 0; s < traits_.states; ++s) {
    if (!p_.d_series[s]) continue;
    for (int64_t k = 0; k < active; ++k) {
      const auto [i, row] = w.places[k];
      this->add_stored(stored_at(p_.d_series[s], (row * D_ + w.d) * H_, size_), w.units, d_state(w, s, i), w.scratch);
    }
  }
}

// What the step made for the states before it, the thread's units, goes to the states that a reset put there.
template <class A>
void FormulaBackwardScan<A>::move_reset_gradients(Worker& w) const {
  for (int64_t k = 0; k < w.resets; ++k) {
    const auto [i, row] = w.reset[k];
    for (int s = 0; s < traits_.states; ++s) {
      this->move_to_stored(d_state(w, s, i), w.units, stored_at(p_.d_reset[s], (w.d * seq_.N + row) * H_, size_));
    }
  }
}

template <class A>
void FormulaBackwardScan<A>::step(Worker& w, int64_t s) const {
  const int64_t active = gather(w, this->time_of(w, s));
  multiply_rec(w, w.active, active, s);
  w.team->barrier.wait();
  if (adds_series_) add_gradients_of_series(w, active);
  const FormulaKernels<A>& cell = this->step_of(*p_.cell);
  const FormulaCall<Row> call = this->call_of(w, w.rows, active);
  this->for_levels(
      w, traits_.backward_levels, [&](int level) { cell.phase_gradient[level](call); },
      [&](int k) { run_phase(w, k, active); });
  cell.backward(call);
  move_reset_gradients(w);
  w.team->barrier.wait();
}

// Gradients of the initial states.
template <class A>
void FormulaBackwardScan<A>::finish(Worker& w) const {
  const bool passes = recurs_ && p_.d_states[traits_.recurrent];
  if (passes) multiply_rec(w, w.next, w.n, 0);
  w.team->barrier.wait();
  const auto [begin, end] = this->rows_of(w);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = w.d * seq_.B + w.team->rows[i].b;
    A* const recurrent = d_state(w, traits_.recurrent, i);
    for (int64_t u = 0; passes && u < H_; ++u) {
      recurrent[u] += w.rec[(i * heads_ + u / units_) * rec_columns_ + u % units_];
    }
    for (int s = 0; s < traits_.states; ++s) {
      if (p_.d_states[s]) kernels_.save[storage_](d_state(w, s, i), stored_at(p_.d_states[s], row * H_, size_), H_);
    }
  }
}

template <class A>
void FormulaBackwardScan<A>::scan(int thread, int d, Teams& teams) const {
  Worker w = make_worker(thread, d, teams);
  if (end_ == seq_.T) start(w);
  w.team->barrier.wait();
  for (int64_t s = end_ - 1; s >= first_; --s) step(w, s);
  if (first_ == 0) finish(w);
  w.team->barrier.wait();
}

template <class A>
bool FormulaBackwardScan<A>::run() {
  prefer_huge_pages(p_.workspace, this->layout(p_.workspace));
  prefer_huge_pages(p_.d, D_ * seq_.N * blocks() * H_ * size_);
  std::fill_n(zeros_, zeros_size_, A(0));
  if (!part_.again) return this->run_on_threads();
  for (end_ = seq_.T; end_ > 0; end_ = first_) {
    first_ = (end_ - 1) / part_.every * part_.every;
    saved_ = part_.again(first_, end_);
    if (!this->run_on_threads()) return false;
  }
  return true;
}

}  // namespace

void backward(FormulaBackward& p, const Allocate& allocate) { run_scan<FormulaBackwardScan>(p, allocate); }

void backward_in_parts(FormulaBackward& p, const BackwardPart& part, const Allocate& allocate) {
  run_scan<FormulaBackwardScan>(p, allocate, part);
}

}  // namespace fused_rnn::cpu
