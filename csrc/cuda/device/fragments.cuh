// Register fragments of a 16 (units) x 8 (batch) x kStep (K) product, one policy per kind of arithmetic. All have
//   Storage, Acc           element type in memory, accumulator type
//   kStep                  elements of K consumed at once
//   kUnroll                steps that are unrolled: as many as the registers of the largest tile allow
//   load_a(tile, row, k)   16 weight rows from `row` on. The stage is K-major (rows of kChunkBytes, swizzled) or unit-major
//                          ([k][units], rows of kPitch bytes)
//   load_b(tile, row, k)   8 batch rows from `row` on, always K-major
//   multiply(acc, a, b)    acc[4] += a b
//   unit(i), batch(i)      which element of the 16 x 8 tile the calling lane's acc[i] is
#pragma once
#include <simt.cuh>

#include "plan/step_geometry.h"

namespace fused_rnn::cuda {

using simt::bfloat16_t;
using simt::half_t;

// Byte offset of byte `byte` of row `row` in a K-major stage. The 16-byte pieces of a row are permuted by the row's number,
// so that 8 rows read at the same place meet every bank once.
__device__ __forceinline__ int k_major_offset(int row, int byte) {
  static_assert(kChunkBytes == 64);
  return row * kChunkBytes + ((byte / 16 ^ (row >> 1 & 3)) * 16) + byte % 16;
}

// Plain multiply-adds; half_t and bfloat16_t are widened to float first.
template <class StorageT, class AccT, bool kUnitMajor, int kPitch>
struct ScalarFragments {
  using Storage = StorageT;
  using Acc = AccT;
  static constexpr int kStep = sizeof(Storage) == 2 ? 4 : 16 / sizeof(Storage);
  static constexpr int kUnroll = sizeof(Storage) == 2 ? 1 : 2;
  struct A {
    Storage v[2][kStep];
  };
  struct B {
    Storage v[2][kStep];
  };

  static __device__ __forceinline__ int unit(int i) {
    const int group = simt::lane_id() / 4;
    return kUnitMajor ? 2 * group + i / 2 : group + 8 * (i / 2);
  }
  static __device__ __forceinline__ int batch(int i) { return 2 * (simt::lane_id() % 4) + i % 2; }

  static __device__ __forceinline__ A load_a(const unsigned char* tile, int row, int k) {
    A a;
    if constexpr (kUnitMajor) {
#pragma unroll
      for (int j = 0; j < kStep; ++j) {
        const auto pair = simt::load_vec<2>(
            reinterpret_cast<const Storage*>(tile + (k + j) * kPitch + (row + unit(0)) * static_cast<int>(sizeof(Storage))));
        a.v[0][j] = pair.v[0];
        a.v[1][j] = pair.v[1];
      }
    } else {
      load_rows(a.v, tile, row + unit(0), row + unit(2), k);
    }
    return a;
  }
  static __device__ __forceinline__ B load_b(const unsigned char* tile, int row, int k) {
    B b;
    load_rows(b.v, tile, row + batch(0), row + batch(1), k);
    return b;
  }
  static __device__ __forceinline__ void multiply(Acc (&acc)[4], const A& a, const B& b) {
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[i] += simt::to_float(a.v[i / 2][j]) * simt::to_float(b.v[i % 2][j]);
    }
  }

 private:
  static __device__ __forceinline__ void load_rows(Storage (&v)[2][kStep], const unsigned char* tile, int row0, int row1,
                                                   int k) {
    const int byte = k * static_cast<int>(sizeof(Storage));
    const auto first = simt::load_vec<kStep>(reinterpret_cast<const Storage*>(tile + k_major_offset(row0, byte)));
    const auto second = simt::load_vec<kStep>(reinterpret_cast<const Storage*>(tile + k_major_offset(row1, byte)));
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      v[0][j] = first.v[j];
      v[1][j] = second.v[j];
    }
  }
};

// Where mma.sync leaves its accumulators.
struct MmaLayout {
  static __device__ __forceinline__ int unit(int i) { return simt::lane_id() / 4 + 8 * (i / 2); }
  static __device__ __forceinline__ int batch(int i) { return 2 * (simt::lane_id() % 4) + i % 2; }
};

// fp32 in memory, rounded to TF32 on the way into the tensor cores.
template <bool kUnitMajor, int kPitch>
struct Tf32Fragments : MmaLayout {
  using Storage = float;
  using Acc = float;
  static constexpr int kStep = 8, kUnroll = 4;
  struct A {
    uint32_t v[4];
  };
  struct B {
    uint32_t v[2];
  };

  static __device__ __forceinline__ uint32_t element(const unsigned char* tile, int row, int k) {
    const int offset = kUnitMajor ? k * kPitch + row * 4 : k_major_offset(row, k * 4);
    return simt::to_tf32(*reinterpret_cast<const float*>(tile + offset));
  }
  static __device__ __forceinline__ A load_a(const unsigned char* tile, int row, int k) {
    const int r = row + simt::lane_id() / 4, c = k + simt::lane_id() % 4;
    return {{element(tile, r, c), element(tile, r + 8, c), element(tile, r, c + 4), element(tile, r + 8, c + 4)}};
  }
  static __device__ __forceinline__ B load_b(const unsigned char* tile, int row, int k) {
    const int r = row + simt::lane_id() / 4, c = 4 * (k + simt::lane_id() % 4);
    return {{simt::to_tf32(*reinterpret_cast<const float*>(tile + k_major_offset(r, c))),
             simt::to_tf32(*reinterpret_cast<const float*>(tile + k_major_offset(r, c + 16)))}};
  }
  static __device__ __forceinline__ void multiply(float (&acc)[4], const A& a, const B& b) {
    simt::mma_tf32_m16n8k8(acc, a.v, b.v);
  }
};

// half_t, or bfloat16_t from sm_80 on.
template <class StorageT, bool kUnitMajor, int kPitch>
struct HalfFragments : MmaLayout {
  using Storage = StorageT;
  using Acc = float;
  static constexpr int kStep = 16, kUnroll = 4;
  struct A {
    uint32_t v[4];
  };
  struct B {
    uint32_t v[2];
  };

  static __device__ __forceinline__ A load_a(const unsigned char* tile, int row, int k) {
    const int lane = simt::lane_id();
    A a;
    if constexpr (kUnitMajor) {
      simt::ldmatrix<true>(a.v, tile + (k + lane % 8 + 8 * (lane / 16)) * kPitch + (row + 8 * (lane / 8 % 2)) * 2);
    } else {
      simt::ldmatrix<false>(a.v, tile + k_major_offset(row + lane % 16, (k + 8 * (lane / 16)) * 2));
    }
    return a;
  }
  static __device__ __forceinline__ B load_b(const unsigned char* tile, int row, int k) {
    const int lane = simt::lane_id();
    B b;
    simt::ldmatrix<false>(b.v, tile + k_major_offset(row + lane % 8, (k + 8 * (lane / 8 % 2)) * 2));
    return b;
  }
  static __device__ __forceinline__ void multiply(float (&acc)[4], const A& a, const B& b) {
    if constexpr (sizeof(Storage) == 2 && std::is_same_v<Storage, bfloat16_t>) {
      simt::mma_bf16_m16n8k16(acc, a.v, b.v);
    } else if constexpr (simt::arch() >= 800) {
      simt::mma_f16_m16n8k16(acc, a.v, b.v);
    } else {
      simt::mma_f16_m16n8k8(acc, {a.v[0], a.v[1]}, {b.v[0]});
      simt::mma_f16_m16n8k8(acc, {a.v[2], a.v[3]}, {b.v[1]});
    }
  }
};

// Element type in memory.
template <MathKind kMath>
struct StorageOf {
  using type = float;
};
template <>
struct StorageOf<MathKind::kFp64> {
  using type = double;
};
template <>
struct StorageOf<MathKind::kFp16> {
  using type = half_t;
};
template <>
struct StorageOf<MathKind::kBf16> {
  using type = bfloat16_t;
};

// The policy of a kind of arithmetic on the architecture `kArch` (750, 800, ...).
template <MathKind kMath, bool kUnitMajor, int kPitch, int kArch>
struct FragmentsOf {
  using Storage = typename StorageOf<kMath>::type;
  using Acc = std::conditional_t<kMath == MathKind::kFp64, double, float>;
  using type = ScalarFragments<Storage, Acc, kUnitMajor, kPitch>;
};
template <bool kUnitMajor, int kPitch, int kArch>
struct FragmentsOf<MathKind::kTf32, kUnitMajor, kPitch, kArch> {
  using type = Tf32Fragments<kUnitMajor, kPitch>;
};
template <bool kUnitMajor, int kPitch, int kArch>
struct FragmentsOf<MathKind::kFp16, kUnitMajor, kPitch, kArch> {
  using type = HalfFragments<half_t, kUnitMajor, kPitch>;
};
template <bool kUnitMajor, int kPitch, int kArch>
struct FragmentsOf<MathKind::kBf16, kUnitMajor, kPitch, kArch> {
  using type = std::conditional_t<(kArch >= 800), HalfFragments<bfloat16_t, kUnitMajor, kPitch>,
                                  ScalarFragments<bfloat16_t, float, kUnitMajor, kPitch>>;
};

}  // namespace fused_rnn::cuda
