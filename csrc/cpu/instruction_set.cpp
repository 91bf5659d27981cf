// The choice of the instruction set.
#include <atomic>
#include <stdexcept>
#include <utility>

#include "cpu/cpu.h"
#include "cpu/isa/kernels.h"

namespace fused_rnn::cpu {
namespace {

struct Candidate {
  const char* name;
  const InstructionSet* (*kernels)();
};
std::vector<Candidate> candidates() {
  std::vector<Candidate> all{{"amx", amx_kernels},
                             {"avx512_bf16", avx512_bf16_kernels},
                             {"avx512", avx512_kernels},
                             {"avx2", avx2_kernels},
                             {"portable", portable_kernels}};
  if (!avx512_bf16_is_fast()) std::swap(all[1], all[2]);
  return all;
}

const InstructionSet* best_kernels() {
  for (const Candidate& c : candidates()) {
    if (const InstructionSet* kernels = c.kernels()) return kernels;
  }
  return portable_kernels();
}

// The instruction set that was set; null: the best.
std::atomic<const InstructionSet*> forced{nullptr};

}  // namespace

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) {
    if (c.kernels()) names.push_back(c.name);
  }
  return names;
}

const InstructionSet& selected_kernels() {
  static const InstructionSet* const best = best_kernels();
  const InstructionSet* const kernels = forced.load(std::memory_order_relaxed);
  return kernels ? *kernels : *best;
}

void set_instruction_set(const std::string& name) {
  if (name.empty()) {
    forced = nullptr;
    return;
  }
  for (const Candidate& c : candidates()) {
    if (name == c.name && c.kernels()) {
      forced = c.kernels();
      return;
    }
  }
  std::string message = "FUSED_RNN_CPU=" + name + ": expected one of the instruction sets available here:";
  for (const std::string& available : available_instruction_sets()) message += " " + available;
  throw std::invalid_argument(message);
}

const char* instruction_set() { return selected_kernels().name; }

}  // namespace fused_rnn::cpu
