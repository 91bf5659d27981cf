// Elements of a block: hidden units of its slice times batch rows of its group, and which thread finishes each.
#pragma once
#include <type_traits>

#include "cell_device.cuh"
#include "persistent_product.cuh"
#include "persistent_scatter.cuh"

namespace fused_rnn::cuda {

// Row b is active at t = 0 .. count - 1; none if that is negative.
__device__ __forceinline__ int64_t count_active(const Sequence& seq, int64_t b) {
  if (b >= seq.B) return 0;
  if (seq.lengths) return seq.lengths[b] < seq.T ? seq.lengths[b] : seq.T;
  if (!seq.offsets) return seq.T;
  int64_t low = 0, high = seq.T;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (b < seq.offsets[middle + 1] - seq.offsets[middle]) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One element of a batch tile: where it is, and whether the calling thread has it. Tiles alternate between the two halves of
// the threads where half of them suffice.
template <class G>
struct ElementPlace {
  static constexpr int kElements = G::kUnits * kTileRows;
  static constexpr int kPerThread = (kElements + kPersistentThreads - 1) / kPersistentThreads;
  static_assert(kElements % 32 == 0, "whole warps take part");
  int unit, b;
  int number;  // of the thread's elements of the tile
  bool mine;

  __device__ __forceinline__ ElementPlace(int tile, int e) : number(e) {
    const int shift = 2 * kElements <= kPersistentThreads && tile % 2 ? kPersistentThreads / 2 : 0;
    const int index = (simt::thread_x() + shift) % kPersistentThreads + e * kPersistentThreads;
    unit = index % G::kUnits;
    b = index / G::kUnits;
    mine = index < kElements;
  }
};

template <class G>
using ProductOf = std::conditional_t<G::kScatters, ScatterProduct<G>, PersistentProduct<G>>;

// Steps between the hint that a row will be read and its reading. A step takes as little as 0.4 us, memory 0.6 to 0.8 us.
constexpr int kPrefetchSteps = 4;

// What forward and backward ask about elements. A thread keeps two fp32 values of each of its elements: those of the group's
// first batch tile in registers (tiles_in_registers), those of others in shared memory.
template <class G>
struct BlockElements {
  using Storage = typename G::Storage;
  using C = DeviceCell<G::kCell>;
  using Place = ElementPlace<G>;

  const Sequence& seq;
  int64_t H;
  const BlockPlace& block;
  ProductOf<G>& product;
  int tiles;  // of the launch's groups
  float first_tile[2][Place::kPerThread];
  static constexpr int kInRegisters = tiles_in_registers(G::shape());

  __device__ __forceinline__ int64_t unit_of(const Place& e) const { return block.slice * G::kUnits + e.unit; }
  __device__ __forceinline__ int64_t row_of_batch(const Place& e, int tile) const {
    return block.first_row + tile * kTileRows + e.b;
  }
  __device__ __forceinline__ bool exists(const Place& e, int tile) const {
    return e.mine && unit_of(e) < H && row_of_batch(e, tile) < seq.B;
  }
  __device__ __forceinline__ bool active(const Place& e, int tile, int64_t t) const {
    return t >= 0 && t < product.lengths()[tile * kTileRows + e.b];
  }
  // Indices: of a state [D, B, H], of a row of memory at time t, of slot 0 of `gates` [D, N, S, H] in a row.
  __device__ __forceinline__ int64_t state_index(const Place& e, int tile) const {
    return (block.dir * seq.B + row_of_batch(e, tile)) * H + unit_of(e);
  }
  __device__ __forceinline__ int64_t memory_row(const Place& e, int tile, int64_t t) const {
    return row_of(seq, t, row_of_batch(e, tile));
  }
  __device__ __forceinline__ int64_t gate_index(const Place& e, int64_t row) const {
    return (block.dir * seq.N + row) * C::kSlots * H + unit_of(e);
  }
  // An element of [D, B, H], zero if there is no tensor.
  __device__ __forceinline__ float state(const void* tensor, const Place& e, int tile) const {
    return tensor ? simt::to_float(static_cast<const Storage*>(tensor)[state_index(e, tile)]) : 0.0f;
  }
  __device__ __forceinline__ float kept(int which, const Place& e, int tile) const {
    if constexpr (kInRegisters > 0) {
      if (tile == 0) return first_tile[which][e.number];
    }
    return product.state(which, tile - kInRegisters, e.unit, e.b, tiles - kInRegisters);
  }
  __device__ __forceinline__ void keep(int which, const Place& e, int tile, float value) {
    if (kInRegisters > 0 && tile == 0) {
      first_tile[which][e.number] = value;
    } else {
      product.state(which, tile - kInRegisters, e.unit, e.b, tiles - kInRegisters) = value;
    }
  }
  // Whether the thread, whose element exists, hints for its neighbours: 8 of them lie in one or two sectors of 32 bytes.
  __device__ __forceinline__ bool hints(const Place& e, int tile, int64_t t) const {
    return e.unit % 8 == 0 && active(e, tile, t);
  }
  // Rows of memory from a batch row's place at one time to that at another.
  __device__ __forceinline__ int64_t rows_between(int64_t from, int64_t to) const {
    return seq.offsets ? seq.offsets[to] - seq.offsets[from] : (to - from) * seq.B;
  }
  // The value of gate `gate` (0 forward) for exchange `step`; by all threads.
  __device__ __forceinline__ void publish(const Place& e, int tile, int64_t step, int gate, float value) const {
    const int per_gate = product.exchange.chunks / published(G::shape()), per_slice = G::kUnits / G::Chunk::kStep;
    if (e.mine) product.exchange.publish(value, e.unit, e.b, tile, gate * per_gate + block.slice * per_slice, step);
  }
};

}  // namespace fused_rnn::cuda
