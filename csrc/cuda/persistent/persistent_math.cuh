// Fragment arithmetic of the persistent families, one policy per kind: acc[m][b] += A[m][k] x[k][b] for 16 m, 8 b and one
// chunk of kStep k. All have
//   kStep, kAcc       elements of K in a chunk, accumulators of a lane
//   load(f)           the lane's 4 words of A; f(m, k) gives an element of the chunk
//   pack(low, high)   the exchanged word of a state: 16-bit types put units 2 i and 2 i + 1 in one word, others ignore
//                     `high`
//   place(k, b)       lane and word (0 or 1) at which the state of unit k of a chunk and row b is consumed
//   multiply(acc, a, x, scratch)   kTiles fragments; x: the lane's 2 words of the state; scratch: PersistentSmem::scratch
//   store(acc, partial)            writes a warp's sums to [batch row][unit], rows of kPartialPitch floats
//   put(own, k, b, value)          writes one element of a chunk to its own_words()
//   multiply_own(acc, a, own)      kTiles fragments by what was put there, after a barrier
//   rows(acc)                      reorders the sums: the lane's 4 units from `unit` on of batch row `b`
#pragma once
#include "cuda/device/fragments.cuh"
#include "cuda/persistent/sequence.h"

namespace fused_rnn::cuda {

struct FragmentPlace {
  int lane, word;
};

// Four consecutive units of one batch row.
struct RowPiece {
  int unit, b;
  float v[4];
};

// Transposes the 4 x 4 values v[i] of four lanes, whose numbers differ in the bits kBit and 2 * kBit: lane i of the four
// gets the v[i] of all four, in order.
template <int kBit>
__device__ __forceinline__ void transpose_lanes(float (&v)[4]) {
  const bool odd = simt::lane_id() & kBit, upper = simt::lane_id() & 2 * kBit;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const float other = simt::shuffle_xor(odd ? v[i] : v[i + 1], kBit);
    (odd ? v[i] : v[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float other = simt::shuffle_xor(upper ? v[i] : v[i + 2], 2 * kBit);
    (upper ? v[i] : v[i + 2]) = other;
  }
}

// Accumulators as mma.sync leaves them: lane l has units l / 4 and 8 further, rows 2 (l % 4) and the next.
struct MmaSums {
  static constexpr int kAcc = 4;
  static __device__ __forceinline__ RowPiece rows(const float (&acc)[kAcc]) {
    const int lane = simt::lane_id(), i = lane / 4 % 4;
    RowPiece piece{lane / 16 * 4 + i / 2 * 8, 2 * (lane % 4) + i % 2, {acc[0], acc[1], acc[2], acc[3]}};
    transpose_lanes<4>(piece.v);
    return piece;
  }
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
  static __device__ __forceinline__ void put(uint32_t* own, int k, int b, float value) {
    const FragmentPlace at = place(k, b);
    reinterpret_cast<Storage*>(own)[(at.word * 32 + at.lane) * 2 + k % 2] = simt::from_float<Storage>(value);
  }
  template <int kTiles>
  static __device__ __forceinline__ void multiply_own(float (&acc)[kTiles][kAcc], const uint32_t (&a)[kTiles][4],
                                                      const uint32_t* own) {
    const uint32_t x[2] = {own[simt::lane_id()], own[32 + simt::lane_id()]};
    multiply(acc, a, x, nullptr);
  }

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
  static __device__ __forceinline__ void put(uint32_t* own, int k, int b, float value) {
    const FragmentPlace at = place(k, b);
    own[at.word * 32 + at.lane] = simt::to_tf32(value);
  }
  template <int kTiles>
  static __device__ __forceinline__ void multiply_own(float (&acc)[kTiles][kAcc], const uint32_t (&a)[kTiles][4],
                                                      const uint32_t* own) {
    const uint32_t x[2] = {own[simt::lane_id()], own[32 + simt::lane_id()]};
    multiply(acc, a, x, nullptr);
  }

  template <int kTiles>
  static __device__ __forceinline__ void multiply(float (&acc)[kTiles][kAcc], const uint32_t (&a)[kTiles][4],
                                                  const uint32_t (&x)[2], float*) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) simt::mma_tf32_m16n8k8(acc[m], a[m], x);
  }
};

// Plain multiply-adds. A lane has row m = lane % 16 and the half lane / 16 of the chunk's k, for all 8 batch rows. The lanes
// hold the state in the places of Tf32Chunk and exchange it through the warp's scratch, whose two buffers in turn need one
// warp barrier a chunk.
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
    multiply_own(acc, a, reinterpret_cast<const uint32_t*>(scratch));
  }

  static __device__ __forceinline__ void put(uint32_t* own, int k, int b, float value) {
    own[k / 4 * kHalf + k % 4 * kTileRows + b] = simt::float_bits(value);
  }
  template <int kTiles>
  static __device__ __forceinline__ void multiply_own(float (&acc)[kTiles][kAcc], const uint32_t (&a)[kTiles][4],
                                                      const uint32_t* own) {
    const float* state = reinterpret_cast<const float*>(own) + simt::lane_id() / 16 * kHalf;
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
    float sums[4];
    add_halves(acc, sums);
    float* row = partial + simt::lane_id() / 16 * 4 * kPartialPitch + simt::lane_id() % 16;
#pragma unroll
    for (int b = 0; b < 4; ++b) row[b * kPartialPitch] = sums[b];
  }
  static __device__ __forceinline__ RowPiece rows(const float (&acc)[kAcc]) {
    const int lane = simt::lane_id();
    RowPiece piece{lane % 16 / 4 * 4, lane / 16 * 4 + lane % 4, {}};
    add_halves(acc, piece.v);
    transpose_lanes<1>(piece.v);
    return piece;
  }

 private:
  // Adds the two halves of k: of batch rows 0 to 3 in the lower lanes, of 4 to 7 in the upper.
  static __device__ __forceinline__ void add_halves(const float (&acc)[kAcc], float (&sums)[4]) {
    const bool upper = simt::lane_id() >= 16;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const float mine = upper ? acc[b + 4] : acc[b], others = upper ? acc[b] : acc[b + 4];
      sums[b] = mine + simt::shuffle_xor(others, 16);
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
