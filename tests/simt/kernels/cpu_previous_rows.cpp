// The CPU's previous_rows, for test_previous_rows.py.
#include "cpu/scan/previous.h"

extern "C" void cpu_previous_rows(const fused_rnn::PreviousParams* params) { fused_rnn::cpu::previous_rows(*params); }
