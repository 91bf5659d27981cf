// The matrix tile: kRows rows times kPanels panels of kVectors vectors, with its sums in registers. Every sum runs over k in
// order, one multiply-add at a time, in every tile: results do not depend on how rows are grouped.
//
// A tile with more sums than registers takes up to twice as long: on AVX2 one row with four panels 1.5 times as long as with
// two, and two rows with two panels twice as long as with one (LSTM, H=256).
//
// Beside the sums a tile keeps in registers what is fewer, the elements of its rows or the vectors of its panel, and takes
// the others one after the other. 4 rows times 3 vectors (a GRU) with the rows' elements kept need 17 registers of AVX2's
// 16: one sum then lies in memory, and its chain of load, multiply-add and store takes twice as long as the whole round.
#pragma once
#include <type_traits>

#include "cpu/isa/kernels.h"

namespace fused_rnn::cpu {

constexpr int64_t kLine = 64;  // bytes of a cache line

template <class V, int kRows, int kVectors, int kPanels>
void gemm_tile(const GemmCall<typename V::Scalar>& call) {
  using A = typename V::Scalar;
  constexpr int kWidth = V::kWidth;
  constexpr int kStep = kVectors * kWidth;
  static_assert(kRows * kVectors * kPanels <= V::kMostSums, "sums that do not fit the registers");
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
  const int64_t stride = call.panel_stride, k_stride = call.k_stride, half_stride = call.half_stride;
  // Where vector v of panel p begins, from `panel` on.
  const auto place_of = [&](int p, int v) {
    const bool second_half = V::kHalves && kVectors == 4 && v >= 2;
    return p * stride + (second_half ? half_stride + (v - 2) * kWidth : v * kWidth);
  };
  const auto multiply = [&](int64_t k) {
    if constexpr (kRows > kPanels * kVectors) {
      V w[kPanels][kVectors];
      for (int p = 0; p < kPanels; ++p) {
        for (int v = 0; v < kVectors; ++v) w[p][v] = V::load_pinned(panel + place_of(p, v));
      }
      for (int r = 0; r < kRows; ++r) {
        const V a = V::broadcast(rows[r] + k);
        for (int p = 0; p < kPanels; ++p) {
          for (int v = 0; v < kVectors; ++v) sum[p][r][v] = multiply_add(a, w[p][v], sum[p][r][v]);
        }
      }
    } else {
      V a[kRows];
      for (int r = 0; r < kRows; ++r) a[r] = V::broadcast(rows[r] + k);
      for (int p = 0; p < kPanels; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          const V w = V::load_pinned(panel + place_of(p, v));
          for (int r = 0; r < kRows; ++r) sum[p][r][v] = multiply_add(a[r], w, sum[p][r][v]);
        }
      }
    }
    panel += k_stride;
  };
  // Lines to be prefetched are asked for one by one between the products: many requests in a row fill the queue of lines on
  // their way, and each request costs a place among the loads (two for each k cost 5% of a product on AVX2). Beyond two
  // lines for each k, lines between are left to the processor's own prefetching.
  int64_t k = 0;
  if (const int64_t fetch = call.prefetch.step; fetch > 0) {
    const char* next = call.prefetch.from;
    const auto rounds = [&](auto count) {
      constexpr int kRounds = decltype(count)::value;
      for (; k + kRounds <= call.depth; k += kRounds) {
        __builtin_prefetch(next, 0, 2);
        next += fetch * kRounds;
#pragma GCC unroll 1
        for (int i = 0; i < kRounds; ++i) multiply(k + i);
      }
    };
    if (fetch * 8 <= kLine) {
      rounds(std::integral_constant<int, 8>{});
    } else if (fetch * 2 <= kLine) {
      rounds(std::integral_constant<int, 2>{});
    } else {
      const int64_t second = fetch / 2;
      for (; k < call.depth; ++k) {
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + second, 0, 2);
        next += fetch;
        multiply(k);
      }
    }
  }
  for (; k < call.depth; ++k) multiply(k);
  for (int p = 0; p < kPanels; ++p) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sum[p][r][v].store(call.out + r * call.out_stride + p * kStep + v * kWidth);
    }
  }
}

// A panel of four vectors by halves, where its sums do not fit the registers at once.
template <class V, int kRows>
void gemm_halves(const GemmCall<typename V::Scalar>& call) {
  GemmCall<typename V::Scalar> half = call;
  half.vectors = 2;
  gemm_tile<V, kRows, 2, 1>(half);
  half.panels += call.half_stride;
  half.out += 2 * V::kWidth;
  if (half.init) half.init += 2 * V::kWidth;
  half.prefetch = {};
  gemm_tile<V, kRows, 2, 1>(half);
}
// kRows rows with one panel.
template <class V, int kRows, int kVectors>
void gemm_rows(const GemmCall<typename V::Scalar>& call) {
  if constexpr (V::kHalves && kVectors == 4 && kRows * kVectors > V::kMostSums) {
    gemm_halves<V, kRows>(call);
  } else {
    gemm_tile<V, kRows, kVectors, 1>(call);
  }
}

// One row with up to V::kMaxPanels[1] panels.
template <class V, int kVectors>
void gemm_row(const GemmCall<typename V::Scalar>& call) {
  static_assert(V::kMaxPanels[1] == 2 || V::kMaxPanels[1] == 4);
  if constexpr (V::kMaxPanels[1] == 4) {
    if (call.n_panels == 4) return gemm_tile<V, 1, kVectors, 4>(call);
    if (call.n_panels == 3) return gemm_tile<V, 1, kVectors, 3>(call);
  }
  if (call.n_panels == 2) return gemm_tile<V, 1, kVectors, 2>(call);
  return gemm_tile<V, 1, kVectors, 1>(call);
}

template <class V, int kVectors>
void gemm_panels(const GemmCall<typename V::Scalar>& call) {
  constexpr int kMax = V::kMaxRows[kVectors];
  static_assert(kMax >= 3 && kMax <= kMaxTileRows);
  switch (call.n_rows) {
    case 1: return gemm_row<V, kVectors>(call);
    case 2:
      if constexpr (V::kMaxPanels[2] > 1) {
        if (call.n_panels > 1) return gemm_tile<V, 2, kVectors, 2>(call);
      }
      return gemm_tile<V, 2, kVectors, 1>(call);
    case 3: return gemm_tile<V, 3, kVectors, 1>(call);
    case 4: return gemm_rows < V, kMax<4 ? 3 : 4, kVectors>(call);
    case 5: return gemm_rows < V, kMax<5 ? 3 : 5, kVectors>(call);
    case 6: return gemm_rows < V, kMax<6 ? 3 : 6, kVectors>(call);
    case 7: return gemm_rows < V, kMax<7 ? 3 : 7, kVectors>(call);
    default: return gemm_rows < V, kMax<8 ? 3 : 8, kVectors>(call);
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

// kWidth dot products of each of kRows rows with the rows of `block`, each of length `depth`. out[r * out_stride + lane] is
// init[lane] + product. Every fourth row of the block has a pointer, and the others are reached from it by multiples of the
// depth: a pointer for each row would not fit the registers. A single row meets the whole block at once, several meet four
// rows of it at a time. Every product is summed in the same order.
template <class V, int kRows, class Storage>
inline void block_products(const typename V::Scalar* const* rows, const Storage* block, int64_t depth, V init,
                           typename V::Scalar* out, int64_t out_stride) {
  constexpr int kWidth = V::kWidth, kNear = kWidth < 4 ? kWidth : 4, kAtOnce = kRows == 1 ? kWidth : kNear;
  const typename V::Scalar* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = rows[r];
  V sums[kRows][kWidth];
  for (int first = 0; first < kWidth; first += kAtOnce) {
    const Storage* near[kAtOnce / kNear];
    for (int q = 0; q < kAtOnce / kNear; ++q) near[q] = block + (first + q * kNear) * depth;
    V sum[kRows][kAtOnce];
    for (int r = 0; r < kRows; ++r) {
      for (int l = 0; l < kAtOnce; ++l) sum[r][l] = V(0);
    }
    const auto add = [&](int64_t k, const auto& load_a, const auto& load_w) {
      V a[kRows];
      for (int r = 0; r < kRows; ++r) a[r] = load_a(row[r] + k);
      for (int l = 0; l < kAtOnce; ++l) {
        const V w = load_w(near[l / kNear] + l % kNear * depth + k);
        for (int r = 0; r < kRows; ++r) sum[r][l] = multiply_add(a[r], w, sum[r][l]);
      }
    };
    int64_t k = 0;
    const auto whole = [](const auto* p) { return V::load(p); };
    for (; k + kWidth <= depth; k += kWidth) add(k, whole, whole);
    if (k < depth) {
      const int n = static_cast<int>(depth - k);
      const auto partial = [n](const auto* p) { return V::load_partial(p, n); };
      add(k, partial, partial);
    }
    for (int r = 0; r < kRows; ++r) {
      for (int l = 0; l < kAtOnce; ++l) sums[r][first + l] = sum[r][l];
    }
  }
  for (int r = 0; r < kRows; ++r) (init + sum_lanes(sums[r])).store(out + r * out_stride);
}

// The dot products of `row` with a block of `lanes` rows; the other lanes are zero.
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
  constexpr int kWidth = V::kWidth, kRows = V::kDirectRows;
  for (int64_t v = call.first; v < call.last; ++v) {
    const int64_t unit = v / call.gates * kWidth, lanes = call.units - unit, column = (v - call.first) * kWidth;
    const auto* block = static_cast<const Storage*>(call.weights) + (v % call.gates * call.units + unit) * call.depth;
    const V init = call.init ? V::load(call.init + column) : V(0);
    auto* const out = call.out + column;
    int r = 0;
    if (lanes >= kWidth) {
      for (; r + kRows <= call.n_rows; r += kRows) {
        block_products<V, kRows>(call.rows + r, block, call.depth, init, out + r * call.out_stride, call.out_stride);
      }
      for (; r + 2 <= call.n_rows; r += 2) {
        block_products<V, 2>(call.rows + r, block, call.depth, init, out + r * call.out_stride, call.out_stride);
      }
      for (; r < call.n_rows; ++r) {
        block_products<V, 1>(call.rows + r, block, call.depth, init, out + r * call.out_stride, call.out_stride);
      }
    }
    for (; r < call.n_rows; ++r) {
      (init + block_product<V>(call.rows[r], block, call.depth, static_cast<int>(lanes))).store(out + r * call.out_stride);
    }
  }
}

}  // namespace fused_rnn::cpu
