// mma.sync from registers, as the persistent families issue it: persistent_math_rate of csrc/plan/machine.cpp.
//   latency  clocks of one m16n8k16 (TF32: m16n8k8) that waits for the one before it, one warp
//   rate     multiply-adds per clock and SM of 8 warps, each with 4 tiles of 16 rows by N = 8, 16, 32 columns (1, 2, 4 tiles
//            of 8), all of them independent; every SM busy
#include "micro.cuh"

namespace {

using namespace micro;

constexpr int kRowTiles = 4;

struct Mma {
  int iterations;
  float* sink;
  Ticks* ticks;
};

struct F16 {
  static constexpr const char* kName = "fp16";
  static constexpr int kK = 16;
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    simt::mma_f16_m16n8k16(d, a, b);
  }
};
struct Bf16 {
  static constexpr const char* kName = "bf16";
  static constexpr int kK = 16;
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    simt::mma_bf16_m16n8k16(d, a, b);
  }
};
struct Tf32 {
  static constexpr const char* kName = "tf32";
  static constexpr int kK = 8;
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    simt::mma_tf32_m16n8k8(d, a, b);
  }
};

template <class Kind, int kRows, int kColumns>
__global__ void __launch_bounds__(256) mma_kernel(const Mma p) {
  if constexpr (simt::arch() >= 800) {
    float d[kRows][kColumns][4] = {};
    uint32_t a[kRows][4], b[kColumns][2];
    const uint32_t seed = 0x3c003c00u + simt::thread_x();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[r][i] = seed + r + i;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) b[c][0] = b[c][1] = seed + c;
    simt::sync_block();
    const Ticks start = now();
#pragma unroll 1
    for (int i = 0; i < p.iterations; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) Kind::mma(d[r][c], a[r], b[c]);
      }
    }
    simt::sync_block();
    if (simt::block_x() == 0 && simt::thread_x() == 0) store_elapsed(p.ticks, start);
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum += d[r][c][0] + d[r][c][1] + d[r][c][2] + d[r][c][3];
    }
    p.sink[simt::block_x() * 256 + simt::thread_x()] = sum;
  }
}

template <class Kind, int kColumns>
void measure_rate(const Mma& p, int sms) {
  const Ticks t = median_of_launches(p.ticks, [&] {
    simt::launch(mma_kernel<Kind, kRowTiles, kColumns>, {"mma", sms, 1, 1, 256, 0, 1, false, false}, nullptr, p);
  });
  const double macs = 8.0 * kRowTiles * kColumns * p.iterations * 16 * 8 * Kind::kK;
  report("mma_rate", word("math", Kind::kName) + ", " + number("n", 8 * kColumns), macs / t.clocks,
         "multiply-adds per clock and SM", "persistent_math_rate");
}

template <class Kind>
void measure_kind(const Mma& p, int sms) {
  const Ticks t = median_of_launches(
      p.ticks, [&] { simt::launch(mma_kernel<Kind, 1, 1>, {"mma", 1, 1, 1, 32, 0, 1, false, false}, nullptr, p); });
  report("mma_latency", word("math", Kind::kName), double(t.clocks) / p.iterations, "clocks", "");
  measure_rate<Kind, 1>(p, sms);
  measure_rate<Kind, 2>(p, sms);
  measure_rate<Kind, 4>(p, sms);
}

void measure() {
  const int sms = simt::query_device(0).sm_count;
  const Mma p{20000, device_array<float>(size_t(sms) * 256), device_array<Ticks>(1)};
  measure_kind<F16>(p, sms);
  measure_kind<Bf16>(p, sms);
  measure_kind<Tf32>(p, sms);
}

}  // namespace

int main() { return micro::run(80, measure); }
