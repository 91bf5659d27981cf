// Fragment arithmetic of the persistent families, one policy per kind: acc[m][b] += A[m][k] x[k][b] for 16 m, 8 b and one chunk
// of kStep k. All have
//   kStep, kAcc       elements of K in a chunk, accumulators of a lane
//   load(f)           the lane's 4 words of A; f(m, k) gives an element of the chunk
//   pack(low, high)   the exchanged word of a state: 16-bit types put units 2 i and 2 i + 1 in one word, others ignore `high`
//   place(k, b)       lane and word (0 or 1) at which the state of unit k of a chunk and row b is consumed
//   multiply(acc, a, x, scratch)   kTiles fragments; x: the lane's 2 words of the state; scratch: see persistent.h
//   store(acc, partial)            writes a warp's sums to [batch row][unit], rows of kPartialPitch floats
#pragma once
#include "fragments.cuh"
#include "persistent.h"

namespace fused_rnn::cuda {

struct FragmentPlace {
  int lane, word;
};

// Accumulators as mma.sync leaves them.
struct MmaSums {
  static constexpr int kAcc = 4;
  static __device__ __forceinline__ void store(const float (&acc)[kAcc], float* partial) {
#pragma unroll
    for (int i = 0; i < kAcc; ++i) partial[MmaLayout::batch(i) * kPartialPitch + MmaLayout::unit(i)] = acc[i];
  }
};

template <class StorageT>
struct HalfChunk : MmaSums {
  using Storage = StorageT;
  static constexpr int kStep = 16;

  template <class F>
  static __device__ __forceinline__ void load(uint32_t (&a)[4], F&& element) {
    const int row = simt::lane_id() / 4, column = 2 * (simt::lane_id() % 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = row + 8 * (i % 2), k = column + 8 * (i / 2);
      a[i] = static_cast<uint32_t>(Storage(element(m, k)).bits) | static_cast<uint32_t>(Storage(element(m, k + 1)).bits)
                                                                      << 16;
    }
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return static_cast<uint32_t>(simt::from_float<Storage>(low).bits) |
           static_cast<uint32_t>(simt::from_float<Storage>(high).bits) << 16;
  }
  static __device__ __forceinline__ FragmentPlace place(int k, int b) { return {b * 4 + k % 8 / 2, k / 8}; }

  template <int kTiles>
  static __device__ __forceinline__ void multiply(float (&acc)[kTiles][kAcc], const uint32_t (&a)[kTiles][4],
                                                  const uint32_t (&x)[2], float*) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      if constexpr (__is_same(Storage, half_t)) {
        simt::mma_f16_m16n8k16(acc[m], a[m], x);
      } else {
        simt::mma_bf16_m16n8k16(acc[m], a[m], x);
      }
    }
  }
};

struct Tf32Chunk : MmaSums {
  using Storage = float;
  static constexpr int kStep = 8;

  template <class F>
  static __device__ __forceinline__ void load(uint32_t (&a)[4], F&& element) {
    const int row = simt::lane_id() / 4, column = simt::lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = simt::to_tf32(element(row + 8 * (i % 2), column + 4 * (i / 2)));
  }
  static __device__ __forceinline__ uint32_t pack(float value, float) { return simt::to_tf32(value); }
  static __device__ __forceinline__ FragmentPlace place(int k, int b) { return {b * 4 + k % 4, k / 4}; }

  template <int kTiles>
  static __device__ __forceinline__ void multiply(float (&acc)[kTiles][kAcc], const uint32_t (&a)[kTiles][4],
                                                  const uint32_t (&x)[2], float*) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) simt::mma_tf32_m16n8k8(acc[m], a[m], x);
  }
};

// Plain multiply-adds. A lane has row m = lane % 16 and the half lane / 16 of the chunk's k, for all 8 batch rows; it reads the
// state, which the lanes hold as Tf32Chunk's, through the warp's scratch. Two buffers in turn need one warp barrier a chunk.
struct Fp32Chunk {
  using Storage = float;
  static constexpr int kStep = 8, kAcc = 8;
  static constexpr int kHalf = 4 * kTileRows + 4;  // floats from the lower half of k to the upper

  template <class F>
  static __device__ __forceinline__ void load(uint32_t (&a)[4], F&& element) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = simt::float_bits(element(simt::lane_id() % 16, 4 * (simt::lane_id() / 16) + i));
    }
  }
  static __device__ __forceinline__ uint32_t pack(float value, float) { return simt::float_bits(value); }
  static __device__ __forceinline__ FragmentPlace place(int k, int b) { return {b * 4 + k % 4, k / 4}; }

  template <int kTiles>
  static __device__ __forceinline__ void multiply(float (&acc)[kTiles][kAcc], const uint32_t (&a)[kTiles][4],
                                                  const uint32_t (&x)[2], float* scratch) {
    const int lane = simt::lane_id(), place = lane % 4 * kTileRows + lane / 4;
    scratch[place] = simt::bits_float(x[0]);
    scratch[kHalf + place] = simt::bits_float(x[1]);
    simt::sync_warp();
    const float* state = scratch + lane / 16 * kHalf;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto low = simt::load_vec<4>(state + i * kTileRows), high = simt::load_vec<4>(state + i * kTileRows + 4);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const float weight = simt::bits_float(a[m][i]);
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          acc[m][b] += weight * low.v[b];
          acc[m][b + 4] += weight * high.v[b];
        }
      }
    }
  }

  static __device__ __forceinline__ void store(const float (&acc)[kAcc], float* partial) {
    const bool upper = simt::lane_id() >= 16;
    float* row = partial + (upper ? 4 : 0) * kPartialPitch + simt::lane_id() % 16;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const float mine = upper ? acc[b + 4] : acc[b], others = upper ? acc[b] : acc[b + 4];
      row[b * kPartialPitch] = mine + simt::shuffle_xor(others, 16);
    }
  }
};

template <MathKind kMath>
struct ChunkOf;
template <>
struct ChunkOf<MathKind::kFp32> {
  using type = Fp32Chunk;
};
template <>
struct ChunkOf<MathKind::kTf32> {
  using type = Tf32Chunk;
};
template <>
struct ChunkOf<MathKind::kFp16> {
  using type = HalfChunk<half_t>;
};
template <>
struct ChunkOf<MathKind::kBf16> {
  using type = HalfChunk<bfloat16_t>;
};

}  // namespace fused_rnn::cuda
