// The pair of elements of a lane of family `block`. What a step does with them is what persistent_forward.cuh and
// persistent_backward.cuh say. A step of one block is short, and every dependent instruction of it counts: here a lane keeps
// the addresses of its pair, whether it exists and how long its row is, and nothing branches, so that the compiler
// can place the requests and stores of a step among its products.
#pragma once
#include "cuda/block/block_product.cuh"
#include "cuda/persistent/persistent_backward.cuh"

namespace fused_rnn::cuda {

// Where a pair, or an element, lies in a tensor whose rows of memory have a constant size: one instruction finds it in a
// row. The row may be none of the tensor's, where nothing is read: addresses are numbers, which may go around.
template <class T>
class Column {
 public:
  Column() = default;
  // first: the element's place in row 0, counted in elements, as is row_size.
  __device__ __forceinline__ Column(const void* tensor, uint64_t first, int row_size)
      : first_(static_cast<const T*>(tensor) + first), row_size_(row_size) {}
  __device__ __forceinline__ T* at(int row) const {
    const uint64_t elements = static_cast<uint64_t>(static_cast<unsigned>(row)) * static_cast<unsigned>(row_size_);
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(first_) + elements * sizeof(T));
  }

 private:
  const T* first_;
  int row_size_;
};

// Rows of memory of the current step and of the next two (StepRows), and the time. A dense batch has equal distances.
struct BlockRows {
  int now, next, coming;
  int t, direction;  // the time, and what a step adds to it

  __device__ __forceinline__ BlockRows(const Sequence& seq, int first_time, int step_of_time)
      : t(first_time), direction(step_of_time), distance_(step_of_time * static_cast<int>(seq.B)) {
    const StepRows rows(seq, [&](int step) { return first_time + step * step_of_time; });
    now = rows.now;
    next = rows.next;
    coming = rows.coming;
  }
  __device__ __forceinline__ void advance(const Sequence& seq) {
    now = next;
    next = coming;
    t += direction;
    coming += distance_;
    const int time = t + 2 * direction;
    // The low word, at an address that may be no offset's: then nothing is read there.
    const auto address = reinterpret_cast<uintptr_t>(seq.offsets) + static_cast<uintptr_t>(int64_t{time} * sizeof(int64_t));
    coming = simt::load_if(seq.offsets && static_cast<unsigned>(time) < static_cast<unsigned>(seq.T),
                           reinterpret_cast<const int*>(address), coming);
  }

 private:
  int distance_;
};

// Two neighbouring units.
template <class Storage>
using Pair = simt::Vec<Storage, 2>;

// What forward and backward keep of the lane's pair, of which both elements exist or none does.
struct LanePair {
  bool always;      // whether inactive rows are stored too: if the pair exists, unless the batch is packed
  int length;       // active steps; 0 where no pair exists
  int hint_length;  // the same where the lane hints that rows will be read, else 0: lanes of 16 units are neighbours
  int row_of_batch;
  const Sequence& seq;
  const Modifier& modifier;

  // elements: begun, with lengths in shared memory.
  template <class Elements>
  __device__ __forceinline__ explicit LanePair(const Elements& elements) : seq(elements.seq), modifier(elements.modifier) {
    const typename Elements::Place e(0, 0);
    const bool exists = elements.exists(e, 0);
    always = exists && !seq.offsets;
    length = exists ? elements.length(e, 0) : 0;
    hint_length = e.unit % (32 / static_cast<int>(sizeof(typename Elements::Storage))) == 0 ? length : 0;
    row_of_batch = elements.row_of_batch(e, 0);
  }
  static __device__ __forceinline__ bool active(int length, int t) {
    return static_cast<unsigned>(t) < static_cast<unsigned>(length);
  }
  // Whether zeros replace the state before time t, whose first row is `row`; 0 for no, and if the launch does not make the
  // step.
  __device__ __forceinline__ unsigned char reset(bool made, int t, int row) const {
    const auto address = reinterpret_cast<uintptr_t>(modifier.resets) + static_cast<uintptr_t>(int64_t{row + row_of_batch});
    return simt::load_if<unsigned char>(made && modifier.resets && active(length, t),
                                        reinterpret_cast<const unsigned char*>(address), 0);
  }
  // Whether to hint that the row at `row` will be read at time t. Of a packed batch the row is guessed (StepRows::ahead).
  __device__ __forceinline__ bool hint(int t, int row) const {
    return active(hint_length, t) && row + row_of_batch < static_cast<int>(seq.N);
  }
};

template <class G>
struct BlockForward : PersistentForward<G> {
  using Base = PersistentForward<G>;
  using Base::H, Base::p, Base::product, Base::seq;
  using C = DeviceCell<G::kCell>;
  using Place = LanePlace<G>;
  using Storage = typename G::Storage;
  using PairT = Pair<Storage>;
  // As in PersistentForward, of a pair.
  struct Request {
    PairT projection[C::kGates];
    unsigned char reset;
  };
  struct Stored {
    PairT a[C::kSlots], c, h;
    bool active;
  };

  LanePair pair;
  Column<Storage> gates, y, cs;
  bool training;

  __device__ __forceinline__ BlockForward(const ForwardSequence& s, const BlockPlace& place, BlockProduct<G>& weights)
      : Base(s, place, weights), pair(*this), training(s.p.training) {
    const Place e(0, 0);
    const int row = Base::row_of_batch(e, 0);
    gates = Column<Storage>(p.gates, Base::gate_index(e, row), C::kSlots * H);
    y = Column<Storage>(p.y, Base::y_index(e, row), p.D * H);
    if constexpr (C::kHasC) cs = Column<Storage>(p.cs, Base::c_index(e, row), H);
  }

  // Requests the projections of a step, if the launch makes it, and whether a reset follows it. rows: of that step.
  __device__ __forceinline__ void load(const BlockRows& rows, bool made, Request& x) const {
    const bool active = made && pair.active(pair.length, rows.t);
    const Storage* projection = gates.at(rows.now);
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) {
      x.projection[g] = simt::load_if(active, reinterpret_cast<const PairT*>(projection + g * H), PairT{});
    }
    x.reset = pair.reset(made, rows.t + rows.direction, rows.next);
    const int later = rows.now + (rows.next - rows.now) * kPrefetchSteps;
    const bool hint = pair.hint(rows.t + rows.direction * kPrefetchSteps, later);
    const Storage* projection_later = gates.at(later);
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) simt::prefetch_l2_if(hint, projection_later + g * H);
  }

  // Applies the cell and publishes the states for step `step` + 1 in the buffer at `to`.
  __device__ __forceinline__ void finish(int t, int step, int to, const Request& x, Stored& result) {
    float a[2][C::kSlots] = {}, h_next[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int g = 0; g < C::kGates; ++g) a[i][g] = simt::to_float(x.projection[g].v[i]);
#pragma unroll
      for (int g = 0; g < C::kGates; ++g) a[i][C::recurrent_slot(g)] += product.sum(0, g, Place(0, i));
      C::sigmoids(a[i]);
    }
    result.active = pair.active(pair.length, t);
    const bool resets = x.reset && step + 1 < Base::steps;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Place e(0, i);
      const float h_prev = Base::h(e, 0), c_prev = C::kHasC ? Base::c(e, 0) : 0.0f;
      float h_state, c_state = c_prev;
      C::forward_of_sigmoids(p.cell, a[i], h_prev, c_prev, h_state, c_state);
      // A pair that does not exist keeps its zeros: 0 * NaN is NaN and would survive a reset.
      h_state = result.active ? h_state : h_prev;
      c_state = result.active ? c_state : c_prev;
#pragma unroll
      for (int slot = 0; slot < C::kSlots; ++slot) result.a[slot].v[i] = simt::from_float<Storage>(a[i][slot]);
      result.c.v[i] = simt::from_float<Storage>(c_state);
      result.h.v[i] = simt::from_float<Storage>(h_state);
      h_next[i] = resets ? 0.0f : simt::to_float(result.h.v[i]);
      Base::keep(e, 0, h_next[i], resets ? 0.0f : c_state);
    }
    product.publish_pair(to, 0, h_next[0], h_next[1]);
  }

  // Stores a step, if there was one, whose first row of memory is `row`; zeros where a row is inactive.
  __device__ __forceinline__ void store(bool made, int row, const Stored& result) const {
    const bool stores = made && (result.active || pair.always), saves = stores && training;
    store_pair(stores, result.active, y.at(row), result.h);
    Storage* const saved = gates.at(row);
#pragma unroll
    for (int slot = 0; slot < C::kSaved; ++slot) store_pair(saves, result.active, saved + slot * H, result.a[slot]);
    if constexpr (C::kHasC) store_pair(saves, result.active, cs.at(row), result.c);
  }

 private:
  static __device__ __forceinline__ void store_pair(bool condition, bool active, Storage* to, PairT value) {
    const Storage zero = simt::from_float<Storage>(0.0f);
#pragma unroll
    for (int i = 0; i < 2; ++i) value.v[i] = active ? value.v[i] : zero;
    simt::store_if(condition, reinterpret_cast<PairT*>(to), value);
  }
};

template <class G>
struct BlockBackward : PersistentBackward<G> {
  using Base = PersistentBackward<G>;
  using Base::H, Base::p, Base::product, Base::seq;
  using C = DeviceCell<G::kCell>;
  using Place = LanePlace<G>;
  using Storage = typename G::Storage;
  using PairT = Pair<Storage>;
  // As in PersistentBackward, of a pair.
  struct Request {
    PairT a[C::kSlots];
    PairT dy, h_prev, h, c_prev, c;
    unsigned char from_zero;
  };
  struct Stored {
    PairT d[C::kSlots];
    bool active;
  };

  LanePair pair;
  Column<Storage> gates, d_gates, dy, y, cs;
  PairT h0{}, c0{};
  bool has_dy;

  __device__ __forceinline__ BlockBackward(const BackwardSequence& s, const BlockPlace& place, BlockProduct<G>& weights)
      : Base(s, place, weights), pair(*this), has_dy(s.p.dy != nullptr) {
    const Place first(0, 0);
    const int row = Base::row_of_batch(first, 0);
    if constexpr (C::kSaved > 0) gates = Column<Storage>(p.gates, Base::gate_index(first, row), C::kSlots * H);
    d_gates = Column<Storage>(p.d_gates, Base::gate_index(first, row), C::kSlots * H);
    dy = Column<Storage>(p.dy, Base::y_index(first, row), p.D * H);
    y = Column<Storage>(p.y, Base::y_index(first, row), p.D * H);
    if constexpr (C::kHasC) cs = Column<Storage>(p.cs, Base::c_index(first, row), H);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Place e(0, i);
      if (!Base::exists(e, 0)) continue;
      if constexpr (C::kReadsH) h0.v[i] = Base::state(p.h0, e, 0);
      if constexpr (C::kHasC) c0.v[i] = Base::state(p.c0, e, 0);
    }
  }

  // Requests what a step needs, if the launch makes it. rows: of that step; rows.next is the row of the step that precedes
  // it in forward's order.
  __device__ __forceinline__ void load(const BlockRows& rows, bool made, Request& x) const {
    x = Request{};
    const bool active = made && pair.active(pair.length, rows.t);
    const bool from_row = active && pair.active(pair.length, rows.t + rows.direction);
    const Storage* saved = gates.at(rows.now);
#pragma unroll
    for (int slot = 0; slot < C::kSaved; ++slot) {
      x.a[slot] = simt::load_if(active, reinterpret_cast<const PairT*>(saved + slot * H), PairT{});
    }
    // The caller's tensors may begin anywhere.
#pragma unroll
    for (int i = 0; i < 2; ++i) x.dy.v[i] = simt::load_if(active && has_dy, dy.at(rows.now) + i, Storage{});
    if constexpr (C::kSaved == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) x.h.v[i] = simt::load_if(active, y.at(rows.now) + i, Storage{});
    }
    // A reset row uses neither h_prev nor c_prev.
    if constexpr (C::kReadsH) {
#pragma unroll
      for (int i = 0; i < 2; ++i) x.h_prev.v[i] = simt::load_if(from_row, y.at(rows.next) + i, h0.v[i]);
    }
    if constexpr (C::kHasC) {
      x.c = simt::load_if(active, reinterpret_cast<const PairT*>(cs.at(rows.now)), PairT{});
      x.c_prev = simt::load_if(from_row, reinterpret_cast<const PairT*>(cs.at(rows.next)), c0);
    }
    x.from_zero = pair.reset(made, rows.t, rows.now);
    prefetch(rows);
  }

  // Adds the product, applies the derivative and publishes the gradients of the gates in the buffer at `to`.
  __device__ __forceinline__ void finish(int t, int to, const Request& x, Stored& result) {
    result.active = pair.active(pair.length, t);
    const bool from_zero = x.from_zero;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Place e(0, i);
      float d[C::kSlots], a[C::kSlots];
      const float carried = Base::carry(e, 0) + product.sum(0, 0, e), dc_before = C::kHasC ? Base::dc(e, 0) : 0.0f;
      float dc = dc_before;
#pragma unroll
      for (int slot = 0; slot < C::kSlots; ++slot) a[slot] = simt::to_float(x.a[slot].v[i]);
      const float h_prev = from_zero ? 0.0f : simt::to_float(x.h_prev.v[i]);
      const float c_prev = from_zero ? 0.0f : simt::to_float(x.c_prev.v[i]);
      float dh = C::backward(p.cell, a, h_prev, c_prev, simt::to_float(x.c.v[i]), simt::to_float(x.h.v[i]),
                             carried + simt::to_float(x.dy.v[i]), dc, d);
      dh = from_zero ? 0.0f : dh;
      dc = from_zero ? 0.0f : dc;
      Base::Base::keep(0, e, 0, result.active ? dh : carried);
      if constexpr (C::kHasC) Base::Base::keep(1, e, 0, result.active ? dc : dc_before);
      // The product takes d_rg as it is stored, rounded.
#pragma unroll
      for (int slot = 0; slot < C::kSlots; ++slot) {
        result.d[slot].v[i] = simt::from_float<Storage>(result.active ? d[slot] : 0.0f);
      }
    }
#pragma unroll
    for (int g = 0; g < C::kGates; ++g) {
      const PairT& d_rg = result.d[C::kSlots - C::kGates + g];
      product.publish_pair(to, g, from_zero ? 0.0f : simt::to_float(d_rg.v[0]),
                           from_zero ? 0.0f : simt::to_float(d_rg.v[1]));
    }
  }

  // Stores the gradients of a step, if there was one, whose first row of memory is `row`; zeros where a row is inactive.
  __device__ __forceinline__ void store(bool made, int row, const Stored& result) const {
    const bool stores = made && (result.active || pair.always);
    Storage* const to = d_gates.at(row);
#pragma unroll
    for (int slot = 0; slot < C::kSlots; ++slot) {
      simt::store_if(stores, reinterpret_cast<PairT*>(to + slot * H), result.d[slot]);
    }
  }

 private:
  __device__ __forceinline__ void prefetch(const BlockRows& rows) const {
    const int later = rows.now + (rows.next - rows.now) * kPrefetchSteps;
    const bool hint = pair.hint(rows.t + rows.direction * kPrefetchSteps, later);
    simt::prefetch_l2_if(hint && has_dy, dy.at(later));
    const Storage* saved = gates.at(later);
#pragma unroll
    for (int slot = 0; slot < C::kSaved; ++slot) simt::prefetch_l2_if(hint, saved + slot * H);
    simt::prefetch_l2_if(hint, C::kHasC ? cs.at(later) : y.at(later));
  }
};

}  // namespace fused_rnn::cuda
