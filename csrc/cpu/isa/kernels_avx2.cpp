// The AVX2+FMA kernels. Everything between the pragmas is compiled for that instruction set, so only templates over its
// vector types may be instantiated there. Any other function could become the program's one copy of a function that other
// files use too, and would then stop a machine without the instructions.
#include "cpu/isa/kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "cpu/isa/vec_avx2.h"
// After the vectors: its templates find their functions where they are defined.
#include "cpu/isa/kernel_table.h"

namespace fused_rnn::cpu::avx2 {
Kernels<float> make_f32() { return make_kernels<VecF>(); }
Kernels<double> make_f64() { return make_kernels<VecD>(); }
}  // namespace fused_rnn::cpu::avx2
#pragma GCC pop_options

namespace fused_rnn::cpu {
namespace {
bool available() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
}  // namespace

const InstructionSet* avx2_kernels() {
  if (!available()) return nullptr;
  static const Kernels<float> f32 = avx2::make_f32();
  static const Kernels<double> f64 = avx2::make_f64();
  static const InstructionSet set{"avx2", f32, f64};
  return &set;
}
}  // namespace fused_rnn::cpu
#else
namespace fused_rnn::cpu {
const InstructionSet* avx2_kernels() { return nullptr; }
}  // namespace fused_rnn::cpu
#endif
