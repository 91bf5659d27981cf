// The norms inside of a step (core/formula.h), of the rows of a block. A block that owns some units of a row sums over all
// of them: a warp takes a row, its lanes the units in turn, so that the sums have one order.
//   forward   out = v^ weight + bias, v^ = (v - mean) / sqrt(variance + eps); an RMS norm has no mean and no bias
//   backward  d_v = (w d - mean(w d) - v^ mean(w d v^)) / sqrt(variance + eps); without a mean for an RMS norm
#pragma once
#include "cuda/formula/formula_geometry.cuh"

namespace fused_rnn::cuda {

// Of a row, in shared memory behind the table of rows. along, mean_d: of backward.
template <class Acc>
struct FormulaMoments {
  Acc mean, scale;
  Acc along, mean_d;
};

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += simt::shuffle_xor(value, mask);
  return value;
}
__device__ __forceinline__ double sum_of_warp(double value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += simt::shuffle_xor_double(value, mask);
  return value;
}

// The sum of f(unit) over a row, in every lane of the warp.
template <class Acc, class F>
__device__ __forceinline__ Acc sum_of_row(int64_t H, F&& f) {
  Acc sum = Acc(0);
  for (int64_t u = simt::lane_id(); u < H; u += simt::kWarpSize) sum += f(u);
  return sum_of_warp(sum);
}

template <class Acc, class Load>
__device__ __forceinline__ FormulaMoments<Acc> moments_of_row(bool centred, int64_t H, Load&& load) {
  using namespace math;
  const Acc count = static_cast<Acc>(H);
  const Acc mean = centred ? sum_of_row<Acc>(H, load) / count : Acc(0);
  const Acc variance = sum_of_row<Acc>(H,
                                       [&](int64_t u) {
                                         const Acc off = load(u) - mean;
                                         return off * off;
                                       }) /
                       count;
  return {mean, Acc(1) / sqrt(variance + Acc(kFormulaNormEpsilon)), Acc(0), Acc(0)};
}

// The norms of a block's active rows. table[row].source[0]: what the norm takes, Acc [H] (backward: the gradient of what it
// gave); of backward source[1]: what it took, [H] in the dtype. Ends with a barrier, after which moments() may be read.
template <class G, bool kCentred>
struct FormulaNorm {
  using Storage = typename G::Storage;
  using Acc = typename G::Acc;
  using Moments = FormulaMoments<Acc>;

  static __device__ __forceinline__ Moments* moments() {
    return reinterpret_cast<Moments*>(simt::dynamic_smem() + G::kTableBytes);
  }

  static __device__ __forceinline__ void forward(const RowInfo* table, int64_t H) {
    for (int row = simt::warp_id(); row < G::kBatch; row += G::kThreads / simt::kWarpSize) {
      const auto* v = static_cast<const Acc*>(table[row].source[0]);
      if (!v) continue;
      const Moments made = moments_of_row<Acc>(kCentred, H, [&](int64_t u) { return v[u]; });
      if (simt::lane_id() == 0) moments()[row] = made;
    }
    simt::sync_block();
  }
  static __device__ __forceinline__ Acc result(const RowInfo* table, int row, int64_t unit, Acc weight, Acc bias) {
    const Moments m = moments()[row];
    return (static_cast<const Acc*>(table[row].source[0])[unit] - m.mean) * m.scale * weight + bias;
  }

  // weight [H] in the dtype.
  static __device__ __forceinline__ void backward(const RowInfo* table, int64_t H, const void* weight) {
    for (int row = simt::warp_id(); row < G::kBatch; row += G::kThreads / simt::kWarpSize) {
      const auto* d = static_cast<const Acc*>(table[row].source[0]);
      const void* const v = table[row].source[1];
      if (!d) continue;
      Moments made = moments_of_row<Acc>(kCentred, H, [&](int64_t u) -> Acc { return formula_load<Storage>(v, u); });
      const auto weighted = [&](int64_t u) -> Acc { return d[u] * formula_load<Storage>(weight, u); };
      const Acc count = static_cast<Acc>(H);
      made.along =
          sum_of_row<Acc>(
              H, [&](int64_t u) -> Acc { return weighted(u) * ((formula_load<Storage>(v, u) - made.mean) * made.scale); }) /
          count;
      if (kCentred) made.mean_d = sum_of_row<Acc>(H, weighted) / count;
      if (simt::lane_id() == 0) moments()[row] = made;
    }
    simt::sync_block();
  }
  static __device__ __forceinline__ Acc gradient(const RowInfo* table, int row, int64_t unit, Acc weight) {
    const Moments m = moments()[row];
    const Acc normal = (formula_load<Storage>(table[row].source[1], unit) - m.mean) * m.scale;
    return (static_cast<const Acc*>(table[row].source[0])[unit] * weight - m.mean_d - normal * m.along) * m.scale;
  }
};

}  // namespace fused_rnn::cuda
