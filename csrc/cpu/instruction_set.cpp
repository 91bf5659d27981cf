// The choice of the instruction set.
#include <cstdlib>
#include <stdexcept>
#include <utility>

#include "cpu.h"
#include "kernels.h"

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

}  // namespace

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) {
    if (c.kernels()) names.push_back(c.name);
  }
  return names;
}

const InstructionSet& selected_kernels() {
  const char* forced = std::getenv("FUSED_RNN_CPU");
  static const InstructionSet* const best = [] {
    for (const Candidate& c : candidates()) {
      if (const InstructionSet* kernels = c.kernels()) return kernels;
    }
    return portable_kernels();
  }();
  if (!forced || !*forced) return *best;
  for (const Candidate& c : candidates()) {
    if (std::string(forced) == c.name && c.kernels()) return *c.kernels();
  }
  std::string message = std::string("FUSED_RNN_CPU=") + forced + ": expected one of the instruction sets available here:";
  for (const std::string& name : available_instruction_sets()) message += " " + name;
  throw std::invalid_argument(message);
}

const char* instruction_set() { return selected_kernels().name; }

}  // namespace fused_rnn::cpu
