// What the forward and the backward scan of a formula share beside scan/scan.h.
//
// Products are stored row by row, head by head. A step has two parts, between which a team meets: a thread multiplies with
// its panels of the recurrent weights, then computes its items (vectors of units, isa/formula.h) from the products. A step
// with phases has more such pairs: items that make what a phase takes, then the phase, a product or the norm of some rows.
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

  void set_place(int thread, int d, Teams& teams, Worker& w) const {
    Base::set_place(thread, d, teams, w);
    const int split = plan_.threads.split;
    w.head_panels = share_of(heads_ * plan_.h.shape.panels, split, w.rank);
    w.items = share_of(items_, split, w.rank);
  }

  bool is_product(int phase) const {
    return static_cast<FormulaPhase>(traits_.phase_kinds[phase]) == FormulaPhase::kProduct;
  }
  bool is_centred(int phase) const {
    return static_cast<FormulaPhase>(traits_.phase_kinds[phase]) == FormulaPhase::kLayerNorm;
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
  int64_t norm_elements() const { return 2 * traits_.phases * room_; }
  void load_norms(const FormulaWeights& weights, A* to) const {
    std::fill_n(to, norm_elements(), A(0));
    const auto load = kernels_.load[this->storage_];
    for (int k = 0; k < traits_.phases; ++k) {
      const FormulaPhaseWeights& phase = weights.phases[k];
      if (phase.weight) load(phase.weight, to + 2 * k * room_, H_);
      if (phase.bias) load(phase.bias, to + (2 * k + 1) * room_, H_);
    }
  }
  // The thread's panels of the product of n rows, `from` [n][room], with a phase's matrix, to `to` [n][room].
  void multiply_phase(Worker& w, int phase, const A* from, int64_t n, A* to) const {
    const Matrix<A>& m = w.phases[phase];
    for (int64_t i = 0; i < n; ++i) w.pointers[i] = from + i * room_;
    multiply<A>({kernels_, m, nullptr, w.pointers, n, {w.r_panels.first, w.r_panels.last}}, w.parts,
                {to + m.shape.columns_before(w.r_panels.first), room_, int64_t{m.shape.vectors} * m.shape.width,
                 /*rows_first=*/true});
  }

  int64_t parameter_elements() const { return traits_.parameters * room_; }
  void load_parameters(const void* from, A* to) const {
    for (int i = 0; i < traits_.parameters; ++i) {
      std::fill_n(to + i * room_, room_, A(0));
      kernels_.load[this->storage_](stored_at(from, i * H_, this->size_), to + i * room_, H_);
    }
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
