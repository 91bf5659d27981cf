// What a modified step does to one unit of one row beside the cell (core/modifier.h), for the kernels kForwardModified and
// kBackwardModified. The CPU's twin is cpu/isa/pointwise_modified.h.
//
//   candidate                     g <- mask * g
//   clip                          c <- min(max(c, -clip), clip), before h is made of it; h of a cell without c
//   zoneout, of h and c alike     s <- share * s before + (1 - share) * s, where flags are shares of 1 and 0
//   product                       the state's row is multiplied by factors on its way into shared memory (matmul.cuh);
//                                 backward multiplies the sum of the product
#pragma once
#include <limits>

#include "cuda/device/cell_device.cuh"

namespace fused_rnn::cuda {

// cells.h's modifier of a unit.
template <class Acc>
struct StepModifier {
  static constexpr Acc kNoClip = std::numeric_limits<Acc>::infinity();
  Acc mask, clip, raw;  // raw: of backward, what was cut to [-clip, clip]

  template <class V>
  __device__ __forceinline__ V candidate(const V& v) const {
    return v * V(mask);
  }
  template <class V>
  __device__ __forceinline__ V clipped(const V& v) const {
    const Acc x = number_of(v);
    return V(x > clip ? clip : x < -clip ? -clip : x);  // NaN stays NaN
  }
  template <class V>
  __device__ __forceinline__ V clip_gradient(const V& d) const {
    return raw > clip || raw < -clip ? V(0) : d;
  }
};

// A state's zoneout of one unit. A share of 1 or 0 takes one of the two, so that the other may be NaN.
template <class Acc>
struct ZoneoutUnit {
  Acc share;

  __device__ __forceinline__ Acc after(Acc before, Acc after) const {
    return share == Acc(0) ? after : share == Acc(1) ? before : share * before + (Acc(1) - share) * after;
  }
  __device__ __forceinline__ Acc to_before(Acc d) const {
    return share == Acc(0) ? Acc(0) : share == Acc(1) ? d : share * d;
  }
  __device__ __forceinline__ Acc to_after(Acc d) const {
    return share == Acc(0) ? d : share == Acc(1) ? Acc(0) : (Acc(1) - share) * d;
  }
};

// index: of the flags [D, N, H].
template <class Acc>
__device__ __forceinline__ ZoneoutUnit<Acc> zoneout_unit(const Zoneout& zoneout, int64_t index) {
  return {zoneout.keep ? Acc(zoneout.keep[index] ? 1 : 0) : Acc(zoneout.share)};
}

// state: index of [D, B, H].
template <class Storage, class Acc>
__device__ __forceinline__ StepModifier<Acc> step_modifier(const Modifier& m, int64_t state) {
  const Acc mask = m.candidate ? Acc(simt::to_float(static_cast<const Storage*>(m.candidate)[state])) : Acc(1);
  return {mask, m.clip != 0 ? Acc(m.clip) : StepModifier<Acc>::kNoClip, Acc(0)};
}

}  // namespace fused_rnn::cuda
