// The choice of the instruction set, in place of csrc/cpu/instruction_set.cpp. Sets that were not linked in are not there.
#include <stdexcept>

#include "harness.h"

namespace fused_rnn::cpu {

[[gnu::weak]] const InstructionSet* amx_kernels();
[[gnu::weak]] const InstructionSet* avx512_bf16_kernels();
[[gnu::weak]] const InstructionSet* avx512_kernels();
[[gnu::weak]] const InstructionSet* avx2_kernels();
const InstructionSet* parts_kernels();

namespace {

using Get = const InstructionSet* (*)();
const InstructionSet* selected = nullptr;

std::vector<const InstructionSet*> linked() {
  std::vector<const InstructionSet*> result;
  for (const Get get :
       {&amx_kernels, &avx512_bf16_kernels, &avx512_kernels, &avx2_kernels, &parts_kernels, &portable_kernels}) {
    const InstructionSet* set = get ? get() : nullptr;
    if (set) result.push_back(set);
  }
  return result;
}

}  // namespace

const InstructionSet& selected_kernels() { return selected ? *selected : *portable_kernels(); }
const char* instruction_set() { return selected_kernels().name; }
std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : linked()) names.push_back(set->name);
  return names;
}

}  // namespace fused_rnn::cpu

namespace harness {

std::vector<std::string> sets() { return fused_rnn::cpu::available_instruction_sets(); }
void select_set(const std::string& name) {
  for (const auto* set : fused_rnn::cpu::linked()) {
    if (name == set->name) {
      fused_rnn::cpu::selected = set;
      return;
    }
  }
  throw std::invalid_argument("instruction set " + name + ": not linked in, or this machine lacks it");
}

}  // namespace harness
