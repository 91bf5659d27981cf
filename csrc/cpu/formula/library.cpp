// Loading of compiled formulas.
#include <dlfcn.h>

#include <stdexcept>

#include "cpu/formula/formula.h"

namespace fused_rnn::cpu {

const FormulaLibrary* load_formula(const std::string& path) {
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error(std::string("the formula's library could not be loaded: ") + dlerror());
  using Make = const FormulaLibrary* (*)();
  const auto make = reinterpret_cast<Make>(dlsym(handle, "fused_rnn_formula"));
  const FormulaLibrary* const library = make ? make() : nullptr;
  if (!library || library->version != kFormulaVersion) {
    dlclose(handle);
    throw std::runtime_error("the formula's library " + path + " was not made for this version of fused_rnn");
  }
  return library;
}

}  // namespace fused_rnn::cpu
