// The kinds of arithmetic that CUDA kernels are compiled for.
#pragma once
#ifndef __CUDACC_RTC__  // which compiles kernels alone
#include <stdexcept>
#include <type_traits>
#endif

#include "core/params.h"

namespace fused_rnn::cuda {

// Every kind, once.
//   X(kind, name, storage_bytes, accumulator_bytes, tensor_cores)
//   storage_bytes      of an element in memory
//   accumulator_bytes  of a sum, and of the running c
//   tensor_cores       whether the products are made by mma.sync (bf16 below sm_80: by plain multiply-adds)
#define FUSED_RNN_MATHS(X)      \
  X(kFp64, "fp64", 8, 8, false) \
  X(kFp32, "fp32", 4, 4, false) \
  X(kTf32, "tf32", 4, 4, true)  \
  X(kFp16, "fp16", 2, 4, true)  \
  X(kBf16, "bf16", 2, 4, true)

enum class MathKind : int {
#define FUSED_RNN_MATH(kind, ...) kind,
  FUSED_RNN_MATHS(FUSED_RNN_MATH)
#undef FUSED_RNN_MATH
};

struct MathTraits {
  const char* name;
  int storage_bytes, accumulator_bytes;
  bool tensor_cores;
};

constexpr FUSED_RNN_HD MathTraits traits_of(MathKind math) {
  switch (math) {
#define FUSED_RNN_MATH(kind, ...) \
  case MathKind::kind: return {__VA_ARGS__};
    FUSED_RNN_MATHS(FUSED_RNN_MATH)
#undef FUSED_RNN_MATH
  }
  return {};
}

constexpr const char* to_string(MathKind math) { return traits_of(math).name; }
constexpr FUSED_RNN_HD int storage_bytes(MathKind math) { return traits_of(math).storage_bytes; }
constexpr FUSED_RNN_HD int accumulator_bytes(MathKind math) { return traits_of(math).accumulator_bytes; }

// The arithmetic of a layer.
constexpr MathKind math_kind(DType dtype, bool allow_tf32) {
  switch (dtype) {
    case DType::kFloat64: return MathKind::kFp64;
    case DType::kFloat32: return allow_tf32 ? MathKind::kTf32 : MathKind::kFp32;
    case DType::kFloat16: return MathKind::kFp16;
    case DType::kBFloat16: return MathKind::kBf16;
  }
  return MathKind::kFp64;
}

#ifndef __CUDACC_RTC__
// Calls f with a std::integral_constant whose value is `math`.
template <class F>
auto dispatch_math(MathKind math, F&& f) {
  switch (math) {
#define FUSED_RNN_MATH(kind, ...) \
  case MathKind::kind: return f(std::integral_constant<MathKind, MathKind::kind>{});
    FUSED_RNN_MATHS(FUSED_RNN_MATH)
#undef FUSED_RNN_MATH
  }
  throw std::invalid_argument("unknown kind of arithmetic");
}
#endif

}  // namespace fused_rnn::cuda
