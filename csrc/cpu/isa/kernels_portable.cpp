// The kernels for any machine.
#include "cpu/isa/kernel_table.h"
#include "cpu/isa/vec_portable.h"

namespace fused_rnn::cpu {

const InstructionSet* portable_kernels() {
  static const Kernels<float> f32 = make_kernels<portable::VecF>();
  static const Kernels<double> f64 = make_kernels<portable::VecD>();
  static const InstructionSet set{"portable", f32, f64};
  return &set;
}

}  // namespace fused_rnn::cpu
