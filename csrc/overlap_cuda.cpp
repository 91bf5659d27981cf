// Carries out the plans of plan_overlap.h: the forward of a stack of layers on CUDA as a wavefront over chunks of the sequence.
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <cstdlib>
#include <deque>
#include <string>

#include "cuda/backend.h"
#include "ops.h"
#include "ops_cuda.h"
#include "plan_overlap.h"

namespace fused_rnn {
namespace {

// FUSED_RNN_OVERLAP: the number of chunks; 0 and 1: none.
std::optional<int> forced_chunks() {
  const char* text = std::getenv("FUSED_RNN_OVERLAP");
  if (!text || !*text) return std::nullopt;
  char* end = nullptr;
  const long chunks = std::strtol(text, &end, 10);
  TORCH_CHECK_VALUE(*end == '\0' && chunks >= 0 && chunks <= 1024, "FUSED_RNN_OVERLAP: expected 0 to 1024, got '", text,
                    "'");
  return static_cast<int>(chunks);
}

struct Schedule {
  OverlapPlan plan;
  std::vector<OverlapTask> tasks;  // empty: the layers run in turn
};

Schedule make_schedule(const Stack& stack, const Plan& plan, int device, std::optional<int> chunks) {
  Schedule schedule{plan_overlap(stack, plan, cuda::device_info(device), chunks), {}};
  if (schedule.plan.chunks > 1) {
    schedule.tasks = overlap_tasks(stack.layers, stack.layer.D, stack.layer.T, schedule.plan.chunk_steps,
                                   schedule.plan.concurrent_layers);
  }
  return schedule;
}

// The latest schedules of the calling thread are kept.
const Schedule& schedule_for(const Stack& stack, const Plan& plan, int device, std::optional<int> chunks) {
  struct Entry {
    Stack stack;
    Family family;
    int device;
    std::optional<int> chunks;
    Schedule schedule;
  };
  constexpr size_t kKept = 8;
  static thread_local std::array<std::optional<Entry>, kKept> kept;
  static thread_local size_t oldest = 0;
  for (const auto& entry : kept) {
    if (entry && entry->stack == stack && entry->family == plan.family && entry->device == device &&
        entry->chunks == chunks) {
      return entry->schedule;
    }
  }
  auto& entry = kept[oldest];
  entry = Entry{stack, plan.family, device, chunks, make_schedule(stack, plan, device, chunks)};
  oldest = (oldest + 1) % kKept;
  return entry->schedule;
}

// Streams and events of the calling thread on one device, made once. A thread has its own, since a stream in a capture must not
// get another thread's work.
struct Lanes {
  std::vector<c10::cuda::CUDAStream> streams;
  std::vector<at::cuda::CUDAEvent> events;  // one for each task

  void prepare(size_t stream_count, size_t event_count, c10::DeviceIndex device) {
    while (streams.size() < stream_count) streams.push_back(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device));
    if (events.size() < event_count) events.resize(event_count);
  }
};
Lanes& lanes_of(c10::DeviceIndex device) {
  static thread_local std::array<Lanes, 128> all;
  return all.at(device);
}

// One layer of the stack: its arguments, its results and the memory of its kernels.
struct StackedLayer {
  const Tensor x;  // [T, B, I], contiguous
  const OptionalTensor h0, c0;
  const LayerInputs in;
  ForwardCall call;
  Tensor workspace, carry;

  StackedLayer(const StackCall& s, const Tensor& input, int64_t layer, int64_t layers)
      : x(input.contiguous()),
        h0(states_of_layer(s.h0, layer, s.bidirectional ? 2 : 1, layers)),
        c0(states_of_layer(s.c0, layer, s.bidirectional ? 2 : 1, layers)),
        in{x,
           h0,
           c0,
           params_of_layer(s.weights, layer, layers),
           s.has_biases,
           s.lengths,
           s.offsets,
           s.resets,
           s.cell,
           s.bidirectional} {}
  StackedLayer(const StackedLayer&) = delete;
};

void run_task(const OverlapTask& task, StackedLayer& layer, const Plan& plan, void* stream) {
  const ForwardParams& p = layer.call.params;
  if (task.project) {
    for (int d = 0; d < p.D; ++d) {
      const int64_t first = d ? p.seq.T - task.end : task.first, end = d ? p.seq.T - task.first : task.end;
      project_rows(layer.in, layer.call, layer.x.view({p.seq.N, p.I}), d, first * p.seq.B, end * p.seq.B);
    }
  } else {
    float* carry = layer.carry.defined() ? layer.carry.data_ptr<float>() : nullptr;
    cuda::forward_steps(p, plan, {task.first, task.end, carry}, stream);
  }
}

// Every recurrence waits for a projection, so the side streams follow the caller's without an event of their own, and a capture
// includes them. At the end the caller's stream waits for them. All memory was allocated on the caller's stream and is freed on
// the host after that wait has been enqueued, so whatever takes its place runs after the side streams: no record_stream.
void run_tasks(const Schedule& schedule, std::deque<StackedLayer>& layers, const Plan& plan) {
  const c10::cuda::CUDAStream caller = c10::cuda::getCurrentCUDAStream();
  Lanes& lanes = lanes_of(caller.device_index());
  const size_t side_streams = schedule.plan.concurrent_layers;
  lanes.prepare(side_streams, schedule.tasks.size() + side_streams, caller.device_index());
  const auto stream_of = [&](int stream) { return stream == 0 ? caller : lanes.streams[stream - 1]; };
  const auto join = [&] {
    for (size_t i = 0; i < side_streams; ++i) {
      auto& event = lanes.events[schedule.tasks.size() + i];
      event.record(lanes.streams[i]);
      event.block(caller);
    }
  };
  try {
    for (size_t i = 0; i < schedule.tasks.size(); ++i) {
      const OverlapTask& task = schedule.tasks[i];
      const c10::cuda::CUDAStream stream = stream_of(task.stream);
      if (task.after >= 0) lanes.events[task.after].block(stream);
      run_task(task, layers[task.layer], plan, stream.stream());
      lanes.events[i].record(stream);
    }
  } catch (...) {
    join();
    throw;
  }
  join();
}

}  // namespace

std::optional<std::vector<LayerOutputs>> overlapped_layers(const StackCall& s, const std::vector<bool>& saves) {
  const int layers = static_cast<int>(saves.size()), D = s.bidirectional ? 2 : 1;
  const at::TensorList params = params_of_layer(s.weights, layers - 1, layers);
  // What does not fit is left to the layers, which say so; of a packed sequence only the device knows the rows.
  if (s.x.dim() != 3 || s.x.numel() == 0 || params.size() < 2 || params[0].dim() != 2 || params[1].dim() != 2 ||
      params[1].numel() == 0)
    return std::nullopt;
  const c10::cuda::CUDAGuard device_guard(s.x.device());
  const auto device = s.x.device().index();
  const bool allow_tf32 = allows_tf32(s.x);
  const Stack stack{
      {s.cell, dtype_of(s.x), allow_tf32, s.x.size(0), s.x.size(1), params[0].size(1),
       params[1].size(0) / gate_count(s.cell), params[1].size(1), D, s.lengths.has_value(), saves.back(), false},
      s.x.size(2),
      layers,
      s.offsets.has_value(),
      s.dropout};
  const Plan& plan = cuda::plan_for(stack.layer, device, forced_family());
  const Schedule& schedule = schedule_for(stack, plan, device, forced_chunks());
  if (schedule.tasks.empty()) return std::nullopt;

  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const MatmulPrecision precision(allow_tf32);
  std::deque<StackedLayer> stacked;
  for (int l = 0; l < layers; ++l) {
    StackedLayer& layer = stacked.emplace_back(s, l == 0 ? s.x : stacked.back().call.y, l, layers);
    layer.call = prepare_forward(layer.in, saves[l]);
    ForwardParams& p = layer.call.params;
    p.allow_tf32 = allow_tf32;
    allocate_gates(layer.call);
    layer.workspace = at::empty({plan.workspace_bytes}, s.x.options().dtype(at::kByte));
    p.workspace = layer.workspace.data_ptr();
    if (layer.call.c_n.defined()) layer.carry = at::empty({D, p.seq.B, p.H}, s.x.options().dtype(at::kFloat));
  }
  run_tasks(schedule, stacked, plan);
  std::vector<LayerOutputs> outputs;
  for (int l = 0; l < layers; ++l) outputs.push_back(forward_outputs(stacked[l].call, saves[l]));
  return outputs;
}

}  // namespace fused_rnn
