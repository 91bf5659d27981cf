// What the forward and the backward scan of a formula share beside scan/scan.h.
//
// Products are stored row by row, head by head. A step has two parts, between which a team meets: a thread multiplies with
// its panels of the recurrent weights, then computes its items (vectors of units, isa/formula.h) from the products. A step
// with phases has more such pairs: items that make what the phases of a level take (core/formula.h), then these phases,
// products or norms of some rows.
#pragma once
#include <vector>

#include "cpu/formula/formula.h"
#include "cpu/scan/scan.h"

namespace fused_rnn::cpu {

// A formula's scan as the planner sees it.
FormulaProblem formula_problem(const FormulaParams& p, bool backward, bool training);

template <class A>
class FormulaScan : public Scan<A> {
 protected:
  using Base = Scan<A>;
  using Base::D_, Base::kernels_, Base::plan_, Base::seq_, Base::team_rows_;

  FormulaScan(const FormulaParams& p, const FormulaProblem& problem, const Kernels<A>& kernels, int max_threads)
      : Base({p.seq, p.D, p.H, p.H, p.dtype}, {-1, p.cell->traits.gradients, p.cell->traits.recurrent_gates}, kernels,
             plan_formula_scan(problem, kernels, max_threads)),
        traits_(p.cell->traits),
        H_(p.H),
        heads_(p.heads),
        units_(p.H / p.heads),
        room_(round_up(p.H, kernels.width) + kernels.width),
        rec_columns_(plan_.h.shape.columns()),
        items_(p.heads * ceil_div(units_, kernels.width)),
        recurs_(traits_.recurrent_gates > 0) {}

  struct Worker : Base::Worker {
    Range head_panels;  // of the recurrent weights, counted through all heads
    Range items;
    A* rec;                   // [n][heads][rec_columns], of the team
    const A* parameters;      // [U][room]
    const Matrix<A>* matrix;  // [heads]
    const Matrix<A>* phases;  // [Q], of products
    const A* norms;           // [Q][weight, bias][room], of norms
  };

  // What both scans have of a direction's weights.
  struct Direction {
    std::vector<Matrix<A>> heads, phases;
    A *parameters, *norms;
  };

  void set_place(int thread, int d, Teams& teams, const Direction& direction, Worker& w) const {
    Base::set_place(thread, d, teams, w);
    w.matrix = direction.heads.data();
    w.phases = direction.phases.data();
    w.norms = direction.norms;
    w.parameters = direction.parameters;
    const int split = plan_.threads.split;
    w.head_panels = share_of(heads_ * plan_.h.shape.panels, split, w.rank);
    w.items = share_of(items_, split, w.rank);
  }

  bool is_product(int phase) const {
    return static_cast<FormulaPhase>(traits_.phase_kinds[phase]) == FormulaPhase::kProduct;
  }
  // The phases level by level: prepare(level), then make(k) of each of its phases. The team meets behind both.
  template <class Prepare, class Make>
  void for_levels(const Worker& w, const int* levels, const Prepare& prepare, const Make& make) const {
    for (int level = 0; level < level_count(levels, traits_.phases); ++level) {
      prepare(level);
      w.team->barrier.wait();
      for (int k = 0; k < traits_.phases; ++k) {
        if (levels[k] == level) make(k);
      }
      w.team->barrier.wait();
    }
  }
  // The matrices of a direction's phases, without memory; empty ones for norms.
  std::vector<Matrix<A>> phase_matrices(const FormulaWeights& weights, std::atomic<bool>* infinite) const {
    std::vector<Matrix<A>> all(static_cast<size_t>(traits_.phases));
    for (int k = 0; k < traits_.phases; ++k) {
      if (!is_product(k)) continue;
      all[k] = plan_.r;
      all[k].source = weights.phases[k].matrix;
      all[k].infinite = infinite + k;
    }
    return all;
  }
  void layout_parameters(Arena& arena, Direction& direction) const {
    direction.parameters = arena.take<A>(traits_.parameters * room_);
    direction.norms = arena.take<A>(2 * traits_.phases * room_);
  }
  void load_parameters(const FormulaWeights& weights, const Direction& direction) const {
    const auto load = [&](const void* from, A* to) {
      std::fill_n(to, room_, A(0));
      if (from) kernels_.load[this->storage_](from, to, H_);
    };
    for (int i = 0; i < traits_.parameters; ++i) {
      load(stored_at(weights.parameters, i * H_, this->size_), direction.parameters + i * room_);
    }
    for (int k = 0; k < traits_.phases; ++k) {
      load(weights.phases[k].weight, direction.norms + 2 * k * room_);
      load(weights.phases[k].bias, direction.norms + (2 * k + 1) * room_);
    }
  }
  // A norm, without its row.
  FormulaNorm<A> norm_of(const Worker& w, int phase) const {
    FormulaNorm<A> norm{};
    norm.centred = static_cast<FormulaPhase>(traits_.phase_kinds[phase]) == FormulaPhase::kLayerNorm;
    norm.H = H_;
    norm.weight = w.norms + 2 * phase * room_;
    norm.bias = norm.centred ? norm.weight + room_ : nullptr;
    return norm;
  }
  // The units of the thread's items, which are neighbours.
  Range units_of(const Range& items) const {
    const int64_t of_head = items_ / heads_;
    const auto first = [&](int64_t item) {
      return item / of_head * units_ + std::min(item % of_head * kernels_.width, units_);
    };
    return {first(items.first), first(items.last)};
  }
  // The call that computes the thread's items of the active rows.
  template <class Row>
  FormulaCall<Row> call_of(const Worker& w, const Row* rows, int64_t active) const {
    return {rows, active, w.items.first, w.items.last, H_, heads_, rec_columns_, w.parameters, room_};
  }
  // Elements of a team's products with the recurrent weights, and of what phases take or give.
  int64_t rec_elements() const { return team_rows_ * heads_ * rec_columns_ + kernels_.width; }
  int64_t phase_elements() const { return traits_.phases * team_rows_ * room_; }

  // The thread's panels of the product of n rows, `from` [n][room], with a phase's matrix, to `to` [n][room].
  void multiply_phase(Worker& w, int phase, const A* from, int64_t n, A* to) const {
    const Matrix<A>& m = w.phases[phase];
    for (int64_t i = 0; i < n; ++i) w.pointers[i] = from + i * room_;
    multiply<A>({kernels_, m, nullptr, w.pointers, n, {w.r_panels.first, w.r_panels.last}}, w.parts,
                {to + m.shape.columns_before(w.r_panels.first), room_, int64_t{m.shape.vectors} * m.shape.width,
                 /*rows_first=*/true});
  }

  // The matrices of all heads of a direction, without memory.
  std::vector<Matrix<A>> head_matrices(const WeightMatrix& source, std::atomic<bool>* infinite) const {
    std::vector<Matrix<A>> all(static_cast<size_t>(recurs_ ? heads_ : 0), plan_.h);
    for (size_t k = 0; k < all.size(); ++k) {
      const int64_t first = static_cast<int64_t>(k) * traits_.recurrent_gates * units_ * units_;
      all[k].source = {stored_at(source.data, first, this->size_), source.storage};
      all[k].infinite = infinite + k;
    }
    return all;
  }
  void take_memory(Arena& arena, Matrix<A>& m) const {
    m.packed = arena.take<A>(m.packed_elements());
    m.tiles = arena.take<uint16_t>(m.tile_elements());
  }
  void pack_all(const std::vector<Matrix<A>>& matrices, int share, int shares) const {
    for (const Matrix<A>& m : matrices) {
      const Range panels = share_of(m.shape.panels, shares, share);
      pack(kernels_, m, panels.first, panels.last);
    }
  }

  // The thread's panels of the product of `rows` [n], each [heads][depth of a head], into w.rec.
  void multiply_heads(Worker& w, const A* const* rows, int64_t n, const A* bias, int64_t step) const {
    const int64_t panels = plan_.h.shape.panels, depth = plan_.h.shape.depth, row_stride = heads_ * rec_columns_;
    for (int64_t k = panels ? w.head_panels.first / panels : 0; k * panels < w.head_panels.last; ++k) {
      const Range of_head{std::max(w.head_panels.first - k * panels, int64_t{0}),
                          std::min(w.head_panels.last - k * panels, panels)};
      const Matrix<A>& m = w.matrix[k];
      for (int64_t i = 0; i < n; ++i) w.pointers[i] = rows[i] + k * depth;
      A* const out = w.rec + k * rec_columns_ + m.shape.columns_before(of_head.first);
      const A* const init = bias ? bias + k * rec_columns_ : nullptr;
      multiply<A>({kernels_, m, init, w.pointers, n, panels_at(kernels_, m, n, of_head, step)}, w.parts,
                  {out, row_stride, int64_t{m.shape.vectors} * m.shape.width, /*rows_first=*/true});
    }
  }

  const FormulaKernels<A>& step_of(const FormulaLibrary& cell) const {
    if constexpr (sizeof(A) == 8) {
      return cell.f64;
    } else {
      return cell.f32;
    }
  }

  const FormulaTraits& traits_;
  const int64_t H_;
  const int heads_;
  const int64_t units_;        // of a head
  const int64_t room_;         // elements of an array of units
  const int64_t rec_columns_;  // of a head
  const int64_t items_;
  const bool recurs_;
};

}  // namespace fused_rnn::cpu
