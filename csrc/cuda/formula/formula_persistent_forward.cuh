// The persistent families, forward (formula_persistent.cuh). C: the cell's struct (fused_rnn/formula/writer.py).
//
// A step: await what the recurrent product reads, the product, then a pass over the elements; for each level of phases the
// exchange of what they take, products and norms, and a pass. The last pass makes the states, of which the recurrent one is
// sent. While that is under way the inputs of the next step are loaded. A barrier of the block stands between any two of
// these. Shared memory:
//   arrays   Acc: the states | with phases: accumulators, what norms took, results of phases before the last level
//   staged   dtype: the input products of the step
#pragma once
#include "cuda/formula/formula_persistent.cuh"

namespace fused_rnn::cuda {

template <class C, MathKind kMath, bool kGrid>
struct FormulaPersistentForwardScan : FormulaPersistentBlock<C, kMath, /*kBackward=*/false, kGrid> {
  using Base = FormulaPersistentBlock<C, kMath, false, kGrid>;
  using Base::s, Base::p, Base::exchange, Base::dir, Base::kLevels, Base::kRecurs, Base::kRows;
  using typename Base::Acc, typename Base::Moments, typename Base::Storage;
  using Element = FormulaPersistentElement;
  static constexpr int kSlotsAt = C::kStates, kTakenAt = kSlotsAt + C::kSlots,
                       kResultsAt = kTakenAt + Base::norm_place(C::kPhases);

  const FormulaForward& f;

  __device__ __forceinline__ FormulaPersistentForwardScan(const FormulaPersistentForward& arguments)
      : Base(arguments.p, arguments.shape, arguments.teams), f(arguments.p) {}

  // ------------------------------------------------------------------------------------------------- the rows of a step

  __device__ __forceinline__ void note_rows(int64_t step) const {
    if (simt::thread_x() >= kRows || step >= p.seq.T) return;
    this->table(step)[simt::thread_x()] = forward_row(p.seq, p.modifier, step, dir, this->first_row + simt::thread_x());
  }
  __device__ __forceinline__ void stage(int64_t step) const {
    if (step >= p.seq.T) return;
    this->for_elements([&](const Element& e) {
      const RowInfo& info = this->table(step)[e.b];
      if (!e.real || !(info.flags & kActive)) return;
      const int64_t x = this->kept_index(e, info.row, C::kInputGates);
#pragma unroll
      for (int g = 0; g < C::kInputGates; ++g) this->staged(g, e.at) = static_cast<const Storage*>(f.x)[x + g * p.H];
    });
  }

  // -------------------------------------------------------------------------------------------------------------- begin

  // States as they are before the first step, and of the recurrent one all units of the group.
  __device__ __forceinline__ void begin() const {
    this->for_elements([&](const Element& e) {
#pragma unroll
      for (int i = 0; i < C::kStates; ++i) {
        const bool there = e.real && f.initial[i];
        this->array(i, e.at) = there ? Acc(formula_load<Storage>(f.initial[i], this->state_index(e))) : Acc(0);
      }
    });
    if (!kRecurs || !f.initial[C::kRecurrent]) return;
    // Of a vector that is not exchanged the block needs its own part.
    const int first = s.recurrent_local ? this->rank * s.slice : 0;
    const int count = s.recurrent_local ? this->units_of(this->rank) : s.units;
    for (int i = simt::thread_x(); i < count * kRows; i += Base::kThreads) {
      Element e{};
      e.b = i / count;
      e.local = first + i % count - this->rank * s.slice;
      if (!this->unit_of(first + i % count, e.unit) || this->first_row + e.b >= p.seq.B) continue;
      this->put(this->recurrent_vectors(0), e, formula_load<Storage>(f.initial[C::kRecurrent], this->state_index(e)));
    }
  }

  // ----------------------------------------------------------------------------------------------------- passes of a step

  struct Values {
    Acc a[Base::kValues], before[C::kStates], p[Base::kParameters], ph[Base::kPhases];
  };
  static constexpr __device__ bool adds(int recurrent_gate) {
    for (int g = 0; g < C::kInputGates; ++g) {
      if (C::input_slot(g) == C::recurrent_slot(recurrent_gate)) return true;
    }
    return false;
  }
  // What the products gave, after the recurrent one; kept for the later passes.
  __device__ __forceinline__ void make_slots(const Element& e, bool recurrent, Values& in) const {
#pragma unroll
    for (int g = 0; g < C::kInputGates; ++g) in.a[C::input_slot(g)] = simt::to_float(this->staged(g, e.at));
#pragma unroll
    for (int g = 0; g < C::kRecurrentGates; ++g) {
      const Acc sum = (recurrent ? this->sum(g, s.splits[0], e) : Acc(0)) + this->constant(g, e.local);
      in.a[C::recurrent_slot(g)] = adds(g) ? in.a[C::recurrent_slot(g)] + sum : sum;
    }
    if constexpr (kLevels > 0) {
#pragma unroll
      for (int i = 0; i < C::kSlots; ++i) this->array(kSlotsAt + i, e.at) = in.a[i];
    }
  }
  // The result of phase k of the level before, for the later passes too.
  template <int k>
  __device__ __forceinline__ Acc make_result(const Element& e) const {
    Acc result;
    if constexpr (Base::is_product(k)) {
      result = this->sum(Base::place_of(Base::level_of(k), k, true), s.splits[Base::level_of(k) + 1], e);
    } else {
      const Moments m = this->final_moments(k, e.b);
      const Acc weight = this->constant(Base::kNormWeights + 2 * k, e.local);
      result = (this->array(kTakenAt + Base::norm_place(k), e.at) - m.mean) * m.scale * weight;
      if constexpr (Base::is_centred(k)) result += this->constant(Base::kNormWeights + 2 * k + 1, e.local);
    }
    if constexpr (Base::level_of(k) + 1 < kLevels) this->array(kResultsAt + Base::kept_place(k), e.at) = result;
    return result;
  }
  // kLevel: of the phases that were made last; -1: none.
  template <int kLevel>
  __device__ __forceinline__ void load(const Element& e, const RowInfo& info, Values& in) const {
    const bool reset = info.flags & kReset;
#pragma unroll
    for (int i = 0; i < Base::kValues; ++i) in.a[i] = Acc(0);
    if constexpr (kLevel < 0) {
      make_slots(e, !reset, in);
    } else {
#pragma unroll
      for (int i = 0; i < C::kSlots; ++i) in.a[i] = this->array(kSlotsAt + i, e.at);
    }
#pragma unroll
    for (int i = 0; i < C::kStates; ++i) in.before[i] = reset ? Acc(0) : this->array(i, e.at);
#pragma unroll
    for (int i = 0; i < C::kParameters; ++i) in.p[i] = this->constant(Base::kBiases + i, e.local);
    formula_for_phases<C>([&](auto phase) {
      constexpr int k = decltype(phase)::value;
      in.ph[k] = Acc(0);
      if constexpr (Base::level_of(k) == kLevel) {
        in.ph[k] = make_result<k>(e);
      } else if constexpr (Base::level_of(k) < kLevel) {
        in.ph[k] = this->array(kResultsAt + Base::kept_place(k), e.at);
      }
    });
  }

  // What phase k takes. Of a row that is not active: zeros, since norms read all rows.
  template <int k>
  __device__ __forceinline__ void take(const Element& e, const RowInfo& info, bool active, const Values& in) const {
    Acc v = Acc(0);
    if (active) {
      call_phase_input<C, k>(in, v);
      if (f.v[k]) formula_store<Storage>(f.v[k], this->kept_index(e, info.row, 1), v);
    }
    this->template hand_on<k>(kTakenAt, e, v);
  }

  __device__ __forceinline__ void finish(const Element& e, const RowInfo& info, Values& in) const {
    Acc after[C::kStates];
    call_forward<C>(in, after);
    const int64_t output = this->output_index(e, info.row);
#pragma unroll
    for (int i = 0; i < C::kStates; ++i) {
      // The output and the recurrent state recur as they are stored.
      const Storage stored = simt::from_float<Storage>(after[i]);
      const bool rounded = i == C::kOutput || (kRecurs && i == C::kRecurrent);
      this->array(i, e.at) = rounded ? Acc(simt::to_float(stored)) : after[i];
      void* const series = i == C::kOutput ? f.y : f.series[i];
      if (series) static_cast<Storage*>(series)[output] = stored;
    }
    if (!f.saved) return;
    const int64_t saved = this->kept_index(e, info.row, C::kSaved);
#pragma unroll
    for (int k = 0; k < C::kSaved; ++k) formula_store<Storage>(f.saved, saved + k * p.H, in.a[k]);
  }
  // A row that takes no part in the step.
  __device__ __forceinline__ void skip(const Element& e, const RowInfo& info) const {
    if (p.seq.offsets) return;
    formula_store<Storage>(f.y, this->output_index(e, info.row), Acc(0));
#pragma unroll
    for (int i = 0; i < C::kStates; ++i) {
      if (i != C::kOutput && f.series[i]) formula_store<Storage>(f.series[i], this->output_index(e, info.row), Acc(0));
    }
#pragma unroll
    for (int k = 0; k < C::kPhases; ++k) {
      if (f.v[k]) formula_store<Storage>(f.v[k], this->kept_index(e, info.row, 1), Acc(0));
    }
  }

  template <int kLevel>
  __device__ __forceinline__ void pass(int64_t step) const {
    constexpr bool kLast = kLevel + 1 == kLevels;
    this->for_elements([&](const Element& e) {
      const RowInfo& info = this->table(step)[e.b];
      const bool active = e.real && info.flags & kActive;
      Values in;
      if (active) load<kLevel>(e, info, in);
      if constexpr (kLast) {
        if (active) {
          finish(e, info, in);
        } else if (e.real) {
          skip(e, info);
        }
        if constexpr (kRecurs) this->put(this->recurrent_vectors(exchange), e, this->array(C::kRecurrent, e.at));
      } else {
        formula_for_phases<C>([&](auto phase) {
          constexpr int k = decltype(phase)::value;
          if constexpr (Base::level_of(k) == kLevel + 1) take<k>(e, info, active, in);
        });
      }
    });
    simt::sync_block();
  }

  template <int k>
  __device__ __forceinline__ void send_norm(unsigned char* norms) const {
    const auto v = [&](int at, int) { return this->array(kTakenAt + Base::norm_place(k), at); };
    for (int b = simt::warp_id(); b < kRows; b += Base::kWarps) {
      this->make_moments(norms, Base::place_of(Base::level_of(k), k, false), Base::is_centred(k), b, v,
                         [](int, int) { return Acc(0); });
    }
  }
  // ---------------------------------------------------------------------------------------------------------------- scan

  __device__ __forceinline__ void run() {
    this->start();
    note_rows(0);
    note_rows(1);
    begin();
    this->meet();
    stage(0);
    const bool exchanged = kRecurs && !s.recurrent_local;
#pragma unroll 1
    for (int64_t step = 0; step < p.seq.T; ++step) {
      if constexpr (kRecurs) {
        const unsigned char* const vector = this->recurrent_vectors(exchange);
        if (exchanged) this->await(1, 0, step > 0);
        this->multiply_recurrent(vector);
        simt::sync_block();
      }
      pass<-1>(step);
      this->make_levels(*this, step, std::make_integer_sequence<int, kLevels>{});
      if (exchanged && step + 1 < p.seq.T) this->send_vectors(this->recurrent_vectors(exchange), 1);
      stage(step + 1);
      note_rows(step + 2);
    }
    this->for_elements([&](const Element& e) {
      if (!e.real) return;
#pragma unroll
      for (int i = 0; i < C::kStates; ++i) formula_store<Storage>(f.last[i], this->state_index(e), this->array(i, e.at));
    });
  }
};

template <class C, MathKind kMath, bool kGrid>
__device__ __forceinline__ void formula_persistent_forward(const FormulaPersistentForward& arguments) {
  FormulaPersistentForwardScan<C, kMath, kGrid>(arguments).run();
}

}  // namespace fused_rnn::cuda
