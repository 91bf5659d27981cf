// Little kernels with known answers for the simulator's own tests: each is right, or wrong in the one way that its name
// says.
#include <launch.cuh>
#include <simt.cuh>
#include <stdexcept>
#include <string>

#include "../runtime/capi.h"

namespace fused_rnn {
namespace {

struct Small {
  const float* in;
  float* out;
  float* scratch;
  int n;
};

__device__ __forceinline__ float* tile() { return reinterpret_cast<float*>(simt::dynamic_smem()); }
__device__ __forceinline__ int global_index() { return simt::block_x() * simt::block_dim_x() + simt::thread_x(); }

// out: in, reversed in each block, through shared memory.
template <bool kSync, int kOffset>
__global__ void reverse_kernel(const Small p) {
  const int i = simt::thread_x(), n = simt::block_dim_x();
  tile()[i] = p.in[global_index()];
  if (kSync) simt::sync_block();
  p.out[global_index()] = tile()[n - 1 - i + kOffset];
}

__global__ void partial_barrier_kernel(const Small p) {
  if (simt::thread_x() < 32) return;
  simt::sync_block();
  p.out[global_index()] = 0;
}

__global__ void divergent_barrier_kernel(const Small p) {
  if (simt::thread_x() < 32) {
    p.out[global_index()] = 1;
    simt::sync_block();
  } else {
    p.out[global_index()] = 2;
    simt::sync_block();
  }
}

// Warp 0 waits at barrier 1 for 64 threads; warp 1 waits at barrier 2.
__global__ void deadlock_kernel(const Small p) {
  simt::sync_named(simt::warp_id() == 0 ? 1 : 2, 64);
  p.out[global_index()] = 0;
}

__global__ void divergent_warp_kernel(const Small p) {
  float v = p.in[global_index()];
  if (simt::lane_id() < 16) {
    v += simt::shuffle_xor(v, 1);
  } else {
    simt::sync_warp();
  }
  p.out[global_index()] = v;
}

__global__ void write_past_end_kernel(const Small p) { p.out[global_index() + 1] = 0; }
__global__ void prefetch_far_kernel(const Small p) {
  p.out[global_index()] = 0;
  simt::prefetch_l2(p.in + (int64_t{1} << 34));
}
__global__ void write_input_kernel(const Small p) { const_cast<float*>(p.in)[global_index()] = p.out[0] = 1; }
__global__ void misaligned_kernel(const Small p) { p.out[global_index()] = simt::load_vec<2>(p.in + simt::thread_x()).v[0]; }
__global__ void hole_kernel(const Small p) {
  if (simt::thread_x() != 5) p.out[global_index()] = 0;
}
__global__ void poison_kernel(const Small p) { p.out[global_index()] = tile()[simt::thread_x()] * 2; }

// Every block adds its number to out[0], without order.
__global__ void block_race_kernel(const Small p) {
  if (simt::thread_x() == 0) p.out[0] = p.in[0] + simt::block_x();
}

// out[i] = in[reversed i] through an asynchronous copy. kWait: how many groups may be pending at the wait, -1: no wait.
template <int kWait, bool kSync>
__global__ void copy_kernel(const Small p) {
  const int i = simt::thread_x(), n = simt::block_dim_x();
  simt::cp_async<4>(tile() + i, p.in + global_index(), 4);
  simt::cp_async_commit();
  if constexpr (kWait >= 0) simt::cp_async_wait<(kWait >= 0 ? kWait : 0)>();
  if (kSync) simt::sync_block();
  p.out[global_index()] = tile()[kSync ? n - 1 - i : i ^ 1];
}
// Reads its own copy, which needs a wait and no barrier.
template <bool kWait>
__global__ void own_copy_kernel(const Small p) {
  const int i = simt::thread_x();
  simt::cp_async<4>(tile() + i, p.in + global_index(), i % 2 ? 4 : 0);
  simt::cp_async_commit();
  if (kWait) simt::cp_async_wait<0>();
  p.out[global_index()] = tile()[i];
}

// Two grids in a row: scratch = 2 in, then out = scratch + 1.
__global__ void first_kernel(const Small p) {
  simt::pdl_launch_dependents();
  p.scratch[global_index()] = 2 * p.in[global_index()];
}
template <bool kWait>
__global__ void second_kernel(const Small p) {
  if (kWait) simt::pdl_wait();
  p.out[global_index()] = p.scratch[global_index()] + 1;
}

// out [16, 8] = A [16, 8] B [8, 8] with A = in, B = in + 128 (rows of k); kSwapped loads A's fragments in the wrong order.
template <bool kSwapped>
__global__ void tf32_kernel(const Small p) {
  const int group = simt::lane_id() / 4, quad = simt::lane_id() % 4;
  const auto a_at = [&](int row, int k) { return simt::to_tf32(p.in[row * 8 + k]); };
  const auto b_at = [&](int k, int column) { return simt::to_tf32(p.in[128 + k * 8 + column]); };
  const uint32_t a[4] = {a_at(group, quad), a_at(group + (kSwapped ? 0 : 8), quad + (kSwapped ? 4 : 0)),
                         a_at(group + (kSwapped ? 8 : 0), quad + (kSwapped ? 0 : 4)), a_at(group + 8, quad + 4)};
  const uint32_t b[2] = {b_at(quad, group), b_at(quad + 4, group)};
  float d[4] = {};
  simt::mma_tf32_m16n8k8(d, a, b);
  for (int i = 0; i < 4; ++i) p.out[(group + i / 2 * 8) * 8 + quad * 2 + i % 2] = d[i];
}

// The same with 16-bit elements, K = 16: A [16, 16] and B^T [8, 16] go through shared memory and ldmatrix.
template <class T>
__global__ void half_kernel(const Small p) {
  auto* a_tile = reinterpret_cast<T*>(simt::dynamic_smem());
  T* b_tile = a_tile + 256;
  for (int i = simt::thread_x(); i < 384; i += 32) a_tile[i] = simt::from_float<T>(p.in[i]);
  simt::sync_warp();
  const int lane = simt::lane_id();
  uint32_t a[4], b[2];
  simt::ldmatrix<false>(a, a_tile + lane % 16 * 16 + lane / 16 * 8);
  simt::ldmatrix<false>(b, b_tile + lane % 8 * 16 + lane / 8 % 2 * 8);
  float d[4] = {};
  if constexpr (std::is_same_v<T, simt::half_t>) {
    simt::mma_f16_m16n8k16(d, a, b);
  } else {
    simt::mma_bf16_m16n8k16(d, a, b);
  }
  for (int i = 0; i < 4; ++i) p.out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// out[i] = the number of the first element of in that is greater than 0, by shuffles and votes.
__global__ void vote_kernel(const Small p) {
  const uint32_t votes = simt::ballot(p.in[simt::thread_x()] > 0);
  const int first = __builtin_ctz(votes);
  p.out[simt::thread_x()] = simt::shuffle(simt::lane_id() == first ? static_cast<float>(first) : -1.0f, first);
}

__global__ void overflow_kernel(const Small p) { p.out[global_index()] = static_cast<float>(p.n + 0x7fffffff); }

// Block 0 writes scratch, the others wait for a flag in scratch[n] and read it. Cooperative.
enum class Flag { kRelease, kRelaxed, kEarly, kNever };
template <Flag kFlag>
__global__ void flag_kernel(const Small p) {
  auto* flag = reinterpret_cast<uint32_t*>(p.scratch + p.n);
  const int i = simt::thread_x(), n = simt::block_dim_x();
  if (simt::block_x() == 0) {
    if (kFlag == Flag::kEarly && i == 0) simt::store_release(flag, 1);
    p.scratch[i] = p.in[i] + 1;
    simt::sync_block();
    if (kFlag == Flag::kRelease && i == 0) simt::store_release(flag, 1);
    if (kFlag == Flag::kRelaxed && i == 0) simt::store_tagged(reinterpret_cast<simt::TaggedWord*>(flag), {1, 1});
  } else {
    if (i == 0) {
      while (simt::load_acquire(flag) != 1) {
      }
    }
    simt::sync_block();
  }
  p.out[global_index()] = p.scratch[n - 1 - i];
}

// Every block takes what the block before it left in tagged words, adds 1 and passes it on. Cooperative.
template <bool kPass>
__global__ void tagged_kernel(const Small p) {
  auto* words = reinterpret_cast<simt::TaggedWord*>(p.scratch);  // [blocks][2 * threads]
  const int block = simt::block_x(), i = 2 * simt::thread_x(), n = 2 * simt::block_dim_x();
  uint32_t value = static_cast<uint32_t>(i);
  if (block > 0) {
    simt::TaggedWord pair[2];
    do {
      simt::load_tagged(pair, words + (block - 1) * n + i);
    } while (pair[0].tag != 7u || pair[1].tag != 7u);
    value = pair[0].value + pair[1].value;
  }
  if (kPass) {
    simt::store_tagged(words + block * n + i, {value, 7});
    simt::store_tagged(words + block * n + i + 1, {1, 7});
  }
  p.out[global_index()] = static_cast<float>(value);
}

// Block 0 writes scratch and pushes to block 1, which reads scratch once the push has come. A push makes known its own bytes
// only; with kBarrier the blocks meet in between.
template <bool kBarrier>
__global__ void push_as_flag_kernel(const Small p) {
  auto* barrier = reinterpret_cast<simt::MBarrier*>(simt::dynamic_smem());
  auto* slot = reinterpret_cast<uint32_t*>(simt::dynamic_smem() + 16);
  const int i = simt::thread_x();
  const bool receives = simt::cluster_rank() == 1;
  if (i == 0) {
    simt::mbarrier_init(barrier);
    if (receives) simt::mbarrier_expect(barrier, 4);
  }
  simt::sync_cluster();
  if (!receives && i == 0) {
    p.scratch[0] = 5;
    const uint32_t value[1] = {7};
    simt::store_async(simt::map_to_rank(slot, 1), value, simt::map_to_rank(barrier, 1));
  }
  if (kBarrier) simt::sync_cluster();
  if (receives) simt::mbarrier_wait(barrier, 0);
  p.out[global_index()] = receives ? p.scratch[0] + static_cast<float>(*slot) : 0;
  simt::sync_cluster();
}

// Two pushes to block 1, counted by barriers of their own; it waits for the second only.
__global__ void push_other_wait_kernel(const Small p) {
  auto* barriers = reinterpret_cast<simt::MBarrier*>(simt::dynamic_smem());
  auto* slots = reinterpret_cast<uint32_t*>(simt::dynamic_smem() + 16);
  const bool receives = simt::cluster_rank() == 1;
  if (simt::thread_x() == 0) {
    for (int k = 0; k < 2; ++k) {
      simt::mbarrier_init(barriers + k);
      if (receives) simt::mbarrier_expect(barriers + k, 4);
    }
  }
  simt::sync_cluster();
  if (!receives && simt::thread_x() == 0) {
    for (int k = 0; k < 2; ++k) {
      const uint32_t value[1] = {7};
      simt::store_async(simt::map_to_rank(slots + k, 1), value, simt::map_to_rank(barriers + k, 1));
    }
  }
  if (receives) simt::mbarrier_wait(barriers + 1, 0);
  p.out[global_index()] = receives ? static_cast<float>(slots[0]) : 0;
  simt::sync_cluster();
}

// Thread 0 waits for the other thread by looking at memory again and again, as if it were a flag.
__global__ void plain_spin_kernel(const Small p) {
  const volatile float* flag = p.scratch;
  if (global_index() == 0) {
    p.scratch[0] = 0;
    while (*flag == 0.0f) {
    }
  }
  p.out[global_index()] = 1;
}

// Warps ask together whether a word has come that nobody sends.
__global__ void warp_spin_kernel(const Small p) {
  const auto* words = reinterpret_cast<const simt::TaggedWord*>(p.scratch);
  simt::TaggedWord pair[2];
  do {
    simt::load_tagged(pair, words);
  } while (simt::ballot(pair[0].tag != 7u));
  p.out[global_index()] = 1;
}

__global__ void wild_kernel(const Small p) { p.out[global_index() + (int64_t{1} << 40)] = 0; }

// Two warps meet at barrier 1, the others at barrier 2: out = in reversed inside each pair of warps.
template <bool kSameBarrier>
__global__ void named_kernel(const Small p) {
  const int pair = simt::thread_x() / 64, i = simt::thread_x();
  tile()[i] = p.in[global_index()];
  simt::sync_named(kSameBarrier ? 1 + simt::warp_id() % 2 : 1 + pair, 64);
  p.out[global_index()] = tile()[pair * 64 + 63 - i % 64];
}

// A block asks for the memory of a peer that has ended.
__global__ void ended_peer_kernel(const Small p) {
  p.out[global_index()] = 0;
  if (simt::cluster_rank() == 0) return;
  const auto* words = reinterpret_cast<const simt::TaggedWord*>(p.scratch);
  simt::TaggedWord pair[2];
  for (int i = 0; i < 100; ++i) simt::load_tagged(pair, words);
  auto* slot = reinterpret_cast<uint32_t*>(simt::dynamic_smem());
  p.out[global_index()] = static_cast<float>(simt::map_to_rank(slot, 0));
}

// Every block of a cluster pushes its rank to all, through two phases of a transaction barrier, and adds up what came.
enum class Push { kRight, kNoWait, kWrongBytes, kNoInitSync, kEnds, kNoSlotSync };
template <Push kPush>
__global__ void push_kernel(const Small p) {
  auto* barrier = reinterpret_cast<simt::MBarrier*>(simt::dynamic_smem());
  auto* slots = reinterpret_cast<uint32_t*>(simt::dynamic_smem() + 16);  // [16]
  const int rank = simt::cluster_rank(), i = simt::thread_x(), size = p.n;
  if (i == 0) simt::mbarrier_init(barrier);
  if (kPush != Push::kNoInitSync) simt::sync_cluster();
  uint32_t sum = 0;
  for (int phase = 0; phase < 2; ++phase) {
    if (i == 0) simt::mbarrier_expect(barrier, 4 * size + (kPush == Push::kWrongBytes ? 4 : 0));
    if (i < size) {
      const uint32_t value[1] = {static_cast<uint32_t>(rank + phase)};
      simt::store_async(simt::map_to_rank(slots + rank, i), value, simt::map_to_rank(barrier, i));
    }
    if (kPush == Push::kEnds && rank == 0) return;
    if (kPush != Push::kNoWait) simt::mbarrier_wait(barrier, phase);
    for (int r = 0; r < size; ++r) sum += slots[r];
    if (kPush != Push::kNoSlotSync) simt::sync_cluster();
  }
  p.out[global_index()] = static_cast<float>(sum);
  simt::sync_cluster();
}

struct Entry {
  const char* name;
  void (*kernel)(Small);
  void (*second)(Small);
  bool cooperative = false;
};
constexpr Entry kEntries[] = {
    {"reverse", reverse_kernel<true, 0>, nullptr},
    {"missing_sync", reverse_kernel<false, 0>, nullptr},
    {"shared_past_end", reverse_kernel<true, 1>, nullptr},
    {"partial_barrier", partial_barrier_kernel, nullptr},
    {"divergent_barrier", divergent_barrier_kernel, nullptr},
    {"deadlock", deadlock_kernel, nullptr},
    {"divergent_warp", divergent_warp_kernel, nullptr},
    {"write_past_end", write_past_end_kernel, nullptr},
    {"prefetch_far", prefetch_far_kernel, nullptr},
    {"write_input", write_input_kernel, nullptr},
    {"misaligned", misaligned_kernel, nullptr},
    {"hole", hole_kernel, nullptr},
    {"poison", poison_kernel, nullptr},
    {"block_race", block_race_kernel, nullptr},
    {"copy", copy_kernel<0, true>, nullptr},
    {"copy_no_wait", copy_kernel<-1, true>, nullptr},
    {"copy_late_wait", copy_kernel<1, true>, nullptr},
    {"copy_no_sync", copy_kernel<0, false>, nullptr},
    {"own_copy", own_copy_kernel<true>, nullptr},
    {"own_copy_no_wait", own_copy_kernel<false>, nullptr},
    {"chain", first_kernel, second_kernel<true>},
    {"chain_no_wait", first_kernel, second_kernel<false>},
    {"tf32", tf32_kernel<false>, nullptr},
    {"tf32_swapped", tf32_kernel<true>, nullptr},
    {"half", half_kernel<simt::half_t>, nullptr},
    {"bfloat16", half_kernel<simt::bfloat16_t>, nullptr},
    {"vote", vote_kernel, nullptr},
    {"overflow", overflow_kernel, nullptr},
    {"flag", flag_kernel<Flag::kRelease>, nullptr, true},
    {"flag_relaxed", flag_kernel<Flag::kRelaxed>, nullptr, true},
    {"flag_early", flag_kernel<Flag::kEarly>, nullptr, true},
    {"flag_never", flag_kernel<Flag::kNever>, nullptr, true},
    {"tagged", tagged_kernel<true>, nullptr, true},
    {"tagged_never", tagged_kernel<false>, nullptr, true},
    {"plain_spin", plain_spin_kernel, nullptr},
    {"warp_spin", warp_spin_kernel, nullptr, true},
    {"wild", wild_kernel, nullptr},
    {"named", named_kernel<false>, nullptr},
    {"named_other_warps", named_kernel<true>, nullptr},
    {"ended_peer", ended_peer_kernel, nullptr},
    {"push", push_kernel<Push::kRight>, nullptr},
    {"push_then_barrier", push_as_flag_kernel<true>, nullptr},
    {"push_as_flag", push_as_flag_kernel<false>, nullptr},
    {"push_other_wait", push_other_wait_kernel, nullptr},
    {"push_no_wait", push_kernel<Push::kNoWait>, nullptr},
    {"push_wrong_bytes", push_kernel<Push::kWrongBytes>, nullptr},
    {"push_no_init_sync", push_kernel<Push::kNoInitSync>, nullptr},
    {"push_block_ends", push_kernel<Push::kEnds>, nullptr},
    {"push_no_slot_sync", push_kernel<Push::kNoSlotSync>, nullptr},
};

}  // namespace
}  // namespace fused_rnn

// shape: blocks, threads, bytes of shared memory, cluster, whether to call prepare.
extern "C" int simt_run_small(const char* name, const int* shape, const float* in, float* out, float* scratch) {
  using namespace fused_rnn;
  return simt_host::run_guarded([&] {
    for (const Entry& e : kEntries) {
      if (std::string(e.name) != name) continue;
      const Small params{in, out, scratch, shape[3] > 1 ? shape[3] : shape[0] * shape[1]};
      simt::LaunchConfig config{name, shape[0], 1, 1, shape[1], shape[2], shape[3], false, e.cooperative};
      if (shape[4]) simt::prepare(e.kernel, name, shape[2]);
      simt::launch(e.kernel, config, nullptr, params);
      config.pdl = true;
      if (e.second) simt::launch(e.second, config, nullptr, params);
      return;
    }
    throw std::runtime_error(std::string("no such kernel: ") + name);
  });
}
