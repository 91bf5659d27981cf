// In place of csrc/cuda/formula/driver.cpp: the kernels of one formula lie in the simulator's library
// (tests/simt/kernels/formula_capi.h), and a launch is over when it returns.
#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>

#include "cuda/device/refused.h"
#include "cuda/formula/driver.h"

namespace fused_rnn::cuda {
namespace {

template <class F>
F* simulator(const char* name) {
  static void* const library = dlopen(std::getenv("FUSED_RNN_SIMT_LIBRARY"), RTLD_NOW);
  void* const function = library ? dlsym(library, name) : nullptr;
  if (!function) throw std::runtime_error(dlerror());
  return reinterpret_cast<F*>(function);
}

int launches = 0;
bool takes_cooperative = true;

}  // namespace

FormulaLauncher FormulaModule::launcher(int, void*) {
  return [](const FormulaLaunch& launch, const void* arguments, size_t bytes) {
    if (launch.cooperative && !takes_cooperative) throw LaunchRefused("too many blocks in cooperative launch");
    ++launches;
    const auto run = simulator<int(const FormulaLaunch*, const void*, size_t)>("simt_formula_launch");
    if (run(&launch, arguments, bytes) == 0) return;
    const auto text = [](const char* name) { return std::string(simulator<const char*()>(name)()); };
    throw std::runtime_error(text("simt_kind") + ": " + text("simt_message"));
  };
}

}  // namespace fused_rnn::cuda

// How many kernels of formulas have been launched.
extern "C" __attribute__((visibility("default"))) int torch_host_formula_launches() { return fused_rnn::cuda::launches; }
// Whether the device takes their cooperative launches.
extern "C" __attribute__((visibility("default"))) void torch_host_formula_cooperative(bool takes) {
  fused_rnn::cuda::takes_cooperative = takes;
}
