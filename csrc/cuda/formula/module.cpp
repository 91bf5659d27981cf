// Files of compiled formulas.
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "cuda/formula/driver.h"

namespace fused_rnn::cuda {

constexpr int kFileVersion = 5;  // set anew with the first line of a file, or with formula_params.h

FormulaModule::FormulaModule(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string line;
  if (!std::getline(file, line)) throw std::runtime_error("the formula's kernels could not be read from " + path);
  std::ostringstream rest;
  rest << file.rdbuf();
  code_ = rest.str();
  try {
    parse(line);
  } catch (const std::invalid_argument&) {
    throw std::runtime_error("the formula's kernels " + path + " were not made for this version of fused_rnn");
  }
}

void FormulaModule::parse(const std::string& line) {
  std::istringstream in(line);
  const auto next = [&in] {
    int value = 0;
    if (!(in >> value)) throw std::invalid_argument("an integer is missing");
    return value;
  };
  const auto up_to = [&next](int most) {
    const int value = next();
    if (value < 0 || value > most) throw std::invalid_argument("a number is out of range");
    return value;
  };
  if (next() != kFileVersion) throw std::invalid_argument("another version");
  dtype_ = static_cast<DType>(up_to(static_cast<int>(DType::kBFloat16)));
  capability_ = next();
  traits_ = {};
  traits_.states = up_to(kMostFormulaStates);
  traits_.output = up_to(traits_.states - 1);
  traits_.recurrent = up_to(traits_.states - 1);
  traits_.input_gates = next();
  traits_.recurrent_gates = next();
  traits_.gradients = next();
  traits_.saved = next();
  traits_.parameters = next();
  traits_.phases = up_to(kMostFormulaPhases);
  for (int g = 0; g < traits_.input_gates; ++g) input_gradients_.push_back(next());
  for (int s = 0; s < traits_.states; ++s) reads_series_.push_back(static_cast<char>(up_to(1)));
  for (int k = 0; k < traits_.phases; ++k) phase_kinds_.push_back(up_to(static_cast<int>(FormulaPhase::kRmsNorm)));
  for (std::vector<int>* levels : {&forward_levels_, &backward_levels_}) {
    for (int k = 0; k < traits_.phases; ++k) levels->push_back(up_to(traits_.phases - 1));
  }
  traits_.input_gradients = input_gradients_.data();
  traits_.reads_series = reinterpret_cast<const bool*>(reads_series_.data());
  traits_.phase_kinds = phase_kinds_.data();
  traits_.forward_levels = forward_levels_.data();
  traits_.backward_levels = backward_levels_.data();
  const char* const roles[] = {"forward",          "backward",     "initial",       "cluster_forward",
                               "cluster_backward", "grid_forward", "grid_backward", "single_forward"};
  const char* const tiles[] = {"kSmall", "kMedium"};
  for (int left = next(); left > 0; --left) {
    const int role = up_to(7), segment = up_to(kMostFormulaPhases), tile = up_to(1);
    kernels_.push_back({static_cast<FormulaRole>(role), segment, static_cast<TileSize>(tile),
                        std::string(roles[role]) + "_" + std::to_string(segment) + "_" + tiles[tile]});
  }
}

FamilyChoice FormulaModule::choice(FamilyChoice setting, int device, int& ranks) const {
  ranks = 0;
  const unsigned refused = refused_.at(device < 0 ? 0 : device);
  setting.refused |= refused;
  for (Family family : kFamilies) {
    const Serves state = serves_.at(static_cast<int>(family));
    if (state == Serves::kForced) {
      ranks = ranks_;
      return FamilyChoice{family, /*cheapest=*/false, refused};
    }
    if (state == Serves::kUnverified) setting.unverified |= 1u << static_cast<int>(family);
  }
  return setting;
}

}  // namespace fused_rnn::cuda
