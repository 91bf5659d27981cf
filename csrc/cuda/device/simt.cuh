// Every hardware primitive the kernels use, by a small named wrapper: the only file with PTX or intrinsics; calls of the
// CUDA runtime are in launch.cuh. Kernels include it as <simt.cuh>; tests/simt/ has a host implementation of the same names,
// which comes first on the include path when the kernels are compiled as C++ for the simulator. Beside the names below a
// kernel may use plain C++17, __global__, __device__, __host__, __forceinline__, __launch_bounds__ and #pragma unroll.
//
// Memory order: sync_block, sync_named and sync_warp order earlier writes of the participating threads before their later
// reads (shared and global memory). cp_async data is visible to the issuing thread after cp_async_wait, to others after a
// barrier that follows it. Data of the preceding grid is visible after pdl_wait.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace fused_rnn::simt {

// ---------------------------------------------------------------------------------------------------- who and where am I

// Architecture the code is being compiled for: 750, 800, 900, ...; 0 in the host pass. Only `if constexpr` inside device
// functions may depend on it, never a kernel's template arguments.
#ifdef __CUDA_ARCH__
constexpr __host__ __device__ int arch() { return __CUDA_ARCH__; }
#else
constexpr __host__ __device__ int arch() { return 0; }
#endif

constexpr int kWarpSize = 32;

__device__ __forceinline__ int thread_x() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block_dim_x() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int block_x() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int block_y() { return static_cast<int>(blockIdx.y); }
__device__ __forceinline__ int block_z() { return static_cast<int>(blockIdx.z); }
__device__ __forceinline__ int lane_id() { return thread_x() % kWarpSize; }
__device__ __forceinline__ int warp_id() { return thread_x() / kWarpSize; }

// Base of the block's dynamic shared memory, 128-byte aligned. There is no other shared memory.
__device__ __forceinline__ unsigned char* dynamic_smem() {
  extern __shared__ __align__(128) unsigned char fused_rnn_smem[];
  return fused_rnn_smem;
}

// -------------------------------------------------------------------------------------------------- barriers and shuffles

// All threads of the block.
__device__ __forceinline__ void sync_block() { __syncthreads(); }
// A fence for the compiler, by whole warps: it issues the loads that stand before it before all that follows. Without the
// fence it delays some loads to save registers, and their users wait.
__device__ __forceinline__ void issue_loads() { __syncwarp(); }
// The same as sync_block; returns whether any thread's predicate held.
__device__ __forceinline__ bool sync_block_or(bool predicate) { return __syncthreads_or(predicate) != 0; }
// All 32 threads of the warp.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
// `threads` threads (whole warps) of the block meet at barrier `id`, 1..15; 0 belongs to sync_block.
__device__ __forceinline__ void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Full-warp shuffles of a 32-bit value (int, unsigned, float).
template <class T>
__device__ __forceinline__ T shuffle(T value, int source_lane) {
  static_assert(sizeof(T) == 4);
  return __shfl_sync(0xffffffffu, value, source_lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4);
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// The same of 64 bits.
__device__ __forceinline__ double shuffle_xor_double(double value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ __forceinline__ uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// --------------------------------------------------------------------------------------------- asynchronous copy to shared

// Copies source_bytes (0..kBytes) bytes from global to shared memory and fills the rest of kBytes with zeros. Both addresses
// are aligned to kBytes (4, 8 or 16); global is not read when source_bytes is 0. Synchronous below sm_80.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int source_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(source_bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(kBytes), "r"(source_bytes)
                 : "memory");
  }
#else
  struct alignas(kBytes) Bytes {
    uint32_t words[kBytes / 4];
  };
  Bytes value{};
  if (source_bytes == kBytes) {
    value = *static_cast<const Bytes*>(global);
  } else {
    for (int i = 0; i < source_bytes; ++i) {
      reinterpret_cast<unsigned char*>(&value)[i] = static_cast<const unsigned char*>(global)[i];
    }
  }
  *static_cast<Bytes*>(shared) = value;
#endif
}

// Closes a group of the calling thread's copies (possibly empty).
__device__ __forceinline__ void cp_async_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of the calling thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---------------------------------------------------------------------------------------------------------- storage types

// IEEE binary16 and bfloat16 as stored in memory. Arithmetic is done in float.
struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

__device__ __forceinline__ double to_float(double value) { return value; }
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(half_t value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
__device__ __forceinline__ float to_float(bfloat16_t value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

// Rounds to nearest, ties to even; overflow gives infinity, NaN stays NaN.
template <class T, class V>
__device__ __forceinline__ T from_float(V value) {
  if constexpr (sizeof(T) >= 4) {
    return static_cast<T>(value);
  } else {
    T result;
    if constexpr (std::is_same_v<T, half_t>) {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
      const uint32_t bits = __float_as_uint(value);
      const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      result.bits = value != value ? uint16_t{0x7fff} : static_cast<uint16_t>(rounded);
#endif
    }
    return result;
  }
}

__device__ __forceinline__ uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float bits_float(uint32_t bits) { return __uint_as_float(bits); }

// 2 to the power of x: 2 ulp. Results below 2^-126 are 0.
__device__ __forceinline__ float exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// 1 / x: 1 ulp. 0 of infinities and of |x| above 2^126.
__device__ __forceinline__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Hides how `value` was computed: the compiler keeps one register for it instead of its operands, and shares nothing across
// this point.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// N values loaded or stored at once; the address is aligned to the whole.
template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Vec {
  T v[kSize];
};
template <int kSize, class T>
__device__ __forceinline__ Vec<T, kSize> load_vec(const T* address) {
  return *reinterpret_cast<const Vec<T, kSize>*>(address);
}
template <class T, int kSize>
__device__ __forceinline__ void store_vec(T* address, const Vec<T, kSize>& value) {
  *reinterpret_cast<Vec<T, kSize>*>(address) = value;
}

// A hint that the sector of 32 bytes around an address of global memory will be read: brings it into L2. Waits for nothing.
__device__ __forceinline__ void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Accesses of global memory that a thread makes if `condition` holds, each by one predicated instruction: around a branch
// the compiler could not place them among other instructions. T has 1, 2, 4 or 8 bytes and is aligned to them. The compiler
// does not know that memory is accessed: plain accesses of the same thread to the same place are in no order with these.
template <class T>
__device__ __forceinline__ T load_if(bool condition, const T* address, T otherwise) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 8) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.b64 %0, [%1];\n}"
                 : "+l"(reinterpret_cast<uint64_t&>(otherwise))
                 : "l"(address), "r"(static_cast<uint32_t>(condition)));
  } else if constexpr (sizeof(T) == 1) {
    uint32_t bits = reinterpret_cast<const uint8_t&>(otherwise);
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.u8 %0, [%1];\n}"
                 : "+r"(bits)
                 : "l"(address), "r"(static_cast<uint32_t>(condition)));
    reinterpret_cast<uint8_t&>(otherwise) = static_cast<uint8_t>(bits);
  } else if constexpr (sizeof(T) == 2) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.b16 %0, [%1];\n}"
                 : "+h"(reinterpret_cast<uint16_t&>(otherwise))
                 : "l"(address), "r"(static_cast<uint32_t>(condition)));
  } else {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.b32 %0, [%1];\n}"
                 : "+r"(reinterpret_cast<uint32_t&>(otherwise))
                 : "l"(address), "r"(static_cast<uint32_t>(condition)));
  }
  return otherwise;
}
template <class T>
__device__ __forceinline__ void store_if(bool condition, T* address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 8) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p st.global.b64 [%0], %1;\n}" ::"l"(address),
                 "l"(reinterpret_cast<const uint64_t&>(value)), "r"(static_cast<uint32_t>(condition)));
  } else {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p st.global.b32 [%0], %1;\n}" ::"l"(address),
                 "r"(reinterpret_cast<const uint32_t&>(value)), "r"(static_cast<uint32_t>(condition)));
  }
}
__device__ __forceinline__ void prefetch_l2_if(bool condition, const void* address) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p prefetch.global.L2 [%0];\n}" ::"l"(address),
               "r"(static_cast<uint32_t>(condition)));
}

// ----------------------------------------------------------------------------------------------------------- tensor cores

// Loads kCount (1, 2, 4) 8x8 matrices of 16-bit elements. Lane 8 m + r gives the address of row r of matrix m (16 bytes,
// aligned; lanes beyond 8 kCount are ignored). Register m of lane l receives elements (l / 4, 2 (l % 4)) and the next of
// matrix m, or of its transpose.
template <bool kTranspose, int kCount>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kCount == 1 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (kCount == 2 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// mma.sync: d += a b with fp32 accumulation; a is 16 x K (row), b is K x 8 (col), fragments as in the PTX manual.
__device__ __forceinline__ void mma_f16_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

// The next three functions need sm_80: code for older architectures must not reach them.
__device__ __forceinline__ void mma_f16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}
__device__ __forceinline__ void mma_bf16_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}
// a, b: fp32 bit patterns rounded by to_tf32.
__device__ __forceinline__ void mma_tf32_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}
// Rounds to 10 mantissa bits, nearest, ties away from zero. sm_80.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t result = __float_as_uint(value);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
#endif
  return result;
}

// --------------------------------------------------------------------------------------------- programmatic dependent
// launch

// Blocks until the grid before this one in the stream has ended and its writes are visible. Every thread calls it before it
// touches memory that the earlier grid writes or reads. Nothing to do below sm_90, where launches do not overlap.
__device__ __forceinline__ void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Allows the next grid to start as soon as every block has called this or ended.
__device__ __forceinline__ void pdl_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ------------------------------------------------------------------------------------- exchange between blocks of one grid

// A word that tells when it was written: value and tag are always seen together. A reader that finds the tag of its step has
// the value of that step, without a barrier, fence or flag. Only for blocks that run at the same time (cooperative launch),
// in global memory that no plain access touches during the launch.
struct alignas(8) TaggedWord {
  uint32_t value, tag;
};
// Relaxed at the scope of the device.
__device__ __forceinline__ void store_tagged(TaggedWord* to, TaggedWord word) {
  const uint64_t bits = static_cast<uint64_t>(word.tag) << 32 | word.value;
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(bits) : "memory");
}
// Loads two neighbours, aligned to 16 bytes, each of them whole. The caller repeats it until both have the tag it waits for.
__device__ __forceinline__ void load_tagged(TaggedWord (&words)[2], const TaggedWord* from) {
  uint64_t first, second;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(from) : "memory");
  words[0] = {static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32)};
  words[1] = {static_cast<uint32_t>(second), static_cast<uint32_t>(second >> 32)};
}

// A flag. A thread whose load_acquire returns the value of a store_release sees everything that the storing thread had
// written before the store, or had been shown by a barrier. Scope of the device; only between blocks that run at the same
// time.
__device__ __forceinline__ void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

// -------------------------------------------------------------------------- clusters: pushes into the shared memory of
// peers

// Everything below needs sm_90: code for older architectures must not reach it.

// Number of the block in its cluster.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
// A barrier of all threads of all blocks of the cluster, which orders memory like sync_block. A block may not end while
// peers still write to it.
__device__ __forceinline__ void sync_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// An address in the shared memory of a block of the cluster; adding to it counts bytes.
using ClusterAddress = uint32_t;
// Where the caller's shared-memory address lies in the block of that rank.
__device__ __forceinline__ ClusterAddress map_to_rank(const void* shared, int rank) {
  ClusterAddress result = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
#endif
  return result;
}

// A barrier in shared memory. A phase ends when two counts are complete: the arrivals of threads of the block, whose number
// is fixed by mbarrier_init, and the bytes that store_async brings, whose number mbarrier_expect announces. Bytes may come
// before the announcement. Phases are numbered 0, 1, ...
using MBarrier = uint64_t;
// By one thread, before a sync_cluster and any use.
__device__ __forceinline__ void mbarrier_init(MBarrier* barrier, int arrivals = 1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\nfence.mbarrier_init.release.cluster;" ::"r"(address), "r"(arrivals)
               : "memory");
#else
  __trap();
#endif
}
// An arrival in the current phase: what the thread wrote to shared memory before it is visible to whoever awaits the phase.
__device__ __forceinline__ void mbarrier_arrive(MBarrier* barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
#else
  __trap();
#endif
}
// An arrival that also announces how many bytes the phase awaits.
__device__ __forceinline__ void mbarrier_expect(MBarrier* barrier, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
#else
  __trap();
#endif
}
// PTX 8.6 has waits that order no memory, and fences of shared memory alone.
constexpr bool kHasSharedFence = __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208;
// Waits until the phase of that parity (phase number % 2) has ended, which is the current phase or the one before it. What
// store_async brought in that phase is then visible to the caller. The fence covers shared memory alone, since an acquire of
// all memory would make every warp discard its SM's L1 (CCTL.IVALL).
__device__ __forceinline__ void mbarrier_wait(MBarrier* barrier, int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  uint32_t done;
  do {
    if constexpr (kHasSharedFence) {
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(address), "r"(parity)
          : "memory");
    } else {
      asm volatile(
          "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(address), "r"(parity)
          : "memory");
    }
  } while (!done);
  if constexpr (kHasSharedFence) asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
#else
  __trap();
#endif
}
// Writes 4, 8 or 16 bytes (aligned to the whole) to a block of the cluster and counts them at that block's barrier.
// Undefined in a cluster of one block.
template <int kCount>
__device__ __forceinline__ void store_async(ClusterAddress to, const uint32_t (&v)[kCount], ClusterAddress barrier) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (kCount == 1) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to), "r"(v[0]),
                 "r"(barrier)
                 : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(to), "r"(v[0]),
                 "r"(v[1]), "r"(barrier)
                 : "memory");
  } else {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(barrier)
                 : "memory");
  }
#else
  __trap();
#endif
}

}  // namespace fused_rnn::simt
