// Fragment arithmetic of family `block`, one policy per kind: acc[m][b] += A[m][k] x[k][b] for 16 m, 4 b and one chunk of
// kStep k. Beside what a chunk of persistent_math.cuh has under the same names:
//   multiply(acc, a, states)   kTiles fragments by the words of a chunk
//   place(k, b)                   where an element of a chunk is, in bytes; b: batch row of the block
//   put(to, value)                writes the element there
//   put_pair(to, low, high)       writes the element and that of the next k, k even
//   sums(acc, out)                out[r]: row l / 4 + 8 r of M and batch row l % 4
#pragma once
#include "cuda/persistent/persistent_math.cuh"
#include "plan/block_geometry.h"

namespace fused_rnn::cuda {

// mma.sync, with batch row b as column 2 b.
template <class ChunkT>
struct MmaBlockMath {
  using Storage = typename ChunkT::Storage;
  static constexpr int kStep = ChunkT::kStep, kAcc = ChunkT::kAcc;
  static constexpr bool kHalf = sizeof(Storage) == 2;
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
  static __device__ __forceinline__ int place(int k, int b) {
    const FragmentPlace at = ChunkT::place(k, 2 * b);
    return (at.word * 32 + at.lane) * 4 + (kHalf ? k % 2 * 2 : 0);
  }
  static __device__ __forceinline__ void put(unsigned char* to, float value) {
    if constexpr (kHalf) {
      *reinterpret_cast<Storage*>(to) = simt::from_float<Storage>(value);
    } else {
      *reinterpret_cast<uint32_t*>(to) = ChunkT::pack(value, 0.0f);
    }
  }
  static __device__ __forceinline__ void put_pair(unsigned char* to, float low, float high) {
    if constexpr (kHalf) {
      *reinterpret_cast<uint32_t*>(to) = ChunkT::pack(low, high);
    } else {
      const simt::Vec<uint32_t, 2> words{ChunkT::pack(low, 0.0f), ChunkT::pack(high, 0.0f)};
      simt::store_vec(reinterpret_cast<uint32_t*>(to), words);
    }
  }
  static __device__ __forceinline__ void sums(const float (&acc)[kAcc], float (&out)[2]) {
    out[0] = acc[0];
    out[1] = acc[2];
  }
};

// Plain multiply-adds. A lane has rows l / 4 and l / 4 + 8 of M, elements l % 4 and l % 4 + 4 of K, and all batch rows; the
// four lanes of a row then add their sums. States: [k][batch row].
struct Fp32BlockMath {
  using Storage = float;
  static constexpr int kStep = 8, kAcc = 2 * kBlockRows;
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
      const auto* state = reinterpret_cast<const float*>(states) + (simt::lane_id() % 4 + 4 * half) * kBlockRows;
      const auto x = simt::load_vec<kBlockRows>(state);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < kAcc; ++i) {
          acc[m][i] += simt::bits_float(a[m][2 * half + i / kBlockRows]) * x.v[i % kBlockRows];
        }
      }
    }
  }
  static __device__ __forceinline__ int place(int k, int b) { return (k * kBlockRows + b) * 4; }
  static __device__ __forceinline__ void put(unsigned char* to, float value) { *reinterpret_cast<float*>(to) = value; }
  static __device__ __forceinline__ void put_pair(unsigned char* to, float low, float high) {
    put(to, low);
    put(to + kBlockRows * 4, high);
  }
  static __device__ __forceinline__ void sums(const float (&acc)[kAcc], float (&out)[2]) {
    const bool upper = simt::lane_id() & 2, odd = simt::lane_id() & 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* of = acc + r * kBlockRows;
      float half[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        half[i] = (upper ? of[2 + i] : of[i]) + simt::shuffle_xor(upper ? of[i] : of[2 + i], 2);
      }
      out[r] = (odd ? half[1] : half[0]) + simt::shuffle_xor(odd ? half[0] : half[1], 1);
    }
  }
};

template <MathKind kMath>
struct BlockMathOf {
  using type = MmaBlockMath<typename ChunkOf<kMath>::type>;
};
template <>
struct BlockMathOf<MathKind::kFp32> {
  using type = Fp32BlockMath;
};

}  // namespace fused_rnn::cuda
