// What generated cells (fused_rnn/formula/writer.py) use beside cells.h: operations of one value of a float or a double. A
// SIMD vector that has functions of these names, found by argument-dependent lookup, serves them too; its comparisons give
// masks, which select takes. NaN goes through all of them, as in torch.
#pragma once
#include "core/cells.h"

namespace fused_rnn::math {

FUSED_RNN_HD float exp(float x) { return ::expf(x); }
FUSED_RNN_HD double exp(double x) { return ::exp(x); }
FUSED_RNN_HD float expm1(float x) { return ::expm1f(x); }
FUSED_RNN_HD double expm1(double x) { return ::expm1(x); }
FUSED_RNN_HD float log(float x) { return ::logf(x); }
FUSED_RNN_HD double log(double x) { return ::log(x); }
FUSED_RNN_HD float log1p(float x) { return ::log1pf(x); }
FUSED_RNN_HD double log1p(double x) { return ::log1p(x); }
FUSED_RNN_HD float sqrt(float x) { return ::sqrtf(x); }
FUSED_RNN_HD double sqrt(double x) { return ::sqrt(x); }
FUSED_RNN_HD float abs(float x) { return ::fabsf(x); }
FUSED_RNN_HD double abs(double x) { return ::fabs(x); }
FUSED_RNN_HD float erf(float x) { return ::erff(x); }
FUSED_RNN_HD double erf(double x) { return ::erf(x); }
FUSED_RNN_HD float sin(float x) { return ::sinf(x); }
FUSED_RNN_HD double sin(double x) { return ::sin(x); }
FUSED_RNN_HD float cos(float x) { return ::cosf(x); }
FUSED_RNN_HD double cos(double x) { return ::cos(x); }

FUSED_RNN_HD float minimum(float a, float b) { return a < b || a != a ? a : b; }
FUSED_RNN_HD double minimum(double a, double b) { return a < b || a != a ? a : b; }
FUSED_RNN_HD float maximum(float a, float b) { return a > b || a != a ? a : b; }
FUSED_RNN_HD double maximum(double a, double b) { return a > b || a != a ? a : b; }

FUSED_RNN_HD float select(bool condition, float a, float b) { return condition ? a : b; }
FUSED_RNN_HD double select(bool condition, double a, double b) { return condition ? a : b; }

}  // namespace fused_rnn::math
