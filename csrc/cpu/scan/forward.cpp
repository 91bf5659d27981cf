// Forward of one layer: the input projection of a chunk of steps, then those steps, for the rows and units of one thread.
//
//   gates[t] = x[t] W_ih^T + b  (chunk by chunk, while it stays in cache)  + h[t-1] W_hh^T   (tile by tile, then cells.h on
//   the tile)
//
// h is kept twice per row: a step reads one copy and writes the other, so that a team meets once per step.
#include <cstring>

#include "core/cells.h"
#include "core/dispatch.h"
#include "cpu/cpu.h"
#include "cpu/scan/scan.h"

namespace fused_rnn::cpu {
namespace {

// Projection kept at a time: a fraction of L2, the size that won in the prototype of DESIGN section 9 (Zen 4), or as much as the
// weights that each chunk reads, within reason.
constexpr int64_t kChunkBytes = 512 * 1024, kMaxChunkBytes = 8 * 1024 * 1024;

int recurrent_slot_of(CellKind cell, int gate) {
  return dispatch_cell(cell, [&](auto tag) { return Cell<decltype(tag)::value>::recurrent_slot(gate); });
}

// One direction's weights.
template <class A>
struct LayerWeights {
  Matrix<A> x;  // W_ih
  Matrix<A> h;  // W_hh
  Matrix<A> r;  // W_hr
  A* bias_x;    // b_ih + b_hh, for GRU's n b_ih alone; gate matrix order
  A* bias_h;    // GRU: 0 0 b_hn
};

template <class A>
class ForwardScan {
 public:
  ForwardScan(const ForwardParams& p, const Kernels<A>& kernels, int max_threads);
  // Weights of an inference are kept from call to call (kept_weights.h): before the workspace is laid out.
  void keep_weights();
  int64_t workspace_bytes() { return layout(nullptr); }
  const Plan& plan() const { return plan_; }
  bool run();

 private:
  // What one thread works with in one direction.
  struct Worker {
    int d, rank;
    Team* team;
    int64_t n;                // rows of the team
    int64_t first, last;      // panels of units
    int64_t r_first, r_last;  // panels of the output projection
    A* h[2];                  // [n, P padded], of the team
    A* c;                     // [n, H padded]
    A* u;                     // [n, H padded], o tanh(c) before the output projection
    Products<A> xg;           // of the chunk's rows
    A* x;                     // [chunk rows, I], 16-bit dtypes
    const A** pointers;       // [max(chunk rows, n)]
    ForwardRow<A>* rows;      // [n]
    StoreRow<A>* store_rows;  // [n]
    A* tile;
    SplitRows split;
    LayerWeights<A> weights;
  };

  Matrix<A> make_matrix(const Shape& shape, int64_t rows, bool rounded_rows) const;
  LayerWeights<A> layout_weights(Arena& arena, int d);
  int64_t layout(void* base);
  void pack_share(const LayerWeights<A>& packed, const Weights& w, int part, int parts) const;
  void pack_biases(const LayerWeights<A>& packed, const Weights& w, int64_t first, int64_t last) const;
  Worker make_worker(int thread, int d, Teams& teams) const;
  void scan(Worker& w) const;
  void start(Worker& w) const;
  void project(Worker& w, int64_t begin, int64_t end) const;
  int64_t step(Worker& w, int64_t step, int64_t first_xg) const;
  void project_output(Worker& w, int64_t step, int64_t active) const;
  void zero_inactive(const Worker& w, int64_t row) const;
  void finish(Worker& w) const;
  int64_t time_of(const Worker& w, int64_t step) const { return w.d == 0 ? step : p_.seq.T - 1 - step; }

  const ForwardParams& p_;
  const Kernels<A>& kernels_;
  const int storage_, cell_;
  const int64_t size_;   // of a stored element
  const int c_storage_;  // of c0 and c_n
  const int64_t c_size_;
  const Shape x_shape_, h_shape_, r_shape_;
  const int64_t h_padded_, p_padded_;
  const Matrix<A> x_matrix_, h_matrix_, r_matrix_;  // forms, without memory
  Plan plan_;
  int64_t team_rows_, chunk_steps_, max_columns_;
  SplitRoom split_room_;                   // of a thread
  std::atomic<bool> infinite_[2][3] = {};  // of the three matrices
  KeptWeights kept_[2][3];                 // the same; none in training
  // Workspace.
  LayerWeights<A> weights_[2];
  A* zeros_;
  A* team_state_;
  int64_t team_state_size_;
  char* threads_;
  int64_t thread_bytes_;
};

template <class A>
ForwardScan<A>::ForwardScan(const ForwardParams& p, const Kernels<A>& kernels, int max_threads)
    : p_(p),
      kernels_(kernels),
      storage_(storage_index(p.dtype)),
      cell_(static_cast<int>(p.cell)),
      size_(dtype_size(p.dtype)),
      c_storage_(p.wide_c ? storage_index(DType::kFloat32) : storage_),
      c_size_(p.wide_c ? dtype_size(DType::kFloat32) : size_),
      x_shape_(p.I, p.H, gate_count(p.cell), kernels.width),
      h_shape_(p.P, p.H, gate_count(p.cell), kernels.width),
      r_shape_(p.weights[0].w_hr.data ? Shape(p.H, p.P, 1, kernels.width) : Shape()),
      h_padded_(round_up(p.H, kernels.width)),
      p_padded_(round_up(p.P, kernels.width)),
      x_matrix_(make_matrix(x_shape_, p.seq.N, /*rounded_rows=*/true)),
      h_matrix_(make_matrix(h_shape_, p.seq.B, /*rounded_rows=*/true)),
      r_matrix_(make_matrix(r_shape_, p.seq.B, /*rounded_rows=*/false)) {
  plan_ = choose_plan({p.seq.T, p.seq.B, p.D, p.P, p.I, h_shape_.columns(), h_shape_.panels, r_shape_.panels ? 2 : 1,
                       h_matrix_.element_size(), h_matrix_.products(), x_matrix_.products(),
                       kernels.split ? kernels.split->rate : 1, max_threads});
  plan_.form = h_matrix_.form;
  team_rows_ = rows_of_team(plan_, p.seq.B);
  max_columns_ = (h_shape_.panels + plan_.split - 1) / plan_.split * h_shape_.vectors * h_shape_.width;
  const int64_t step_bytes = std::max<int64_t>(team_rows_ * max_columns_ * sizeof(A), 1);
  const int64_t weight_bytes = x_shape_.elements() / plan_.split * x_matrix_.element_size();
  const int64_t chunk_bytes = std::clamp(weight_bytes, kChunkBytes, kMaxChunkBytes);
  chunk_steps_ = std::min(std::max<int64_t>(chunk_bytes / step_bytes, 1), p.seq.T);
  split_room_.include(x_matrix_, chunk_steps_ * team_rows_);
  split_room_.include(h_matrix_, team_rows_);
  split_room_.include(r_matrix_, team_rows_);
}

template <class A>
Matrix<A> ForwardScan<A>::make_matrix(const Shape& shape, int64_t rows, bool rounded_rows) const {
  Matrix<A> m;
  m.shape = shape;
  m.storage = storage_;
  m.parts = split_parts(storage_, rounded_rows);
  m.form =
      choose_form({shape.depth, shape.columns(), rows, p_.seq.T * p_.seq.B, gains_from_parts(kernels_, storage_), m.parts});
  return m;
}

template <class A>
void ForwardScan<A>::keep_weights() {
  if (p_.training) return;
  const Matrix<A>* matrices[] = {&x_matrix_, &h_matrix_, &r_matrix_};
  for (int d = 0; d < p_.D; ++d) {
    const void* sources[] = {p_.weights[d].w_ih.data, p_.weights[d].w_hh.data, p_.weights[d].w_hr.data};
    for (int i = 0; i < 3; ++i) {
      const Matrix<A>& m = *matrices[i];
      const Shape& s = m.shape;
      kept_[d][i].take({sources[i], s.depth, s.units, s.gates, s.width, storage_, m.form, m.parts}, m.kept_bytes(),
                       s.panels);
    }
  }
}

template <class A>
LayerWeights<A> ForwardScan<A>::layout_weights(Arena& arena, int d) {
  const Weights& w = p_.weights[d];
  LayerWeights<A> weights{x_matrix_, h_matrix_, r_matrix_, nullptr, nullptr};
  const void* sources[] = {w.w_ih.data, w.w_hh.data, w.w_hr.data};
  int i = 0;
  for (Matrix<A>* m : {&weights.x, &weights.h, &weights.r}) {
    m->source = sources[i];
    m->infinite = &infinite_[d][i];
    m->kept = kept_[d][i].matrix();
    if (m->kept) {
      m->packed = static_cast<A*>(m->kept->aligned);
      m->split = static_cast<uint16_t*>(m->kept->aligned);
    } else {
      m->packed = arena.take<A>(m->packed_elements());
      m->split = arena.take<uint16_t>(m->split_elements());
    }
    ++i;
  }
  weights.bias_x = arena.take<A>(h_shape_.columns());
  weights.bias_h = arena.take<A>(h_shape_.columns());
  return weights;
}

template <class A>
int64_t ForwardScan<A>::layout(void* base) {
  Arena arena(base);
  for (int d = 0; d < p_.D; ++d) weights_[d] = layout_weights(arena, d);
  zeros_ = arena.take<A>(std::max(h_padded_, p_padded_));
  team_state_size_ = team_rows_ * (2 * p_padded_ + (p_.weights[0].w_hr.data ? 2 : 1) * h_padded_);
  team_state_ = arena.take<A>(team_state_size_ * plan_.direction_teams * plan_.batch_teams);
  thread_bytes_ = 0;
  const int64_t chunk_rows = chunk_steps_ * team_rows_;
  Arena thread(nullptr);
  thread.take<A>(chunk_rows * max_columns_);
  thread.take<A>(sizeof(A) == static_cast<size_t>(size_) ? 0 : chunk_rows * p_.I);
  thread.take<const A*>(chunk_rows);
  thread.take<ForwardRow<A>>(team_rows_);
  thread.take<StoreRow<A>>(team_rows_);
  thread.take<char>(2 * kTileBytes);
  split_room_.take(thread);
  thread_bytes_ = thread.used();
  threads_ = arena.take<char>(thread_bytes_ * plan_.threads());
  return arena.used();
}

template <class A>
void ForwardScan<A>::pack_share(const LayerWeights<A>& packed, const Weights& w, int part, int parts) const {
  const int64_t first = share_begin(h_shape_.panels, parts, part), last = share_begin(h_shape_.panels, parts, part + 1);
  pack(kernels_, packed.x, first, last);
  pack(kernels_, packed.h, first, last);
  pack(kernels_, packed.r, share_begin(r_shape_.panels, parts, part), share_begin(r_shape_.panels, parts, part + 1));
  pack_biases(packed, w, h_shape_.columns_before(first) / h_shape_.width, h_shape_.columns_before(last) / h_shape_.width);
}

// Vectors [first, last) of both biases.
template <class A>
void ForwardScan<A>::pack_biases(const LayerWeights<A>& packed, const Weights& w, int64_t first, int64_t last) const {
  const int width = h_shape_.width, gates = h_shape_.gates;
  for (int64_t v = first; v < last; ++v) {
    const int gate = static_cast<int>(v % gates);
    const int64_t unit = v / gates * width, lanes = std::clamp<int64_t>(p_.H - unit, 0, width);
    const int64_t from = (gate * p_.H + unit) * size_;
    A *x = packed.bias_x + v * width, *h = packed.bias_h + v * width;
    std::fill_n(x, width, A(0));
    std::fill_n(h, width, A(0));
    if (w.b_ih) kernels_.load[storage_](static_cast<const char*>(w.b_ih) + from, x, lanes);
    if (w.b_hh) kernels_.load[storage_](static_cast<const char*>(w.b_hh) + from, h, lanes);
    if (recurrent_slot_of(p_.cell, gate) != gate) continue;
    for (int64_t i = 0; i < lanes; ++i) {
      x[i] += h[i];
      h[i] = 0;
    }
  }
}

template <class A>
typename ForwardScan<A>::Worker ForwardScan<A>::make_worker(int thread, int d, Teams& teams) const {
  Worker w;
  const int team = thread / plan_.split;
  w.d = d;
  w.rank = thread % plan_.split;
  w.team = &teams.teams[team];
  w.n = static_cast<int64_t>(w.team->rows.size());
  w.first = share_begin(h_shape_.panels, plan_.split, w.rank);
  w.last = share_begin(h_shape_.panels, plan_.split, w.rank + 1);
  w.r_first = share_begin(r_shape_.panels, plan_.split, w.rank);
  w.r_last = share_begin(r_shape_.panels, plan_.split, w.rank + 1);
  A* state = team_state_ + team * team_state_size_;
  w.h[0] = state;
  w.h[1] = w.h[0] + team_rows_ * p_padded_;
  w.c = w.h[1] + team_rows_ * p_padded_;
  w.u = w.c + team_rows_ * h_padded_;
  const int64_t chunk_rows = chunk_steps_ * team_rows_;
  Arena arena(threads_ + thread * thread_bytes_);
  const int64_t panel = h_shape_.vectors * h_shape_.width;
  const bool rows_first = team_rows_ <= 2;
  w.xg = {arena.take<A>(chunk_rows * max_columns_), rows_first ? max_columns_ : panel,
          rows_first ? panel : chunk_rows * panel, rows_first};
  w.x = arena.take<A>(sizeof(A) == static_cast<size_t>(size_) ? 0 : chunk_rows * p_.I);
  w.pointers = arena.take<const A*>(chunk_rows);
  w.rows = arena.take<ForwardRow<A>>(team_rows_);
  w.store_rows = arena.take<StoreRow<A>>(team_rows_);
  w.tile = reinterpret_cast<A*>(arena.take<char>(2 * kTileBytes));
  w.split = split_room_.take(arena);
  w.weights = weights_[d];
  return w;
}

// The rank's share of the rows gets its initial state.
template <class A>
void ForwardScan<A>::start(Worker& w) const {
  for (int64_t i = share_begin(w.n, plan_.split, w.rank); i < share_begin(w.n, plan_.split, w.rank + 1); ++i) {
    const int64_t state = w.d * p_.seq.B + w.team->rows[i].b;
    for (int copy = 0; copy < 2; ++copy) std::fill_n(w.h[copy] + i * p_padded_, p_padded_, A(0));
    std::fill_n(w.c + i * h_padded_, h_padded_, A(0));
    if (p_.h0) kernels_.load[storage_](stored_at(p_.h0, state * p_.P, size_), w.h[0] + i * p_padded_, p_.P);
    if (p_.c0) kernels_.load[c_storage_](stored_at(p_.c0, state * p_.H, c_size_), w.c + i * h_padded_, p_.H);
  }
}

// Input projection of the active rows of steps [begin, end), in scan order, into w.xg.
template <class A>
void ForwardScan<A>::project(Worker& w, int64_t begin, int64_t end) const {
  int64_t count = 0;
  for (int64_t step = begin; step < end; ++step) {
    const int64_t t = time_of(w, step);
    for (const TeamRow& row : w.team->rows) {
      if (t >= row.length) continue;
      const void* x = stored_at(p_.x, row_of(p_.seq, t, row.b) * p_.I, size_);
      if (sizeof(A) != static_cast<size_t>(size_)) {
        A* converted = w.x + count * p_.I;
        kernels_.load[storage_](x, converted, p_.I);
        x = converted;
      }
      w.pointers[count++] = static_cast<const A*>(x);
    }
  }
  multiply<A>(kernels_, w.weights.x, w.weights.bias_x, w.pointers, count, {w.first, w.last}, w.split, w.xg);
}

template <class A>
void ForwardScan<A>::zero_inactive(const Worker& w, int64_t row) const {
  if (p_.seq.offsets || w.rank != 0) return;
  std::memset(stored_at(p_.y, (row * p_.D + w.d) * p_.P, size_), 0, p_.P * size_);
  if (!p_.training) return;
  const int64_t saved = (w.d * p_.seq.N + row) * p_.H;
  if (p_.gates) std::memset(stored_at(p_.gates, saved * slot_count(p_.cell), size_), 0, slot_count(p_.cell) * p_.H * size_);
  if (p_.cs) std::memset(stored_at(p_.cs, saved, size_), 0, p_.H * size_);
}

// One step of the team's active rows for this rank's units; first_xg: its first projection row. Returns the number of active
// rows.
template <class A>
int64_t ForwardScan<A>::step(Worker& w, int64_t step, int64_t first_xg) const {
  const int64_t t = time_of(w, step);
  const int64_t width = p_.D * p_.P;
  int64_t active = 0;
  for (int64_t i = 0; i < w.n; ++i) {
    const TeamRow& team_row = w.team->rows[i];
    const int64_t row = row_of(p_.seq, t, team_row.b);
    if (t >= team_row.length) {
      zero_inactive(w, row);
      continue;
    }
    const int64_t copy = team_row.steps_before(t, w.d) & 1;
    const bool reset = is_reset(p_.modifier, row);
    const int64_t saved = w.d * p_.seq.N + row;
    ForwardRow<A>& out = w.rows[active];
    out.h_prev = reset ? zeros_ : w.h[copy] + i * p_padded_;
    out.c_prev = reset ? zeros_ : w.c + i * h_padded_;
    out.h = r_shape_.panels ? w.u + i * h_padded_ : w.h[1 - copy] + i * p_padded_;
    out.c = w.c + i * h_padded_;
    out.y = r_shape_.panels ? nullptr : stored_at(p_.y, row * width + w.d * p_.P, size_);
    out.gates = p_.training ? stored_at(p_.gates, saved * slot_count(p_.cell) * p_.H, size_) : nullptr;
    out.cs = p_.training ? stored_at(p_.cs, saved * p_.H, size_) : nullptr;
    w.store_rows[active] = {nullptr, nullptr, stored_at(p_.y, row * width + w.d * p_.P, size_),
                            w.h[1 - copy] + i * p_padded_};
    w.pointers[active++] = out.h_prev;
  }
  const A* init = gate_count(p_.cell) < slot_count(p_.cell) ? w.weights.bias_h : nullptr;
  const int64_t panel_columns = h_shape_.vectors * h_shape_.width;
  const Panels panels = panels_at(kernels_, w.weights.h, active, w.first, w.last, step);
  for_tiles<A>(kernels_, w.weights.h, init, w.pointers, active, panels, w.tile, w.split,
               [&](int64_t begin, int count, int64_t first, int64_t last, const A* tile, int64_t stride) {
                 const int64_t together = w.xg.rows_first ? last - first : 1;  // panels whose projections are neighbours
                 for (int64_t p = first; p < last; p += together) {
                   kernels_.forward[cell_][storage_](
                       {tile + (p - first) * panel_columns, stride, w.xg.at(first_xg + begin, p - w.first), w.xg.row_stride,
                        w.rows + begin, count, p_.H, h_shape_.unit_vector(p), h_shape_.unit_vector(p + together)});
                 }
               });
  return active;
}

// y = h W_hr^T, this rank's columns.
template <class A>
void ForwardScan<A>::project_output(Worker& w, int64_t step, int64_t active) const {
  for (int64_t i = 0; i < active; ++i) w.pointers[i] = w.rows[i].h;
  const Panels panels = panels_at(kernels_, w.weights.r, active, w.r_first, w.r_last, step);
  for_tiles<A>(kernels_, w.weights.r, nullptr, w.pointers, active, panels, w.tile, w.split,
               [&](int64_t begin, int count, int64_t first, int64_t last, const A* tile, int64_t stride) {
                 kernels_.store[storage_]({tile, stride, w.store_rows + begin, count, p_.P, r_shape_.unit_vector(first),
                                           r_shape_.unit_vector(last), true});
               });
}

template <class A>
void ForwardScan<A>::finish(Worker& w) const {
  for (int64_t i = share_begin(w.n, plan_.split, w.rank); i < share_begin(w.n, plan_.split, w.rank + 1); ++i) {
    const TeamRow& row = w.team->rows[i];
    const int64_t state = w.d * p_.seq.B + row.b;
    kernels_.save[storage_](w.h[row.length & 1] + i * p_padded_, stored_at(p_.h_n, state * p_.P, size_), p_.P);
    if (p_.c_n) kernels_.save[c_storage_](w.c + i * h_padded_, stored_at(p_.c_n, state * p_.H, c_size_), p_.H);
  }
}

template <class A>
void ForwardScan<A>::scan(Worker& w) const {
  start(w);
  w.team->barrier.wait();
  for (int64_t begin = 0; begin < p_.seq.T; begin += chunk_steps_) {
    const int64_t end = std::min(begin + chunk_steps_, p_.seq.T);
    project(w, begin, end);
    int64_t first_xg = 0;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t active = step(w, s, first_xg);
      first_xg += active;
      w.team->barrier.wait();
      if (r_shape_.panels) {
        project_output(w, s, active);
        w.team->barrier.wait();
      }
    }
  }
  finish(w);
  w.team->barrier.wait();
}

template <class A>
bool ForwardScan<A>::run() {
  prefer_huge_pages(p_.workspace, layout(p_.workspace));
  prefer_huge_pages(p_.y, p_.seq.N * p_.D * p_.P * size_);
  if (p_.training) prefer_huge_pages(p_.gates, p_.D * p_.seq.N * slot_count(p_.cell) * p_.H * size_);
  if (p_.training) prefer_huge_pages(p_.cs, p_.D * p_.seq.N * p_.H * size_);
  std::fill_n(zeros_, std::max(h_padded_, p_padded_), A(0));
  Teams teams(plan_, p_.seq, p_.D);
  return run_threads(plan_.threads(), [&](int thread) {
    for (int d = 0; d < p_.D; ++d) pack_share(weights_[d], p_.weights[d], thread, plan_.threads());
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

Plan forward_plan(const ForwardParams& p) {
  return with_arithmetic(p.dtype, [&](auto a) {
    using A = decltype(a);
    return ForwardScan<A>(p, kernels_of<A>(selected_kernels()), thread_limit()).plan();
  });
}

void forward(ForwardParams& p, const Allocate& allocate) {
  with_arithmetic(p.dtype, [&](auto a) {
    using A = decltype(a);
    const Kernels<A>& kernels = kernels_of<A>(selected_kernels());
    const auto run = [&](int threads) {
      ForwardScan<A> scan(p, kernels, threads);
      scan.keep_weights();
      p.workspace = allocate(scan.workspace_bytes());
      return scan.run();
    };
    if (!run(thread_limit())) run(1);
    return 0;
  });
}

}  // namespace fused_rnn::cpu
