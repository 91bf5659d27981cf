// The kernels of family `block`. A step reads one buffer of states and writes the other, with one barrier at its end. What
// the step before has to store, and what the next one needs from global memory, goes out beside its product.
#pragma once
#include "cuda/block/block_elements.cuh"

namespace fused_rnn::cuda {

// A block's batch rows, in one row tile.
__device__ __forceinline__ BlockPlace place_of_block(const PersistentLaunch& l, int64_t B) {
  BlockPlace place;
  place.slice = 0;
  place.row_tiles = 1;
  const int group = simt::block_x();
  place.group = group;
  place.dir = l.first_dir + group / l.groups;
  place.first_row = simt::opaque(static_cast<int>(l.first_row) + group % l.groups * kBlockRows);
  const int rows = static_cast<int>(B) - place.first_row;
  place.rows = rows < kBlockRows ? rows : kBlockRows;
  return place;
}

// Active steps of the block's rows; read after the next barrier.
template <class G>
__device__ __forceinline__ void load_lengths(const BlockProduct<G>& product, const Sequence& seq, const BlockPlace& block) {
  const int i = simt::thread_x();
  if (i < kBlockRows) product.lengths()[i] = count_active(seq, block.first_row + i);
}

template <class G>
__device__ __forceinline__ void block_forward(const ForwardSequence& s) {
  using Forward = BlockForward<G>;
  const BlockPlace block = place_of_block(s.l, s.p.seq.B);
  BlockProduct<G> product(block.dir ? s.p.weights[1].w_hh.data : s.p.weights[0].w_hh.data, static_cast<int>(s.p.H));
  load_lengths(product, s.p.seq, block);
  load_biases<G>(product, block.dir ? s.p.weights[1].b_hh : s.p.weights[0].b_hh, static_cast<int>(s.p.H), 0);
  simt::sync_block();
  Forward forward(s, block, product);
  BlockRows rows(s.p.seq, forward.time(0), block.dir ? -1 : 1);
  forward.begin(0, rows.now);
  typename Forward::Request x, next;
  typename Forward::Stored result{};
  forward.load(rows, true, next);
  simt::sync_block();
  int row = 0, from = 0;  // the row of the step before; the buffer of the states
#pragma unroll 1
  for (int step = 0; step < forward.steps; ++step) {
    typename BlockProduct<G>::Sums sums;
    product.begin(sums, from);
    x = next;
    forward.store(step > 0, row, result);
    const int t = rows.t;
    row = rows.now;
    rows.advance(s.p.seq);
    forward.load(rows, step + 1 < forward.steps, next);
    product.end(sums, from);
    from = product.second() - from;
    forward.finish(t, step, from, x, result);
    simt::sync_block();
  }
  forward.store(true, row, result);
  forward.end(0, 0);
}

// In scan order from the last step to the first (persistent_backward.cuh).
template <class G>
__device__ __forceinline__ void block_backward(const BackwardSequence& s) {
  using Backward = BlockBackward<G>;
  const BlockPlace block = place_of_block(s.l, s.p.seq.B);
  BlockProduct<G> product(block.dir ? s.p.weights[1].w_hh.data : s.p.weights[0].w_hh.data, static_cast<int>(s.p.H));
  load_lengths(product, s.p.seq, block);
  simt::sync_block();
  Backward backward(s, block, product);
  BlockRows rows(s.p.seq, backward.time(0), block.dir ? 1 : -1);
  backward.begin(0);
  typename Backward::Request x, next;
  typename Backward::Stored result{};
  backward.load(rows, true, next);
  int row = 0, to = 0;  // the row of the step before; the buffer of the gradients
#pragma unroll 1
  for (int k = 0; k < backward.steps; ++k) {
    typename BlockProduct<G>::Sums sums;
    product.begin(sums, product.second() - to);
    x = next;
    backward.store(k > 0, row, result);
    const int t = rows.t;
    row = rows.now;
    rows.advance(s.p.seq);
    backward.load(rows, k + 1 < backward.steps, next);
    product.end(sums, product.second() - to);
    backward.finish(t, to, x, result);
    to = product.second() - to;
    simt::sync_block();
  }
  backward.store(true, row, result);
  if (backward.has_exchange(backward.steps - 1)) {
    typename BlockProduct<G>::Sums sums;
    product.begin(sums, product.second() - to);
    product.end(sums, product.second() - to);
  }
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
