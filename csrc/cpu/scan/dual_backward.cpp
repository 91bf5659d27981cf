// Backward on dual numbers: the scan of backward.cpp for the values and the tangents of its rows at once.
//
//   dh[t]  = dy[t] + d_rec[t+1] W_hh + carry[t+1]
//   dh'[t] = dy'[t] + d_rec'[t+1] W_hh + d_rec[t+1] W_hh' + carry'[t+1]      ' marks a tangent
//
// then cells.h on dual numbers makes d_gates[t] and d_gates'[t]. The sums of the tangents go to memory, where the kernel
// finds them when it works on a tile of the values. With an output projection dh and dh' are completed first, and the same
// products with W_hr follow.
#include <cstring>

#include "cpu/scan/scan.h"

namespace fused_rnn::cpu {
namespace {

template <class A>
class DualBackwardScan final : public Scan<A> {
 public:
  DualBackwardScan(const DualBackwardParams& p, const Kernels<A>& kernels, int max_threads)
      : Base(p.value, kernels, max_threads),
        p_(p),
        halves_{p.value, p.tangent},
        primal_{states_of(p.value), states_of(p.tangent)},
        kernel_(kernels.dual_backward[cell_]),
        knows_dh_(!projects_ && p.value.d_h),
        moves_resets_(p.tangent.d_reset_h || p.tangent.d_reset_c) {}
  bool run();

 private:
  using Base = Scan<A>;
  using Base::cell_, Base::D_, Base::gates_, Base::h_padded_, Base::kernels_, Base::p_padded_, Base::plan_, Base::projects_,
      Base::seq_, Base::size_, Base::sizes_, Base::slots_, Base::storage_, Base::team_rows_, Base::time_of;
  static constexpr int kValue = 0, kTangent = 1;

  // What a thread has of the values, and of the tangents.
  struct Half {
    A* carry;               // [n, P padded], of the team
    A* dc;                  // [n, H padded], of the team
    A* dh;                  // [n, P padded], of the team; output projection only
    const A** next;         // [n] d_rec of each row's step done last, or a row of zeros
    const A** pointers;     // [n] the same of the active rows
    StoreRow<A>* complete;  // [n] of dh; output projection only
  };
  struct ResetPlace {
    int64_t i, row;
  };
  struct Worker : Base::Worker {
    Half halves[2];
    A* sums;           // [n, P or H padded] of the tangents, of the team
    DualRow<A>* rows;  // [n]
    Range units;       // of the thread's pointwise half
    ResetPlace* reset;
    int64_t resets;
  };
  // A matrix and its tangent, whose source is null where it is zeros.
  struct DualMatrix {
    Matrix<A> value, tangent;
  };

  static Primal states_of(const BackwardParams& p) { return {p.h0, p.c0, p.y, p.gates, p.cs, p.modifier, nullptr, nullptr}; }

  void layout_shared(Arena& arena) override;
  void pack_share(int share, int shares) const override;
  void scan(int thread, int d, Teams& teams) const override;

  void take_arrays(Arena& arena, Worker& w) const;
  Worker make_worker(int thread, int d, Teams& teams) const;
  void start(Worker& w) const;
  int64_t gather(Worker& w, int64_t t) const;
  void gather_half(Worker& w, int half, int64_t i, int64_t t, int64_t active, BackwardRow<A>& out) const;
  void step(Worker& w, int64_t step, int64_t active) const;
  void complete(Worker& w, int64_t step, int64_t active) const;
  void sum_tangents(Worker& w, const DualMatrix& m, const Range& panels, int64_t n, int64_t step, int64_t columns) const;
  template <class F>
  void for_sums(Worker& w, const Matrix<A>& m, const Range& panels, const A** rows, int64_t n, int64_t step, F&& f) const;
  void store(Worker& w, const Matrix<A>& m, const Range& panels, const A** rows, const StoreRow<A>* to, int64_t n,
             int64_t step, int64_t columns) const;
  void move_reset_gradients(Worker& w) const;
  void zero_inactive(const Worker& w, int64_t row) const;
  void finish(Worker& w) const;
  int64_t stored_gates(const Worker& w, int64_t row, int slot) const {
    return ((w.d * seq_.N + row) * slots_ + slot) * sizes_.H;
  }

  const DualBackwardParams& p_;
  const BackwardParams halves_[2];
  const Primal primal_[2];
  void (*const kernel_)(const DualCall<A>&);
  const bool knows_dh_;
  const bool moves_resets_;
  std::atomic<bool> infinite_[2][4] = {};  // Matrix::infinite
  // Workspace.
  struct {
    DualMatrix h, r;  // W_hh, W_hr
  } matrices_[2];
  A* zeros_;
  int64_t zeros_size_;
  A* team_state_;
  int64_t team_state_size_;
};

template <class A>
void DualBackwardScan<A>::layout_shared(Arena& arena) {
  for (int d = 0; d < D_; ++d) {
    auto& [h, r] = matrices_[d];
    const Weights &value = halves_[kValue].weights[d], &tangent = halves_[kTangent].weights[d];
    h = {plan_.h, plan_.h}, r = {plan_.r, plan_.r};
    h.value.source = value.w_hh, h.tangent.source = tangent.w_hh;
    r.value.source = value.w_hr, r.tangent.source = tangent.w_hr;
    int i = 0;
    for (Matrix<A>* m : {&h.value, &h.tangent, &r.value, &r.tangent}) {
      m->infinite = &infinite_[d][i++];
      m->packed = arena.take<A>(m->source.data ? m->packed_elements() : 0);
      m->tiles = arena.take<uint16_t>(m->source.data ? m->tile_elements() : 0);
    }
  }
  zeros_size_ = std::max(gates_ * sizes_.H, sizes_.P) + kernels_.width;
  zeros_ = arena.take<A>(zeros_size_);
  const int64_t padded = p_padded_ + h_padded_ + (projects_ ? p_padded_ : 0);
  team_state_size_ = round_up(team_rows_ * (2 * padded + std::max(h_padded_, p_padded_)), 16);
  team_state_ = arena.take<A>(team_state_size_ * plan_.threads.direction_teams * plan_.threads.batch_teams);
  Arena thread(nullptr);
  Worker counted;
  take_arrays(thread, counted);
  this->thread_bytes_ = thread.used();
}

template <class A>
void DualBackwardScan<A>::take_arrays(Arena& arena, Worker& w) const {
  for (Half& half : w.halves) {
    half.next = arena.take<const A*>(team_rows_);
    half.pointers = arena.take<const A*>(team_rows_);
    half.complete = arena.take<StoreRow<A>>(projects_ ? team_rows_ : 0);
  }
  w.rows = arena.take<DualRow<A>>(team_rows_);
  w.reset = arena.take<ResetPlace>(moves_resets_ ? team_rows_ : 0);
  w.resets = 0;
  Base::take_arrays(arena, w);
}

template <class A>
typename DualBackwardScan<A>::Worker DualBackwardScan<A>::make_worker(int thread, int d, Teams& teams) const {
  Worker w;
  this->set_place(thread, d, teams, w);
  A* at = team_state_ + thread / plan_.threads.split * team_state_size_;
  for (Half& half : w.halves) {
    half.carry = at;
    half.dc = half.carry + team_rows_ * p_padded_;
    half.dh = half.dc + team_rows_ * h_padded_;
    at = half.dh + (projects_ ? team_rows_ * p_padded_ : 0);
  }
  w.sums = at;
  w.units = projects_ ? this->units_of_panels(w.r_panels, plan_.r.shape) : this->units_of_panels(w.h_panels, plan_.h.shape);
  Arena arena = this->arena_of_thread(thread);
  take_arrays(arena, w);
  return w;
}

template <class A>
void DualBackwardScan<A>::pack_share(int share, int shares) const {
  for (int d = 0; d < D_; ++d) {
    const auto& [h, r] = matrices_[d];
    for (const Matrix<A>* m : {&h.value, &h.tangent, &r.value, &r.tangent}) {
      if (!m->source.data) continue;
      const Range panels = share_of(m->shape.panels, shares, share);
      pack(kernels_, *m, panels.first, panels.last);
    }
  }
}

// The rank's share of the rows gets the gradients of the last state.
template <class A>
void DualBackwardScan<A>::start(Worker& w) const {
  const auto [begin, end] = this->rows_of(w);
  for (int k : {kValue, kTangent}) {
    const BackwardParams& p = halves_[k];
    const Half& half = w.halves[k];
    for (int64_t i = 0; i < w.n; ++i) half.next[i] = zeros_;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t state = w.d * seq_.B + w.team->rows[i].b;
      std::fill_n(half.carry + i * p_padded_, p_padded_, A(0));
      std::fill_n(half.dc + i * h_padded_, h_padded_, A(0));
      if (p.dh_n) kernels_.load[storage_](stored_at(p.dh_n, state * p.P, size_), half.carry + i * p_padded_, p.P);
      if (p.dc_n) kernels_.load[storage_](stored_at(p.dc_n, state * p.H, size_), half.dc + i * h_padded_, p.H);
    }
  }
}

template <class A>
void DualBackwardScan<A>::zero_inactive(const Worker& w, int64_t row) const {
  if (seq_.offsets || w.rank != 0) return;
  for (const BackwardParams& p : halves_) {
    std::memset(stored_at(p.d_gates, stored_gates(w, row, 0), size_), 0, slots_ * p.H * size_);
    if (p.d_h && projects_) std::memset(stored_at(p.d_h, (w.d * seq_.N + row) * p.P, size_), 0, p.P * size_);
  }
}

// One half of row i of the team, active at step t, as active row number `active`.
template <class A>
void DualBackwardScan<A>::gather_half(Worker& w, int k, int64_t i, int64_t t, int64_t active, BackwardRow<A>& out) const {
  const BackwardParams& p = halves_[k];
  const Half& half = w.halves[k];
  const TeamRow& team_row = w.team->rows[i];
  const int64_t row = row_of(seq_, t, team_row.b), place = w.d * seq_.N + row, of_y = (row * D_ + w.d) * p.P;
  const bool reset = is_reset(p.modifier, row);
  A* const carry = half.carry + i * p_padded_;
  const void* const dy = p.dy ? stored_at(p.dy, of_y, size_) : zeros_;
  const auto [h, c] = states_before(primal_[k], sizes_, w.d, t, team_row, zeros_);
  out = {};
  out.gates = stored_at(p.gates, place * slots_ * p.H, size_);
  out.h_prev = h, out.c_prev = c;
  out.c = stored_at(p.cs, place * p.H, size_);
  out.y = stored_at(p.y, of_y, size_);
  out.dy = !projects_ ? dy : zeros_;
  if (k == kValue && knows_dh_) out.dh = stored_at(p.d_h, place * p.P, size_);
  out.carry = projects_ ? zeros_ : carry;
  out.carry_out = projects_ ? nullptr : carry;
  out.dc = half.dc + i * h_padded_;
  out.d_gates = stored_at(p.d_gates, stored_gates(w, row, 0), size_);
  out.reset = reset && !moves_resets_;  // else the kernel makes the gradients as of every other step
  half.pointers[active] = half.next[i];
  half.next[i] = reset ? zeros_ : static_cast<const A*>(stored_at(p.d_gates, stored_gates(w, row, slots_ - gates_), size_));
  if (p.d_cs) {  // beside what passes through the steps
    const A* const more = static_cast<const A*>(stored_at(p.d_cs, place * p.H, size_));
    for (int64_t u = w.units.first; u < w.units.last; ++u) out.dc[u] += more[u];
  }
  if (!projects_) return;
  const bool last_step = team_row.steps_before(t, w.d) == team_row.length - 1;
  half.complete[active] = {last_step ? carry : zeros_, dy, stored_at(p.d_h, place * p.P, size_), half.dh + i * p_padded_};
}

// The active rows of step t. Returns their number.
template <class A>
int64_t DualBackwardScan<A>::gather(Worker& w, int64_t t) const {
  int64_t active = 0;
  w.resets = 0;
  for (int64_t i = 0; i < w.n; ++i) {
    const TeamRow& team_row = w.team->rows[i];
    const int64_t row = row_of(seq_, t, team_row.b);
    if (t >= team_row.length) {
      zero_inactive(w, row);
      continue;
    }
    DualRow<A>& out = w.rows[active];
    gather_half(w, kValue, i, t, active, out.value);
    gather_half(w, kTangent, i, t, active, out.tangent);
    out.rec = w.sums + active * std::max(h_padded_, p_padded_);
    if (moves_resets_ && is_reset(halves_[kValue].modifier, row)) w.reset[w.resets++] = {i, row};
    ++active;
  }
  return active;
}

// f(tile) for tiles of the products of rows [n] with these panels; of zeros where all rows are zeros_.
template <class A>
template <class F>
void DualBackwardScan<A>::for_sums(Worker& w, const Matrix<A>& m, const Range& panels, const A** rows, int64_t n,
                                   int64_t step, F&& f) const {
  if (std::any_of(rows, rows + n, [&](const A* row) { return row != zeros_; })) {
    w.pointers = rows;
    this->for_tiles_of_step(w, m, panels, nullptr, n, step, f);
  } else if (n > 0 && panels.size() > 0) {
    f(Tile<A>{0, static_cast<int>(n), panels.first, panels.last, zeros_, 0});
  }
}

// The products, to their places in `to`.
template <class A>
void DualBackwardScan<A>::store(Worker& w, const Matrix<A>& m, const Range& panels, const A** rows, const StoreRow<A>* to,
                                int64_t n, int64_t step, int64_t columns) const {
  for_sums(w, m, panels, rows, n, step, [&](const Tile<A>& tile) {
    kernels_.store[storage_]({tile.sums, tile.stride, to + tile.row, tile.rows, columns, m.shape.unit_vector(tile.first),
                              m.shape.unit_vector(tile.last), /*rounded=*/false});
  });
}

// w.sums = tangents W + values W', of both halves' pointers; this rank's columns.
template <class A>
void DualBackwardScan<A>::sum_tangents(Worker& w, const DualMatrix& m, const Range& panels, int64_t n, int64_t step,
                                       int64_t columns) const {
  const int64_t padded = std::max(h_padded_, p_padded_);
  StoreRow<A>* const to = w.store_rows;
  for (int64_t i = 0; i < n; ++i) to[i] = {nullptr, nullptr, nullptr, w.sums + i * padded};
  if (m.tangent.source.data) {
    store(w, m.tangent, panels, w.halves[kValue].pointers, to, n, step, columns);
    for (int64_t i = 0; i < n; ++i) to[i].add = w.sums + i * padded;
  }
  store(w, m.value, panels, w.halves[kTangent].pointers, to, n, step, columns);
}

// The total gradients of the projected h, and their tangents: where the pointers of both halves are afterwards.
template <class A>
void DualBackwardScan<A>::complete(Worker& w, int64_t step, int64_t active) const {
  const DualMatrix& m = matrices_[w.d].h;
  sum_tangents(w, m, w.h_panels, active, step, sizes_.P);
  Half &value = w.halves[kValue], &tangent = w.halves[kTangent];
  store(w, m.value, w.h_panels, value.pointers, value.complete, active, step, sizes_.P);
  // A tile of all rows, whose sums are there.
  const int64_t padded = std::max(h_padded_, p_padded_), first = m.value.shape.unit_vector(w.h_panels.first);
  kernels_.store[storage_]({w.sums + first * kernels_.width, padded, tangent.complete, static_cast<int>(active), sizes_.P,
                            first, m.value.shape.unit_vector(w.h_panels.last), /*rounded=*/false});
  w.team->barrier.wait();
  for (Half& half : w.halves) {
    for (int64_t i = 0; i < active; ++i) half.pointers[i] = half.complete[i].out_arithmetic;
  }
}

// This rank's units of a step.
template <class A>
void DualBackwardScan<A>::step(Worker& w, int64_t step, int64_t active) const {
  if (projects_) complete(w, step, active);
  const DualMatrix& m = projects_ ? matrices_[w.d].r : matrices_[w.d].h;
  const Range& panels = projects_ ? w.r_panels : w.h_panels;
  sum_tangents(w, m, panels, active, step, sizes_.H);
  if (knows_dh_) {
    if (active > 0 && panels.size() > 0) {
      kernel_({nullptr, 0, w.rows, static_cast<int>(active), sizes_.H, m.value.shape.unit_vector(panels.first),
               m.value.shape.unit_vector(panels.last)});
    }
    return move_reset_gradients(w);
  }
  for_sums(w, m.value, panels, w.halves[kValue].pointers, active, step, [&](const Tile<A>& tile) {
    kernel_({tile.sums, tile.stride, w.rows + tile.row, tile.rows, sizes_.H, m.value.shape.unit_vector(tile.first),
             m.value.shape.unit_vector(tile.last)});
  });
  move_reset_gradients(w);
}

// What the step made for the state before it, this rank's units, goes to the state that a reset put there.
template <class A>
void DualBackwardScan<A>::move_reset_gradients(Worker& w) const {
  const BackwardParams& p = halves_[kTangent];
  for (int64_t k = 0; k < w.resets; ++k) {
    const auto [i, row] = w.reset[k];
    const int64_t at = w.d * seq_.N + row;
    Half &value = w.halves[kValue], &tangent = w.halves[kTangent];
    if (p.d_reset_h) {
      this->move_to_stored(tangent.carry + i * p_padded_, w.units, stored_at(p.d_reset_h, at * p.P, size_));
      std::fill_n(value.carry + i * p_padded_ + w.units.first, w.units.size(), A(0));
    }
    if (p.d_reset_c) {
      this->move_to_stored(tangent.dc + i * h_padded_, w.units, stored_at(p.d_reset_c, at * p.H, size_));
      std::fill_n(value.dc + i * h_padded_ + w.units.first, w.units.size(), A(0));
    }
  }
}

// Tangents of the gradients of the initial state.
template <class A>
void DualBackwardScan<A>::finish(Worker& w) const {
  const BackwardParams& p = halves_[kTangent];
  Half& tangent = w.halves[kTangent];
  for (int64_t i = 0; i < w.n; ++i) {
    for (Half& half : w.halves) half.pointers[i] = half.next[i];
    if (p.d_c0 && i % plan_.threads.split == w.rank) {
      const int64_t state = w.d * seq_.B + w.team->rows[i].b;
      kernels_.save[storage_](tangent.dc + i * h_padded_, stored_at(p.d_c0, state * p.H, size_), p.H);
    }
  }
  if (!p.d_h0) return;
  const Range& panels = w.h_panels;
  const DualMatrix& m = matrices_[w.d].h;
  sum_tangents(w, m, panels, w.n, 0, p.P);
  for (int64_t i = 0; i < w.n; ++i) {
    const TeamRow& row = w.team->rows[i];
    // With an output projection carry is the gradient of the last state, and used up by the row's last step.
    w.store_rows[i] = {projects_ && row.length > 0 ? zeros_ : tangent.carry + i * p_padded_, nullptr,
                       stored_at(p.d_h0, (w.d * seq_.B + row.b) * p.P, size_), nullptr};
  }
  const int64_t padded = std::max(h_padded_, p_padded_), first = m.value.shape.unit_vector(panels.first);
  kernels_.store[storage_]({w.sums + first * kernels_.width, padded, w.store_rows, static_cast<int>(w.n), p.P, first,
                            m.value.shape.unit_vector(panels.last), /*rounded=*/false});
}

template <class A>
void DualBackwardScan<A>::scan(int thread, int d, Teams& teams) const {
  Worker w = make_worker(thread, d, teams);
  start(w);
  w.team->barrier.wait();
  for (int64_t s = seq_.T - 1; s >= 0; --s) {
    step(w, s, gather(w, time_of(w, s)));
    w.team->barrier.wait();
  }
  finish(w);
  w.team->barrier.wait();
}

template <class A>
bool DualBackwardScan<A>::run() {
  prefer_huge_pages(p_.workspace, this->layout(p_.workspace));
  for (const BackwardParams& p : halves_) prefer_huge_pages(p.d_gates, D_ * seq_.N * slots_ * p.H * size_);
  std::fill_n(zeros_, zeros_size_, A(0));
  return this->run_on_threads();
}

}  // namespace

void dual_backward(DualBackwardParams& p, const Allocate& allocate) { run_scan<DualBackwardScan>(p, allocate); }

}  // namespace fused_rnn::cpu
