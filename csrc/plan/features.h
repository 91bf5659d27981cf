// What some calls have, and kernels have code of their own for: a family that has passed its verification without one of
// them is not proven for it. fused_rnn/tuning/verification.py has the same names.
#pragma once

namespace fused_rnn {

enum Feature : unsigned {
  kProjection = 1 << 0,
  kZoneout = 1 << 1,
  kRecurrentDropout = 1 << 2,
  kStateClip = 1 << 3,
  kResetState = 1 << 4,
  kEveryC = 1 << 5,  // results, or gradients, of the c after every step
  kSecondOrder = 1 << 6,
};

constexpr const char* kFeatureNames[] = {"projection",  "zoneout", "recurrent_dropout", "state_clip",
                                         "reset_state", "every_c", "second_order"};
constexpr int kFeatures = sizeof(kFeatureNames) / sizeof(kFeatureNames[0]);

}  // namespace fused_rnn
