// Elements of a block: hidden units of its slice times batch rows of its group, and which thread finishes each.
#pragma once
#include <type_traits>

#include "core/ceil_div.h"
#include "cuda/device/cell_device.cuh"
#include "cuda/persistent/persistent_product.cuh"
#include "cuda/persistent/persistent_scatter.cuh"

namespace fused_rnn::cuda {

// Active steps of row b; 0 for a row beyond the batch.
__device__ __forceinline__ int count_active(const Sequence& seq, int64_t b) {
  return b < seq.B ? active_steps<int>(seq, b) : 0;
}

// Where the first batch row lies in memory at a step and at the next two steps in the order of the scan. Beyond the last
// step the number is any. Packed sequences load these numbers, so each is requested a step before its use.
struct StepRows {
  int now, next, coming;

  // Of step 0. time(step): the time of a step.
  template <class Time>
  __device__ __forceinline__ StepRows(const Sequence& seq, const Time& time)
      : now(row_at(seq, time(0))), next(row_at(seq, time(1))), coming(row_at(seq, time(2))) {}
  // Goes on by a step. time: of the third step after the current one.
  __device__ __forceinline__ void advance(const Sequence& seq, int time) {
    *this = following();
    coming = row_at(seq, time);
  }
  // The rows of the next step, of which `coming` is not known.
  __device__ __forceinline__ StepRows following() const {
    StepRows rows = *this;
    rows.now = next;
    rows.next = coming;
    return rows;
  }
  // The distance in rows to a step some steps later. For packed sequences it is a guess that takes the number of rows for
  // constant.
  __device__ __forceinline__ int ahead(int steps) const { return (next - now) * steps; }

 private:
  static __device__ __forceinline__ int row_at(const Sequence& seq, int time) {
    if (!seq.offsets) return time * static_cast<int>(seq.B);
    return time >= 0 && time < static_cast<int>(seq.T) ? static_cast<int>(seq.offsets[time]) : 0;
  }
};

// When a block requests what the elements of a row tile need at a step, and when it stores their results.
//   kPlain      requests before the product of the row tile, stores as soon as an element is finished
//   kEarly      requests for the next row tile or step before it stores, so that the loads have ended when the next states
//               come: in a cluster the wait for states is a wait for all loads. Registers suffice for one element of a
//               thread.
//   kAlternate  one half of the threads suffices for a row tile: while it finishes and stores, the other half requests for
//               the next row tile or step, which is its own turn
enum class Schedule { kPlain, kEarly, kAlternate };

// One element of a row tile: where it is, and whether the calling thread has it. Where half of the threads suffice, half
// `half` % 2 has it: of the row tile's number, or, with kAlternate, of the number of row tiles finished before in all steps.
template <class G>
struct ElementPlace {
  static constexpr unsigned kElements = G::kUnits * kTileRows;
  static constexpr int kPerThread = ceil_div(kElements, kPersistentThreads);
  static constexpr bool kHalf = 2 * kElements == kPersistentThreads;
  static_assert(kHalf || kElements >= kPersistentThreads);
  static constexpr Schedule kSchedule = takes_turns(G::shape())          ? Schedule::kAlternate
                                        : G::kCluster && kPerThread == 1 ? Schedule::kEarly
                                                                         : Schedule::kPlain;
  static_assert(kSchedule == Schedule::kPlain || kPerThread == 1);
  int unit, b;
  int number;  // of the thread's elements of the row tile
  bool mine;

  __device__ __forceinline__ ElementPlace(int half, int e) : number(e) {
    const unsigned thread = simt::thread_x(), index = kHalf ? thread % kElements : thread + e * kPersistentThreads;
    unit = index % G::kUnits;
    b = index / G::kUnits;
    mine = kHalf ? thread / kElements == half % 2u : index < kElements;
  }
};

// Of family `block` (block/block_product.cuh).
template <class G>
struct LanePlace;
template <class G>
class BlockProduct;

template <class G>
using PlaceOf = std::conditional_t<G::kBlock, LanePlace<G>, ElementPlace<G>>;
template <class G>
using ProductOf = std::conditional_t<G::kBlock, BlockProduct<G>,
                                     std::conditional_t<G::kScatters, ScatterProduct<G>, PersistentProduct<G>>>;

// Row tiles whose running states lie in registers.
template <class G>
constexpr int row_tiles_in_registers_of() {
  if constexpr (G::kBlock) {
    return 1;  // its only one
  } else {
    return row_tiles_in_registers(G::shape());
  }
}

// Steps between the hint that a row will be read and its reading. A step may take as little as 0.4 us, memory 0.6 to 0.8 us.
constexpr int kPrefetchSteps = 4;

// What forward and backward ask about elements. A thread keeps two fp32 values of each of its elements: for the group's
// first row tile in registers (row_tiles_in_registers), for the others in shared memory. A step is a chain of latencies with
// little to hide them, so that only indices of memory are 64 bits wide.
template <class G>
struct BlockElements {
  using Storage = typename G::Storage;
  using C = DeviceCell<G::kCell>;
  using Place = PlaceOf<G>;

  const Sequence& seq;
  const Modifier& modifier;
  int H, D;
  const BlockPlace& block;
  ProductOf<G>& product;
  int first_step, steps;  // of the launch
  float first_row_tile[2][Place::kPerThread] = {};
  static constexpr int kInRegisters = row_tiles_in_registers_of<G>();

  // s: ForwardSequence or BackwardSequence.
  template <class S>
  __device__ __forceinline__ BlockElements(const S& s, const BlockPlace& place, ProductOf<G>& weights)
      : seq(s.p.seq),
        modifier(s.p.modifier),
        H(static_cast<int>(s.p.H)),
        D(s.p.D),
        block(place),
        product(weights),
        first_step(static_cast<int>(s.l.first_step)),
        steps(static_cast<int>(s.l.steps)) {}

  // The time of one of the launch's steps; backward scans from the other end.
  __device__ __forceinline__ int time(int step) const {
    return G::kBackward == (block.dir != 0) ? first_step + step : static_cast<int>(seq.T) - 1 - first_step - step;
  }
  __device__ __forceinline__ int unit_of(const Place& e) const { return block.slice * G::kUnits + e.unit; }
  __device__ __forceinline__ int row_of_batch(const Place& e, int row_tile) const {
    return block.first_row + row_tile * kTileRows + e.b;
  }
  __device__ __forceinline__ bool exists(const Place& e, int row_tile) const {
    return e.mine && unit_of(e) < H && row_tile * kTileRows + e.b < block.rows;
  }
  // Active steps of an element that exists.
  __device__ __forceinline__ int length(const Place& e, int row_tile) const {
    return product.lengths()[row_tile * kTileRows + e.b];
  }
  static __device__ __forceinline__ bool active(int t, int length) {
    return static_cast<unsigned>(t) < static_cast<unsigned>(length);
  }
  // Whether an element takes part in the step at time t. Rows from B on have no active steps. Padding units (from H on)
  // publish 0, not their sum: 0 * NaN is NaN and would survive a reset.
  __device__ __forceinline__ bool takes_part(const Place& e, int row_tile, int t) const {
    return unit_of(e) < H && active(t, length(e, row_tile));
  }
  // Whether zeros replace the state of an element before time t, whose first row is `row`: the byte as it is loaded, 0 for
  // no.
  __device__ __forceinline__ unsigned char reset(const Place& e, int row_tile, int t, int row, int length) const {
    if (!modifier.resets || !active(t, length)) return 0;
    return reinterpret_cast<const unsigned char*>(modifier.resets)[row + row_of_batch(e, row_tile)];
  }
  // Indices of an element: in a state [D, B, H]; in a row of memory, of slot 0 in `gates` [D, N, S, H], in `cs` [D, N, H],
  // in `y` [N, D, H].
  __device__ __forceinline__ uint64_t state_index(const Place& e, int row_tile) const {
    const unsigned row = row_of_batch(e, row_tile);
    return multiply_add(row + (block.dir ? static_cast<unsigned>(seq.B) : 0u), H, unit_of(e));
  }
  __device__ __forceinline__ uint64_t gate_index(const Place& e, int row) const {
    return multiply_add(row_of_direction(row), C::kSlots * H, unit_of(e));
  }
  __device__ __forceinline__ uint64_t c_index(const Place& e, int row) const {
    return multiply_add(row_of_direction(row), H, unit_of(e));
  }
  __device__ __forceinline__ uint64_t y_index(const Place& e, int row) const {
    return multiply_add(row, D * H, simt::opaque(block.dir * H + unit_of(e)));
  }
  // An element of a tensor [D, B, H]; zero if the tensor is null.
  __device__ __forceinline__ Storage state(const void* tensor, const Place& e, int row_tile) const {
    return tensor ? static_cast<const Storage*>(tensor)[state_index(e, row_tile)] : Storage{};
  }
  __device__ __forceinline__ float held(int which, const Place& e, int row_tile) const {
    if constexpr (G::kBlock) {
      return first_row_tile[which][e.number];
    } else {
      if constexpr (kInRegisters > 0) {
        if (row_tile == 0) return first_row_tile[which][e.number];
      }
      return product.state(which, row_tile - kInRegisters, e.unit, e.b);
    }
  }
  __device__ __forceinline__ void keep(int which, const Place& e, int row_tile, float value) {
    if constexpr (G::kBlock) {
      first_row_tile[which][e.number] = value;
    } else if (kInRegisters > 0 && row_tile == 0) {
      first_row_tile[which][e.number] = value;
    } else {
      product.state(which, row_tile - kInRegisters, e.unit, e.b) = value;
    }
  }
  // Whether the thread hints that a row will be read: one thread does so for 8 neighbours, whose elements lie in one or two
  // sectors of 32 bytes. No hint is given for a guessed row behind the last.
  __device__ __forceinline__ bool hints(const Place& e, int row) const {
    return e.unit % 8 == 0 && row < static_cast<int>(seq.N);
  }
  // The value of gate `gate` (0 forward) for exchange `step`; by all threads that have the element, which are whole warps.
  __device__ __forceinline__ void publish(const Place& e, int row_tile, uint32_t step, int gate, float value) const {
    if constexpr (G::kBlock) {
      product.publish(step & 1 ? product.second() : 0, gate, e.number, value);
    } else {
      const int per_gate = product.exchange.chunks / published(G::shape()), per_slice = G::kUnits / G::Chunk::kStep;
      product.exchange.publish(value, e.unit, e.b, row_tile, gate * per_gate + block.slice * per_slice, step);
    }
  }

 private:
  __device__ __forceinline__ unsigned row_of_direction(int row) const {
    return static_cast<unsigned>(row) + (block.dir ? static_cast<unsigned>(seq.N) : 0u);
  }
  // One instruction.
  static __device__ __forceinline__ uint64_t multiply_add(unsigned a, unsigned b, unsigned c) { return uint64_t{a} * b + c; }
};

}  // namespace fused_rnn::cuda
