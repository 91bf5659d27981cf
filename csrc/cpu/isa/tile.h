// The matrix tile: kRows rows times kPanels panels of kVectors vectors, with its sums in registers. Every sum runs over k in
// order, one multiply-add at a time, in every tile: results do not depend on how rows are grouped.
#pragma once
#include "cpu/isa/kernels.h"

namespace fused_rnn::cpu {

template <class V, int kRows, int kVectors, int kPanels>
void gemm_tile(const GemmCall<typename V::Scalar>& call) {
  using A = typename V::Scalar;
  constexpr int kWidth = V::kWidth;
  constexpr int kStep = kVectors * kWidth;
  V sum[kPanels][kRows][kVectors];
  for (int p = 0; p < kPanels; ++p) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        sum[p][r][v] = call.init ? V::load(call.init + (p * kVectors + v) * kWidth) : V(0);
      }
    }
  }
  const A* rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = call.rows[r];
  const A* panel = call.panels;
  const int64_t stride = call.panel_stride, k_stride = call.k_stride;
  // The lines of 8 or 16 k are asked for at once. A test in every round of the inner loop would be a tenth of the
  // instructions of a small tile; dozens of requests in a row fill the queue of lines on their way (LSTM 64x8x1024x1024,
  // with 128 bytes for each k: 1.05 times as fast with the lines of 8 k at once as with those of 16).
  const int64_t round = call.prefetch.step == 0 ? call.depth : call.prefetch.step > 64 ? 8 : 16;
  const int64_t fetch = call.prefetch.step * round;
  const char* next = call.prefetch.from;
  for (int64_t begin = 0; begin < call.depth; begin += round) {
    const int64_t end = begin + round < call.depth ? begin + round : call.depth;
    for (int64_t i = 0; i < fetch; i += 64) __builtin_prefetch(next + i, 0, 2);
    next += fetch;
    for (int64_t k = begin; k < end; ++k, panel += k_stride) {
      V a[kRows];
      for (int r = 0; r < kRows; ++r) a[r] = V::broadcast(rows[r] + k);
      for (int p = 0; p < kPanels; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          const V w = V::load_pinned(panel + p * stride + v * kWidth);
          for (int r = 0; r < kRows; ++r) sum[p][r][v] = multiply_add(a[r], w, sum[p][r][v]);
        }
      }
    }
  }
  for (int p = 0; p < kPanels; ++p) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sum[p][r][v].store(call.out + r * call.out_stride + p * kStep + v * kWidth);
    }
  }
}

template <class V, int kVectors>
void gemm_panels(const GemmCall<typename V::Scalar>& call) {
  constexpr int kMax = V::kMaxRows[kVectors];
  static_assert(kMax >= 3 && kMax <= kMaxTileRows);
  switch (call.n_rows) {
    case 1:
      if (call.n_panels == 1) return gemm_tile<V, 1, kVectors, 1>(call);
      if (call.n_panels == 2) return gemm_tile<V, 1, kVectors, 2>(call);
      if (call.n_panels == 3) return gemm_tile<V, 1, kVectors, 3>(call);
      return gemm_tile<V, 1, kVectors, 4>(call);
    case 2: return call.n_panels == 1 ? gemm_tile<V, 2, kVectors, 1>(call) : gemm_tile<V, 2, kVectors, 2>(call);
    case 3: return gemm_tile<V, 3, kVectors, 1>(call);
    case 4: return gemm_tile < V, kMax<4 ? 3 : 4, kVectors, 1>(call);
    case 5: return gemm_tile < V, kMax<5 ? 3 : 5, kVectors, 1>(call);
    case 6: return gemm_tile < V, kMax<6 ? 3 : 6, kVectors, 1>(call);
    case 7: return gemm_tile < V, kMax<7 ? 3 : 7, kVectors, 1>(call);
    default: return gemm_tile < V, kMax<8 ? 3 : 8, kVectors, 1>(call);
  }
}

template <class V>
void gemm(const GemmCall<typename V::Scalar>& call) {
  switch (call.vectors) {
    case 1: return gemm_panels<V, 1>(call);
    case 2: return gemm_panels<V, 2>(call);
    case 3: return gemm_panels<V, 3>(call);
    default: return gemm_panels<V, 4>(call);
  }
}

// Lane l of the result is the sum of the lanes of v[l].
template <class V>
inline V sum_lanes(const V (&v)[V::kWidth]) {
  typename V::Scalar sums[V::kWidth];
  for (int l = 0; l < V::kWidth; ++l) {
    typename V::Scalar lanes[V::kWidth];
    v[l].store(lanes);
    for (int half = V::kWidth / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    sums[l] = lanes[0];
  }
  return V::load(sums);
}

// kWidth dot products of `row` with the rows of `block`, each of length `depth`. Every fourth row of the block has a
// pointer, and the others are reached from it by multiples of the depth: a pointer for each row would not fit the
// registers.
template <class V, class Storage>
inline V block_product(const typename V::Scalar* row, const Storage* block, int64_t depth) {
  constexpr int kWidth = V::kWidth, kNear = kWidth < 4 ? kWidth : 4;
  const Storage* near[kWidth / kNear];
  for (int q = 0; q < kWidth / kNear; ++q) near[q] = block + q * kNear * depth;
  V sum[kWidth];
  for (int l = 0; l < kWidth; ++l) sum[l] = V(0);
  int64_t k = 0;
  for (; k + kWidth <= depth; k += kWidth) {
    const V a = V::load(row + k);
    for (int l = 0; l < kWidth; ++l) sum[l] = multiply_add(a, V::load(near[l / kNear] + l % kNear * depth + k), sum[l]);
  }
  if (k < depth) {
    const int n = static_cast<int>(depth - k);
    const V a = V::load_partial(row + k, n);
    for (int l = 0; l < kWidth; ++l) {
      sum[l] = multiply_add(a, V::load_partial(near[l / kNear] + l % kNear * depth + k, n), sum[l]);
    }
  }
  return sum_lanes(sum);
}

// The same for a block of `lanes` rows; the other lanes are zero.
template <class V, class Storage>
inline V block_product(const typename V::Scalar* row, const Storage* block, int64_t depth, int lanes) {
  constexpr int kWidth = V::kWidth;
  V sum[kWidth];
  for (int l = 0; l < kWidth; ++l) sum[l] = V(0);
  for (int l = 0; l < lanes; ++l, block += depth) {
    for (int64_t k = 0; k < depth; k += kWidth) {
      const int n = static_cast<int>(depth - k < kWidth ? depth - k : kWidth);
      sum[l] = multiply_add(V::load_partial(row + k, n), V::load_partial(block + k, n), sum[l]);
    }
  }
  return sum_lanes(sum);
}

template <class V, class Storage>
[[gnu::flatten]] void direct_product(const DirectCall<typename V::Scalar>& call) {
  constexpr int kWidth = V::kWidth;
  for (int64_t v = call.first; v < call.last; ++v) {
    const int64_t unit = v / call.gates * kWidth, lanes = call.units - unit, column = (v - call.first) * kWidth;
    const auto* block = static_cast<const Storage*>(call.weights) + (v % call.gates * call.units + unit) * call.depth;
    const V init = call.init ? V::load(call.init + column) : V(0);
    for (int r = 0; r < call.n_rows; ++r) {
      const V sum = lanes >= kWidth ? block_product<V>(call.rows[r], block, call.depth)
                                    : block_product<V>(call.rows[r], block, call.depth, static_cast<int>(lanes));
      (init + sum).store(call.out + r * call.out_stride + column);
    }
  }
}

}  // namespace fused_rnn::cpu
