// The matrix products of family `gemm` where no library is there: by a plain kernel, for this program and the simulator. It
// is right and slow.
//
// A thread makes one element of the result, in the order of k; nothing is shared between threads.
#include <cstring>
#include <launch.cuh>
#include <simt.cuh>

#include "core/ceil_div.h"
#include "cuda/device/fragments.cuh"
#include "cuda/library_product.h"

namespace torch_free {
namespace {

using fused_rnn::cuda::LibraryProduct;
using fused_rnn::cuda::MathKind;
namespace simt = fused_rnn::simt;

constexpr int kThreads = 128;

// A factor as tensor cores take it.
template <MathKind kMath, class Storage>
__device__ __forceinline__ auto factor(Storage stored) {
  if constexpr (kMath == MathKind::kTf32) {
    const uint32_t bits = simt::to_tf32(stored);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  } else {
    return simt::to_float(stored);
  }
}

template <MathKind kMath>
__global__ void __launch_bounds__(kThreads) plain_product_kernel(const LibraryProduct p) {
  using Storage = typename fused_rnn::cuda::StorageOf<kMath>::type;
  using Acc = decltype(simt::to_float(Storage{}));
  const int64_t row = simt::block_y(), column = int64_t{simt::block_x()} * kThreads + simt::thread_x();
  if (column >= p.columns) return;
  const auto* a = static_cast<const Storage*>(p.a) + row * p.a_stride;
  const auto* b = static_cast<const Storage*>(p.b) + (p.b_transposed ? column * p.inner : column);
  const int64_t b_stride = p.b_transposed ? 1 : p.columns;
  Acc sum(0);
  for (int64_t k = 0; k < p.inner; ++k) sum += factor<kMath>(a[k]) * factor<kMath>(b[k * b_stride]);
  static_cast<Acc*>(p.out)[row * p.columns + column] = sum;
}

void plain_product(const LibraryProduct& p, void* stream) {
  simt::LaunchConfig config{"plain_product",
                            static_cast<int>(fused_rnn::ceil_div(p.columns, kThreads)),
                            static_cast<int>(p.rows),
                            1,
                            kThreads,
                            0,
                            1,
                            false,
                            false};
  fused_rnn::cuda::dispatch_math(
      p.math, [&](auto math) { simt::launch(plain_product_kernel<decltype(math)::value>, config, stream, p); });
}

[[maybe_unused]] const bool installed = (fused_rnn::cuda::set_library_product(plain_product), true);

}  // namespace

}  // namespace torch_free
