// Which layers of a stack run beside each other on CUDA: a pure function like plan.h's. No torch, no CUDA.
//
// The persistent families leave most SMs idle where a layer is small. So the sequence is cut into chunks of steps. While one
// layer's recurrence makes a chunk, two things run beside it: its input projection of the next chunk, and the layers above,
// some chunks behind.
//   project(l, c)  needs chunk c of the layer below, if layers have one direction (two: the whole layer below)
//   scan(l, c)     needs project(l, c) and scan(l, c - 1)
// Backward goes from the top layer down and from the last step to the first. There project(l, c) makes the gradient of layer
// l's output from the gates of the layer above, and the top layer has no project. All projections run on stream 0, the
// caller's. The recurrence of the n-th layer in the order of the pass runs on stream 1 + n % concurrent_layers. Dropout
// between the layers is part of project: it drops the input of a forward projection and the output of a backward one. All
// masks are drawn before the first task.
#pragma once
#include <string>
#include <vector>

#include "plan/plan.h"

namespace fused_rnn {

struct Stack {
  Problem layer;        // each of the layers, forward or backward; I of those above the first
  int64_t first_input;  // I of the first
  int layers;
  int64_t rows;    // in memory: T * B, or fewer if packed
  double dropout;  // probability between the layers, 0: none
};

inline bool operator==(const Stack& a, const Stack& b) {
  return a.layer == b.layer && a.first_input == b.first_input && a.layers == b.layers && a.rows == b.rows &&
         a.dropout == b.dropout;
}

struct OverlapPlan {
  int64_t chunk_steps;  // T: the layers run in turn
  int chunks;
  int concurrent_layers;     // recurrences that run at once
  int sms_in_use, sms_idle;  // of the recurrences that run at once, and beside them
  double us, us_in_turn;     // expected by the cost model
  std::string reason;
};

// plan: of stack.layer on the device. chunks: their number, instead of the cost model's choice; 1: no overlap. Every other
// obstacle still holds.
OverlapPlan plan_overlap(const Stack& stack, const Plan& plan, const DeviceInfo& device,
                         std::optional<int> chunks = std::nullopt);

struct OverlapTask {
  bool project;  // else the recurrence
  int layer;
  int64_t first, end;  // steps of the scan
  int stream;
  int after;  // number of the task on another stream that must have ended, -1: none
};

// In the order in which they are handed to their streams: a task comes after all tasks that it waits for.
std::vector<OverlapTask> overlap_tasks(int layers, int directions, bool backward, int64_t T, int64_t chunk_steps,
                                       int concurrent_layers);

std::string to_string(const OverlapPlan& plan);

}  // namespace fused_rnn
