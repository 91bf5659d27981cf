// Every primitive of csrc/cuda/device/simt.cuh in little kernels, whose results depend on all that it promises. They are
// compiled twice: with the host twins of the primitives, and by nvcc, whose PTX is translated (../ptx). Both must give the
// same bits.
#include <launch.cuh>
#include <simt.cuh>
#include <stdexcept>
#include <string>

#include "../runtime/capi.h"

namespace fused_rnn {
namespace {

struct Primitive {
  const uint32_t* in;  // 4096 words
  uint32_t* out;       // 4096 words
  uint32_t* scratch;   // 1024 words, zeros
};

__device__ __forceinline__ uint32_t* shared_words() { return reinterpret_cast<uint32_t*>(simt::dynamic_smem()); }

// Conversions of a word taken as a float, and of its lower half taken as a number of 16 bits.
__global__ void convert_kernel(const Primitive p) {
  const int i = simt::block_x() * simt::block_dim_x() + simt::thread_x();
  simt::prefetch_l2(p.in + i);
  const float value = simt::bits_float(p.in[i]);
  const auto low = static_cast<uint16_t>(p.in[i]);
  uint32_t* out = p.out + 8 * i;
  out[0] = simt::from_float<simt::half_t>(value).bits;
  out[1] = simt::from_float<simt::bfloat16_t>(value).bits;
  out[2] = simt::to_tf32(value);
  out[3] = simt::float_bits(simt::to_float(simt::half_t{low}));
  out[4] = simt::float_bits(simt::to_float(simt::bfloat16_t{low}));
  out[5] = simt::float_bits(simt::exp2(value));
  out[6] = simt::float_bits(simt::reciprocal(value));
  out[7] = static_cast<uint32_t>(simt::opaque(i));
}

// Loads and stores of every size, made where a bit of the thread's number is set.
__global__ void conditional_kernel(const Primitive p) {
  using Two = simt::Vec<uint32_t, 2>;
  const int i = simt::block_x() * simt::block_dim_x() + simt::thread_x();
  const uint32_t* const in = p.in + 2 * i;
  uint32_t* const out = p.out + 8 * i;
  simt::prefetch_l2_if(i & 1, in);
  out[0] = simt::load_if(i & 1, reinterpret_cast<const unsigned char*>(in) + 1, static_cast<unsigned char>(7));
  out[1] = simt::load_if(i & 2, reinterpret_cast<const simt::half_t*>(in) + 1, simt::half_t{3}).bits;
  out[2] = simt::load_if(i & 4, in + 1, 5u);
  const Two two = simt::load_if(i & 8, reinterpret_cast<const Two*>(in), Two{{11, 13}});
  out[3] = two.v[0];
  out[4] = two.v[1];
  simt::store_if((i & 16) != 0, out + 5, in[0]);
  simt::store_if((i & 32) != 0, reinterpret_cast<Two*>(out + 6), Two{{in[1], in[0]}});
  if (!(i & 16)) out[5] = 17;
  if (!(i & 32)) out[6] = out[7] = 19;
}

// Three groups of copies of 16, 8 and 4 bytes, whole, in part and not at all; each group is read once it has been awaited.
// The word behind them stays as it is.
__global__ void copy_kernel(const Primitive p) {
  const int thread = simt::thread_x();
  unsigned char* const mine = simt::dynamic_smem() + 96 * thread;
  const unsigned char* const from = reinterpret_cast<const unsigned char*>(p.in + 32 * thread);
#pragma unroll
  for (int group = 0; group < 3; ++group) {
    shared_words()[24 * thread + 8 * group + 7] = p.in[thread];
    simt::cp_async<16>(mine + 32 * group, from + 32 * group, group == 0 ? 16 : group == 1 ? 10 : 0);
    simt::cp_async<8>(mine + 32 * group + 16, from + 32 * group + 16, group == 0 ? 5 : group == 1 ? 0 : 8);
    simt::cp_async<4>(mine + 32 * group + 24, from + 32 * group + 24, group == 0 ? 0 : group == 1 ? 4 : 3);
    simt::cp_async_commit();
  }
  const auto store = [&](int group) {
    for (int word = 8 * group; word < 8 * group + 8; ++word) {
      p.out[24 * thread + word] = shared_words()[24 * thread + word];
    }
  };
  simt::cp_async_wait<2>();
  store(0);
  simt::cp_async_wait<1>();
  store(1);
  simt::cp_async_wait<0>();
  store(2);
}

// Fragments of matrices in shared memory, and products; one warp.
__global__ void matrix_kernel(const Primitive p) {
  const int lane = simt::lane_id();
  for (int word = 0; word < 4; ++word) shared_words()[4 * lane + word] = p.in[4 * lane + word];
  simt::sync_warp();
  const void* const row = shared_words() + 4 * lane;
  uint32_t* out = p.out + 64 * lane;
  const auto store = [&](const auto& words) {
    for (const auto word : words) *out++ = word;
  };
  uint32_t one[1], two[2], four[4];
  simt::ldmatrix<false>(one, row);
  store(one);
  simt::ldmatrix<true>(one, row);
  store(one);
  simt::ldmatrix<false>(two, row);
  store(two);
  simt::ldmatrix<true>(two, row);
  store(two);
  simt::ldmatrix<false>(four, row);
  store(four);
  simt::ldmatrix<true>(four, row);
  store(four);
  float d[4][4];
  uint32_t a[4], b[2];
  for (int i = 0; i < 16; ++i) d[i / 4][i % 4] = static_cast<float>(i + lane);
  for (int i = 0; i < 4; ++i) a[i] = p.in[256 + 4 * lane + i];
  for (int i = 0; i < 2; ++i) b[i] = p.in[512 + 2 * lane + i];
  simt::mma_f16_m16n8k8(d[0], {a[0], a[1]}, {b[0]});
  if constexpr (simt::arch() >= 800) {
    simt::mma_f16_m16n8k16(d[1], a, b);
    simt::mma_bf16_m16n8k16(d[2], a, b);
    simt::mma_tf32_m16n8k8(d[3], a, b);
  }
  for (const auto& tile : d) {
    for (const float value : tile) *out++ = simt::float_bits(value);
  }
}

// Two pairs of warps meet apart, then all threads, with a question.
__global__ void barrier_kernel(const Primitive p) {
  const int thread = simt::thread_x(), half = thread / 64;
  shared_words()[thread] = p.in[thread];
  simt::sync_named(1 + half, 64);
  p.out[thread] = shared_words()[thread ^ 33];
  const bool any = simt::sync_block_or(thread == 77);
  p.out[128 + thread] = any ? shared_words()[127 - thread] : 0;
  p.out[256 + thread] =
      simt::ballot((p.in[thread] & 1) != 0) ^ simt::shuffle(p.in[thread], 5) ^ simt::shuffle_xor(p.in[thread], 16);
}

constexpr uint32_t kRaised = 0x12345678;

// Block 0 hands words over to block 1: behind a flag, and as tagged words.
__global__ void hand_over_kernel(const Primitive p) {
  const int thread = simt::thread_x();
  auto* const tagged = reinterpret_cast<simt::TaggedWord*>(p.scratch + 128);
  if (simt::block_x() == 0) {
    p.scratch[64 + thread] = p.in[thread];
    simt::sync_block();
    if (thread == 0) simt::store_release(p.scratch, kRaised);
    simt::store_tagged(tagged + thread, {p.in[64 + thread], kRaised});
    return;
  }
  while (simt::load_acquire(p.scratch) != kRaised) {
  }
  p.out[thread] = p.scratch[64 + 31 - thread];
  simt::TaggedWord words[2];
  do {
    simt::load_tagged(words, tagged + thread / 2 * 2);
  } while (words[0].tag != kRaised || words[1].tag != kRaised);
  p.out[32 + thread] = words[0].value;
  p.out[64 + thread] = words[1].value;
}

// Each block of a cluster pushes into the next one, in pieces of 16, 8 and 4 bytes; then its threads meet at an mbarrier,
// twice.
__global__ void cluster_kernel(const Primitive p) {
  if constexpr (simt::arch() >= 900) {
    const int lane = simt::thread_x(), rank = simt::cluster_rank(), next = (rank + 1) % 4;
    auto* const pushed = reinterpret_cast<simt::MBarrier*>(simt::dynamic_smem());
    simt::MBarrier* const met = pushed + 1;
    uint32_t* const words = shared_words() + 16;
    uint32_t* const own = words + 8 * 32;
    uint32_t* const out = p.out + 512 * rank + 16 * lane;
    if (lane == 0) {
      simt::mbarrier_init(pushed);
      simt::mbarrier_init(met, 32);
    }
    simt::sync_cluster();
    if (lane == 0) simt::mbarrier_expect(pushed, 32 * 28);
    const simt::ClusterAddress to = simt::map_to_rank(words + 8 * lane, next), barrier = simt::map_to_rank(pushed, next);
    uint32_t four[4], two[2], one[1];
    for (int i = 0; i < 4; ++i) four[i] = p.in[256 * rank + 8 * lane + i];
    for (int i = 0; i < 2; ++i) two[i] = p.in[256 * rank + 8 * lane + 4 + i];
    one[0] = p.in[256 * rank + 8 * lane + 6];
    simt::store_async(to, four, barrier);
    simt::store_async(to + 16, two, barrier);
    simt::store_async(to + 24, one, barrier);
    simt::mbarrier_wait(pushed, 0);
    for (int i = 0; i < 7; ++i) out[i] = words[8 * (31 - lane) + i];
    own[lane] = p.in[lane] + static_cast<uint32_t>(rank);
    simt::mbarrier_arrive(met);
    simt::mbarrier_wait(met, 0);
    out[7] = own[31 - lane];
    simt::mbarrier_arrive(met);
    simt::mbarrier_wait(met, 1);
    own[lane] = static_cast<uint32_t>(lane);
    simt::mbarrier_arrive(met);
    simt::mbarrier_wait(met, 0);
    out[8] = own[lane ^ 1];
    out[9] = static_cast<uint32_t>(rank);
    simt::sync_cluster();
  }
}

// A grid that may start before the one whose words it reads has ended.
__global__ void before_kernel(const Primitive p) {
  simt::pdl_launch_dependents();
  p.scratch[simt::thread_x()] = p.in[simt::thread_x()];
}
__global__ void after_kernel(const Primitive p) {
  simt::pdl_wait();
  p.out[simt::thread_x()] = p.scratch[63 - simt::thread_x()];
}

struct Entry {
  void (*kernel)(Primitive);
  simt::LaunchConfig config;
  void (*second)(Primitive);
};
const Entry kEntries[] = {
    {convert_kernel, {"convert", 8, 1, 1, 64, 0, 1, false, false}, nullptr},
    {conditional_kernel, {"conditional", 8, 1, 1, 64, 0, 1, false, false}, nullptr},
    {copy_kernel, {"copy", 1, 1, 1, 64, 96 * 64, 1, false, false}, nullptr},
    {matrix_kernel, {"matrix", 1, 1, 1, 32, 512, 1, false, false}, nullptr},
    {barrier_kernel, {"barrier", 1, 1, 1, 128, 512, 1, false, false}, nullptr},
    {hand_over_kernel, {"hand_over", 2, 1, 1, 32, 0, 1, false, true}, nullptr},
    {cluster_kernel, {"cluster", 4, 1, 1, 32, 64 + 9 * 128, 4, false, false}, nullptr},
    {before_kernel, {"dependent", 1, 1, 1, 64, 0, 1, false, false}, after_kernel},
};

}  // namespace
}  // namespace fused_rnn

extern "C" int simt_run_primitive(const char* name, const uint32_t* in, uint32_t* out, uint32_t* scratch) {
  using namespace fused_rnn;
  return simt_host::run_guarded([&] {
    for (const Entry& e : kEntries) {
      if (std::string(e.config.name) != name) continue;
      const Primitive params{in, out, scratch};
      simt::launch(e.kernel, e.config, nullptr, params);
      simt::LaunchConfig config = e.config;
      config.pdl = simt::arch() != 750;
      if (e.second) simt::launch(e.second, config, nullptr, params);
      return;
    }
    throw std::runtime_error(std::string("no such primitive: ") + name);
  });
}
