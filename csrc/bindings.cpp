// Python's view of what was built. The ops themselves are reached through torch.ops.fused_rnn.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/cpu.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
#ifdef FUSED_RNN_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cpu_instruction_set"] = fused_rnn::cpu::instruction_set();
  info["cpu_instruction_sets"] = fused_rnn::cpu::available_instruction_sets();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info,
        "cuda: whether CUDA kernels were built; cpu_instruction_set: the one in use; cpu_instruction_sets: those that this "
        "machine can run.");
}
