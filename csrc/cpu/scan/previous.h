// The h before every step, which the gradient of the recurrent weights multiplies d_gates with.
#pragma once
#include "core/previous.h"

namespace fused_rnn::cpu {

// Writes every row's h before its step to p.out, by several threads where that pays.
void previous_rows(const PreviousParams& p);

}  // namespace fused_rnn::cpu
