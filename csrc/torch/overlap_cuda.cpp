// Carries out the plans of plan/overlap.h: forward and backward of a stack of layers on CUDA as wavefronts of chunks.
#include "torch/overlap_cuda.h"

#include <ATen/cuda/CUDAEvent.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/native_dropout.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <deque>
#include <string>
#include <tuple>

#include "core/recent.h"
#include "cuda/backend.h"
#include "plan/overlap.h"
#include "torch/families_cuda.h"
#include "torch/ops.h"
#include "torch/ops_cuda.h"
#include "torch/settings.h"

namespace fused_rnn {
namespace {

struct Schedule {
  OverlapPlan plan;
  std::vector<OverlapTask> tasks;  // empty: the layers run in turn
};

Schedule make_schedule(const Stack& stack, const Plan& plan, int device, std::optional<int> chunks) {
  Schedule schedule{plan_overlap(stack, plan, cuda::device_info(device), chunks), {}};
  if (schedule.plan.chunks > 1) {
    schedule.tasks = overlap_tasks(stack.layers, stack.layer.D, stack.layer.backward, stack.layer.T,
                                   schedule.plan.chunk_steps, schedule.plan.concurrent_layers);
  }
  return schedule;
}

// The latest schedules of the calling thread are kept.
const Schedule& schedule_for(const Stack& stack, const Plan& plan, int device, std::optional<int> chunks) {
  static thread_local Recent<std::tuple<Stack, Family, int, std::optional<int>>, Schedule, 8> recent;
  return recent.get({stack, plan.family, device, chunks}, [&] { return make_schedule(stack, plan, device, chunks); });
}

// Streams and events of the calling thread on one device, made once. Every thread has its own: a stream that is being
// captured must not get another thread's work.
struct Lanes {
  std::vector<c10::cuda::CUDAStream> streams;
  std::vector<at::cuda::CUDAEvent> events;  // one for each task

  void prepare(size_t stream_count, size_t event_count, c10::DeviceIndex device) {
    // High priority: when an SM comes free, a recurrence takes it before the matrix products beside it do.
    while (streams.size() < stream_count) streams.push_back(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device));
    if (events.size() < event_count) events.resize(event_count);
  }
};
Lanes& lanes_of(c10::DeviceIndex device) {
  static thread_local std::array<Lanes, 128> all;
  return all.at(device);
}

// Hands every task to its stream: run(task, stream). The side streams wait for the caller's stream at the beginning, so a
// capture includes them; the caller's stream waits for the side streams at the end. All memory is allocated on the caller's
// stream, and the host frees it after that last wait was enqueued: the memory's next user runs after the side streams, and
// record_stream is not needed.
template <class Run>
void run_all(const Schedule& schedule, const Run& run) {
  const c10::cuda::CUDAStream caller = c10::cuda::getCurrentCUDAStream();
  Lanes& lanes = lanes_of(caller.device_index());
  const size_t side_streams = schedule.plan.concurrent_layers, tasks = schedule.tasks.size();
  lanes.prepare(side_streams, tasks + 1 + side_streams, caller.device_index());
  at::cuda::CUDAEvent* const forked = &lanes.events[tasks];
  at::cuda::CUDAEvent* const ended = forked + 1;
  const auto join = [&] {
    for (size_t i = 0; i < side_streams; ++i) {
      ended[i].record(lanes.streams[i]);
      ended[i].block(caller);
    }
  };
  forked->record(caller);
  for (size_t i = 0; i < side_streams; ++i) forked->block(lanes.streams[i]);
  try {
    for (size_t i = 0; i < tasks; ++i) {
      const OverlapTask& task = schedule.tasks[i];
      const c10::cuda::CUDAStream stream = task.stream == 0 ? caller : lanes.streams[task.stream - 1];
      if (task.after >= 0) lanes.events[task.after].block(stream);
      run(task, stream.stream());
      lanes.events[i].record(stream);
    }
  } catch (...) {
    join();
    throw;
  }
  join();
}

// The same; false, after a warning, if the device refuses the family's launches: then the layers are to be called in turn.
template <class Run>
bool run_tasks(const Schedule& schedule, Family family, int device, const Run& run) {
  try {
    run_all(schedule, run);
    return true;
  } catch (const LaunchRefused& caught) {
    family_was_refused(family, device, caught);
    return false;
  }
}

// The arguments of one layer of the stack.
struct StackedLayer {
  const Tensor x;  // contiguous
  const States states;
  const Call call;

  StackedLayer(const Call& s, const Tensor& input, int64_t layer)
      : x(input.contiguous()),
        states(states_of_layer(s, layer)),
        call{x, states, params_of_layer(s, layer), s.rows, s.recipe.of_layer()} {}
  StackedLayer(const StackedLayer&) = delete;
};

struct ForwardLayer : StackedLayer {
  using StackedLayer::StackedLayer;
  ForwardCall made;
  Tensor workspace, carry;
};

struct BackwardLayer : StackedLayer {
  const ResultGradients given;  // dy: of all layers but the last the dx of the one above
  BackwardCall made;
  Tensor workspace, carry, dx;

  BackwardLayer(const Call& s, const Tensor& input, int64_t layer, ResultGradients gradients)
      : StackedLayer(s, input, layer), given(std::move(gradients)) {}
};

// The rows of memory of the steps of a stack: those of time t begin at at(t).
struct StepRows {
  int64_t batch;
  const int64_t* offsets;  // null: dense

  explicit StepRows(const Call& s)
      : batch(s.rows.offsets ? s.h0()->size(1) : s.x.size(1)),
        offsets(s.rows.offsets ? s.rows.host_offsets->const_data_ptr<int64_t>() : nullptr) {}
  int64_t at(int64_t t) const { return offsets ? offsets[t] : t * batch; }
  // Of a contiguous [N, ...] or [T, B, ...], those of times [first, end).
  Tensor of(const Tensor& t, int64_t first, int64_t end) const {
    return t.view({-1, t.size(-1)}).slice(0, at(first), at(end));
  }
};

// Whether shapes are those of a stack; what does not fit is left to the layers, which say so. Where the rows of packed steps
// lie must be known on the host.
bool fits(const Call& s, at::TensorList params) {
  const bool packed = s.rows.offsets.has_value();
  if (s.x.dim() != (packed ? 2 : 3) || s.x.numel() == 0 || params.size() < 2 || params[0].dim() != 2 ||
      params[1].dim() != 2 || params[1].numel() == 0) {
    return false;
  }
  const OptionalTensor& offsets = s.rows.host_offsets;
  return !packed || (offsets && offsets->scalar_type() == at::kLong && offsets->is_contiguous() && offsets->size(0) >= 2 &&
                     s.h0() && s.h0()->dim() == 3);
}

std::optional<Stack> stack_of(const Call& s, bool training, bool backward) {
  const at::TensorList params = params_of_layer(s, s.recipe.num_layers - 1);
  if (!fits(s, params)) return std::nullopt;
  const StepRows rows(s);
  Problem layer{};
  layer.cell = s.recipe.cell;
  layer.dtype = dtype_of(s.x);
  layer.allow_tf32 = allows_tf32(s.x);
  layer.T = s.rows.offsets ? s.rows.host_offsets->size(0) - 1 : s.x.size(0);
  layer.B = rows.batch;
  layer.I = params[0].size(1);
  layer.H = params[1].size(0) / gate_count(layer.cell);
  layer.P = params[1].size(1);
  layer.D = static_cast<int>(s.recipe.directions());
  layer.ragged = s.rows.ragged();
  layer.training = training;
  layer.backward = backward;
  return Stack{layer, s.x.size(-1), static_cast<int>(s.recipe.num_layers), rows.at(layer.T), s.recipe.dropout};
}

double scale_of(double dropout) { return 1 / (1 - dropout); }

// dropped() of some rows, into `to`, which may be `from`.
void drop_rows(Tensor to, const Tensor& from, const Tensor& left, double dropout) {
  at::mul_out(to, from, left);
  to.mul_(scale_of(dropout));
}

// What is left to do of a layer's gradients: dx of the layers above the first is a task of the schedule.
GradientMask mask_of(const std::vector<GradientMask>& masks, int64_t layer) {
  return {layer == 0 && masks[layer].x, masks[layer].states, masks[layer].weights};
}

}  // namespace

Tensor dropped(const Tensor& t, const Tensor& left, double dropout) { return at::mul(at::mul(t, left), scale_of(dropout)); }

std::optional<StackOutputs> overlapped_forward(const Call& s, bool save) {
  const c10::cuda::CUDAGuard device_guard(s.x.device());
  const auto stack = stack_of(s, save, /*backward=*/false);
  if (!stack) return std::nullopt;
  const Plan& plan = cuda::plan_for(stack->layer, s.x.get_device(), family_choice(s.x.get_device(), s.recipe));
  const Schedule& schedule = schedule_for(*stack, plan, s.x.get_device(), chunk_setting());
  if (schedule.tasks.empty()) return std::nullopt;

  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const MatmulPrecision precision(stack->layer.allow_tf32);
  const StepRows all(s);
  const double dropout = s.recipe.dropout;
  StackOutputs results;
  std::deque<ForwardLayer> layers;
  for (int64_t l = 0; l < s.recipe.num_layers; ++l) {
    Tensor x = l == 0 ? s.x : layers.back().made.y;
    if (l > 0 && dropout > 0) {
      // The layers in turn would make the same calls in the same order, so the same masks are drawn. The values are written
      // later, when the output below is there.
      const auto [room, left] = at::native_dropout(x, dropout, /*train=*/true);
      results.inputs.push_back(x = room);
      results.left.push_back(left);
    }
    ForwardLayer& layer = layers.emplace_back(s, x, l);
    layer.made = prepare_forward(layer.call, save);
    ForwardParams& p = layer.made.params;
    p.allow_tf32 = stack->layer.allow_tf32;
    allocate_gates(layer.made);
    layer.workspace = workspace_of(plan, s.x);
    layer.carry = at::empty({p.D, p.seq.B, p.H}, s.x.options().dtype(at::kFloat));
    p.workspace = layer.workspace.data_ptr();
  }
  const bool done = run_tasks(schedule, plan.family, s.x.get_device(), [&](const OverlapTask& task, void* stream) {
    const ForwardLayer& layer = layers[task.layer];
    const ForwardParams& p = layer.made.params;
    if (!task.project) return cuda::forward_steps(p, plan, {task.first, task.end, layer.carry.data_ptr<float>()}, stream);
    // With two directions the first task of a layer waits for the whole layer below.
    if (task.layer > 0 && dropout > 0 && (p.D == 1 || task.first == 0)) {
      const auto rows = [&](const Tensor& t) { return p.D == 1 ? all.of(t, task.first, task.end) : t; };
      drop_rows(rows(layer.x), rows(layers[task.layer - 1].made.y), rows(results.left[task.layer - 1]), dropout);
    }
    for (int d = 0; d < p.D; ++d) {
      const int64_t first = d ? p.seq.T - task.end : task.first, end = d ? p.seq.T - task.first : task.end;
      project_rows(layer.call, layer.made, layer.x.view({p.seq.N, p.I}), d, all.at(first), all.at(end));
    }
  });
  if (!done) return std::nullopt;
  for (const ForwardLayer& layer : layers) results.layers.push_back(forward_outputs(layer.made, save));
  return results;
}

std::optional<std::vector<LayerGradients>> overlapped_backward(const Call& s, const StackGradients& given,
                                                               const StackOutputs& saved,
                                                               const std::vector<GradientMask>& masks) {
  const c10::cuda::CUDAGuard device_guard(s.x.device());
  const auto stack = stack_of(s, /*training=*/true, /*backward=*/true);
  if (!stack) return std::nullopt;
  const Plan& plan = cuda::plan_for(stack->layer, s.x.get_device(), family_choice(s.x.get_device(), s.recipe));
  const Schedule& schedule = schedule_for(*stack, plan, s.x.get_device(), chunk_setting());
  if (schedule.tasks.empty()) return std::nullopt;

  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const MatmulPrecision precision(stack->layer.allow_tf32);
  const StepRows all(s);
  const double dropout = s.recipe.dropout;
  std::deque<BackwardLayer> layers;  // the first is the lowest
  for (int64_t l = s.recipe.num_layers - 1; l >= 0; --l) {
    const auto& [y, last, of_layer] = saved.layers[l];
    const OptionalTensor dy = layers.empty() ? given.dy : OptionalTensor(layers.front().dx);
    Saved layer_saved = saved_of(s.recipe.cell, s.rows, of_layer);
    layer_saved.y = y;
    const Tensor& x = l == 0 ? s.x : dropout > 0 ? saved.inputs[l - 1] : std::get<0>(saved.layers[l - 1]);
    BackwardLayer& layer = layers.emplace_front(s, x, l, ResultGradients{dy, given.of_last[l], layer_saved});
    layer.made = prepare_backward(layer.call, layer.given, mask_of(masks, l));
    BackwardParams& p = layer.made.params;
    p.allow_tf32 = stack->layer.allow_tf32;
    if (!(masks[l].states && layer.call.h0())) p.d_h0 = nullptr;
    layer.workspace = workspace_of(plan, s.x);
    layer.carry = at::empty({2, p.D, p.seq.B, p.H}, s.x.options().dtype(at::kFloat));
    p.workspace = layer.workspace.data_ptr();
    if (l > 0) layer.dx = at::empty_like(layer.x);
  }
  const bool done = run_tasks(schedule, plan.family, s.x.get_device(), [&](const OverlapTask& task, void* stream) {
    const BackwardLayer& layer = layers[task.layer];
    const BackwardParams& p = layer.made.params;
    if (!task.project) return cuda::backward_steps(p, plan, {task.first, task.end, layer.carry.data_ptr<float>()}, stream);
    const BackwardLayer& above = layers[task.layer + 1];
    const int64_t first = all.at(p.seq.T - task.end), end = all.at(p.seq.T - task.first);
    const Tensor dg = above.made.d_gates.view({p.seq.N, slot_count(p.cell) * p.H}).slice(0, first, end);
    const Tensor dx = above.dx.view({p.seq.N, -1}).slice(0, first, end);
    input_gradient(above.call, input_columns(p.cell, p.H, dg), dx, /*d=*/0);
    if (dropout > 0) drop_rows(dx, dx, saved.left[task.layer].view({p.seq.N, -1}).slice(0, first, end), dropout);
  });
  if (!done) return std::nullopt;
  std::vector<LayerGradients> gradients;
  for (int64_t l = 0; l < s.recipe.num_layers; ++l) {
    gradients.push_back(gradients_of_layer(layers[l].call, layers[l].given, layers[l].made, mask_of(masks, l)));
  }
  return gradients;
}

}  // namespace fused_rnn
