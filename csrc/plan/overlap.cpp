// The tasks of an overlap, and the number of their chunks: see overlap.h.
#include "plan/overlap.h"

#include <algorithm>
#include <cstdio>
#include <limits>

#include "core/ceil_div.h"
#include "plan/machine.h"

namespace fused_rnn {
namespace {

constexpr double kWorthIt = 0.95;  // of the time in turn: an overlap must be expected to take less
constexpr int kMostConcurrentLayers =
    7;  // 8 streams with the caller's: more would share the hardware's queues (CUDA's default)

double us_of_bytes(double bytes, double sms) { return bytes / (kSharedL2BytesPerClock * kClockGhz * 1e3 * sms); }

// Expected durations of the parts of a stack.
struct Costs {
  const Stack& stack;
  const Plan& plan;
  const DeviceInfo& device;

  double rows_of(int64_t steps) const { return double(steps) * stack.rows / stack.layer.T; }  // on average
  // One launch, which loads the weights of all blocks again.
  double scan(int64_t steps) const { return plan.us_once + steps * plan.us_per_step; }
  double project(int layer, int64_t steps, int sms) const {
    const Problem& p = stack.layer;
    const double rows = rows_of(steps), columns = gate_count(p.cell) * p.H,
                 inputs = layer == 0 && !p.backward ? stack.first_input : p.I;
    const double clocks = rows * columns * inputs / (persistent_math_rate(plan.persistent->math, device) * sms);
    const double bytes = (rows * (columns + inputs) + columns * inputs) * dtype_size(p.dtype);
    return p.D * (kLaunchUs + std::max(clocks / (kClockGhz * 1e3), us_of_bytes(bytes, sms)));
  }
  // Passes over the elements between two layers, each of which reads or writes two elements and a byte of mask.
  double drop(int64_t steps, int passes, int sms) const {
    if (stack.dropout == 0) return 0;
    const double elements = rows_of(steps) * stack.layer.I;
    return passes * (kLaunchUs + us_of_bytes(elements * (2 * dtype_size(stack.layer.dtype) + 1), sms));
  }
  // The dropout of a task: one pass for the mask, one for the scale.
  double drop_rows(const OverlapTask& task, int sms) const {
    return task.project && (stack.layer.backward || task.layer > 0) ? drop(task.end - task.first, 2, sms) : 0;
  }
  double draw() const { return stack.layer.backward ? 0 : (stack.layers - 1) * drop(stack.layer.T, 1, device.sm_count); }
  double in_turn() const {
    double us = (stack.layers - 1) * drop(stack.layer.T, 1, device.sm_count);
    for (int layer = 0; layer < stack.layers; ++layer) {
      us += scan(stack.layer.T);
      if (layer < stack.layers - 1 || !stack.layer.backward) us += project(layer, stack.layer.T, device.sm_count);
    }
    return us;
  }
  // When the last task ends. A stream runs its tasks one after another, and a task waits for its `after`.
  double overlapped(const std::vector<OverlapTask>& tasks, int concurrent_layers, int idle_sms) const {
    std::vector<double> ends, free(1 + concurrent_layers, draw());
    double host = 0;
    for (const OverlapTask& task : tasks) {
      const double dropped = drop_rows(task, idle_sms);
      host += kHostUs * (dropped > 0 ? 2 : 1);
      double start = std::max(free[task.stream], host);
      if (task.after >= 0) start = std::max(start, ends[task.after] + kLaunchUs);
      const int64_t steps = task.end - task.first;
      ends.push_back(start + dropped + (task.project ? project(task.layer, steps, idle_sms) : scan(steps)));
      free[task.stream] = ends.back();
    }
    return *std::max_element(free.begin(), free.end());
  }
};

// Recurrences that the device holds at once, beside at least one SM for the projections.
int most_concurrent(const Stack& stack, const Plan& plan, const DeviceInfo& device) {
  const PersistentPlan& p = *plan.persistent;
  const int groups = p.groups * p.directions;
  int64_t most = (device.sm_count - 1) / (int64_t{p.slices} * groups);
  if (p.cluster) most = std::min(most, clusters_at_once(device, p.slices) / groups);
  // With two directions a layer needs all of the one below.
  return static_cast<int>(std::min<int64_t>({most, stack.layer.D == 1 ? stack.layers : 1, kMostConcurrentLayers}));
}

std::string obstacle(const Stack& stack, const Plan& plan) {
  if (!plan.persistent) return std::string("family ") + to_string(plan.family) + " takes all SMs in turn";
  if (stack.dropout >= 1) return "dropout leaves nothing of a layer's output";
  if (stack.layer.backward && stack.layers == 1) return "there is one layer";
  if (stack.layer.backward && stack.layer.D == 2)
    return "the gradient of an output has a part from both ends of the sequence";
  return "";
}

}  // namespace

std::vector<OverlapTask> overlap_tasks(int layers, int directions, bool backward, int64_t T, int64_t chunk_steps,
                                       int concurrent_layers) {
  const int64_t chunks = ceil_div(T, chunk_steps), at_once = concurrent_layers;
  // The wave in which the recurrence of the n-th layer makes a chunk. The layers of one round follow each other a chunk
  // apart.
  const auto wave = [&](int64_t n, int64_t chunk) { return n / at_once * chunks + n % at_once + chunk; };
  const auto chunk_before = [&](int64_t chunk) { return directions == 1 ? chunk : chunks - 1; };
  struct Entry {
    int64_t order, chunk;
    int n;
    OverlapTask task;
  };
  std::vector<Entry> entries;
  for (int n = 0; n < layers; ++n) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t first = chunk * chunk_steps, end = std::min(T, first + chunk_steps);
      const int layer = backward ? layers - 1 - n : n;
      // A projection comes after the wave that makes its input. The first layer has its input from the beginning: its
      // projection comes in the wave before the one that needs it.
      const int64_t project_after = n == 0 ? chunk - 1 : wave(n - 1, chunk_before(chunk));
      if (n > 0 || !backward) entries.push_back({2 * project_after + 1, chunk, n, {true, layer, first, end, 0, -1}});
      entries.push_back({2 * wave(n, chunk), chunk, n, {false, layer, first, end, 1 + n % concurrent_layers, -1}});
    }
  }
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.order < b.order; });
  std::vector<OverlapTask> tasks;
  std::vector<int> projected(layers * chunks, -1), scanned(layers * chunks, -1);
  for (const auto& [order, chunk, n, entry] : entries) {
    OverlapTask task = entry;
    if (!task.project) task.after = projected[n * chunks + chunk];
    if (task.project && n > 0) task.after = scanned[(n - 1) * chunks + chunk_before(chunk)];
    (task.project ? projected : scanned)[n * chunks + chunk] = static_cast<int>(tasks.size());
    tasks.push_back(task);
  }
  return tasks;
}

OverlapPlan plan_overlap(const Stack& stack, const Plan& plan, const DeviceInfo& device, std::optional<int> chunks) {
  const int64_t T = stack.layer.T;
  OverlapPlan best{T, 1, 1, 0, 0, 0.0, 0.0, obstacle(stack, plan)};
  if (!best.reason.empty()) return best;
  const Costs costs{stack, plan, device};
  const PersistentPlan& p = *plan.persistent;
  const int blocks = p.slices * p.groups * p.directions, most = most_concurrent(stack, plan, device);
  best.us = best.us_in_turn = costs.in_turn();
  if (most < 1) {
    best.reason = "one layer's " + std::to_string(blocks) + " blocks take the whole device";
    return best;
  }
  const std::vector<int> counts = chunks ? std::vector<int>{*chunks} : std::vector<int>{2, 4, 8, 16, 32};
  double limit = chunks ? std::numeric_limits<double>::infinity() : kWorthIt * best.us_in_turn;
  for (int at_once = 1; at_once <= most; ++at_once) {
    for (int count : counts) {
      const int64_t steps = ceil_div(T, std::max(count, 1));
      const int made = static_cast<int>(ceil_div(T, steps)), idle = device.sm_count - at_once * blocks;
      if (made < 2 || made < at_once) continue;
      const double us = costs.overlapped(overlap_tasks(stack.layers, stack.layer.D, stack.layer.backward, T, steps, at_once),
                                         at_once, idle);
      if (us >= limit) continue;
      limit = us;
      best = {steps, made, at_once, at_once * blocks, idle, us, best.us_in_turn, ""};
    }
  }
  best.reason = chunks            ? "so many chunks are asked for"
                : best.chunks > 1 ? "the layers leave SMs idle"
                                  : "chunks would save too little";
  return best;
}

std::string to_string(const OverlapPlan& plan) {
  char text[300];
  if (plan.chunks == 1) return "layers in turn, because " + plan.reason + "\n";
  std::snprintf(
      text, sizeof text,
      "overlap: %d chunks of %lld steps, %d recurrence%s at once on %d SMs, projections on %d; %.0f us expected, %.0f in "
      "turn (model, not measured)\n",
      plan.chunks, static_cast<long long>(plan.chunk_steps), plan.concurrent_layers, plan.concurrent_layers == 1 ? "" : "s",
      plan.sms_in_use, plan.sms_idle, plan.us, plan.us_in_turn);
  return text;
}

}  // namespace fused_rnn
