// A segment of a backward step of a formula (formula_params.h), and the gradients of the initial states. C: the cell's
// struct.
//
// With "next" in the order of the scan, the gradient of state s of an active row after the step is what the next step left
// in d_states[s], or d_last[s] where the row ends; the output's has dy added, every other's d_series[s], the recurrent one's
// the product d_rec[next] W_hh, which is 0 where the next step was reset. What a step that is reset makes for the states
// before it goes to d_reset, not to the step before. Blocks, threads and memory as in formula_forward.cuh.
#pragma once
#include "core/formula_math.h"
#include "cuda/formula/formula_norm.cuh"

namespace fused_rnn::cuda {

// A part of a segment: the product with W_hh (kPart -1), or the gradient of a phase.
template <class C, int kPart>
struct FormulaBackwardPart {
  static constexpr bool kRecurrent = kPart < 0;
  static constexpr FormulaPhase kKind = static_cast<FormulaPhase>(kRecurrent ? 0 : C::phase_kind(kPart));
  static constexpr bool kIsProduct = kRecurrent ? C::kRecurrentGates > 0 : kKind == FormulaPhase::kProduct;
  static constexpr bool kIsNorm = !kRecurrent && !kIsProduct;
  static constexpr bool kCentred = kIsNorm && kKind == FormulaPhase::kLayerNorm;
};

// Where gradients lie, for the elements of a thread.
template <class C, class G>
struct FormulaGradientElements {
  using Storage = typename G::Storage;
  using Acc = typename G::Acc;
  static constexpr int kBlocks = C::kSlots + C::kParameters + C::kPhases;  // of a row of d

  const FormulaBackwardStep& s;
  const FormulaTile<G>& tile;
  const RowInfo* table;

  __device__ __forceinline__ int64_t row_of_batch(int e) const {  // of [D, B]
    return tile.dir * s.p.seq.B + tile.first_row + FormulaTile<G>::batch_of(e);
  }
  __device__ __forceinline__ int64_t state_index(int e) const { return row_of_batch(e) * s.p.H + tile.unit(e); }
  // Of [D, N, blocks, H].
  __device__ __forceinline__ int64_t kept_index(int e, int64_t row, int64_t blocks) const {
    return (tile.dir * s.p.seq.N + row) * blocks * s.p.H + tile.unit(e);
  }
  // Of [N, D * H].
  __device__ __forceinline__ int64_t output_index(int e, int64_t row) const {
    return (row * s.p.D + tile.dir) * s.p.H + tile.unit(e);
  }
  // The gradient of state `state` from the steps behind this one, without what goes through the recurrent weights.
  __device__ __forceinline__ Acc d_state(int e, const RowInfo& info, int state) const {
    if (info.flags & kHasNext) return formula_load<Acc>(s.p.d_states[state], state_index(e));
    return s.p.d_last[state] ? Acc(formula_load<Storage>(s.p.d_last[state], state_index(e))) : Acc(0);
  }
  __device__ __forceinline__ Acc sum(int e) const {
    return Matmul<G>::sum(0, FormulaTile<G>::unit_of(e), FormulaTile<G>::batch_of(e));
  }
};

// kPart: the part of the segment that was made last, -1 or a phase.
template <class C, class G, int kSegment, int kPart>
struct FormulaBackwardElements : FormulaGradientElements<C, G> {
  using Base = FormulaGradientElements<C, G>;
  using Storage = typename G::Storage;
  using Acc = typename G::Acc;
  using Part = FormulaBackwardPart<C, kPart>;
  using Base::kBlocks, Base::s, Base::tile, Base::table;
  static constexpr bool kLast = kSegment == C::kBackwardLevels;
  static constexpr int kParameters = C::kParameters > 0 ? C::kParameters : 1;
  static constexpr int kValues = C::kValues > 0 ? C::kValues : 1;
  static constexpr int kPhases = C::kPhases > 0 ? C::kPhases : 1;
  static constexpr bool kRecurs = C::kRecurrentGates > 0;

  // The gradient of the recurrent state through the weights.
  __device__ __forceinline__ Acc recurrent_gradient(int e) const {
    if constexpr (Part::kRecurrent) {
      const Acc sum = this->sum(e);
      if constexpr (!kLast) formula_store<Acc>(s.p.rec, this->state_index(e), sum);
      return sum;
    } else {
      return formula_load<Acc>(s.p.rec, this->state_index(e));
    }
  }
  // The gradient of what phase kPart took.
  __device__ __forceinline__ Acc phase_gradient_of_input(int e) const {
    if constexpr (Part::kIsProduct) {
      return this->sum(e);
    } else {
      const FormulaDirection& weights = tile.dir ? s.p.weights[1] : s.p.weights[0];
      const Acc weight = formula_load<Storage>(weights.weight[kPart], tile.unit(e));
      return FormulaNorm<G, Part::kCentred>::gradient(table, FormulaTile<G>::batch_of(e), tile.unit(e), weight);
    }
  }
  // Leaves it in working memory, for the parts and launches behind it.
  __device__ __forceinline__ void store_results() const {
#pragma unroll(G::kElements <= 1 ? 1 : 2)
    for (int e = 0; e < G::kElements; ++e) {
      if (!tile.exists(e, table) || !(table[FormulaTile<G>::batch_of(e)].flags & kActive)) continue;
      formula_store<Acc>(s.p.d_taken[kPart], this->state_index(e), phase_gradient_of_input(e));
    }
  }

  struct Values {
    Acc a[kValues], before[C::kStates], after[C::kStates], p[kParameters], v[kPhases], d_states[C::kStates], dv[kPhases];
  };
  template <int kState>
  __device__ __forceinline__ void load_state(int e, const RowInfo& info, Values& in) const {
    in.before[kState] = in.after[kState] = Acc(0);
    if constexpr (C::reads_state(kState)) {
      const void* const series = kState == C::kOutput ? s.p.y : s.p.series[kState];
      in.after[kState] = formula_load<Storage>(series, this->output_index(e, info.row));
      if (info.flags & kReset) {
        in.before[kState] = formula_reset_state<Storage>(s.p, tile, kState, s.step, e);
      } else if (info.flags & kHasPrevious) {
        in.before[kState] = formula_load<Storage>(series, this->output_index(e, info.other));
      } else if (s.p.initial[kState]) {
        in.before[kState] = formula_load<Storage>(s.p.initial[kState], this->state_index(e));
      }
    }
    in.d_states[kState] = this->d_state(e, info, kState);
    const void* const d_after = kState == C::kOutput ? s.p.dy : s.p.d_series[kState];
    if (d_after) in.d_states[kState] += formula_load<Storage>(d_after, this->output_index(e, info.row));
    if constexpr (kRecurs && kState == C::kRecurrent) in.d_states[kState] += recurrent_gradient(e);
  }
  template <int... kStates>
  __device__ __forceinline__ void load_states(int e, const RowInfo& info, Values& in,
                                              std::integer_sequence<int, kStates...>) const {
    (load_state<kStates>(e, info, in), ...);
  }
  __device__ __forceinline__ void load(int e, const RowInfo& info, Values& in) const {
    const int64_t saved = this->kept_index(e, info.row, C::kSaved);
#pragma unroll
    for (int k = 0; k < C::kSaved; ++k) in.a[k] = formula_load<Storage>(s.p.saved, saved + k * s.p.H);
    load_states(e, info, in, std::make_integer_sequence<int, C::kStates>{});
    const void* const parameters = tile.dir ? s.p.weights[1].parameters : s.p.weights[0].parameters;
#pragma unroll
    for (int i = 0; i < C::kParameters; ++i) in.p[i] = formula_load<Storage>(parameters, i * s.p.H + tile.unit(e));
#pragma unroll
    for (int k = 0; k < C::kPhases; ++k) in.v[k] = formula_load<Storage>(s.p.v[k], this->kept_index(e, info.row, 1));
    if constexpr (!Part::kRecurrent) {
#pragma unroll
      for (int k = 0; k < C::kPhases; ++k) {
        if (k != kPart && C::backward_level(k) < kSegment)
          in.dv[k] = formula_load<Acc>(s.p.d_taken[k], this->state_index(e));
      }
      in.dv[kPart] = phase_gradient_of_input(e);
      if constexpr (!kLast) formula_store<Acc>(s.p.d_taken[kPart], this->state_index(e), in.dv[kPart]);
    }
  }

  // The gradient of the result of phase kPhase.
  template <int kPhase>
  __device__ __forceinline__ void give(int e, const RowInfo& info, const Values& in) const {
    Acc d;
    call_phase_gradient<C, kPhase>(in, d);
    const int64_t block = C::kSlots + C::kParameters + kPhase;
    formula_store<Storage>(s.p.d, this->kept_index(e, info.row, kBlocks) + block * s.p.H, d);
    if constexpr (static_cast<FormulaPhase>(C::phase_kind(kPhase)) != FormulaPhase::kProduct) {
      formula_store<Acc>(s.p.d_results[kPhase], this->state_index(e), d);
    }
  }

  // Those of the next segment's phases.
  __device__ __forceinline__ void give_all(int e, const RowInfo& info, const Values& in) const {
    formula_for_phases<C>([&](auto phase) {
      constexpr int kPhase = decltype(phase)::value;
      if constexpr (C::backward_level(kPhase) == kSegment) give<kPhase>(e, info, in);
    });
  }

  // The gradients of products, parameters and of the states before the step.
  __device__ __forceinline__ void finish(int e, const RowInfo& info, Values& in) const {
    constexpr int kFirst = C::kSlots - C::kRecurrentGates;
    Acc d[C::kSlots], d_parameters[kParameters];
    call_backward<C>(in, d, d_parameters);
    const int64_t at = this->kept_index(e, info.row, kBlocks);
#pragma unroll
    for (int i = 0; i < C::kSlots; ++i) formula_store<Storage>(s.p.d, at + i * s.p.H, d[i]);
#pragma unroll
    for (int i = 0; i < C::kParameters; ++i) {
      formula_store<Storage>(s.p.d, at + (C::kSlots + i) * s.p.H, d_parameters[i]);
    }
    if (kRecurs && s.p.d_rec) {
      const int64_t copy = (s.step & 1) * s.p.D * s.p.seq.B + this->row_of_batch(e);
      const int64_t unit = tile.unit(e) - tile.head * tile.units;
#pragma unroll
      for (int g = 0; g < C::kRecurrentGates; ++g) {
        const int64_t row = (copy * s.p.heads + tile.head) * C::kRecurrentGates + g;
        formula_store<Storage>(s.p.d_rec, row * tile.units + unit, d[kFirst + g]);
      }
    }
#pragma unroll
    for (int i = 0; i < C::kStates; ++i) {
      if (info.flags & kReset && s.p.d_reset[i]) {
        formula_store<Storage>(s.p.d_reset[i], this->kept_index(e, info.row, 1), in.d_states[i]);
      }
      formula_store<Acc>(s.p.d_states[i], this->state_index(e), info.flags & kReset ? Acc(0) : in.d_states[i]);
    }
  }

  __device__ __forceinline__ void skip(int e, const RowInfo& info) const {
    if (s.p.seq.offsets) return;
    const int64_t at = this->kept_index(e, info.row, kBlocks);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) formula_store<Storage>(s.p.d, at + i * s.p.H, Acc(0));
  }

  __device__ __forceinline__ void run() const {
    const auto active = [&](int e, const RowInfo& info) {
      Values in;
      load(e, info, in);
      if constexpr (kLast) {
        finish(e, info, in);
      } else {
        give_all(e, info, in);
      }
    };
    formula_for_elements(tile, table, active, [&](int e, const RowInfo& info) {
      if constexpr (kLast) skip(e, info);
    });
  }
};

// What backward_row says of a row's next step, and its number.
struct FormulaNext {
  int64_t step, row;
  bool reset;
};

// The gradients of the recurrent products at the next step of row b, those of the tile's head; null: zeros.
template <class C, class G>
__device__ __forceinline__ const void* formula_next_gradient(const FormulaBackwardStep& s, const FormulaTile<G>& tile,
                                                             int64_t b, int flags, const FormulaNext& next) {
  using Storage = typename G::Storage;
  if (C::kRecurrentGates == 0 || !(flags & kHasNext) || next.reset) return nullptr;
  if (!s.p.d_rec) {
    constexpr int kBlocks = C::kSlots + C::kParameters + C::kPhases, kFirst = C::kSlots - C::kRecurrentGates;
    return static_cast<const Storage*>(s.p.d) + ((tile.dir * s.p.seq.N + next.row) * kBlocks + kFirst) * s.p.H;
  }
  const int64_t row = (next.step & 1) * s.p.D * s.p.seq.B + tile.dir * s.p.seq.B + b;
  return static_cast<const Storage*>(s.p.d_rec) + (row * s.p.heads + tile.head) * C::kRecurrentGates * tile.units;
}

// The operand of the product with W_hh: of a head [Gr * units][units].
template <class C, class G>
__device__ __forceinline__ Operand<typename G::Storage> formula_recurrent_operand(const FormulaBackwardStep& s,
                                                                                  const FormulaTile<G>& tile) {
  const auto* matrix = static_cast<const typename G::Storage*>(tile.dir ? s.p.weights[1].w_hh : s.p.weights[0].w_hh);
  const int64_t depth = C::kRecurrentGates * tile.units;
  if (matrix) matrix += tile.head * depth * tile.units;
  return {matrix, tile.units, depth, s.copy_bytes};
}

// The rows that an active row's product or norm reads; source 0 null: zeros.
template <class C, class G, int kPart>
__device__ __forceinline__ void formula_backward_sources(const FormulaBackwardStep& s, const FormulaTile<G>& tile, int64_t b,
                                                         const FormulaNext& next, RowInfo& info) {
  using Storage = typename G::Storage;
  using Part = FormulaBackwardPart<C, kPart>;
  constexpr int kPhase = kPart < 0 ? 0 : kPart;
  if constexpr (Part::kRecurrent) {
    info.source[0] = formula_next_gradient<C>(s, tile, b, info.flags, next);
  } else if constexpr (Part::kIsProduct) {
    constexpr int kBlocks = C::kSlots + C::kParameters + C::kPhases, kBlock = C::kSlots + C::kParameters + kPhase;
    const int64_t at = ((tile.dir * s.p.seq.N + info.row) * kBlocks + kBlock) * s.p.H;
    info.source[0] = static_cast<const Storage*>(s.p.d) + at;
  } else {
    const int64_t row = (tile.dir * s.p.seq.B + b) * s.p.H;
    info.source[0] = static_cast<const typename G::Acc*>(s.p.d_results[kPhase]) + row;
    info.source[1] = static_cast<const Storage*>(s.p.v[kPhase]) + (tile.dir * s.p.seq.N + info.row) * s.p.H;
  }
}

// kFirst, kFinal: the part is the segment's first, or last one.
template <class C, MathKind kMath, TileSize kSize, int kSegment, int kPart, bool kFirst, bool kFinal>
__device__ __forceinline__ void formula_backward_part(const FormulaBackwardStep& s) {
  using Part = FormulaBackwardPart<C, kPart>;
  using G = FormulaGeometry</*kBackward=*/true, 1, kMath, kSize>;
  using Storage = typename G::Storage;
  const FormulaTile<G> tile(s.p);
  const FormulaDirection& weights = tile.dir ? s.p.weights[1] : s.p.weights[0];

  constexpr int kPhase = kPart < 0 ? 0 : kPart;
  Operand<Storage> operands[1] = {{static_cast<const Storage*>(weights.weight[kPhase]), s.p.H, s.p.H, s.copy_bytes}};
  if constexpr (Part::kRecurrent) operands[0] = formula_recurrent_operand<C>(s, tile);
  Matmul<G> matmul(operands, Part::kRecurrent ? tile.first_unit : tile.head * tile.units + tile.first_unit, s.stages);
  const auto row = [&](int64_t b) {
    FormulaNext next{s.step + 1, 0, false};
    RowInfo info = backward_row(s.p.seq, s.p.modifier, s.step, tile.dir, b, next.row, next.reset);
    if (info.flags & kActive) formula_backward_sources<C, G, kPart>(s, tile, b, next, info);
    return info;
  };
  const RowInfo* const table = formula_sums<kFirst, Part::kIsProduct>(matmul, tile, row, [&](RowInfo* rows) {
    if constexpr (Part::kIsNorm) FormulaNorm<G, Part::kCentred>::backward(rows, s.p.H, weights.weight[kPhase]);
  });
  const FormulaBackwardElements<C, G, kSegment, kPart> elements{{s, tile, table}};
  if constexpr (kFinal) {
    elements.run();
  } else {
    elements.store_results();
  }
}

template <class C, MathKind kMath, TileSize kSize, int kSegment>
__device__ __forceinline__ void formula_backward(const FormulaBackwardStep& s) {
  if constexpr (kSegment == 0) {
    formula_backward_part<C, kMath, kSize, kSegment, -1, true, true>(s);
  } else {
    using Ends = FormulaLevelEnds<C, /*kBackward=*/true, kSegment - 1>;
    formula_for_phases<C>([&](auto phase) {
      constexpr int kPhase = decltype(phase)::value;
      if constexpr (C::backward_level(kPhase) == kSegment - 1) {
        formula_backward_part<C, kMath, kSize, kSegment, kPhase, kPhase == Ends::kFirst, kPhase == Ends::kLast>(s);
      }
    });
  }
}

// d_initial, after the last step of backward: what the row's first step left, and the product of its d_rec with W_hh.
template <class C, MathKind kMath, TileSize kSize>
__device__ __forceinline__ void formula_initial_gradients(const FormulaBackwardStep& s) {
  using G = FormulaGeometry</*kBackward=*/true, 1, kMath, kSize>;
  using Storage = typename G::Storage;
  using Acc = typename G::Acc;
  constexpr bool kRecurs = C::kRecurrentGates > 0;
  const FormulaTile<G> tile(s.p);
  const Operand<Storage> operands[1] = {formula_recurrent_operand<C>(s, tile)};
  Matmul<G> matmul(operands, tile.first_unit, s.stages);
  const auto row = [&](int64_t b) {
    FormulaNext next{0, 0, false};
    RowInfo info = backward_row(s.p.seq, s.p.modifier, -1, tile.dir, b, next.row, next.reset);
    if (info.flags & kExists) {
      if (tile.dir) next.step = s.p.seq.T - active_steps(s.p.seq, b);  // its first in the order of the scan
      info.source[0] = formula_next_gradient<C>(s, tile, b, info.flags, next);
    }
    return info;
  };
  const RowInfo* const table = formula_sums</*kFirst=*/true, kRecurs>(matmul, tile, row, [](RowInfo*) {});
  const FormulaGradientElements<C, G> elements{s, tile, table};
#pragma unroll 1
  for (int e = 0; e < G::kElements; ++e) {
    if (!tile.exists(e, table)) continue;
    const RowInfo& info = table[FormulaTile<G>::batch_of(e)];
#pragma unroll
    for (int i = 0; i < C::kStates; ++i) {
      if (!s.p.d_initial[i]) continue;
      Acc d = elements.d_state(e, info, i);
      if constexpr (kRecurs) {
        if (i == C::kRecurrent) d += elements.sum(e);
      }
      formula_store<Storage>(s.p.d_initial[i], elements.state_index(e), d);
    }
  }
}

}  // namespace fused_rnn::cuda
