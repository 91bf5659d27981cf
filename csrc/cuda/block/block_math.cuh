// Fragment arithmetic of family `block`, one policy per kind: acc[m][b] += A[m][k] x[k][b] for 16 m, 4 or 8 b and one chunk
// of kStep k. Beside what a chunk of persistent_math.cuh has under the same names:
//   multiply(acc, a, states)   kTiles fragments by the words of a chunk
//   put(states, k, b, value)   writes one element of a chunk; b: batch row of the block
//   sums(acc, out)             out[2 r + c]: row l / 4 + 8 r of M and the lane's column c
#pragma once
#include "cuda/persistent/persistent_math.cuh"
#include "plan/block_geometry.h"

namespace fused_rnn::cuda {

// mma.sync. With one column a lane, batch row b is column 2 b.
template <class ChunkT, int kColumns>
struct MmaBlockMath {
  using Storage = typename ChunkT::Storage;
  static constexpr int kStep = ChunkT::kStep, kAcc = ChunkT::kAcc;
  static constexpr int kChains = 4;  // of sums with one tile: an mma.sync need not wait for the one before

  template <class F>
  static __device__ __forceinline__ void load(uint32_t (&a)[4], F&& element) {
    ChunkT::load(a, element);
  }
  template <int kTiles>
  static __device__ __forceinline__ void multiply(float (&acc)[kTiles][kAcc], const uint32_t (&a)[kTiles][4],
                                                  const uint32_t* states) {
    ChunkT::multiply_own(acc, a, states);
  }
  static __device__ __forceinline__ void put(uint32_t* states, int k, int b, float value) {
    ChunkT::put(states, k, kColumns == 1 ? 2 * b : b, value);
  }
  static __device__ __forceinline__ void sums(const float (&acc)[kAcc], float (&out)[4]) {
#pragma unroll
    for (int i = 0; i < kAcc; ++i) out[i] = acc[i];
  }
};

// Plain multiply-adds. A lane has rows l / 4 and l / 4 + 8 of M, elements l % 4 and l % 4 + 4 of K, and all batch rows; the
// four lanes of a row then add their sums. States: [k][batch row].
template <int kColumns>
struct Fp32BlockMath {
  using Storage = float;
  static constexpr int kStep = 8, kRows = 4 * kColumns, kAcc = 2 * kRows;
  static constexpr int kChains = 1;

  template <class F>
  static __device__ __forceinline__ void load(uint32_t (&a)[4], F&& element) {
    const int row = simt::lane_id() / 4, k = simt::lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = simt::float_bits(element(row + 8 * (i % 2), k + 4 * (i / 2)));
  }
  template <int kTiles>
  static __device__ __forceinline__ void multiply(float (&acc)[kTiles][kAcc], const uint32_t (&a)[kTiles][4],
                                                  const uint32_t* states) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* state = reinterpret_cast<const float*>(states) + (simt::lane_id() % 4 + 4 * half) * kRows;
#pragma unroll
      for (int first = 0; first < kRows; first += 4) {
        const auto x = simt::load_vec<4>(state + first);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            acc[m][i / 4 * kRows + first + i % 4] += simt::bits_float(a[m][2 * half + i / 4]) * x.v[i % 4];
          }
        }
      }
    }
  }
  static __device__ __forceinline__ void put(uint32_t* states, int k, int b, float value) {
    states[k * kRows + b] = simt::float_bits(value);
  }
  // Lane l % 4 keeps the columns 2 (l % 4) and the next, or l % 4.
  static __device__ __forceinline__ void sums(const float (&acc)[kAcc], float (&out)[4]) {
    const bool upper = simt::lane_id() & 2, odd = simt::lane_id() & 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float half[kRows / 2];
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        const float low = acc[r * kRows + i], high = acc[r * kRows + kRows / 2 + i];
        half[i] = (upper ? high : low) + simt::shuffle_xor(upper ? low : high, 2);
      }
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const float low = half[i], high = half[kColumns + i];
        out[2 * r + i] = (odd ? high : low) + simt::shuffle_xor(odd ? low : high, 1);
      }
    }
  }
};

template <MathKind kMath, int kColumns>
struct BlockMathOf {
  using type = MmaBlockMath<typename ChunkOf<kMath>::type, kColumns>;
};
template <int kColumns>
struct BlockMathOf<MathKind::kFp32, kColumns> {
  using type = Fp32BlockMath<kColumns>;
};

}  // namespace fused_rnn::cuda
