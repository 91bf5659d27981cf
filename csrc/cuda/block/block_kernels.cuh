// The kernels of family `block`: the elements of persistent_forward.cuh and persistent_backward.cuh with the product of one
// block. A step reads one buffer of states and writes the other, with one barrier at its end. What a step stores, and what
// the next one needs from global memory, goes out between the product and the use of its sums.
#pragma once
#include "cuda/block/block_product.cuh"
#include "cuda/persistent/persistent_backward.cuh"

namespace fused_rnn::cuda {

// A block's batch rows: block_rows of the shape, in one row tile.
template <class G>
__device__ __forceinline__ BlockPlace place_of_block(const PersistentLaunch& l, int64_t B) {
  constexpr int kRows = block_rows(G::shape());
  BlockPlace place;
  place.slice = 0;
  place.row_tiles = 1;
  const int group = simt::block_x();
  place.group = group;
  place.dir = l.first_dir + group / l.groups;
  place.first_row = simt::opaque(static_cast<int>(l.first_row) + group % l.groups * kRows);
  const int rows = static_cast<int>(B) - place.first_row;
  place.rows = rows < kRows ? rows : kRows;
  return place;
}

// Active steps of the block's rows; read after the next barrier.
template <class G>
__device__ __forceinline__ void load_lengths(const BlockProduct<G>& product, const Sequence& seq, const BlockPlace& block) {
  const int i = simt::thread_x();
  if (i < block_rows(G::shape())) product.lengths()[i] = count_active(seq, block.first_row + i);
}

template <class Elements, class Results>
__device__ __forceinline__ void store_results(const Elements& elements, int row, const Results& results) {
#pragma unroll
  for (int i = 0; i < Elements::Place::kPerThread; ++i) {
    elements.store(typename Elements::Place(0, i), 0, row, results[i]);
  }
}

template <class G>
__device__ __forceinline__ void block_forward(const ForwardSequence& s) {
  using Forward = PersistentForward<G>;
  using Place = LanePlace<G>;
  const BlockPlace block = place_of_block<G>(s.l, s.p.seq.B);
  BlockProduct<G> product(block.dir ? s.p.weights[1].w_hh.data : s.p.weights[0].w_hh.data, static_cast<int>(s.p.H));
  Forward forward(s, block, product);
  load_lengths(product, s.p.seq, block);
  load_biases<G>(product, block.dir ? s.p.weights[1].b_hh : s.p.weights[0].b_hh, forward.H, 0);
  simt::sync_block();
  StepRows rows(s.p.seq, [&](int step) { return forward.time(step); });
  typename Forward::Element x[Place::kPerThread], next[Place::kPerThread];
  typename Forward::Result results[Place::kPerThread];
  forward.begin(0, rows.now);
  load_elements(forward, next, 0, 0, 0, rows);
  simt::sync_block();
  int row = 0;  // of the step before
#pragma unroll 1
  for (int step = 0; step < forward.steps; ++step) {
    product.run(step & 1);
#pragma unroll
    for (int i = 0; i < Place::kPerThread; ++i) x[i] = next[i];
    if (step > 0) store_results(forward, row, results);
    if (step + 1 < forward.steps) load_elements(forward, next, 0, 0, step + 1, rows.following());
#pragma unroll
    for (int i = 0; i < Place::kPerThread; ++i) forward.finish(Place(0, i), 0, step, x[i], 0, results[i]);
    simt::sync_block();
    row = rows.now;
    rows.advance(forward.seq, forward.time(step + 3));
  }
  store_results(forward, row, results);
  forward.end(0, 0);
}

// In scan order from the last step to the first (persistent_backward.cuh).
template <class G>
__device__ __forceinline__ void block_backward(const BackwardSequence& s) {
  using Backward = PersistentBackward<G>;
  using Place = LanePlace<G>;
  const BlockPlace block = place_of_block<G>(s.l, s.p.seq.B);
  BlockProduct<G> product(block.dir ? s.p.weights[1].w_hh.data : s.p.weights[0].w_hh.data, static_cast<int>(s.p.H));
  Backward backward(s, block, product);
  load_lengths(product, s.p.seq, block);
  simt::sync_block();
  StepRows rows(s.p.seq, [&](int k) { return backward.time(k); });
  typename Backward::Element x[Place::kPerThread], next[Place::kPerThread];
  typename Backward::Result results[Place::kPerThread];
  backward.begin(0);
  load_elements(backward, next, 0, 0, 0, rows);
  int row = 0;  // of the step before
#pragma unroll 1
  for (int k = 0; k < backward.steps; ++k) {
    if (k > 0) {
      product.run(k - 1 & 1);
      store_results(backward, row, results);
    }
#pragma unroll
    for (int i = 0; i < Place::kPerThread; ++i) x[i] = next[i];
    if (k + 1 < backward.steps) load_elements(backward, next, 0, 0, k + 1, rows.following());
#pragma unroll
    for (int i = 0; i < Place::kPerThread; ++i) backward.finish(Place(0, i), 0, k, x[i], 0, results[i]);
    simt::sync_block();
    row = rows.now;
    rows.advance(backward.seq, backward.time(k + 3));
  }
  store_results(backward, row, results);
  if (backward.has_exchange(backward.steps - 1)) product.run(backward.steps - 1 & 1);
  backward.end(0, 0, 0);
}

template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) block_forward_kernel(const ForwardSequence s) {
  if constexpr (simt::arch() >= 800) block_forward<G>(s);
}
template <class G>
__global__ void __launch_bounds__(G::kThreads, 1) block_backward_kernel(const BackwardSequence s) {
  if constexpr (simt::arch() >= 800) block_backward<G>(s);
}

}  // namespace fused_rnn::cuda
