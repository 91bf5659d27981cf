// The persistent families, backward, and the gradients of the initial states (formula_persistent.cuh). C: the cell's struct.
//
// A step, in the reverse order of the scan: await the gradients of the recurrent products of the next step, their product
// with W_hh, then a pass over the elements; for each level of phases the exchange of their results' gradients, products and
// norms, and a pass. The last pass makes the gradients of the recurrent products, which are sent. While that is under way
// the inputs of the step before are loaded. A barrier of the block stands between any two of these. Shared memory:
//   arrays   Acc: gradients of the states | of what phases before the last level took, of what norms gave
//   staged   dtype: saved values, states before and after the step, dy, what phases took
// A row whose next step, in the order of the scan, is active has the product with W_hh added to the gradient of its
// recurrent state, whether it takes part in this step or begins with the next.
#pragma once
#include "cuda/formula/formula_persistent.cuh"

namespace fused_rnn::cuda {

template <class C, MathKind kMath, bool kGrid>
struct FormulaPersistentBackwardScan : FormulaPersistentBlock<C, kMath, /*kBackward=*/true, kGrid> {
  using Base = FormulaPersistentBlock<C, kMath, true, kGrid>;
  using Base::s, Base::p, Base::exchange, Base::dir, Base::kLevels, Base::kRecurs, Base::kRows;
  using typename Base::Acc, typename Base::Moments, typename Base::Storage;
  using Element = FormulaPersistentElement;
  static constexpr int kBlocks = C::kSlots + C::kParameters + C::kPhases;  // of a row of d
  static constexpr int kTakenAt = C::kStates, kResultsAt = kTakenAt + Base::kept_place(C::kPhases);
  static constexpr int kBeforeAt = C::kSaved, kAfterAt = kBeforeAt + C::kStates, kDyAt = kAfterAt + C::kStates;
  static constexpr int kPhasesAt = kDyAt + 1;
  static constexpr int kNextReset = 64;  // with RowFlags: the next step began from zeros

  const FormulaBackward& f;

  __device__ __forceinline__ FormulaPersistentBackwardScan(const FormulaPersistentBackward& arguments)
      : Base(arguments.p, arguments.shape, arguments.teams), f(arguments.p) {}

  // ------------------------------------------------------------------------------------------------- the rows of a step

  __device__ __forceinline__ void note_rows(int64_t step) const {
    if (simt::thread_x() >= kRows || step < 0) return;
    int64_t next_row;
    bool next_reset;
    RowInfo info = backward_row(p.seq, p.modifier, step, dir, this->first_row + simt::thread_x(), next_row, next_reset);
    if (next_reset) info.flags |= kNextReset;
    this->table(step)[simt::thread_x()] = info;
  }
  template <int kState>
  __device__ __forceinline__ void stage_state(const Element& e, const RowInfo& info) const {
    if constexpr (C::reads_state(kState)) {
      const auto* const series = static_cast<const Storage*>(kState == C::kOutput ? f.y : f.series[kState]);
      const auto* const initial = static_cast<const Storage*>(f.initial[kState]);
      Storage before = simt::from_float<Storage>(Acc(0));
      if (!(info.flags & kReset)) {
        if (info.flags & kHasPrevious) {
          before = series[this->output_index(e, info.other)];
        } else if (initial) {
          before = initial[this->state_index(e)];
        }
      }
      this->staged(kAfterAt + kState, e.at) = series[this->output_index(e, info.row)];
      this->staged(kBeforeAt + kState, e.at) = before;
    }
  }
  template <int... kStates>
  __device__ __forceinline__ void stage_states(const Element& e, const RowInfo& info,
                                               std::integer_sequence<int, kStates...>) const {
    (stage_state<kStates>(e, info), ...);
  }
  __device__ __forceinline__ void stage(int64_t step) const {
    if (step < 0) return;
    this->for_elements([&](const Element& e) {
      const RowInfo& info = this->table(step)[e.b];
      if (!e.real || !(info.flags & kActive)) return;
      const int64_t saved = this->kept_index(e, info.row, C::kSaved), v = this->kept_index(e, info.row, 1);
#pragma unroll
      for (int k = 0; k < C::kSaved; ++k) this->staged(k, e.at) = static_cast<const Storage*>(f.saved)[saved + k * p.H];
      stage_states(e, info, std::make_integer_sequence<int, C::kStates>{});
      if (f.dy) this->staged(kDyAt, e.at) = static_cast<const Storage*>(f.dy)[this->output_index(e, info.row)];
#pragma unroll
      for (int k = 0; k < C::kPhases; ++k) this->staged(kPhasesAt + k, e.at) = static_cast<const Storage*>(f.v[k])[v];
    });
  }

  __device__ __forceinline__ void begin() const {
    this->for_elements([&](const Element& e) {
#pragma unroll
      for (int i = 0; i < C::kStates; ++i) {
        const bool there = e.real && f.d_last[i];
        this->array(i, e.at) = there ? Acc(formula_load<Storage>(f.d_last[i], this->state_index(e))) : Acc(0);
      }
    });
  }

  // ----------------------------------------------------------------------------------------------------- passes of a step

  struct Values {
    Acc a[Base::kValues], before[C::kStates], after[C::kStates], p[Base::kParameters], v[Base::kPhases];
    Acc d_states[C::kStates], dv[Base::kPhases];
  };
  __device__ __forceinline__ Acc loaded(int number, const Element& e) const {
    return simt::to_float(this->staged(number, e.at));
  }
  // The gradient of what phase k of the level before took, for the later passes too.
  template <int k>
  __device__ __forceinline__ Acc make_gradient(const Element& e) const {
    Acc result;
    if constexpr (Base::is_product(k)) {
      result = this->sum(Base::place_of(Base::level_of(k), k, true), s.splits[Base::level_of(k) + 1], e);
    } else {
      const Moments m = this->final_moments(k, e.b);
      const Acc weighted =
          this->array(kResultsAt + Base::norm_place(k), e.at) * this->constant(Base::kNormWeights + 2 * k, e.local);
      const Acc normal = (loaded(kPhasesAt + k, e) - m.mean) * m.scale;
      result = (weighted - m.mean_d - normal * m.along) * m.scale;
    }
    if constexpr (Base::level_of(k) + 1 < kLevels) this->array(kTakenAt + Base::kept_place(k), e.at) = result;
    return result;
  }
  // kLevel: of the phases that were made last; -1: none.
  template <int kLevel>
  __device__ __forceinline__ void load(const Element& e, Values& in) const {
#pragma unroll
    for (int i = 0; i < Base::kValues; ++i) in.a[i] = i < C::kSaved ? loaded(i, e) : Acc(0);
    if constexpr (kLevel < 0) {
      if (f.dy) this->array(C::kOutput, e.at) += loaded(kDyAt, e);
    }
#pragma unroll
    for (int i = 0; i < C::kStates; ++i) {
      in.before[i] = C::reads_state(i) ? loaded(kBeforeAt + i, e) : Acc(0);
      in.after[i] = C::reads_state(i) ? loaded(kAfterAt + i, e) : Acc(0);
      in.d_states[i] = this->array(i, e.at);
    }
#pragma unroll
    for (int i = 0; i < C::kParameters; ++i) in.p[i] = this->constant(Base::kBiases + i, e.local);
    formula_for_phases<C>([&](auto phase) {
      constexpr int k = decltype(phase)::value;
      in.v[k] = loaded(kPhasesAt + k, e);
      in.dv[k] = Acc(0);
      if constexpr (Base::level_of(k) == kLevel) {
        in.dv[k] = make_gradient<k>(e);
      } else if constexpr (Base::level_of(k) < kLevel) {
        in.dv[k] = this->array(kTakenAt + Base::kept_place(k), e.at);
      }
    });
  }

  // The gradient of the result of phase k; of a row that is not active: zero.
  template <int k>
  __device__ __forceinline__ void give(const Element& e, const RowInfo& info, bool active, const Values& in) const {
    Acc d = Acc(0);
    if (active) {
      call_phase_gradient<C, k>(in, d);
      const int64_t block = C::kSlots + C::kParameters + k;
      formula_store<Storage>(f.d, this->kept_index(e, info.row, kBlocks) + block * p.H, d);
    }
    this->template hand_on<k>(kResultsAt, e, d);
  }

  // The gradients of products, parameters and of the states before the step.
  __device__ __forceinline__ void finish(const Element& e, const RowInfo& info, Values& in, Acc (&d)[C::kSlots]) const {
    Acc d_parameters[Base::kParameters];
    call_backward<C>(in, d, d_parameters);
    const int64_t at = this->kept_index(e, info.row, kBlocks);
#pragma unroll
    for (int i = 0; i < C::kSlots; ++i) formula_store<Storage>(f.d, at + i * p.H, d[i]);
#pragma unroll
    for (int i = 0; i < C::kParameters; ++i) formula_store<Storage>(f.d, at + (C::kSlots + i) * p.H, d_parameters[i]);
#pragma unroll
    for (int i = 0; i < C::kStates; ++i) this->array(i, e.at) = info.flags & kReset ? Acc(0) : in.d_states[i];
  }
  // A row that takes no part in the step.
  __device__ __forceinline__ void skip(const Element& e, const RowInfo& info) const {
    if (p.seq.offsets) return;
    const int64_t at = this->kept_index(e, info.row, kBlocks);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) formula_store<Storage>(f.d, at + i * p.H, Acc(0));
  }

  template <int kLevel>
  __device__ __forceinline__ void pass(int64_t step) const {
    constexpr bool kLast = kLevel + 1 == kLevels;
    this->for_elements([&](const Element& e) {
      const RowInfo& info = this->table(step)[e.b];
      const bool active = e.real && info.flags & kActive;
      if constexpr (kRecurs && kLevel < 0) {
        if (e.real && info.flags & kHasNext && !(info.flags & kNextReset)) {
          this->array(C::kRecurrent, e.at) += this->sum(0, s.splits[0], e);
        }
      }
      Values in;
      if (active) load<kLevel>(e, in);
      if constexpr (kLast) {
        Acc d[C::kSlots] = {};
        if (active) {
          finish(e, info, in, d);
        } else if (e.real) {
          skip(e, info);
        }
        if constexpr (kRecurs) {
          constexpr int kFirst = C::kSlots - C::kRecurrentGates;
          unsigned char* const vectors = this->recurrent_vectors(exchange);
#pragma unroll
          for (int g = 0; g < C::kRecurrentGates; ++g) this->put(vectors + g * this->vector_bytes(), e, d[kFirst + g]);
        }
      } else {
        formula_for_phases<C>([&](auto phase) {
          constexpr int k = decltype(phase)::value;
          if constexpr (Base::level_of(k) == kLevel + 1) give<k>(e, info, active, in);
        });
      }
    });
    simt::sync_block();
  }

  template <int k>
  __device__ __forceinline__ void send_norm(unsigned char* norms) const {
    const auto v = [&](int at, int) -> Acc { return simt::to_float(this->staged(kPhasesAt + k, at)); };
    const auto d = [&](int at, int u) -> Acc {
      return this->array(kResultsAt + Base::norm_place(k), at) * this->constant(Base::kNormWeights + 2 * k, u);
    };
    for (int b = simt::warp_id(); b < kRows; b += Base::kWarps) {
      this->make_moments(norms, Base::place_of(Base::level_of(k), k, false), Base::is_centred(k), b, v, d);
    }
  }
  // ---------------------------------------------------------------------------------------------------------------- scan

  // The product of the next step's gradients with W_hh. sent: they have been sent.
  __device__ __forceinline__ void multiply_gradients(bool sent) {
    if constexpr (kRecurs) {
      const unsigned char* const vectors = this->recurrent_vectors(exchange);
      if (!s.recurrent_local) this->await(Base::kRecurrentVectors, 0, sent);
      this->multiply_recurrent(vectors);
      simt::sync_block();
    }
  }
  __device__ __forceinline__ void run() {
    const int64_t last = p.seq.T - 1;
    bool asked = false;  // for the gradient of any initial state
#pragma unroll
    for (int i = 0; i < C::kStates; ++i) asked |= f.d_initial[i] != nullptr;
    this->start();
    note_rows(last);
    note_rows(last - 1);
    begin();
    this->meet();
    stage(last);
#pragma unroll 1
    for (int64_t step = last; step >= 0; --step) {
      multiply_gradients(step < last);
      pass<-1>(step);
      this->make_levels(*this, step, std::make_integer_sequence<int, kLevels>{});
      if constexpr (kRecurs) {
        if (!s.recurrent_local && (step > 0 || asked)) {
          this->send_vectors(this->recurrent_vectors(exchange), Base::kRecurrentVectors);
        }
      }
      stage(step - 1);
      note_rows(step - 2);
    }
    if (!asked) return;
    if (p.seq.T > 0) multiply_gradients(true);
    this->for_elements([&](const Element& e) {
      if (!e.real) return;
      // The product of rows that begin later has been added already: they have sent zeros since.
      const bool adds = p.seq.T > 0 && !(this->table(0)[e.b].flags & kReset);
#pragma unroll
      for (int i = 0; i < C::kStates; ++i) {
        if (!f.d_initial[i]) continue;
        Acc d = this->array(i, e.at);
        if (kRecurs && i == C::kRecurrent && adds) d += this->sum(0, s.splits[0], e);
        formula_store<Storage>(f.d_initial[i], this->state_index(e), d);
      }
    });
  }
};

template <class C, MathKind kMath, bool kGrid>
__device__ __forceinline__ void formula_persistent_backward(const FormulaPersistentBackward& arguments) {
  FormulaPersistentBackwardScan<C, kMath, kGrid>(arguments).run();
}

}  // namespace fused_rnn::cuda
