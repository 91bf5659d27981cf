// Backward of one layer's recurrence, the scan of forward.cpp the other way round:
//
//   dh[t] = dy[t] + d_rec[t+1] W_hh (tile by tile) + what goes past the weights (GRU's z)   then cells.h on the tile ->
//   d_gates[t]
//
// d_rec, the gradient of the recurrent product, is the last G slots of d_gates: for float and double it is read back from
// there, 16-bit dtypes keep a copy of two steps that is not rounded. With an output projection dh[t] is completed first, and
// its product with W_hr is the tile that the cell works on.
#include <cstring>

#include "cpu/cpu.h"
#include "cpu/scan/scan.h"

namespace fused_rnn::cpu {
namespace {

template <class A>
class BackwardScan {
 public:
  BackwardScan(const BackwardParams& p, const Kernels<A>& kernels, int max_threads);
  int64_t workspace_bytes() { return layout(nullptr); }
  const Plan& plan() const { return plan_; }
  bool run();

 private:
  // What one thread works with in one direction.
  struct Worker {
    int d, rank;
    Team* team;
    int64_t n;                // rows of the team
    A* carry;                 // [n, P padded], of the team
    A* dc;                    // [n, H padded]
    A* dh;                    // [n, P padded], output projection only
    A* d_rec[2];              // [n, G * H], 16-bit dtypes only
    const A** next;           // [n] of each row its d_rec of the step done last (a row of zeros where there is none)
    const A** pointers;       // [n]
    BackwardRow<A>* rows;     // [n]
    StoreRow<A>* store_rows;  // [n]
    A* tile;
    SplitRows split;
  };

  Matrix<A> make_matrix(const Shape& shape) const;
  int64_t layout(void* base);
  Worker make_worker(int thread, int d, Teams& teams) const;
  void scan(Worker& w) const;
  void start(Worker& w) const;
  int64_t gather(Worker& w, int64_t t) const;
  void step(Worker& w, int64_t step, int64_t active) const;
  void store_sums(Worker& w, int64_t step, int64_t active) const;
  void zero_inactive(const Worker& w, int64_t row) const;
  void finish(Worker& w) const;
  int64_t stored_gates(const Worker& w, int64_t row, int slot) const {
    return ((w.d * p_.seq.N + row) * slots_ + slot) * p_.H;
  }
  int64_t stored_y(const Worker& w, int64_t row) const { return (row * p_.D + w.d) * p_.P; }

  const BackwardParams& p_;
  const Kernels<A>& kernels_;
  const int storage_, cell_, slots_, gates_;
  const int64_t size_;  // of a stored element
  const bool copies_;   // d_rec apart from d_gates
  const Shape h_shape_, r_shape_;
  const int64_t h_padded_, p_padded_;
  const Matrix<A> h_matrix_, r_matrix_;  // forms, without memory
  Plan plan_;
  int64_t team_rows_;
  SplitRoom split_room_;                   // of a thread
  std::atomic<bool> infinite_[2][2] = {};  // of the two matrices
  // Workspace.
  struct {
    Matrix<A> h, r;  // W_hh, W_hr
  } matrices_[2];
  A* zeros_;
  int64_t zeros_size_;
  A* team_state_;
  int64_t team_state_size_;
  char* threads_;
  int64_t thread_bytes_;
};

template <class A>
BackwardScan<A>::BackwardScan(const BackwardParams& p, const Kernels<A>& kernels, int max_threads)
    : p_(p),
      kernels_(kernels),
      storage_(storage_index(p.dtype)),
      cell_(static_cast<int>(p.cell)),
      slots_(slot_count(p.cell)),
      gates_(gate_count(p.cell)),
      size_(dtype_size(p.dtype)),
      copies_(sizeof(A) != static_cast<size_t>(size_)),
      h_shape_(gates_ * p.H, p.P, 1, kernels.width),
      r_shape_(p.weights[0].w_hr.data ? Shape(p.P, p.H, 1, kernels.width) : Shape()),
      h_padded_(round_up(p.H, kernels.width)),
      p_padded_(round_up(p.P, kernels.width)),
      h_matrix_(make_matrix(h_shape_)),
      r_matrix_(make_matrix(r_shape_)) {
  plan_ =
      choose_plan({p.seq.T, p.seq.B, p.D, gates_ * p.H, 0, h_shape_.columns(), h_shape_.panels, r_shape_.panels ? 2 : 1,
                   h_matrix_.element_size(), h_matrix_.products(), 0, kernels.split ? kernels.split->rate : 1, max_threads});
  plan_.form = h_matrix_.form;
  team_rows_ = rows_of_team(plan_, p.seq.B);
  split_room_.include(h_matrix_, team_rows_);
  split_room_.include(r_matrix_, team_rows_);
}

template <class A>
Matrix<A> BackwardScan<A>::make_matrix(const Shape& shape) const {
  Matrix<A> m;
  m.shape = shape;
  m.straight = true;
  m.storage = storage_;
  m.parts = split_parts(storage_, /*rounded_rows=*/false);
  m.form = choose_form(
      {shape.depth, shape.columns(), p_.seq.B, p_.seq.T * p_.seq.B, gains_from_parts(kernels_, storage_), m.parts});
  // A straight matrix can be used as it lies where its rows are whole vectors of the arithmetic type.
  const bool whole = shape.units % kernels_.width == 0 && size_ == static_cast<int64_t>(sizeof(A));
  if (m.form == Form::kDirect && !whole) m.form = Form::kPacked;
  return m;
}

template <class A>
int64_t BackwardScan<A>::layout(void* base) {
  Arena arena(base);
  for (int d = 0; d < p_.D; ++d) {
    matrices_[d] = {h_matrix_, r_matrix_};
    matrices_[d].h.source = p_.weights[d].w_hh.data;
    matrices_[d].r.source = p_.weights[d].w_hr.data;
    int i = 0;
    for (Matrix<A>* m : {&matrices_[d].h, &matrices_[d].r}) {
      m->infinite = &infinite_[d][i++];
      m->packed = arena.take<A>(m->packed_elements());
      m->split = arena.take<uint16_t>(m->split_elements());
    }
  }
  zeros_size_ = std::max(gates_ * p_.H, p_.P) + kernels_.width;
  zeros_ = arena.take<A>(zeros_size_);
  const int64_t padded = p_padded_ + h_padded_ + (r_shape_.panels ? p_padded_ : 0);
  team_state_size_ = round_up(team_rows_ * (padded + (copies_ ? 2 * gates_ * p_.H : 0)), 16);
  team_state_ = arena.take<A>(team_state_size_ * plan_.direction_teams * plan_.batch_teams);
  Arena thread(nullptr);
  thread.take<const A*>(team_rows_);
  thread.take<const A*>(team_rows_);
  thread.take<BackwardRow<A>>(team_rows_);
  thread.take<StoreRow<A>>(team_rows_);
  thread.take<char>(2 * kTileBytes);
  split_room_.take(thread);
  thread_bytes_ = thread.used();
  threads_ = arena.take<char>(thread_bytes_ * plan_.threads());
  return arena.used();
}

template <class A>
typename BackwardScan<A>::Worker BackwardScan<A>::make_worker(int thread, int d, Teams& teams) const {
  Worker w;
  const int team = thread / plan_.split;
  w.d = d;
  w.rank = thread % plan_.split;
  w.team = &teams.teams[team];
  w.n = static_cast<int64_t>(w.team->rows.size());
  w.carry = team_state_ + team * team_state_size_;
  w.dc = w.carry + team_rows_ * p_padded_;
  w.dh = w.dc + team_rows_ * h_padded_;
  w.d_rec[0] = w.dh + (r_shape_.panels ? team_rows_ * p_padded_ : 0);
  w.d_rec[1] = w.d_rec[0] + team_rows_ * gates_ * p_.H;
  Arena arena(threads_ + thread * thread_bytes_);
  w.next = arena.take<const A*>(team_rows_);
  w.pointers = arena.take<const A*>(team_rows_);
  w.rows = arena.take<BackwardRow<A>>(team_rows_);
  w.store_rows = arena.take<StoreRow<A>>(team_rows_);
  w.tile = reinterpret_cast<A*>(arena.take<char>(2 * kTileBytes));
  w.split = split_room_.take(arena);
  return w;
}

// The rank's share of the rows gets the gradients of the last state.
template <class A>
void BackwardScan<A>::start(Worker& w) const {
  for (int64_t i = 0; i < w.n; ++i) w.next[i] = zeros_;
  for (int64_t i = share_begin(w.n, plan_.split, w.rank); i < share_begin(w.n, plan_.split, w.rank + 1); ++i) {
    const int64_t state = w.d * p_.seq.B + w.team->rows[i].b;
    std::fill_n(w.carry + i * p_padded_, p_padded_, A(0));
    std::fill_n(w.dc + i * h_padded_, h_padded_, A(0));
    if (p_.dh_n) kernels_.load[storage_](stored_at(p_.dh_n, state * p_.P, size_), w.carry + i * p_padded_, p_.P);
    if (p_.dc_n) kernels_.load[storage_](stored_at(p_.dc_n, state * p_.H, size_), w.dc + i * h_padded_, p_.H);
  }
}

template <class A>
void BackwardScan<A>::zero_inactive(const Worker& w, int64_t row) const {
  if (p_.seq.offsets || w.rank != 0) return;
  std::memset(stored_at(p_.d_gates, stored_gates(w, row, 0), size_), 0, slots_ * p_.H * size_);
  if (p_.d_h) std::memset(stored_at(p_.d_h, (w.d * p_.seq.N + row) * p_.P, size_), 0, p_.P * size_);
}

// The active rows of step t: w.pointers their d_rec of the step done before, w.rows and w.store_rows their places. Returns
// their number.
template <class A>
int64_t BackwardScan<A>::gather(Worker& w, int64_t t) const {
  int64_t active = 0;
  for (int64_t i = 0; i < w.n; ++i) {
    const TeamRow& team_row = w.team->rows[i];
    const int64_t b = team_row.b, row = row_of(p_.seq, t, b);
    if (t >= team_row.length) {
      zero_inactive(w, row);
      continue;
    }
    const int64_t done = team_row.steps_before(t, w.d);
    const int64_t state = w.d * p_.seq.B + b, saved = (w.d * p_.seq.N + row) * p_.H;
    const void *h_prev = zeros_, *c_prev = zeros_;
    BackwardRow<A>& out = w.rows[active];
    out.reset = is_reset(p_.modifier, row);
    if (!out.reset && done > 0) {
      const int64_t previous = row_of(p_.seq, w.d == 0 ? t - 1 : t + 1, b);
      h_prev = stored_at(p_.y, stored_y(w, previous), size_);
      c_prev = stored_at(p_.cs, (w.d * p_.seq.N + previous) * p_.H, size_);
    } else if (!out.reset) {
      if (p_.h0) h_prev = stored_at(p_.h0, state * p_.P, size_);
      if (p_.c0) c_prev = stored_at(p_.c0, state * p_.H, size_);
    }
    out.gates = stored_at(p_.gates, stored_gates(w, row, 0), size_);
    out.h_prev = h_prev;
    out.c_prev = c_prev;
    out.c = stored_at(p_.cs, saved, size_);
    out.y = stored_at(p_.y, stored_y(w, row), size_);
    const void* dy = p_.dy ? stored_at(p_.dy, stored_y(w, row), size_) : zeros_;
    out.dy = r_shape_.panels ? zeros_ : dy;
    out.carry = r_shape_.panels ? zeros_ : w.carry + i * p_padded_;
    out.carry_out = r_shape_.panels ? nullptr : w.carry + i * p_padded_;
    out.dc = w.dc + i * h_padded_;
    out.d_gates = stored_at(p_.d_gates, stored_gates(w, row, 0), size_);
    out.d_rec = copies_ ? w.d_rec[done & 1] + i * gates_ * p_.H : nullptr;
    const A* done_rec =
        copies_ ? out.d_rec : static_cast<const A*>(stored_at(p_.d_gates, stored_gates(w, row, slots_ - gates_), size_));
    w.pointers[active] = w.next[i];
    w.next[i] = out.reset ? zeros_ : done_rec;
    if (r_shape_.panels) {
      const A* carry = done == team_row.length - 1 ? w.carry + i * p_padded_ : zeros_;
      w.store_rows[active] = {carry, dy, stored_at(p_.d_h, (w.d * p_.seq.N + row) * p_.P, size_), w.dh + i * p_padded_};
    }
    ++active;
  }
  return active;
}

// This rank's columns of pointers W_hh, stored to the places in w.store_rows.
template <class A>
void BackwardScan<A>::store_sums(Worker& w, int64_t step, int64_t active) const {
  const int64_t first = share_begin(h_shape_.panels, plan_.split, w.rank);
  const int64_t last = share_begin(h_shape_.panels, plan_.split, w.rank + 1);
  const Matrix<A>& m = matrices_[w.d].h;
  for_tiles<A>(kernels_, m, nullptr, w.pointers, active, panels_at(kernels_, m, active, first, last, step), w.tile, w.split,
               [&](int64_t begin, int count, int64_t p, int64_t end, const A* tile, int64_t stride) {
                 kernels_.store[storage_]({tile, stride, w.store_rows + begin, count, p_.P, h_shape_.unit_vector(p),
                                           h_shape_.unit_vector(end), false});
               });
}

// This rank's units of a step.
template <class A>
void BackwardScan<A>::step(Worker& w, int64_t step, int64_t active) const {
  const bool projected = r_shape_.panels > 0;
  const Shape& shape = projected ? r_shape_ : h_shape_;
  if (projected) {
    store_sums(w, step, active);
    w.team->barrier.wait();
    for (int64_t i = 0; i < active; ++i) w.pointers[i] = w.store_rows[i].out_arithmetic;
  }
  const int64_t first = share_begin(shape.panels, plan_.split, w.rank);
  const int64_t last = share_begin(shape.panels, plan_.split, w.rank + 1);
  const Matrix<A>& m = projected ? matrices_[w.d].r : matrices_[w.d].h;
  for_tiles<A>(kernels_, m, nullptr, w.pointers, active, panels_at(kernels_, m, active, first, last, step), w.tile, w.split,
               [&](int64_t begin, int count, int64_t p, int64_t end, const A* tile, int64_t stride) {
                 kernels_.backward[cell_][storage_](
                     {tile, stride, w.rows + begin, count, p_.H, shape.unit_vector(p), shape.unit_vector(end)});
               });
}

// Gradients of the initial state.
template <class A>
void BackwardScan<A>::finish(Worker& w) const {
  for (int64_t i = 0; i < w.n; ++i) {
    const TeamRow& row = w.team->rows[i];
    const int64_t state = w.d * p_.seq.B + row.b;
    w.pointers[i] = w.next[i];
    // With an output projection carry is the gradient of the last state, and used up by the row's last step.
    w.store_rows[i] = {r_shape_.panels && row.length > 0 ? zeros_ : w.carry + i * p_padded_, nullptr,
                       stored_at(p_.d_h0, state * p_.P, size_), nullptr};
    if (p_.d_c0 && i % plan_.split == w.rank) {
      kernels_.save[storage_](w.dc + i * h_padded_, stored_at(p_.d_c0, state * p_.H, size_), p_.H);
    }
  }
  store_sums(w, 0, w.n);
}

template <class A>
void BackwardScan<A>::scan(Worker& w) const {
  start(w);
  w.team->barrier.wait();
  for (int64_t s = p_.seq.T - 1; s >= 0; --s) {
    step(w, s, gather(w, w.d == 0 ? s : p_.seq.T - 1 - s));
    w.team->barrier.wait();
  }
  finish(w);
  w.team->barrier.wait();
}

template <class A>
bool BackwardScan<A>::run() {
  prefer_huge_pages(p_.workspace, layout(p_.workspace));
  prefer_huge_pages(p_.d_gates, p_.D * p_.seq.N * slots_ * p_.H * size_);
  std::fill_n(zeros_, zeros_size_, A(0));
  Teams teams(plan_, p_.seq, p_.D);
  return run_threads(plan_.threads(), [&](int thread) {
    const int parts = plan_.threads();
    for (int d = 0; d < p_.D; ++d) {
      const auto& [h, r] = matrices_[d];
      pack(kernels_, h, share_begin(h_shape_.panels, parts, thread), share_begin(h_shape_.panels, parts, thread + 1));
      pack(kernels_, r, share_begin(r_shape_.panels, parts, thread), share_begin(r_shape_.panels, parts, thread + 1));
    }
    teams.all.wait();
    const Team& team = teams.teams[thread / plan_.split];
    for (int d = team.first_direction; d < team.last_direction; ++d) {
      Worker w = make_worker(thread, d, teams);
      scan(w);
    }
    if (kernels_.split) kernels_.split->release();
  });
}

}  // namespace

Plan backward_plan(const BackwardParams& p) {
  return with_arithmetic(p.dtype, [&](auto a) {
    using A = decltype(a);
    return BackwardScan<A>(p, kernels_of<A>(selected_kernels()), thread_limit()).plan();
  });
}

void backward(BackwardParams& p, const Allocate& allocate) {
  with_arithmetic(p.dtype, [&](auto a) {
    using A = decltype(a);
    const Kernels<A>& kernels = kernels_of<A>(selected_kernels());
    const auto run = [&](int threads) {
      BackwardScan<A> scan(p, kernels, threads);
      p.workspace = allocate(scan.workspace_bytes());
      return scan.run();
    };
    if (!run(thread_limit())) run(1);
    return 0;
  });
}

}  // namespace fused_rnn::cpu
