// Both functions go through the matrix in blocks of kBlock rows, one block a thread at a time: a block's part of a row of
// the product is then a cache line, and its part of the matrix, transposed to [I][kBlock], stays in L2.
#include "cpu/gemm/columns.h"

#include <algorithm>

#include "cpu/isa/blocks.h"
#include "cpu/isa/kernels.h"
#include "cpu/threads.h"

namespace fused_rnn::cpu {
namespace {

constexpr int64_t kBlock = 16;
constexpr int64_t kElementsOfThread = 16 * 1024;  // of the products: a thread with fewer is not worth its start

// Runs of(first, count, thread) for the blocks of C columns.
template <class F>
void for_column_blocks(int64_t C, int threads, const F& of) {
  const int64_t blocks = ceil_div(C, kBlock);
  const auto run = [&](int count) {
    return run_threads(count, [&](int thread) {
      const int64_t end = share_begin(blocks, count, thread + 1);
      for (int64_t k = share_begin(blocks, count, thread); k < end; ++k) {
        of(k * kBlock, std::min(kBlock, C - k * kBlock), thread);
      }
    });
  };
  if (!run(threads)) run(1);
}

int threads_for(int64_t N, int64_t C) {
  const int64_t most = std::min(N * C / kElementsOfThread, ceil_div(C, kBlock));
  return static_cast<int>(std::clamp<int64_t>(most, 1, thread_limit()));
}

// Copies a block, transposed, from [columns, I] to [I][kBlock] where many rows read it, else reads it where it lies. U has
// the size of an element.
template <class U>
void gather(const GatherParams& p, const Allocate& allocate) {
  const bool transposes = p.I <= 2 * p.N;
  const int threads = threads_for(p.N, p.C);
  U* const room = transposes ? static_cast<U*>(allocate(threads * p.I * kBlock * static_cast<int64_t>(sizeof(U)))) : nullptr;
  for_column_blocks(p.C, threads, [&](int64_t first, int64_t count, int thread) {
    const U* const w = static_cast<const U*>(p.w) + first * p.I;
    U* const to = static_cast<U*>(p.out) + first;
    if (!transposes) {
      for (int64_t n = 0; n < p.N; ++n) {
        if (p.ids[n] < 0) continue;
        for (int64_t c = 0; c < count; ++c) to[n * p.out_stride + c] = w[c * p.I + p.ids[n]];
      }
      return;
    }
    U* const block = room + thread * p.I * kBlock;
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t i = 0; i < p.I; ++i) block[i * kBlock + c] = w[c * p.I + i];
    }
    for (int64_t n = 0; n < p.N; ++n) {
      if (p.ids[n] < 0) continue;
      const U* const from = block + p.ids[n] * kBlock;
      count == kBlock ? std::copy_n(from, kBlock, to + n * p.out_stride) : std::copy_n(from, count, to + n * p.out_stride);
    }
  });
}

// Sums in A of numbers in storage.
template <class A>
void scatter(const ScatterParams& p, const Allocate& allocate) {
  const Kernels<A>& kernels = kernels_of<A>(selected_kernels());
  const int storage = storage_index(p.dtype);
  const int64_t size = dtype_size(p.dtype), elements = (p.I + 1) * kBlock + p.I;
  const int threads = threads_for(p.N + p.I, p.C);
  A* const room = static_cast<A*>(allocate(threads * elements * static_cast<int64_t>(sizeof(A))));
  for_column_blocks(p.C, threads, [&](int64_t first, int64_t count, int thread) {
    A* const sums = room + thread * elements;  // [I][kBlock]
    A* const row = sums + p.I * kBlock;        // [kBlock], then [I]
    std::fill_n(sums, p.I * kBlock + kBlock, A(0));
    const bool in_place = size == static_cast<int64_t>(sizeof(A)) && count == kBlock;
    for (int64_t n = 0; n < p.N; ++n) {
      if (p.ids[n] < 0) continue;
      const void* const d = stored_at(p.d, n * p.d_stride + first, size);
      if (!in_place) kernels.load[storage](d, row, count);
      const A* const from = in_place ? static_cast<const A*>(d) : row;
      A* const to = sums + p.ids[n] * kBlock;
      for (int64_t c = 0; c < kBlock; ++c) to[c] += from[c];
    }
    A* const of_column = row + kBlock;
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t i = 0; i < p.I; ++i) of_column[i] = sums[i * kBlock + c];
      kernels.save[storage](of_column, stored_at(p.dw, (first + c) * p.I, size), p.I);
    }
  });
}

}  // namespace

void gather_columns(const GatherParams& p, const Allocate& allocate) {
  switch (dtype_size(p.dtype)) {
    case 8: return gather<uint64_t>(p, allocate);
    case 4: return gather<uint32_t>(p, allocate);
    case 2: return gather<uint16_t>(p, allocate);
  }
}

void scatter_columns(const ScatterParams& p, const Allocate& allocate) {
  p.dtype == DType::kFloat64 ? scatter<double>(p, allocate) : scatter<float>(p, allocate);
}

}  // namespace fused_rnn::cpu
