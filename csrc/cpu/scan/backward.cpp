// Backward of one layer's recurrence, the scan of forward.cpp the other way round:
//
//   dh[t] = dy[t] + d_rec[t+1] W_hh + carry[t+1]    tile by tile; cells.h then works on the tile, and makes d_gates[t]
//
// d_rec is the gradient of the recurrent product, the last G slots of d_gates. Float and double read it back from there;
// 16-bit dtypes keep the d_rec of two steps unrounded. carry is the gradient of h that goes past the weights (GRU's z).
// With an output projection dh[t] is the gradient of the projected h. It is completed first, and its product with W_hr is
// the tile that the cell works on.
#include <cstring>

#include "cpu/scan/checkpoint.h"
#include "cpu/scan/scan.h"

namespace fused_rnn::cpu {
namespace {

template <class A>
class BackwardScan final : public Scan<A> {
 public:
  BackwardScan(const BackwardParams& p, const Kernels<A>& kernels, int max_threads, const BackwardPart& part = {})
      : Base(p, kernels, max_threads),
        p_(p),
        kernel_((modifies_steps(p.modifier) ? kernels.backward_modified : kernels.backward)[cell_][storage_]),
        part_(part),
        end_(p.seq.T),
        saved_{p.seq.N, {0, 0}},
        copies_(part.again ? p.D : 1),
        multiplies_(p.seq.T > 1 || p.d_h0),
        moves_resets_(p.d_reset_h || p.d_reset_c) {}
  bool run();

 private:
  using Base = Scan<A>;
  using Base::cell_, Base::converts_, Base::D_, Base::gates_, Base::h_padded_, Base::kernels_, Base::p_padded_, Base::plan_,
      Base::projects_, Base::seq_, Base::size_, Base::sizes_, Base::slots_, Base::storage_, Base::team_rows_, Base::time_of;

  struct RowPlace {
    int64_t i, row;
  };
  struct Worker : Base::Worker {
    A* carry;              // [n, P padded], of the team
    A* dc;                 // [n, H padded]
    A* dh;                 // [n, P padded], output projection only
    A* d_rec[2];           // [n, G * H], of two steps, where the dtype is not A
    const A** next;        // [n] d_rec of each row's step done last, or a row of zeros
    BackwardRow<A>* rows;  // [n]
    Range units;           // of the thread's pointwise half
    A* scratch;            // [H], where d_cs is there
    // Places in the team and in memory of what a step does beside the cell: [n] all active rows for d_cs, and rows that
    // begin from a state whose gradient is asked for.
    RowPlace *active, *reset;
    int64_t resets;
    TeamOptions<A> options;
  };

  void layout_shared(Arena& arena) override;
  void pack_share(int share, int shares) const override;
  void scan(int thread, int d, Teams& teams) const override;

  void take_arrays(Arena& arena, Worker& w) const;
  Worker make_worker(int thread, int d, Teams& teams) const;
  void start(Worker& w) const;
  int64_t gather(Worker& w, int64_t t) const;
  void gather_row(Worker& w, int64_t i, int64_t t, int64_t active) const;
  void step(Worker& w, int64_t step, int64_t active) const;
  void add_gradients_of_c(Worker& w, int64_t active) const;
  void move_reset_gradients(Worker& w) const;
  template <class F>
  void for_sums(const Worker& w, const Matrix<A>& m, const Range& panels, int64_t active, int64_t step, F&& f) const;
  void store_sums(Worker& w, int64_t step, int64_t active) const;
  void zero_inactive(const Worker& w, int64_t row) const;
  void finish(Worker& w) const;
  int64_t stored_gates(const Worker& w, int64_t row, int slot) const {
    return ((w.d * seq_.N + row) * slots_ + slot) * p_.H;
  }
  // Of the team's row i, or null.
  const A* factors_of_product(const Worker& w, int64_t i) const {
    return w.options.product ? w.options.product + i * p_padded_ : nullptr;
  }
  int64_t stored_y(const Worker& w, int64_t row) const { return (row * D_ + w.d) * p_.P; }

  const BackwardParams& p_;
  void (*const kernel_)(const BackwardCall<A>&);  // the pointwise half of a step
  const BackwardPart part_;
  int64_t first_ = 0, end_;  // the steps that threads do now; between their runs the workspace keeps what it holds
  SavedRows saved_;          // of gates and cs
  const int copies_;         // of a thread's state: 2 where it alternates between directions, else 1
  const bool multiplies_;    // by W_hh: not where the only step is the last one, and nobody asks for d_h0
  const bool moves_resets_;  // somebody asks for gradients of what resets put into a state
  std::atomic<bool> infinite_[2][2] = {};  // Matrix::infinite
  // Workspace.
  struct {
    Matrix<A> h, r;  // W_hh, W_hr
  } matrices_[2];
  A* zeros_;
  int64_t zeros_size_;
  A* team_state_;
  int64_t team_state_size_;
  int64_t worker_bytes_;
};

template <class A>
void BackwardScan<A>::layout_shared(Arena& arena) {
  for (int d = 0; d < D_; ++d) {
    matrices_[d] = {plan_.h, plan_.r};
    matrices_[d].h.source = p_.weights[d].w_hh;
    matrices_[d].r.source = p_.weights[d].w_hr;
    int i = 0;
    for (Matrix<A>* m : {&matrices_[d].h, &matrices_[d].r}) {
      m->infinite = &infinite_[d][i++];
      m->packed = arena.take<A>(m->packed_elements());
      m->tiles = arena.take<uint16_t>(m->tile_elements());
    }
  }
  zeros_size_ = std::max(gates_ * p_.H, p_.P) + kernels_.width;
  zeros_ = arena.take<A>(zeros_size_);
  const int64_t padded = p_padded_ + h_padded_ + (projects_ ? p_padded_ : 0);
  team_state_size_ = round_up(team_rows_ * (padded + (converts_ ? 2 * gates_ * p_.H : 0)), 16);
  team_state_ = arena.take<A>(copies_ * team_state_size_ * plan_.threads.direction_teams * plan_.threads.batch_teams);
  Arena thread(nullptr);
  Worker counted;
  take_arrays(thread, counted);
  worker_bytes_ = round_up(thread.used(), 64);
  this->thread_bytes_ = copies_ * worker_bytes_;
}

template <class A>
void BackwardScan<A>::take_arrays(Arena& arena, Worker& w) const {
  w.next = arena.take<const A*>(team_rows_);
  w.rows = arena.take<BackwardRow<A>>(team_rows_);
  w.scratch = arena.take<A>(p_.d_cs ? h_padded_ : 0);
  w.active = arena.take<RowPlace>(p_.d_cs ? team_rows_ : 0);
  w.reset = arena.take<RowPlace>(moves_resets_ ? team_rows_ : 0);
  w.resets = 0;
  w.options.take(arena, p_.modifier, team_rows_, p_padded_, h_padded_);
  Base::take_arrays(arena, w);
}

template <class A>
typename BackwardScan<A>::Worker BackwardScan<A>::make_worker(int thread, int d, Teams& teams) const {
  Worker w;
  this->set_place(thread, d, teams, w);
  const int copy = d % copies_;
  w.carry = team_state_ + (thread / plan_.threads.split * copies_ + copy) * team_state_size_;
  w.dc = w.carry + team_rows_ * p_padded_;
  w.dh = w.dc + team_rows_ * h_padded_;
  w.d_rec[0] = w.dh + (projects_ ? team_rows_ * p_padded_ : 0);
  w.d_rec[1] = w.d_rec[0] + team_rows_ * gates_ * p_.H;
  w.units = projects_ ? this->units_of_panels(w.r_panels, plan_.r.shape) : this->units_of_panels(w.h_panels, plan_.h.shape);
  Arena arena(this->threads_ + thread * this->thread_bytes_ + copy * worker_bytes_);
  take_arrays(arena, w);
  if (w.options.rows) w.options.load(kernels_, p_.modifier, w.team->rows, d, sizes_);
  return w;
}

template <class A>
void BackwardScan<A>::pack_share(int share, int shares) const {
  if (end_ < seq_.T) return;
  for (int d = 0; d < D_; ++d) {
    for (const Matrix<A>* m : {&matrices_[d].h, &matrices_[d].r}) {
      if (m == &matrices_[d].h && !multiplies_) continue;
      const Range panels = share_of(m->shape.panels, shares, share);
      pack(kernels_, *m, panels.first, panels.last);
    }
  }
}

// The rank's share of the rows gets the gradients of the last state.
template <class A>
void BackwardScan<A>::start(Worker& w) const {
  for (int64_t i = 0; i < w.n; ++i) w.next[i] = zeros_;
  const auto [begin, end] = this->rows_of(w);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t state = w.d * seq_.B + w.team->rows[i].b;
    std::fill_n(w.carry + i * p_padded_, p_padded_, A(0));
    std::fill_n(w.dc + i * h_padded_, h_padded_, A(0));
    if (p_.dh_n) kernels_.load[storage_](stored_at(p_.dh_n, state * p_.P, size_), w.carry + i * p_padded_, p_.P);
    if (p_.dc_n) kernels_.load[storage_](stored_at(p_.dc_n, state * p_.H, size_), w.dc + i * h_padded_, p_.H);
  }
}

template <class A>
void BackwardScan<A>::zero_inactive(const Worker& w, int64_t row) const {
  if (seq_.offsets || w.rank != 0) return;
  std::memset(stored_at(p_.d_gates, stored_gates(w, row, 0), size_), 0, slots_ * p_.H * size_);
  if (p_.d_h) std::memset(stored_at(p_.d_h, (w.d * seq_.N + row) * p_.P, size_), 0, p_.P * size_);
}

// Row i of the team, active at step t, as active row number `active`.
template <class A>
void BackwardScan<A>::gather_row(Worker& w, int64_t i, int64_t t, int64_t active) const {
  const TeamRow& team_row = w.team->rows[i];
  const int64_t row = row_of(seq_, t, team_row.b), state = w.d * seq_.B + team_row.b;
  const int64_t done = team_row.steps_before(t, w.d);
  BackwardRow<A>& out = w.rows[active];
  const bool reset = is_reset(p_.modifier, row);
  out.reset = reset && !moves_resets_;  // else the kernel makes the gradients as of every other step
  out.h_prev = out.c_prev = zeros_;
  if (reset) {
    if (const void* h = reset_row(p_.modifier.h, t, w.d, team_row.b)) out.h_prev = h;
    if (const void* c = reset_row(p_.modifier.c, t, w.d, team_row.b)) out.c_prev = c;
    if (moves_resets_) w.reset[w.resets++] = {i, row};
  } else if (done > 0) {
    const int64_t previous = row_of(seq_, w.d == 0 ? t - 1 : t + 1, team_row.b);
    out.h_prev = stored_at(p_.y, stored_y(w, previous), size_);
    const bool is_first = first_ > 0 && time_of(w, first_) == t;
    out.c_prev =
        is_first ? stored_at(part_.c_before, state * p_.H, size_) : stored_at(p_.cs, saved_.at(w.d, previous) * p_.H, size_);
  } else {
    if (p_.h0) out.h_prev = stored_at(p_.h0, state * p_.P, size_);
    if (p_.c0) out.c_prev = stored_at(p_.c0, state * p_.H, size_);
  }
  A* const carry = w.carry + i * p_padded_;
  const void* const dy = p_.dy ? stored_at(p_.dy, stored_y(w, row), size_) : zeros_;
  out.gates = stored_at(p_.gates, saved_.at(w.d, row) * slots_ * p_.H, size_);
  out.c = stored_at(p_.cs, saved_.at(w.d, row) * p_.H, size_);
  out.y = stored_at(p_.y, stored_y(w, row), size_);
  out.dy = projects_ ? zeros_ : dy;
  out.carry = projects_ ? zeros_ : carry;
  out.carry_out = projects_ ? nullptr : carry;
  out.dc = w.dc + i * h_padded_;
  out.d_gates = stored_at(p_.d_gates, stored_gates(w, row, 0), size_);
  out.dh = p_.d_h && !projects_ ? stored_at(p_.d_h, (w.d * seq_.N + row) * p_.P, size_) : nullptr;
  out.d_rec = converts_ ? w.d_rec[done & 1] + i * gates_ * p_.H : nullptr;
  const void* const stored_rec = stored_at(p_.d_gates, stored_gates(w, row, slots_ - gates_), size_);
  w.pointers[active] = w.next[i];
  w.next[i] = reset ? zeros_ : converts_ ? out.d_rec : static_cast<const A*>(stored_rec);
  if (p_.d_cs) w.active[active] = {i, row};
  if (w.options.rows) {
    w.options.rows[active] =
        w.options.row(p_.modifier, i, w.d * seq_.N + row, sizes_, kernels_.width, /*multiplies=*/!projects_);
  }
  if (!projects_) return;
  const bool last_step = done == team_row.length - 1;
  w.store_rows[active] = {last_step ? carry : zeros_, dy, stored_at(p_.d_h, (w.d * seq_.N + row) * p_.P, size_),
                          w.dh + i * p_padded_, factors_of_product(w, i)};
}

// The active rows of step t: their places in w.rows and w.store_rows, and in w.pointers the d_rec of the step done before.
// Returns their number.
template <class A>
int64_t BackwardScan<A>::gather(Worker& w, int64_t t) const {
  int64_t active = 0;
  w.resets = 0;
  for (int64_t i = 0; i < w.n; ++i) {
    const TeamRow& team_row = w.team->rows[i];
    if (t < team_row.length) {
      gather_row(w, i, t, active++);
    } else {
      zero_inactive(w, row_of(seq_, t, team_row.b));
    }
  }
  return active;
}

// f(tile) for tiles of the products of w.pointers with these panels. At the last step the rows are zeros, and so are their
// products: no step after them has a gradient.
template <class A>
template <class F>
void BackwardScan<A>::for_sums(const Worker& w, const Matrix<A>& m, const Range& panels, int64_t active, int64_t step,
                               F&& f) const {
  if (std::any_of(w.pointers, w.pointers + active, [&](const A* row) { return row != zeros_; })) {
    this->for_tiles_of_step(w, m, panels, nullptr, active, step, f);
  } else if (active > 0 && panels.size() > 0) {
    f(Tile<A>{0, static_cast<int>(active), panels.first, panels.last, zeros_, 0});
  }
}

// This rank's columns of the product of w.pointers and W_hh, to the places in w.store_rows.
template <class A>
void BackwardScan<A>::store_sums(Worker& w, int64_t step, int64_t active) const {
  const Matrix<A>& m = matrices_[w.d].h;
  for_sums(w, m, w.h_panels, active, step, [&](const Tile<A>& tile) {
    kernels_.store[storage_]({tile.sums, tile.stride, w.store_rows + tile.row, tile.rows, p_.P,
                              m.shape.unit_vector(tile.first), m.shape.unit_vector(tile.last), /*rounded=*/false});
  });
}

// The gradients of c that come from outside, to this rank's units.
template <class A>
void BackwardScan<A>::add_gradients_of_c(Worker& w, int64_t active) const {
  for (int64_t k = 0; k < active; ++k) {
    const auto [i, row] = w.active[k];
    this->add_stored(stored_at(p_.d_cs, (w.d * seq_.N + row) * p_.H, size_), w.units, w.dc + i * h_padded_, w.scratch);
  }
}

// What the step made for the state before it, this rank's units, goes to the state that a reset put there.
template <class A>
void BackwardScan<A>::move_reset_gradients(Worker& w) const {
  for (int64_t k = 0; k < w.resets; ++k) {
    const auto [i, row] = w.reset[k];
    const int64_t at = w.d * seq_.N + row;
    if (p_.d_reset_h) this->move_to_stored(w.carry + i * p_padded_, w.units, stored_at(p_.d_reset_h, at * p_.P, size_));
    if (p_.d_reset_c) this->move_to_stored(w.dc + i * h_padded_, w.units, stored_at(p_.d_reset_c, at * p_.H, size_));
  }
}

// This rank's units of a step.
template <class A>
void BackwardScan<A>::step(Worker& w, int64_t step, int64_t active) const {
  if (p_.d_cs) add_gradients_of_c(w, active);
  if (projects_) {
    store_sums(w, step, active);
    w.team->barrier.wait();
    for (int64_t i = 0; i < active; ++i) w.pointers[i] = w.store_rows[i].out_arithmetic;
  }
  const Matrix<A>& m = projects_ ? matrices_[w.d].r : matrices_[w.d].h;
  const Range& panels = projects_ ? w.r_panels : w.h_panels;
  for_sums(w, m, panels, active, step, [&](const Tile<A>& tile) {
    BackwardCall<A> call{tile.sums,
                         tile.stride,
                         w.rows + tile.row,
                         tile.rows,
                         p_.H,
                         m.shape.unit_vector(tile.first),
                         m.shape.unit_vector(tile.last)};
    if (w.options.rows) call.options = w.options.rows + tile.row, call.numbers = &w.options.numbers;
    kernel_(call);
  });
  move_reset_gradients(w);
}

// Gradients of the initial state.
template <class A>
void BackwardScan<A>::finish(Worker& w) const {
  for (int64_t i = 0; i < w.n; ++i) {
    const TeamRow& row = w.team->rows[i];
    const int64_t state = w.d * seq_.B + row.b;
    w.pointers[i] = w.next[i];
    // With an output projection carry is the gradient of the last state, and used up by the row's last step.
    w.store_rows[i] = {projects_ && row.length > 0 ? zeros_ : w.carry + i * p_padded_, nullptr,
                       stored_at(p_.d_h0, state * p_.P, size_), nullptr, factors_of_product(w, i)};
    if (p_.d_c0 && i % plan_.threads.split == w.rank) {
      kernels_.save[storage_](w.dc + i * h_padded_, stored_at(p_.d_c0, state * p_.H, size_), p_.H);
    }
  }
  if (p_.d_h0) store_sums(w, 0, w.n);
}

template <class A>
void BackwardScan<A>::scan(int thread, int d, Teams& teams) const {
  Worker w = make_worker(thread, d, teams);
  if (end_ == seq_.T) start(w);
  w.team->barrier.wait();
  for (int64_t s = end_ - 1; s >= first_; --s) {
    step(w, s, gather(w, time_of(w, s)));
    w.team->barrier.wait();
  }
  if (first_ == 0) finish(w);
  w.team->barrier.wait();
}

template <class A>
bool BackwardScan<A>::run() {
  prefer_huge_pages(p_.workspace, this->layout(p_.workspace));
  prefer_huge_pages(p_.d_gates, D_ * seq_.N * slots_ * p_.H * size_);
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

void backward(BackwardParams& p, const Allocate& allocate) { run_scan<BackwardScan>(p, allocate); }

void backward_in_parts(BackwardParams& p, const BackwardPart& part, const Allocate& allocate) {
  run_scan<BackwardScan>(p, allocate, part);
}

}  // namespace fused_rnn::cpu
