// Host implementation of csrc/cuda/device/simt.cuh: the same names and signatures, on the simulated device of
// tests/simt/runtime. It comes first on the include path when the kernels are compiled by g++. A primitive that is added
// there must be added here too; what each one means and where it may be called is written there.
//
// The compiler instruments every plain load and store of the kernels (see runtime/hooks.cpp), so only what is not a plain
// access needs an implementation here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../runtime/api.h"
#include "../runtime/tensor.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// PTX has no place in a kernel file.
#define asm            \
  static_assert(false, \
                "PTX belongs into a wrapper in csrc/cuda/device/simt.cuh with a host twin in tests/simt/include/simt.cuh")

namespace fused_rnn::simt {

// The instruction that called the wrapper, for reports. Wrappers are always inlined, so this is a line of the kernel.
#define SIMT_HERE                              \
  ({                                           \
    uintptr_t pc;                              \
    __asm__ volatile(SIMT_READ_PC : "=r"(pc)); \
    pc;                                        \
  })
#if defined(__x86_64__)
#define SIMT_READ_PC "leaq 0(%%rip), %0"
#elif defined(__aarch64__)
#define SIMT_READ_PC "adr %0, ."
#else
#error "tests/simt/include/simt.cuh: say here how to read the program counter on this architecture"
#endif

#ifndef SIMT_ARCH
#define SIMT_ARCH 900
#endif
constexpr int arch() { return SIMT_ARCH; }

constexpr int kWarpSize = 32;

__forceinline__ int thread_x() { return simt_host::context.thread_x; }
__forceinline__ int block_dim_x() { return simt_host::context.block_dim_x; }
__forceinline__ int block_x() { return simt_host::context.block.x; }
__forceinline__ int block_y() { return simt_host::context.block.y; }
__forceinline__ int block_z() { return simt_host::context.block.z; }
__forceinline__ int lane_id() { return thread_x() % kWarpSize; }
__forceinline__ int warp_id() { return thread_x() / kWarpSize; }

__forceinline__ unsigned char* dynamic_smem() { return simt_host::context.smem; }

// -------------------------------------------------------------------------------------------------- barriers and shuffles

__forceinline__ void sync_block() { simt_host::barrier(0, 0, nullptr, SIMT_HERE); }
__forceinline__ bool sync_block_or(bool predicate) {
  simt_host::barrier(0, 0, &predicate, SIMT_HERE);
  return predicate;
}
__forceinline__ void sync_warp() { simt_host::warp_collective("sync_warp", ~0u, nullptr, nullptr, true, SIMT_HERE); }
__forceinline__ void issue_loads() { simt_host::warp_collective("issue_loads", ~0u, nullptr, nullptr, true, SIMT_HERE); }
__forceinline__ void sync_named(int id, int threads) { simt_host::barrier(id, threads, nullptr, SIMT_HERE); }

namespace detail {
struct Shuffle {
  uint32_t value, result;
  int source;
};
inline void complete_shuffle(void** payload) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& mine = *static_cast<Shuffle*>(payload[lane]);
    mine.result = static_cast<Shuffle*>(payload[mine.source & 31])->value;
  }
}
inline void complete_ballot(void** payload) {
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= (static_cast<Shuffle*>(payload[lane])->value & 1u) << lane;
  for (int lane = 0; lane < 32; ++lane) static_cast<Shuffle*>(payload[lane])->result = bits;
}
template <class T>
__forceinline__ T exchange(const char* kind, T value, int source, uintptr_t pc) {
  static_assert(sizeof(T) == 4);
  Shuffle shuffle{};
  std::memcpy(&shuffle.value, &value, 4);
  shuffle.source = source;
  simt_host::warp_collective(kind, ~0u, &shuffle, complete_shuffle, false, pc);
  std::memcpy(&value, &shuffle.result, 4);
  return value;
}
}  // namespace detail

template <class T>
__forceinline__ T shuffle(T value, int source_lane) {
  return detail::exchange("shuffle", value, source_lane, SIMT_HERE);
}
template <class T>
__forceinline__ T shuffle_xor(T value, int mask) {
  return detail::exchange("shuffle_xor", value, lane_id() ^ mask, SIMT_HERE);
}
__forceinline__ double shuffle_xor_double(double value, int mask) {
  uint32_t halves[2];
  std::memcpy(halves, &value, 8);
  for (uint32_t& half : halves) half = detail::exchange("shuffle_xor", half, lane_id() ^ mask, SIMT_HERE);
  std::memcpy(&value, halves, 8);
  return value;
}
__forceinline__ uint32_t ballot(bool predicate) {
  detail::Shuffle vote{predicate, 0, 0};
  simt_host::warp_collective("ballot", ~0u, &vote, detail::complete_ballot, false, SIMT_HERE);
  return vote.result;
}

// --------------------------------------------------------------------------------------------- asynchronous copy to shared

template <int kBytes>
__forceinline__ void cp_async(void* shared, const void* global, int source_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  simt_host::copy_async(shared, global, kBytes, source_bytes, SIMT_HERE);
  if constexpr (arch() < 800) {  // synchronous there
    simt_host::copy_commit();
    simt_host::copy_wait(0, SIMT_HERE);
  }
}
__forceinline__ void cp_async_commit() {
  if constexpr (arch() >= 800) simt_host::copy_commit();
}
template <int kPending>
__forceinline__ void cp_async_wait() {
  if constexpr (arch() >= 800) simt_host::copy_wait(kPending, SIMT_HERE);
}

// ---------------------------------------------------------------------------------------------------------- storage types

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

__forceinline__ double to_float(double value) { return value; }
__forceinline__ float to_float(float value) { return value; }
__forceinline__ float to_float(half_t value) { return simt_host::half_to_float(value.bits); }
__forceinline__ float to_float(bfloat16_t value) { return simt_host::bfloat16_to_float(value.bits); }

template <class T, class V>
__forceinline__ T from_float(V value) {
  if constexpr (sizeof(T) >= 4) {
    return static_cast<T>(value);
  } else if constexpr (std::is_same_v<T, half_t>) {
    return {simt_host::float_to_half(value)};
  } else {
    return {simt_host::float_to_bfloat16(value)};
  }
}

__forceinline__ uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
__forceinline__ float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// With errors of the size that the device's have; powers of two are exact, which tanh and exp of doubles rely on.
__forceinline__ float exp2(float x) {
  const float result = std::exp2(x) * (x == std::nearbyint(x) ? 1 : 1 + 0x1p-22f);
  return result < 0x1p-126f ? 0.0f : result;
}
__forceinline__ float reciprocal(float x) {
  const float result = (1 - 0x1p-23f) / x;
  return std::fabs(x) > 0x1p126f ? 0.0f : result;
}

__forceinline__ int opaque(int value) { return value; }

template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Vec {
  T v[kSize];
};
template <int kSize, class T>
__forceinline__ Vec<T, kSize> load_vec(const T* address) {
  Vec<T, kSize> value;
  simt_host::check_access(address, sizeof value, simt_host::kRead, SIMT_HERE);
  std::memcpy(&value, address, sizeof value);
  return value;
}
template <class T, int kSize>
__forceinline__ void store_vec(T* address, const Vec<T, kSize>& value) {
  simt_host::check_access(address, sizeof value, simt_host::kWrite, SIMT_HERE);
  std::memcpy(address, &value, sizeof value);
}

__forceinline__ void prefetch_l2(const void* address) {
  // Only a hint, but for what will be read: an address outside of all buffers is a mistake.
  simt_host::check_access(address, 1, simt_host::kRead | simt_host::kHint, SIMT_HERE);
}

template <class T>
__forceinline__ T load_if(bool condition, const T* address, T otherwise) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
  return condition ? *address : otherwise;
}
template <class T>
__forceinline__ void store_if(bool condition, T* address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if (condition) *address = value;
}
__forceinline__ void prefetch_l2_if(bool condition, const void* address) {
  if (condition) prefetch_l2(address);
}

// ----------------------------------------------------------------------------------------------------------- tensor cores

template <bool kTranspose, int kCount>
__forceinline__ void ldmatrix(uint32_t (&r)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  simt_host::ldmatrix(kTranspose, kCount, r, row, SIMT_HERE);
}
__forceinline__ void mma_f16_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  simt_host::mma(simt_host::MmaType::kF16, 8, d, a, b, SIMT_HERE);
}
__forceinline__ void mma_f16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt_host::mma(simt_host::MmaType::kF16, 16, d, a, b, SIMT_HERE);
}
__forceinline__ void mma_bf16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt_host::mma(simt_host::MmaType::kBf16, 16, d, a, b, SIMT_HERE);
}
__forceinline__ void mma_tf32_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt_host::mma(simt_host::MmaType::kTf32, 8, d, a, b, SIMT_HERE);
}
__forceinline__ uint32_t to_tf32(float value) {
  return arch() >= 800 ? simt_host::float_to_tf32(value) : [&] {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
  }();
}

// --------------------------------------------------------------------------------------- programmatic dependent launch

__forceinline__ void pdl_wait() {
  if constexpr (arch() >= 900) simt_host::grid_wait(SIMT_HERE);
}
__forceinline__ void pdl_launch_dependents() {
  if constexpr (arch() >= 900) simt_host::grid_launch_dependents();
}

// ------------------------------------------------------------------------------------- exchange between blocks of one grid

struct alignas(8) TaggedWord {
  uint32_t value, tag;
};
__forceinline__ void store_tagged(TaggedWord* to, TaggedWord word) {
  simt_host::store_flag(to, &word, sizeof word, false, SIMT_HERE);
}
__forceinline__ void load_tagged(TaggedWord (&words)[2], const TaggedWord* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    simt_host::check_access(from, 16, simt_host::kRead | simt_host::kAtomic, SIMT_HERE);  // reports it
  }
  simt_host::load_flag(&words[0], from, sizeof words[0], false, SIMT_HERE);
  simt_host::load_flag(&words[1], from + 1, sizeof words[1], false, SIMT_HERE);
}

__forceinline__ void store_release(uint32_t* flag, uint32_t value) {
  simt_host::store_flag(flag, &value, sizeof value, true, SIMT_HERE);
}
__forceinline__ uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  simt_host::load_flag(&value, flag, sizeof value, true, SIMT_HERE);
  return value;
}

// -------------------------------------------------------------------- clusters: pushes into the shared memory of peers

__forceinline__ int cluster_rank() { return simt_host::cluster_rank(); }
__forceinline__ void sync_cluster() { simt_host::sync_cluster(SIMT_HERE); }
using ClusterAddress = uint32_t;
__forceinline__ ClusterAddress map_to_rank(const void* shared, int rank) {
  return simt_host::map_to_rank(shared, rank, SIMT_HERE);
}
using MBarrier = uint64_t;
__forceinline__ void mbarrier_init(MBarrier* barrier, int arrivals = 1) {
  simt_host::mbarrier_init(barrier, arrivals, SIMT_HERE);
  simt_host::fence_mbarrier_init();
}
__forceinline__ void mbarrier_arrive(MBarrier* barrier) { simt_host::mbarrier_expect(barrier, 0, SIMT_HERE); }
__forceinline__ void mbarrier_expect(MBarrier* barrier, int bytes) { simt_host::mbarrier_expect(barrier, bytes, SIMT_HERE); }
__forceinline__ void mbarrier_wait(MBarrier* barrier, int parity) {
  simt_host::mbarrier_wait(barrier, parity, true, SIMT_HERE);
}
template <int kCount>
__forceinline__ void store_async(ClusterAddress to, const uint32_t (&v)[kCount], ClusterAddress barrier) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  simt_host::store_async(to, v, 4 * kCount, barrier, SIMT_HERE);
}

}  // namespace fused_rnn::simt
