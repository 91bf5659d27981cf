// What a call computes, beside its tensors. fused_rnn/_recipe.py is the twin in Python (tests/test_recipe.py compares them).
#pragma once
#include "core/params.h"

namespace fused_rnn {

struct Recipe {
  CellKind cell{};
  bool has_biases = true, bidirectional = false;
  bool all_states = false;  // the states after every step are results too
  // Of a stack alone; dropout: the probability between the layers, while training.
  bool batch_first = false, training = false;
  int64_t num_layers = 1;
  double dropout = 0;
  // 1 + the number of the GPU's kernel family (plan/family.h) that serves the call, forward and backward; 0: none is chosen.
  int family = 0;
  // Of a stack alone: a graph is recorded, and only backward reads what forward saves (torch/graph_stack_cuda.h).
  bool in_graph = false;

  int64_t directions() const { return bidirectional ? 2 : 1; }
  // Of each of its layers.
  Recipe of_layer() const {
    Recipe layer{cell, has_biases, bidirectional, all_states};
    layer.family = family;
    return layer;
  }
};

// A recipe without dropout as one number, which a schema takes and a graph keeps: the cell in bits 0 to 7, a bit each for
// has_biases, bidirectional, batch_first and training, then four that say which tensors a schema's list `rows` has, one for
// all_states, six that say which tensors of StepOptions (torch/call.h) the list has, the number of layers in bits 24 to 55,
// the family in bits 56 to 59, and in_graph in bit 60.
constexpr int64_t kHasLengths = 1 << 12, kHasOffsets = 1 << 13, kHasResets = 1 << 14, kHasResetStates = 1 << 15;
constexpr int64_t kHasZoneoutH = 1 << 17, kHasZoneoutC = 1 << 18, kHasClip = 1 << 19, kHasProduct = 1 << 20,
                  kHasCandidate = 1 << 21, kHasValues = 1 << 22;
constexpr int64_t kHasStepOptions = kHasZoneoutH | kHasZoneoutC | kHasClip | kHasProduct | kHasCandidate | kHasValues;
constexpr int64_t kHasRows = kHasLengths | kHasOffsets | kHasResets | kHasResetStates | kHasStepOptions;
constexpr int kAllStatesShift = 16, kLastRowsShift = 22, kLayersShift = 24, kFamilyShift = 56, kFamilyBits = 4,
              kInGraphShift = kFamilyShift + kFamilyBits;
constexpr int64_t kFree = (int64_t{1} << kLayersShift) - (int64_t{1} << (kLastRowsShift + 1));  // bits that say nothing
constexpr int64_t kMostLayers = int64_t{1} << 31;

constexpr int64_t pack(const Recipe& r) {
  return static_cast<int64_t>(r.cell) | int64_t{r.has_biases} << 8 | int64_t{r.bidirectional} << 9 |
         int64_t{r.batch_first} << 10 | int64_t{r.training} << 11 | int64_t{r.all_states} << kAllStatesShift |
         r.num_layers << kLayersShift | int64_t{r.family} << kFamilyShift | int64_t{r.in_graph} << kInGraphShift;
}

constexpr int64_t layers_of(int64_t packed) {
  return packed >> kLayersShift & ((int64_t{1} << (kFamilyShift - kLayersShift)) - 1);
}

// Whether a number is a packed recipe.
constexpr bool is_packed(int64_t number) {
  const int64_t layers = layers_of(number);
  return (number & 0xff) < kCellCount && (number & kFree) == 0 && layers >= 1 && layers <= kMostLayers &&
         (number >> kInGraphShift | 1) == 1;
}

// Of a number that is one.
constexpr Recipe unpack(int64_t number) {
  return {static_cast<CellKind>(number & 0xff),
          (number >> 8 & 1) != 0,
          (number >> 9 & 1) != 0,
          (number >> kAllStatesShift & 1) != 0,
          (number >> 10 & 1) != 0,
          (number >> 11 & 1) != 0,
          layers_of(number),
          /*dropout=*/0,
          static_cast<int>(number >> kFamilyShift & ((1 << kFamilyBits) - 1)),
          (number >> kInGraphShift & 1) != 0};
}

}  // namespace fused_rnn
