// Forward of one layer: the input projection of a chunk of steps, then those steps, for the rows and units of one thread.
//
//   gates[t] = x[t] W_ih^T + b    of a chunk of steps at a time, so that it stays in cache
//            + h[t-1] W_hh^T      tile by tile; cells.h then works on the tile
//
// Each row has two copies of h: a step reads one and writes the other, so that a team meets once a step.
//
// A scan of tangents (ForwardParams::primal) is the same with another kernel: gates, h, c, x and the biases are tangents.
#include <cstring>

#include "cpu/scan/checkpoint.h"
#include "cpu/scan/layer_weights.h"
#include "cpu/scan/scan.h"

namespace fused_rnn::cpu {
namespace {

template <class A>
class ForwardScan final : public Scan<A> {
 public:
  ForwardScan(const ForwardParams& p, const Kernels<A>& kernels, int max_threads, const ForwardPart& part = {});
  bool run();

 private:
  using Base = Scan<A>;
  using Base::cell_, Base::D_, Base::gates_, Base::h_padded_, Base::kernels_, Base::p_padded_, Base::plan_, Base::projects_,
      Base::seq_, Base::size_, Base::sizes_, Base::slots_, Base::storage_, Base::team_rows_, Base::time_of;

  struct Worker : Base::Worker {
    A* h[2];               // [n, P padded], of the team
    A* c;                  // [n, H padded]
    A* u;                  // [n, H padded], o tanh(c) before the output projection
    ProductStore<A> xg;    // [chunk rows] input projection, of the thread's panels
    InputRows<A> x;        // [chunk rows, I]
    ForwardRow<A>* rows;   // [n]
    A *reset_h, *reset_c;  // [n, P padded], [n, H padded]: of rows that are reset to a state of their own; else not there
    TeamOptions<A> options;
    PrimalRow* primal;  // [n] of a scan of tangents
    A* masked;          // [n, P padded]: h with the factors of the product, where there are any
    LayerWeights<A> weights;
  };

  void layout_shared(Arena& arena) override;
  void pack_share(int share, int shares) const override;
  void scan(int thread, int d, Teams& teams) const override;

  int64_t chunk_rows() const { return chunk_steps_ * team_rows_; }
  void take_arrays(Arena& arena, Worker& w) const;
  Worker make_worker(int thread, int d, Teams& teams) const;
  void start(Worker& w) const;
  void start_again(Worker& w, int64_t i) const;
  void keep_c(const Worker& w, int64_t step) const;
  void project(Worker& w, int64_t begin, int64_t end) const;
  void load_columns(Worker& w, int64_t begin, int64_t end) const;
  int64_t gather(Worker& w, int64_t t) const;
  void read_given_states(ForwardRow<A>& out, int64_t state) const;
  int64_t step(Worker& w, int64_t step, int64_t first_xg) const;
  void project_output(Worker& w, int64_t step, int64_t active) const;
  void zero_inactive(const Worker& w, int64_t row) const;
  void reset(Worker& w, int64_t t, int64_t b, int64_t active) const;
  void set_options(Worker& w, int64_t i, int64_t place, int64_t active) const;
  void set_primal(Worker& w, int64_t i, int64_t t, int64_t active) const;
  void save_c(const Worker& w, int64_t active) const;
  void finish(Worker& w) const;

  const ForwardParams& p_;
  void (*const kernel_)(const ForwardCall<A>&);  // the pointwise half of a step
  const ForwardPart part_;
  const int64_t first_, end_;  // steps
  const SavedRows saved_;
  const int c_storage_;  // of c0 and c_n
  const int64_t c_size_;
  const bool reads_given_states_;  // a single step of all rows reads h0 and c0 where they lie
  int64_t chunk_steps_;
  int64_t max_columns_;  // of the panels of a thread
  CachedLayerWeights<A> cache_;
  // Workspace.
  LayerWeights<A> weights_[2];
  A* zeros_;
  A* team_state_;
  int64_t team_state_size_;
};

// The pointwise half of a step.
template <class A>
auto kernel_of(const ForwardParams& p, const Kernels<A>& kernels) {
  const int cell = static_cast<int>(p.cell);
  return p.primal ? kernels.tangents[cell]
                  : (modifies_steps(p.modifier) ? kernels.forward_modified : kernels.forward)[cell][storage_index(p.dtype)];
}

template <class A>
ForwardScan<A>::ForwardScan(const ForwardParams& p, const Kernels<A>& kernels, int max_threads, const ForwardPart& part)
    : Base(p, kernels, max_threads),
      p_(p),
      kernel_(kernel_of(p, kernels)),
      part_(part),
      first_(part.again ? part.first : 0),
      end_(part.again ? part.end : p.seq.T),
      saved_(part.again ? part.saved : SavedRows{p.seq.N, {0, 0}}),
      c_storage_(p.wide_c ? storage_index(DType::kFloat32) : storage_),
      c_size_(p.wide_c ? dtype_size(DType::kFloat32) : size_),
      reads_given_states_(p.seq.T == 1 && !p.seq.lengths && !p.seq.offsets && !part.again && size_ == sizeof(A) &&
                          c_size_ == sizeof(A) && p.P == p_padded_ && p.H == h_padded_) {
  const Shape &x = plan_.x.shape, &h = plan_.h.shape;
  const int split = plan_.threads.split;
  max_columns_ = ceil_div(h.panels, split) * h.vectors * h.width;
  const int64_t step_bytes = team_rows_ * max_columns_ * static_cast<int64_t>(sizeof(A));
  const int64_t weight_bytes = x.elements() / split * plan_.x.element_size();
  chunk_steps_ = steps_of_chunk(step_bytes, weight_bytes, p.seq.T);
  this->parts_room_.include(plan_.x, chunk_rows());
  if (!p.training || p.seq.T == 1 || part.again) cache_.lease(plan_, p.weights, D_, p.seq.T == 1);
}

template <class A>
void ForwardScan<A>::layout_shared(Arena& arena) {
  for (int d = 0; d < D_; ++d) weights_[d] = cache_.layout(arena, plan_, p_.weights[d], d);
  zeros_ = arena.take<A>(std::max(h_padded_, p_padded_));
  team_state_size_ = team_rows_ * (2 * p_padded_ + (projects_ ? 2 : 1) * h_padded_);
  team_state_ = arena.take<A>(team_state_size_ * plan_.threads.direction_teams * plan_.threads.batch_teams);
  Arena thread(nullptr);
  Worker counted;
  take_arrays(thread, counted);
  this->thread_bytes_ = thread.used();
}

template <class A>
void ForwardScan<A>::take_arrays(Arena& arena, Worker& w) const {
  const int64_t panel = plan_.h.shape.vectors * plan_.h.shape.width;
  const bool rows_first = team_rows_ <= 2;
  w.xg = {arena.take<A>(chunk_rows() * max_columns_), rows_first ? max_columns_ : panel,
          rows_first ? panel : chunk_rows() * panel, rows_first};
  w.x.take(arena, plan_.x, chunk_rows(), p_.I, p_.dtype);
  w.rows = arena.take<ForwardRow<A>>(team_rows_);
  w.reset_h = arena.take<A>(p_.modifier.h.data ? team_rows_ * p_padded_ : 0);
  w.reset_c = arena.take<A>(p_.modifier.c.data ? team_rows_ * h_padded_ : 0);
  w.options.take(arena, p_.modifier, team_rows_, p_padded_, h_padded_);
  w.primal = arena.take<PrimalRow>(p_.primal ? team_rows_ : 0);
  w.masked = arena.take<A>(p_.modifier.product ? team_rows_ * p_padded_ : 0);
  Base::take_arrays(arena, w);
}

template <class A>
typename ForwardScan<A>::Worker ForwardScan<A>::make_worker(int thread, int d, Teams& teams) const {
  Worker w;
  this->set_place(thread, d, teams, w);
  w.h[0] = team_state_ + thread / plan_.threads.split * team_state_size_;
  w.h[1] = w.h[0] + team_rows_ * p_padded_;
  w.c = w.h[1] + team_rows_ * p_padded_;
  w.u = w.c + team_rows_ * h_padded_;
  Arena arena = this->arena_of_thread(thread);
  take_arrays(arena, w);
  w.weights = weights_[d];
  if (p_.modifier.h.data) std::fill_n(w.reset_h, team_rows_ * p_padded_, A(0));
  if (p_.modifier.c.data) std::fill_n(w.reset_c, team_rows_ * h_padded_, A(0));
  if (w.options.rows) w.options.load(kernels_, p_.modifier, w.team->rows, d, sizes_);
  return w;
}

template <class A>
void ForwardScan<A>::pack_share(int share, int shares) const {
  for (int d = 0; d < D_; ++d) weights_[d].pack_share(kernels_, {p_.cell, p_.weights[d], p_.dtype}, share, shares);
}

// The rank's share of the rows gets its initial state.
template <class A>
void ForwardScan<A>::start(Worker& w) const {
  if (reads_given_states_) return;
  const auto [begin, end] = this->rows_of(w);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t state = w.d * seq_.B + w.team->rows[i].b;
    A *const h = w.h[0] + i * p_padded_, *const c = w.c + i * h_padded_;
    std::fill(h + (p_.h0 ? p_.P : 0), h + p_padded_, A(0));
    std::fill_n(w.h[1] + i * p_padded_ + p_.P, p_padded_ - p_.P, A(0));
    std::fill(c + (p_.c0 ? p_.H : 0), c + h_padded_, A(0));
    if (first_ > 0 && steps_done(seq_.T, w.team->rows[i].length, w.d, first_) > 0) {
      start_again(w, i);
      continue;
    }
    if (p_.h0) kernels_.load[storage_](stored_at(p_.h0, state * p_.P, size_), h, p_.P);
    if (p_.c0) kernels_.load[c_storage_](stored_at(p_.c0, state * p_.H, c_size_), c, p_.H);
  }
}

// Row i of the team, which has done steps before the first one: its states then.
template <class A>
void ForwardScan<A>::start_again(Worker& w, int64_t i) const {
  const TeamRow& row = w.team->rows[i];
  const int64_t done = steps_done(seq_.T, row.length, w.d, first_);
  const int64_t last = row_of(seq_, time_of_last(row.length, w.d, done), row.b);
  kernels_.load[storage_](stored_at(p_.y, (last * D_ + w.d) * p_.P, size_), w.h[done & 1] + i * p_padded_, p_.P);
  if (!part_.c) return;
  const int64_t count = (seq_.T - 1) / part_.every, checkpoint = w.d * count + first_ / part_.every - 1;
  A* const c = w.c + i * h_padded_;
  std::copy_n(static_cast<const A*>(part_.c) + (checkpoint * seq_.B + row.b) * p_.H, p_.H, c);
  kernels_.save[storage_](c, stored_at(part_.c_before, (w.d * seq_.B + row.b) * p_.H, size_), p_.H);
}

// This rank's units of c after a step, if the next one is where states are kept.
template <class A>
void ForwardScan<A>::keep_c(const Worker& w, int64_t step) const {
  if ((step + 1) % part_.every != 0 || step + 1 == seq_.T) return;
  const int64_t count = (seq_.T - 1) / part_.every, checkpoint = w.d * count + (step + 1) / part_.every - 1;
  const Range units = this->units_of_panels(w.h_panels, w.weights.h.shape);
  for (int64_t i = 0; i < w.n; ++i) {
    A* const to = static_cast<A*>(part_.c) + (checkpoint * seq_.B + w.team->rows[i].b) * p_.H;
    std::copy(w.c + i * h_padded_ + units.first, w.c + i * h_padded_ + units.last, to + units.first);
  }
}

// The same where the product is there, in p_.columns: copies it, and adds the biases.
template <class A>
void ForwardScan<A>::load_columns(Worker& w, int64_t begin, int64_t end) const {
  const Shape& shape = w.weights.h.shape;
  const auto load = kernels_.load[storage_];
  int64_t count = 0;
  for (int64_t step = begin; step < end; ++step) {
    const int64_t t = time_of(w, step);
    for (const TeamRow& row : w.team->rows) {
      if (t >= row.length) continue;
      const int64_t from = (w.d * seq_.N + row_of(seq_, t, row.b)) * p_.columns_stride;
      for (int64_t p = w.h_panels.first; p < w.h_panels.last; ++p) {
        A* to = w.xg.at(count, p - w.h_panels.first);
        const A* bias = w.weights.bias_x + p * shape.vectors * shape.width;
        for (int k = 0; k < shape.vectors_of(p); ++k, to += shape.width, bias += shape.width) {
          const auto [gate, unit, lanes] = vector_of(shape, p * shape.vectors + k);
          load(stored_at(p_.columns, from + gate * p_.H + unit, size_), to, lanes);
          for (int i = 0; i < lanes; ++i) to[i] += bias[i];
          std::fill_n(to + lanes, shape.width - lanes, A(0));
        }
      }
      ++count;
    }
  }
}

// Input projection of the active rows of steps [begin, end), in the order of the scan, into w.xg.
template <class A>
void ForwardScan<A>::project(Worker& w, int64_t begin, int64_t end) const {
  if (p_.columns) return load_columns(w, begin, end);
  w.x.clear();
  for (int64_t step = begin; step < end; ++step) {
    const int64_t t = time_of(w, step);
    for (const TeamRow& row : w.team->rows) {
      if (t < row.length) w.x.add(kernels_, stored_at(p_.x, row_of(seq_, t, row.b) * p_.I, size_));
    }
  }
  multiply<A>(w.x.product(kernels_, w.weights.x, w.weights.bias_x, w.h_panels), w.parts, w.xg);
}

template <class A>
void ForwardScan<A>::zero_inactive(const Worker& w, int64_t row) const {
  if (seq_.offsets || w.rank != 0) return;
  std::memset(stored_at(p_.y, (row * D_ + w.d) * p_.P, size_), 0, p_.P * size_);
  if (!p_.training && !p_.cs) return;
  const int64_t saved = saved_.at(w.d, row) * p_.H;
  if (p_.gates) std::memset(stored_at(p_.gates, saved * slots_, size_), 0, slots_ * p_.H * size_);
  if (p_.cs) std::memset(stored_at(p_.cs, saved, size_), 0, p_.H * size_);
}

// Active row number `active` begins step t from what the modifier has for it.
template <class A>
void ForwardScan<A>::reset(Worker& w, int64_t t, int64_t b, int64_t active) const {
  ForwardRow<A>& out = w.rows[active];
  out.h_prev = out.c_prev = zeros_;
  if (const void* h = reset_row(p_.modifier.h, t, w.d, b)) {
    A* const to = w.reset_h + active * p_padded_;
    kernels_.load[storage_](h, to, p_.P);
    out.h_prev = to;
  }
  if (const void* c = reset_row(p_.modifier.c, t, w.d, b)) {
    A* const to = w.reset_c + active * h_padded_;
    kernels_.load[storage_](c, to, p_.H);
    out.c_prev = to;
  }
}

// What modifies the step of the team's row i, as active row number `active`; `place`: its row in [D * N].
template <class A>
void ForwardScan<A>::set_options(Worker& w, int64_t i, int64_t place, int64_t active) const {
  w.options.rows[active] = w.options.row(p_.modifier, i, place, sizes_, kernels_.width, /*multiplies=*/false);
  if (!w.options.product) return;
  const A *const h = w.rows[active].h_prev, *const factors = w.options.product + i * p_padded_;
  A* const masked = w.masked + active * p_padded_;
  for (int64_t u = 0; u < p_padded_; ++u) masked[u] = h[u] * factors[u];
  w.pointers[active] = masked;
}

// The values that belong to the tangents of step t of the team's row i, active row number `active`.
template <class A>
void ForwardScan<A>::set_primal(Worker& w, int64_t i, int64_t t, int64_t active) const {
  const Primal& p = *p_.primal;
  const TeamRow& team_row = w.team->rows[i];
  const int64_t row = row_of(seq_, t, team_row.b), place = w.d * seq_.N + row;
  const auto [h, c] = states_before(p, sizes_, w.d, t, team_row, zeros_);
  w.primal[active] = {stored_at(p.gates, place * slots_ * p_.H, size_), h, c, stored_at(p.y, (row * D_ + w.d) * p_.P, size_),
                      p.source ? stored_at(p.source, place * slots_ * p_.H, size_) : nullptr};
  if (p.source_y) w.store_rows[active].add_stored = stored_at(p.source_y, place * p_.P, size_);
}

template <class A>
void ForwardScan<A>::read_given_states(ForwardRow<A>& out, int64_t state) const {
  out.h_prev = p_.h0 ? static_cast<const A*>(p_.h0) + state * p_.P : zeros_;
  out.c_prev = p_.c0 ? static_cast<const A*>(p_.c0) + state * p_.H : zeros_;
}

// The active rows of step t: their places in w.rows and w.store_rows, their h in w.pointers. Returns their number.
template <class A>
int64_t ForwardScan<A>::gather(Worker& w, int64_t t) const {
  int64_t active = 0;
  for (int64_t i = 0; i < w.n; ++i) {
    const TeamRow& team_row = w.team->rows[i];
    const int64_t row = row_of(seq_, t, team_row.b);
    if (t >= team_row.length) {
      zero_inactive(w, row);
      continue;
    }
    const int64_t copy = team_row.steps_before(t, w.d) & 1;
    const int64_t saved = saved_.at(w.d, row);
    void* const y = stored_at(p_.y, (row * D_ + w.d) * p_.P, size_);
    A* const h = w.h[1 - copy] + i * p_padded_;
    ForwardRow<A>& out = w.rows[active];
    if (is_reset(p_.modifier, row)) {
      reset(w, t, team_row.b, active);
    } else {
      out.h_prev = w.h[copy] + i * p_padded_;
      out.c_prev = w.c + i * h_padded_;
      if (reads_given_states_) read_given_states(out, w.d * seq_.B + team_row.b);
    }
    out.h = projects_ ? w.u + i * h_padded_ : h;
    out.c = w.c + i * h_padded_;
    out.y = projects_ ? nullptr : y;
    out.gates = p_.training ? stored_at(p_.gates, saved * slots_ * p_.H, size_) : nullptr;
    out.cs = p_.training || p_.cs ? stored_at(p_.cs, saved * p_.H, size_) : nullptr;
    w.store_rows[active] = {nullptr, nullptr, y, h};
    w.pointers[active] = out.h_prev;
    if (w.options.rows) set_options(w, i, w.d * seq_.N + row, active);
    if (p_.primal) set_primal(w, i, t, active);
    ++active;
  }
  return active;
}

// One step of the team's active rows for this rank's units; first_xg: its first row in w.xg. Returns the number of active
// rows.
template <class A>
int64_t ForwardScan<A>::step(Worker& w, int64_t step, int64_t first_xg) const {
  const int64_t active = gather(w, time_of(w, step));
  const Matrix<A>& m = w.weights.h;
  const A* init = gates_ < slots_ ? w.weights.bias_h : nullptr;
  const int64_t panel_columns = m.shape.vectors * m.shape.width;
  this->for_tiles_of_step(w, m, w.h_panels, init, active, step, [&](const Tile<A>& tile) {
    const int64_t together = w.xg.rows_first ? tile.last - tile.first : 1;  // panels whose projections are neighbours
    for (int64_t p = tile.first; p < tile.last; p += together) {
      ForwardCall<A> call{tile.sums + (p - tile.first) * panel_columns,
                          tile.stride,
                          w.xg.at(first_xg + tile.row, p - w.h_panels.first),
                          w.xg.row_stride,
                          w.rows + tile.row,
                          tile.rows,
                          p_.H,
                          m.shape.unit_vector(p),
                          m.shape.unit_vector(p + together)};
      if (w.options.rows) call.options = w.options.rows + tile.row, call.numbers = &w.options.numbers;
      if (p_.primal) call.primal = w.primal + tile.row;
      kernel_(call);
    }
  });
  if (p_.cs && !p_.training) save_c(w, active);
  return active;
}

// This rank's units of c after a step, where the pointwise half, which does so in training, does not.
template <class A>
void ForwardScan<A>::save_c(const Worker& w, int64_t active) const {
  const Range units = this->units_of_panels(w.h_panels, w.weights.h.shape);
  for (int64_t i = 0; i < active; ++i) {
    kernels_.save[storage_](w.rows[i].c + units.first, stored_at(w.rows[i].cs, units.first, size_), units.size());
  }
}

// y = h W_hr^T, this rank's columns.
template <class A>
void ForwardScan<A>::project_output(Worker& w, int64_t step, int64_t active) const {
  for (int64_t i = 0; i < active; ++i) w.pointers[i] = w.rows[i].h;
  const Matrix<A>& m = w.weights.r;
  this->for_tiles_of_step(w, m, w.r_panels, nullptr, active, step, [&](const Tile<A>& tile) {
    kernels_.store[storage_]({tile.sums, tile.stride, w.store_rows + tile.row, tile.rows, p_.P,
                              m.shape.unit_vector(tile.first), m.shape.unit_vector(tile.last), /*rounded=*/true});
  });
}

template <class A>
void ForwardScan<A>::finish(Worker& w) const {
  const auto [begin, end] = this->rows_of(w);
  for (int64_t i = begin; i < end; ++i) {
    const TeamRow& row = w.team->rows[i];
    const int64_t state = w.d * seq_.B + row.b;
    if (p_.h_n != p_.y || seq_.lengths)  // a single step of all rows has one result
      kernels_.save[storage_](w.h[row.length & 1] + i * p_padded_, stored_at(p_.h_n, state * p_.P, size_), p_.P);
    if (p_.c_n) kernels_.save[c_storage_](w.c + i * h_padded_, stored_at(p_.c_n, state * p_.H, c_size_), p_.H);
  }
}

template <class A>
void ForwardScan<A>::scan(int thread, int d, Teams& teams) const {
  Worker w = make_worker(thread, d, teams);
  start(w);
  w.team->barrier.wait();
  for (int64_t begin = first_; begin < end_; begin += chunk_steps_) {
    const int64_t end = std::min(begin + chunk_steps_, end_);
    project(w, begin, end);
    int64_t first_xg = 0;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t active = step(w, s, first_xg);
      first_xg += active;
      if (part_.c && !part_.again) keep_c(w, s);
      w.team->barrier.wait();
      if (projects_) {
        project_output(w, s, active);
        w.team->barrier.wait();
      }
    }
  }
  if (!part_.again) finish(w);
  w.team->barrier.wait();
}

template <class A>
bool ForwardScan<A>::run() {
  prefer_huge_pages(p_.workspace, this->layout(p_.workspace));
  prefer_huge_pages(p_.y, seq_.N * D_ * p_.P * size_);
  if (p_.training) prefer_huge_pages(p_.gates, D_ * saved_.count * slots_ * p_.H * size_);
  if (p_.training) prefer_huge_pages(p_.cs, D_ * saved_.count * p_.H * size_);
  std::fill_n(zeros_, std::max(h_padded_, p_padded_), A(0));
  return this->run_on_threads();
}

}  // namespace

void forward(ForwardParams& p, const Allocate& allocate) { run_scan<ForwardScan>(p, allocate); }

void forward_part(ForwardParams& p, const ForwardPart& part, const Allocate& allocate) {
  run_scan<ForwardScan>(p, allocate, part);
}

}  // namespace fused_rnn::cpu
