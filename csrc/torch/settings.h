// Settings that the environment chooses (README has the table). fused_rnn/_settings.py reads the variables once, when the
// package is imported, and hands them over by set_setting. Calls read the values kept here: they run without Python's lock,
// where getenv reads freed memory while another thread sets a variable.
#pragma once
#include <optional>
#include <string>

#include "plan/plan.h"

namespace fused_rnn {

// FUSED_RNN_CPU, FUSED_RNN_WEIGHT_CACHE, FUSED_RNN_PLAN or FUSED_RNN_OVERLAP; an empty value is the default. Throws
// std::invalid_argument, with the setting as it was, for a value or a name that is none.
void set_setting(const std::string& name, const std::string& value);

FamilyChoice family_setting();       // FUSED_RNN_PLAN
std::optional<int> chunk_setting();  // FUSED_RNN_OVERLAP: the number of chunks; 0 and 1: none

}  // namespace fused_rnn
