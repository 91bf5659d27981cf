// A segment of a forward step of a formula (formula_params.h). C: the cell's struct (fused_rnn/formula/writer.py).
//
// A block makes the products, or the moments of the norms, of its tile one after the other. A thread then finishes kElements
// (unit, row) pairs one after the other: it loads what the pointwise part reads, calls C and stores. Weights are requested
// before pdl_wait; all else may be the preceding launch's. Every array of working memory is read and written element by
// element by the thread that owns the element, except what products and norms read across units, which an earlier launch
// wrote and this one does not write: hence two copies of the recurrent state.
#pragma once
#include "core/formula_math.h"
#include "cuda/formula/formula_norm.cuh"

namespace fused_rnn::cuda {

// A part of a segment: the recurrent product (kPhase -1), or a phase.
template <class C, int kPhase>
struct FormulaForwardPart {
  static constexpr bool kRecurrent = kPhase < 0;
  static constexpr FormulaPhase kKind = static_cast<FormulaPhase>(kRecurrent ? 0 : C::phase_kind(kPhase));
  static constexpr bool kIsProduct = kRecurrent ? C::kRecurrentGates > 0 : kKind == FormulaPhase::kProduct;
  static constexpr bool kIsNorm = !kRecurrent && !kIsProduct;
  static constexpr bool kCentred = kIsNorm && kKind == FormulaPhase::kLayerNorm;
  static constexpr int kGroups = kRecurrent ? C::kRecurrentGates : 1;
};

// kPart: the part of the segment that was made last, -1 or a phase.
template <class C, class G, int kSegment, int kPart>
struct FormulaForwardElements {
  using Storage = typename G::Storage;
  using Acc = typename G::Acc;
  using Part = FormulaForwardPart<C, kPart>;
  static constexpr bool kLast = kSegment == C::kForwardLevels;
  static constexpr int kParameters = C::kParameters > 0 ? C::kParameters : 1;
  static constexpr int kValues = C::kValues > 0 ? C::kValues : 1;
  static constexpr int kPhases = C::kPhases > 0 ? C::kPhases : 1;
  static constexpr bool kRecurs = C::kRecurrentGates > 0;
  static constexpr bool kInput = G::kOperands > 1;  // the part has made the input products too
  static constexpr bool kOwnRecurrent = kRecurs && C::kRecurrent != C::kOutput;

  const FormulaForwardStep& s;
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
  // The copy of the recurrent state after the step `step`, [D, B, H].
  __device__ __forceinline__ int64_t recurrent_copy(int64_t step) const { return (step & 1) * s.p.D * s.p.seq.B * s.p.H; }

  // State `state` of an active row before the step.
  template <int kState>
  __device__ __forceinline__ Acc before(int e, const RowInfo& info) const {
    if (info.flags & kReset) return formula_reset_state<Storage>(s.p, tile, kState, s.step, e);
    if (!(info.flags & kHasPrevious)) {
      return s.p.initial[kState] ? Acc(formula_load<Storage>(s.p.initial[kState], state_index(e))) : Acc(0);
    }
    if constexpr (kState == C::kOutput) {
      return formula_load<Storage>(s.p.y, output_index(e, info.other));
    } else if constexpr (kOwnRecurrent && kState == C::kRecurrent) {
      return formula_load<Storage>(s.p.recurrent, recurrent_copy(s.step - 1) + state_index(e));
    } else {
      return formula_load<Acc>(s.p.states[kState], state_index(e));
    }
  }
  template <int... kStates>
  __device__ __forceinline__ void load_states(int e, const RowInfo& info, Acc (&to)[C::kStates],
                                              std::integer_sequence<int, kStates...>) const {
    ((to[kStates] = C::forward_reads(kStates) ? before<kStates>(e, info) : Acc(0)), ...);
  }

  // Whether the accumulator of a recurrent product has an input product in it.
  static constexpr __device__ bool adds(int recurrent_gate) {
    for (int g = 0; g < C::kInputGates; ++g) {
      if (C::input_slot(g) == C::recurrent_slot(recurrent_gate)) return true;
    }
    return false;
  }

  // The recurrent product of a gate with its bias, of an active row.
  __device__ __forceinline__ Acc recurrent_sum(int e, int gate) const {
    const int64_t index = (row_of_batch(e) * C::kRecurrentGates + gate) * s.p.H + tile.unit(e);
    if constexpr (Part::kRecurrent) {
      Acc sum = Matmul<G>::sum(gate, FormulaTile<G>::unit_of(e), FormulaTile<G>::batch_of(e));
      const void* const bias = tile.dir ? s.p.weights[1].b_hh : s.p.weights[0].b_hh;
      if (bias) sum += formula_load<Storage>(bias, gate * s.p.H + tile.unit(e));
      if constexpr (!kLast) static_cast<Acc*>(s.p.rec)[index] = sum;
      return sum;
    } else {
      return static_cast<const Acc*>(s.p.rec)[index];
    }
  }
  // The accumulators of an active row after both products. Further segments find their sums where those of family `step`
  // leave them.
  __device__ __forceinline__ void make_accumulators(int e, const RowInfo& info, Acc (&a)[kValues]) const {
    const FormulaDirection& weights = tile.dir ? s.p.weights[1] : s.p.weights[0];
    const int64_t unit = tile.unit(e);
#pragma unroll
    for (int i = 0; i < C::kSlots; ++i) a[i] = Matmul<G>::sum(i, FormulaTile<G>::unit_of(e), FormulaTile<G>::batch_of(e));
#pragma unroll
    for (int g = 0; g < C::kInputGates; ++g) {
      if (weights.b_ih) a[C::input_slot(g)] += formula_load<Storage>(weights.b_ih, g * s.p.H + unit);
    }
#pragma unroll
    for (int g = 0; g < C::kRecurrentGates; ++g) {
      if (weights.b_hh) a[C::recurrent_slot(g)] += formula_load<Storage>(weights.b_hh, g * s.p.H + unit);
    }
    if constexpr (!kLast) {
      Acc stored[kValues] = {};
#pragma unroll
      for (int g = 0; g < C::kInputGates; ++g) {
        const Storage product = simt::from_float<Storage>(a[C::input_slot(g)]);
        static_cast<Storage*>(s.p.x)[kept_index(e, info.row, C::kInputGates) + g * s.p.H] = product;
        stored[C::input_slot(g)] = simt::to_float(product);
      }
#pragma unroll
      for (int g = 0; g < C::kRecurrentGates; ++g) {  // what the rounding has left over counts as the recurrent product's
        const int slot = C::recurrent_slot(g);
        static_cast<Acc*>(s.p.rec)[(row_of_batch(e) * C::kRecurrentGates + g) * s.p.H + unit] = a[slot] - stored[slot];
      }
    }
  }
  // The result of phase kPart.
  __device__ __forceinline__ Acc phase_result(int e) const {
    static_assert(!Part::kRecurrent);
    const int unit = FormulaTile<G>::unit_of(e), batch = FormulaTile<G>::batch_of(e);
    if constexpr (Part::kIsProduct) {
      return Matmul<G>::sum(0, unit, batch);
    } else {
      const FormulaDirection& weights = tile.dir ? s.p.weights[1] : s.p.weights[0];
      const Acc weight = formula_load<Storage>(weights.weight[kPart], tile.unit(e));
      const Acc bias = Part::kCentred ? Acc(formula_load<Storage>(weights.bias[kPart], tile.unit(e))) : Acc(0);
      return FormulaNorm<G, Part::kCentred>::result(table, batch, tile.unit(e), weight, bias);
    }
  }
  // Leaves the results of phase kPart in working memory, for the parts and launches behind it.
  __device__ __forceinline__ void store_results() const {
#pragma unroll(G::kElements <= 1 ? 1 : 2)
    for (int e = 0; e < G::kElements; ++e) {
      if (!tile.exists(e, table) || !(table[FormulaTile<G>::batch_of(e)].flags & kActive)) continue;
      formula_store<Acc>(s.p.results[kPart], state_index(e), phase_result(e));
    }
  }

  struct Values {
    Acc a[kValues], before[C::kStates], p[kParameters], ph[kPhases];
  };
  __device__ __forceinline__ void load(int e, const RowInfo& info, Values& in) const {
#pragma unroll
    for (int i = 0; i < kValues; ++i) in.a[i] = Acc(0);
    if constexpr (kInput) {
      make_accumulators(e, info, in.a);
    } else {
      const int64_t x = kept_index(e, info.row, C::kInputGates);
#pragma unroll
      for (int g = 0; g < C::kInputGates; ++g) in.a[C::input_slot(g)] = formula_load<Storage>(s.p.x, x + g * s.p.H);
#pragma unroll
      for (int g = 0; g < C::kRecurrentGates; ++g) {
        const Acc sum = recurrent_sum(e, g);
        in.a[C::recurrent_slot(g)] = adds(g) ? in.a[C::recurrent_slot(g)] + sum : sum;
      }
    }
    load_states(e, info, in.before, std::make_integer_sequence<int, C::kStates>{});
    const void* const parameters = tile.dir ? s.p.weights[1].parameters : s.p.weights[0].parameters;
#pragma unroll
    for (int i = 0; i < C::kParameters; ++i) in.p[i] = formula_load<Storage>(parameters, i * s.p.H + tile.unit(e));
    if constexpr (!Part::kRecurrent) {
#pragma unroll
      for (int k = 0; k < C::kPhases; ++k) {
        if (k != kPart && C::forward_level(k) < kSegment) in.ph[k] = formula_load<Acc>(s.p.results[k], state_index(e));
      }
      in.ph[kPart] = phase_result(e);
      if constexpr (!kLast) formula_store<Acc>(s.p.results[kPart], state_index(e), in.ph[kPart]);
    }
  }

  // What phase kPhase takes.
  template <int kPhase>
  __device__ __forceinline__ void take(int e, const RowInfo& info, const Values& in) const {
    constexpr bool kProduct = static_cast<FormulaPhase>(C::phase_kind(kPhase)) == FormulaPhase::kProduct;
    Acc v;
    call_phase_input<C, kPhase>(in, v);
    formula_store<std::conditional_t<kProduct, Storage, Acc>>(s.p.taken[kPhase], state_index(e), v);
    if (s.p.v[kPhase]) formula_store<Storage>(s.p.v[kPhase], kept_index(e, info.row, 1), v);
  }
  // What the next segment's phases take.
  __device__ __forceinline__ void take_all(int e, const RowInfo& info, const Values& in) const {
    formula_for_phases<C>([&](auto phase) {
      constexpr int kPhase = decltype(phase)::value;
      if constexpr (C::forward_level(kPhase) == kSegment) take<kPhase>(e, info, in);
    });
  }

  // The states after the step, and what backward reads.
  __device__ __forceinline__ void finish(int e, const RowInfo& info, Values& in) const {
    Acc after[C::kStates];
    call_forward<C>(in, after);
    store_states(e, info, after, std::make_integer_sequence<int, C::kStates>{});
    if (!s.p.saved) return;
    const int64_t saved = kept_index(e, info.row, C::kSaved);
#pragma unroll
    for (int k = 0; k < C::kSaved; ++k) formula_store<Storage>(s.p.saved, saved + k * s.p.H, in.a[k]);
  }
  template <int kState>
  __device__ __forceinline__ void store_state(int e, const RowInfo& info, Acc value) const {
    if constexpr (kState == C::kOutput) {
      formula_store<Storage>(s.p.y, output_index(e, info.row), value);
    } else if constexpr (kOwnRecurrent && kState == C::kRecurrent) {
      formula_store<Storage>(s.p.recurrent, recurrent_copy(s.step) + state_index(e), value);
    } else {
      if constexpr (kState == C::kRecurrent) value = simt::to_float(simt::from_float<Storage>(value));
      formula_store<Acc>(s.p.states[kState], state_index(e), value);
    }
    if (kState != C::kOutput && s.p.series[kState]) {
      formula_store<Storage>(s.p.series[kState], output_index(e, info.row), value);
    }
    if (!(info.flags & kHasNext)) formula_store<Storage>(s.p.last[kState], state_index(e), value);
  }
  template <int... kStates>
  __device__ __forceinline__ void store_states(int e, const RowInfo& info, const Acc (&after)[C::kStates],
                                               std::integer_sequence<int, kStates...>) const {
    (store_state<kStates>(e, info, after[kStates]), ...);
  }

  // A row that takes no part in the step, or in any.
  __device__ __forceinline__ void skip(int e, const RowInfo& info) const {
    if (info.flags & kNever) {
#pragma unroll
      for (int i = 0; i < C::kStates; ++i) {
        const Acc value = s.p.initial[i] ? Acc(formula_load<Storage>(s.p.initial[i], state_index(e))) : Acc(0);
        formula_store<Storage>(s.p.last[i], state_index(e), value);
      }
    }
    if (s.p.seq.offsets) return;
    formula_store<Storage>(s.p.y, output_index(e, info.row), Acc(0));
#pragma unroll
    for (int i = 0; i < C::kStates; ++i) {
      if (i != C::kOutput && s.p.series[i]) formula_store<Storage>(s.p.series[i], output_index(e, info.row), Acc(0));
    }
#pragma unroll
    for (int k = 0; k < C::kPhases; ++k) {
      if (s.p.v[k]) formula_store<Storage>(s.p.v[k], kept_index(e, info.row, 1), Acc(0));
    }
  }

  __device__ __forceinline__ void run() const {
    const auto active = [&](int e, const RowInfo& info) {
      Values in;
      load(e, info, in);
      if constexpr (kLast) {
        finish(e, info, in);
      } else {
        take_all(e, info, in);
      }
    };
    formula_for_elements(tile, table, active, [&](int e, const RowInfo& info) {
      if constexpr (kLast) skip(e, info);
    });
  }
};

// The row that an active row's product or norm reads; null: zeros.
template <class C, class G, int kPart>
__device__ __forceinline__ const void* formula_forward_source(const FormulaForwardStep& s, const FormulaTile<G>& tile,
                                                              int64_t b, const RowInfo& info) {
  using Storage = typename G::Storage;
  const int64_t row = (tile.dir * s.p.seq.B + b) * s.p.H;
  if constexpr (kPart >= 0) {
    if constexpr (FormulaForwardPart<C, kPart>::kIsProduct) {
      return static_cast<const Storage*>(s.p.taken[kPart]) + row;
    } else {
      return static_cast<const typename G::Acc*>(s.p.taken[kPart]) + row;
    }
  } else if constexpr (C::kRecurrentGates > 0) {
    const int64_t of_head = tile.head * tile.units;
    if (info.flags & kReset) {
      const auto* put = formula_reset_row<Storage>(s.p, tile, C::kRecurrent, s.step, b);
      return put ? put + of_head : nullptr;
    }
    if (!(info.flags & kHasPrevious)) {
      const auto* initial = static_cast<const Storage*>(s.p.initial[C::kRecurrent]);
      return initial ? initial + row + of_head : nullptr;
    }
    if constexpr (C::kRecurrent == C::kOutput) {
      return static_cast<const Storage*>(s.p.y) + (info.other * s.p.D + tile.dir) * s.p.H + of_head;
    } else {
      return static_cast<const Storage*>(s.p.recurrent) + ((s.step - 1) & 1) * s.p.D * s.p.seq.B * s.p.H + row + of_head;
    }
  }
  return nullptr;
}

// Segment 0 of family `single`.
template <class C, MathKind kMath, TileSize kSize>
__device__ __forceinline__ void formula_single_forward(const FormulaForwardStep& s) {
  using G = FormulaSingleGeometry<C, kMath, kSize>;
  using Storage = typename G::Storage;
  const FormulaTile<G> tile(s.p);
  const FormulaDirection& weights = tile.dir ? s.p.weights[1] : s.p.weights[0];
  const int64_t head = tile.head * tile.units;
  const auto* const w_ih = static_cast<const Storage*>(weights.w_ih) + head * s.p.I;
  const auto* w_hh = w_ih;  // of no columns where there is no recurrent product
  if (C::kRecurrentGates > 0) w_hh = static_cast<const Storage*>(weights.w_hh) + head * C::kRecurrentGates * tile.units;
  const Operand<Storage> operands[2] = {
      {w_ih, tile.units, s.p.I, s.input_copy_bytes, s.p.H},
      {w_hh, tile.units, C::kRecurrentGates > 0 ? tile.units : 0, s.copy_bytes, tile.units}};
  Matmul<G> matmul(operands, tile.first_unit, s.stages);
  const auto row = [&](int64_t b) {
    RowInfo info = forward_row(s.p.seq, s.p.modifier, s.step, tile.dir, b);
    if (info.flags & kActive) {
      info.source[0] = static_cast<const Storage*>(s.p.input) + info.row * s.p.I;
      info.source[1] = formula_forward_source<C, G, -1>(s, tile, b, info);
    }
    return info;
  };
  const RowInfo* const table = formula_sums<true, true>(matmul, tile, row, [](RowInfo*) {});
  FormulaForwardElements<C, G, 0, -1>{s, tile, table}.run();
}

// kFirst, kFinal: the part is the segment's first, or last one.
template <class C, MathKind kMath, TileSize kSize, int kSegment, int kPart, bool kFirst, bool kFinal>
__device__ __forceinline__ void formula_forward_part(const FormulaForwardStep& s) {
  using Part = FormulaForwardPart<C, kPart>;
  using G = FormulaGeometry</*kBackward=*/false, Part::kGroups, kMath, kSize>;
  using Storage = typename G::Storage;
  const FormulaTile<G> tile(s.p);
  const FormulaDirection& weights = tile.dir ? s.p.weights[1] : s.p.weights[0];

  // A head's matrix is [Gr][units][units], a phase's [H][H]; the tiles of a phase's product lie head by head like all.
  const auto* matrix = static_cast<const Storage*>(Part::kRecurrent ? weights.w_hh : weights.weight[kPart < 0 ? 0 : kPart]);
  if (Part::kRecurrent && Part::kIsProduct) matrix += tile.head * Part::kGroups * tile.units * tile.units;
  const int64_t product_units = Part::kRecurrent ? tile.units : s.p.H;
  const int64_t first = Part::kRecurrent ? tile.first_unit : tile.head * tile.units + tile.first_unit;
  const Operand<Storage> operands[1] = {{matrix, product_units, product_units, s.copy_bytes}};
  Matmul<G> matmul(operands, first, s.stages);
  const auto row = [&](int64_t b) {
    RowInfo info = forward_row(s.p.seq, s.p.modifier, s.step, tile.dir, b);
    if (info.flags & kActive) info.source[0] = formula_forward_source<C, G, kPart>(s, tile, b, info);
    return info;
  };
  const RowInfo* const table = formula_sums<kFirst, Part::kIsProduct>(matmul, tile, row, [&](RowInfo* rows) {
    if constexpr (Part::kIsNorm) FormulaNorm<G, Part::kCentred>::forward(rows, s.p.H);
  });
  const FormulaForwardElements<C, G, kSegment, kPart> elements{s, tile, table};
  if constexpr (kFinal) {
    elements.run();
  } else {
    elements.store_results();
  }
}

template <class C, MathKind kMath, TileSize kSize, int kSegment>
__device__ __forceinline__ void formula_forward(const FormulaForwardStep& s) {
  if constexpr (kSegment == 0) {
    formula_forward_part<C, kMath, kSize, kSegment, -1, true, true>(s);
  } else {
    using Ends = FormulaLevelEnds<C, /*kBackward=*/false, kSegment - 1>;
    formula_for_phases<C>([&](auto phase) {
      constexpr int kPhase = decltype(phase)::value;
      if constexpr (C::forward_level(kPhase) == kSegment - 1) {
        formula_forward_part<C, kMath, kSize, kSegment, kPhase, kPhase == Ends::kFirst, kPhase == Ends::kLast>(s);
      }
    });
  }
}

}  // namespace fused_rnn::cuda
