// The products of the stand-in for cuBLAS on the simulated device, which checks that each access lies inside of a buffer,
// is aligned, and is ordered with those of other kernels.
//
// A thread makes one element of C in double; nothing is shared between threads.
#include <cstring>
#include <launch.cuh>
#include <simt.cuh>
#include <type_traits>

#include "../runtime/capi.h"
#include "core/ceil_div.h"
#include "gemm_ex.h"

namespace {

namespace simt = fused_rnn::simt;
using simt_host::GemmEx;
using simt_host::GemmType;

constexpr int kThreads = 128;

template <class T>
double factor(const void* matrix, int64_t index, bool tf32) {
  const auto value = simt::to_float(static_cast<const T*>(matrix)[index]);
  if constexpr (std::is_same_v<T, float>) {
    if (!tf32) return value;
    const uint32_t bits = simt::to_tf32(value);
    float rounded;
    std::memcpy(&rounded, &bits, sizeof rounded);
    return rounded;
  }
  return value;
}

template <class In, class Out>
void gemm_ex_kernel(const GemmEx p) {
  const int64_t element = int64_t{simt::block_x()} * kThreads + simt::thread_x();
  if (element >= p.m * p.n) return;
  const int64_t i = element % p.m, j = element / p.m;
  double sum = 0;
  for (int64_t l = 0; l < p.k; ++l) {
    sum += factor<In>(p.a, p.a_transposed ? l + i * p.lda : i + l * p.lda, p.tf32) *
           factor<In>(p.b, p.b_transposed ? j + l * p.ldb : l + j * p.ldb, p.tf32);
  }
  Out& to = static_cast<Out*>(p.c)[i + j * p.ldc];
  double result = p.alpha * sum;
  if (p.beta != 0) result += p.beta * double(simt::to_float(to));
  to = simt::from_float<Out>(result);
}

template <class In, class Out>
void launch(const GemmEx& p) {
  const int blocks = static_cast<int>(fused_rnn::ceil_div(p.m * p.n, kThreads));
  const simt::LaunchConfig config{"cublas", blocks, 1, 1, kThreads, 0, 1, false, false};
  simt::launch(gemm_ex_kernel<In, Out>, config, nullptr, p);
}

template <class In>
void launch_of(const GemmEx& p) {
  switch (p.result) {
    case GemmType::kFp64: return launch<In, double>(p);
    case GemmType::kFp32: return launch<In, float>(p);
    case GemmType::kFp16: return launch<In, simt::half_t>(p);
    case GemmType::kBf16: return launch<In, simt::bfloat16_t>(p);
  }
}

}  // namespace

// Behind the launches of the host code that runs now.
extern "C" void simt_gemm_ex(const GemmEx* p) {
  if (p->m == 0 || p->n == 0) return;
  switch (p->inputs) {
    case GemmType::kFp64: return launch_of<double>(*p);
    case GemmType::kFp32: return launch_of<float>(*p);
    case GemmType::kFp16: return launch_of<simt::half_t>(*p);
    case GemmType::kBf16: return launch_of<simt::bfloat16_t>(*p);
  }
}
// Alone.
extern "C" int simt_gemm_ex_alone(const GemmEx* p) {
  return simt_host::run_guarded([&] { simt_gemm_ex(p); });
}
