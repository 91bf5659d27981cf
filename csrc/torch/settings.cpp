#include "torch/settings.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/cpu.h"
#include "cpu/gemm/weight_cache.h"

namespace fused_rnn {
namespace {

// One word each, so that a call beside set_setting sees the old value or the new one.
constexpr int kByItself = -1, kCheapest = -2;
std::atomic<int> family{kByItself};  // or a Family
std::atomic<int> chunks{kByItself};

// The whole of the text as a number from 0 to `most`.
std::optional<int64_t> parse_number(const std::string& text, int64_t most) {
  char* end = nullptr;
  const long long number = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end || number < 0 || number > most) return std::nullopt;
  return number;
}

void set_family(const std::string& value) {
  if (value.empty()) {
    family = kByItself;
    return;
  }
  try {
    const FamilyChoice choice = parse_choice(value);
    family = choice.cheapest ? kCheapest : static_cast<int>(*choice.forced);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("FUSED_RNN_PLAN: ") + error.what());
  }
}

void set_chunks(const std::string& value) {
  const std::optional<int64_t> number = parse_number(value, 1024);
  if (!value.empty() && !number) throw std::invalid_argument("FUSED_RNN_OVERLAP: expected 0 to 1024, got '" + value + "'");
  chunks = number ? static_cast<int>(*number) : kByItself;
}

void set_weight_cache(const std::string& value) {
  const std::optional<int64_t> mebibytes = parse_number(value, int64_t{1} << 40);
  if (!value.empty() && !mebibytes) {
    throw std::invalid_argument("FUSED_RNN_WEIGHT_CACHE=" + value +
                                ": expected a number of MiB (0: packed weights are not kept from call to call)");
  }
  cpu::set_weight_cache_limit(mebibytes ? *mebibytes << 20 : cpu::kDefaultWeightCacheLimit);
}

}  // namespace

void set_setting(const std::string& name, const std::string& value) {
  if (name == "FUSED_RNN_CPU") return cpu::set_instruction_set(value);
  if (name == "FUSED_RNN_WEIGHT_CACHE") return set_weight_cache(value);
  if (name == "FUSED_RNN_PLAN") return set_family(value);
  if (name == "FUSED_RNN_OVERLAP") return set_chunks(value);
  throw std::invalid_argument("unknown setting " + name);
}

FamilyChoice family_setting() {
  const int setting = family;
  if (setting == kByItself) return {};
  if (setting == kCheapest) return {std::nullopt, true};
  return {static_cast<Family>(setting), false};
}

std::optional<int> chunk_setting() {
  const int setting = chunks;
  return setting == kByItself ? std::nullopt : std::optional<int>(setting);
}

}  // namespace fused_rnn
