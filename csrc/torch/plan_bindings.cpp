// The planners for Python, all plain values and dicts: plan(...) of a layer on a CUDA device that is given by its
// properties, cuda_device(index) those of a device that is there, cpu_plan(...) of a layer on this machine's CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/rates.h"
#include "plan/cudnn.h"
#include "plan/formula_choice.h"
#include "plan/machine.h"
#include "plan/overlap.h"
#include "plan/persistent_geometry.h"
#ifdef FUSED_RNN_WITH_CUDA
#include "cuda/backend.h"
#endif

namespace fused_rnn {
namespace {

namespace py = pybind11;

template <class Enum, size_t kCount>
Enum parse(const char* what, const std::string& name, const char* const (&names)[kCount]) {
  for (size_t i = 0; i < kCount; ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
  }
  throw std::invalid_argument(std::string("unknown ") + what + " '" + name + "'");
}

CellKind parse_cell(const std::string& name) {
  for (int cell = 0; cell < kCellCount; ++cell) {
    if (name == traits_of(static_cast<CellKind>(cell)).name) return static_cast<CellKind>(cell);
  }
  throw std::invalid_argument("unknown cell '" + name + "'");
}

py::dict to_dict(const Problem& problem, const KernelPlan& kernel) {
  const cuda::TileShape tile = cuda::tile_shape(kernel.role, kernel.math, kernel.tile);
  py::dict result;
  result["name"] = to_string(kernel.role);
  result["tile"] = to_string(kernel.tile);
  result["math"] = to_string(kernel.math);
  result["units"] = tile.units;
  result["batch"] = tile.batch;
  result["grid"] = py::make_tuple(kernel.grid_x, kernel.grid_y, kernel.grid_z);
  result["threads"] = kernel.threads;
  result["stages"] = kernel.stages;
  result["smem_bytes"] = kernel.smem_bytes;
  result["least_smem_bytes"] =
      kernel.stages ? cuda::smem_bytes(kernel.role, problem.cell, kernel.math, tile, cuda::kMinStages) : kernel.smem_bytes;
  result["us"] = kernel.us;
  return result;
}

py::dict to_dict(const PersistentPlan& plan) {
  py::dict result;
  result["math"] = to_string(plan.math);
  result["units"] = plan.units;
  result["blocks"] = plan.slices;
  result["threads"] = plan.threads;
  result["rows"] = plan.rows;  // of a group
  result["row_tiles"] = plan.row_tiles;
  result["groups"] = plan.groups;
  result["directions"] = plan.directions;
  result["launches"] = plan.launches;
  result["weight_registers"] = plan.weight_bytes_in_registers / plan.threads / 4;  // of a thread
  result["weight_bytes_in_registers"] = plan.weight_bytes_in_registers;
  result["weight_bytes_in_smem"] = plan.weight_bytes_in_smem;
  result["smem_bytes"] = plan.smem_bytes;
  return result;
}

// Keyword arguments of a function, taken by name.
class Keywords {
 public:
  Keywords(const char* function, const py::kwargs& given) : function_(function), given_(given) {}

  // Raises TypeError where it was not given, or is of another type.
  template <class T>
  T take(const char* name) {
    known_.insert(name);
    if (!given_.contains(name)) throw py::type_error(std::string(function_) + ": missing argument '" + name + "'");
    return converted<T>(name);
  }
  template <class T>
  T take(const char* name, T otherwise) {
    known_.insert(name);
    return given_.contains(name) ? converted<T>(name) : otherwise;
  }
  // Raises TypeError for an argument that nobody has taken.
  void end() const {
    for (const auto& item : given_) {
      const auto name = item.first.cast<std::string>();
      if (!known_.count(name)) throw py::type_error(std::string(function_) + ": unknown argument '" + name + "'");
    }
  }

 private:
  template <class T>
  T converted(const char* name) const {
    const py::object value = given_[name];
    try {
      return value.cast<T>();
    } catch (const py::cast_error&) {
      throw py::type_error(std::string(function_) + ": " + name + ": got " + Py_TYPE(value.ptr())->tp_name);
    }
  }

  const char* const function_;
  const py::kwargs& given_;
  std::set<std::string> known_;
};

Problem problem_of(Keywords& k) {
  Problem problem{};
  problem.cell = parse_cell(k.take<std::string>("cell"));
  problem.dtype = parse<DType>("dtype", k.take<std::string>("dtype"), kDTypeNames);
  problem.allow_tf32 = k.take<bool>("allow_tf32", false);
  problem.T = k.take<int64_t>("T");
  problem.B = k.take<int64_t>("B");
  problem.I = k.take<int64_t>("I");
  problem.H = k.take<int64_t>("H");
  problem.P = k.take<std::optional<int64_t>>("P", std::nullopt).value_or(problem.H);
  problem.D = k.take<int>("D", 1);
  problem.ragged = k.take<bool>("ragged", false);
  problem.training = k.take<bool>("training", false);
  problem.backward = k.take<bool>("backward", false);
  problem.modified = k.take<bool>("modified", false);
  problem.dual = k.take<bool>("dual", false);
  return problem;
}

DeviceInfo device_of(const py::dict& device) {
  const auto field = [&device](const char* name) { return device[name].cast<int>(); };
  DeviceInfo info{field("compute_capability"),
                  field("sm_count"),
                  field("smem_per_block"),
                  field("smem_per_sm"),
                  field("registers_per_sm"),
                  field("threads_per_sm"),
                  device["l2_bytes"].cast<int64_t>(),
                  field("max_cluster"),
                  field("compiled_for")};
  if (device.contains("active_clusters")) {  // not in a description
    const auto counts = device["active_clusters"].cast<std::vector<int>>();
    if (counts.size() != info.active_clusters.size()) {
      throw std::invalid_argument("active_clusters: expected " + std::to_string(info.active_clusters.size()) +
                                  " numbers, got " + std::to_string(counts.size()));
    }
    std::copy(counts.begin(), counts.end(), info.active_clusters.begin());
  }
  if (device.contains("resident_blocks")) info.resident_blocks = field("resident_blocks");  // likewise
  if (device.contains("dram_gb_per_s")) info.dram_gb_per_s = field("dram_gb_per_s");        // may be unknown
  return info;
}

FamilyChoice choice_of(Keywords& k) {
  const auto name = k.take<std::optional<std::string>>("forced", std::nullopt);
  FamilyChoice choice = name ? parse_choice(*name) : FamilyChoice{};
  if (const auto preferred = k.take<std::optional<std::string>>("preferred", std::nullopt)) {
    choice.preferred = parse_choice(*preferred).forced;
  }
  return choice;
}

py::dict plan(const py::kwargs& given) {
  Keywords k("plan", given);
  const Problem problem = problem_of(k);
  const DeviceInfo device = device_of(k.take<py::dict>("device"));
  const FamilyChoice choice = choice_of(k);
  k.end();
  const Plan made = make_plan(problem, device, choice);
  py::list kernels;
  for (const KernelPlan& kernel : made.kernels) kernels.append(to_dict(problem, kernel));
  py::dict candidates;
  for (const Candidate& candidate : made.candidates) {
    py::dict entry;
    entry["us_per_step"] = candidate.us_per_step;
    entry["us"] = candidate.us;
    if (candidate.persistent) entry["persistent"] = to_dict(*candidate.persistent);
    candidates[to_string(candidate.family)] = entry;
  }
  py::dict rejected;
  for (const Rejection& rejection : made.rejected) rejected[to_string(rejection.family)] = rejection.reason;
  py::dict result;
  result["family"] = to_string(made.family);
  result["kernels"] = kernels;
  if (made.persistent) result["persistent"] = to_dict(*made.persistent);
  result["overlapped_launches"] = made.pdl;
  result["products"] = made.products;
  result["workspace_bytes"] = made.workspace_bytes;
  result["us_per_step"] = made.us_per_step;
  result["us"] = made.us;
  result["reason"] = made.reason;
  result["rejected"] = rejected;
  result["candidates"] = candidates;
  result["cheapest"] = to_string(made.cheapest);
  result["text"] = to_string(made);
  return result;
}

// A formula's traits by name. Lists live as long as this.
struct NamedTraits {
  std::vector<int> phase_kinds, forward_levels, backward_levels;
  FormulaTraits traits{};

  explicit NamedTraits(const py::kwargs& given) {
    Keywords k("traits", given);
    traits.states = k.take<int>("states");
    traits.output = k.take<int>("output");
    traits.recurrent = k.take<int>("recurrent");
    traits.input_gates = k.take<int>("input_gates");
    traits.recurrent_gates = k.take<int>("recurrent_gates");
    traits.gradients = k.take<int>("gradients");
    traits.saved = k.take<int>("saved");
    traits.parameters = k.take<int>("parameters");
    traits.phases = k.take<int>("phases");
    traits.phase_kinds = list(k, "phase_kinds", phase_kinds);
    traits.forward_levels = list(k, "forward_levels", forward_levels);
    traits.backward_levels = list(k, "backward_levels", backward_levels);
    k.take<std::vector<int>>("input_gradients");  // of no use to a plan
    k.take<std::vector<int>>("reads_series");
    k.end();
  }

 private:
  // One number for each phase.
  const int* list(Keywords& k, const char* name, std::vector<int>& numbers) {
    numbers = k.take<std::vector<int>>(name);
    if (traits.phases < 0 || traits.phases > kMostFormulaPhases || static_cast<int>(numbers.size()) != traits.phases) {
      throw std::invalid_argument(std::string("traits: ") + name + ": expected " + std::to_string(traits.phases) +
                                  " numbers of at most " + std::to_string(kMostFormulaPhases) + " phases, got " +
                                  std::to_string(numbers.size()));
    }
    return numbers.data();
  }
};

py::dict formula_plan(const py::kwargs& given) {
  Keywords k("formula_plan", given);
  const NamedTraits cell(k.take<py::kwargs>("traits"));
  FormulaStepProblem problem{};
  problem.cell = &cell.traits;
  problem.dtype = parse<DType>("dtype", k.take<std::string>("dtype"), kDTypeNames);
  problem.T = k.take<int64_t>("T");
  problem.B = k.take<int64_t>("B");
  problem.H = k.take<int64_t>("H");
  problem.D = k.take<int>("D");
  problem.heads = k.take<int>("heads");
  problem.backward = k.take<bool>("backward");
  problem.reset_states = k.take<bool>("reset_states", false);
  problem.d_series = k.take<bool>("d_series", false);
  problem.I = k.take<int64_t>("I", 0);
  const DeviceInfo device = device_of(k.take<py::dict>("device"));
  const FamilyChoice choice = choice_of(k);
  k.end();
  const FormulaPlan made = plan_formula(problem, device, choice);
  py::dict result, rejected, candidates;
  for (const Rejection& rejection : made.rejected) rejected[to_string(rejection.family)] = rejection.reason;
  for (const Candidate& candidate : made.candidates) {
    py::dict entry;
    entry["us_per_step"] = candidate.us_per_step;
    entry["us"] = candidate.us;
    candidates[to_string(candidate.family)] = entry;
  }
  result["family"] = to_string(made.family);
  result["reason"] = made.reason;
  result["rejected"] = rejected;
  result["candidates"] = candidates;
  result["cheapest"] = to_string(made.cheapest);
  result["launches"] = made.launches;
  result["overlapped_launches"] = made.overlapped;
  result["workspace_bytes"] = made.workspace_bytes;
  result["us_per_step"] = made.us_per_step;
  result["us"] = made.us;
  result["text"] = to_string(made);
  return result;
}

py::dict overlap(const py::kwargs& given) {
  Keywords k("overlap", given);
  const Problem problem = problem_of(k);
  const DeviceInfo device = device_of(k.take<py::dict>("device"));
  const FamilyChoice choice = choice_of(k);
  const auto rows = k.take<std::optional<int64_t>>("rows", std::nullopt);
  const Stack stack{problem, k.take<int64_t>("first_input"), k.take<int>("layers"), rows.value_or(problem.T * problem.B),
                    k.take<double>("dropout", 0.0)};
  const auto chunks = k.take<std::optional<int>>("chunks", std::nullopt);
  k.end();
  const OverlapPlan made = plan_overlap(stack, make_plan(problem, device, choice), device, chunks);
  py::dict result;
  result["chunks"] = made.chunks;
  result["chunk_steps"] = made.chunk_steps;
  result["concurrent_layers"] = made.concurrent_layers;
  result["sms_in_use"] = made.sms_in_use;
  result["sms_idle"] = made.sms_idle;
  result["us"] = made.us;
  result["us_in_turn"] = made.us_in_turn;
  result["reason"] = made.reason;
  result["text"] = to_string(made);
  return result;
}

// Of a call whose tensors lack nothing.
std::string cudnn_lacks_of(const py::kwargs& given) {
  Keywords k("cudnn_lacks", given);
  CudnnCall call{parse_cell(k.take<std::string>("cell")), k.take<int64_t>("T")};
  call.enabled = k.take<bool>("enabled");
  call.deterministic = k.take<bool>("deterministic");
  call.one_step = k.take<bool>("one_step");
  call.modified = k.take<bool>("modified");
  call.empty = k.take<bool>("empty");
  k.end();
  return cudnn_lacks(call);
}

py::list tasks(int layers, int directions, bool backward, int64_t T, int64_t chunk_steps, int concurrent_layers) {
  py::list result;
  for (const OverlapTask& task : overlap_tasks(layers, directions, backward, T, chunk_steps, concurrent_layers)) {
    py::dict entry;
    entry["project"] = task.project;
    entry["layer"] = task.layer;
    entry["first"] = task.first;
    entry["end"] = task.end;
    entry["stream"] = task.stream;
    entry["after"] = task.after;
    result.append(entry);
  }
  return result;
}

py::dict machine_constants() {
  py::dict peak;
#define FUSED_RNN_MATH(kind, name, ...) peak[name] = peak_math_rate(cuda::MathKind::kind);
  FUSED_RNN_MATHS(FUSED_RNN_MATH)
#undef FUSED_RNN_MATH
  py::dict result;
  result["clock_ghz"] = kClockGhz;
  result["launch_us"] = kLaunchUs;
  result["shared_l2_bytes_per_clock"] = kSharedL2BytesPerClock;
  result["peak_math_rate"] = peak;
  return result;
}

#ifdef FUSED_RNN_WITH_CUDA
py::dict cuda_device(int index) {
  const DeviceInfo& info = cuda::device_info(index);
  py::dict result;
  result["compute_capability"] = info.compute_capability;
  result["sm_count"] = info.sm_count;
  result["smem_per_block"] = info.smem_per_block;
  result["smem_per_sm"] = info.smem_per_sm;
  result["registers_per_sm"] = info.registers_per_sm;
  result["threads_per_sm"] = info.threads_per_sm;
  result["l2_bytes"] = info.l2_bytes;
  result["max_cluster"] = info.max_cluster;
  result["compiled_for"] = info.compiled_for;
  result["active_clusters"] = info.active_clusters;
  result["resident_blocks"] = info.resident_blocks;
  result["dram_gb_per_s"] = info.dram_gb_per_s;
  return result;
}
#endif

py::dict cpu_plan(const py::kwargs& given) {
  Keywords k("cpu_plan", given);
  const Problem problem = problem_of(k);
  k.end();
  const cpu::ThreadPlan made = cpu::plan_of(problem);
  py::dict result;
  result["threads"] = made.threads();
  result["direction_teams"] = made.direction_teams;
  result["batch_teams"] = made.batch_teams;
  result["split"] = made.split;
  result["weights"] = cpu::to_string(made.form);
  return result;
}

// Several threads may measure at the same time, as the threads of a call run.
double cpu_product_rate(const std::string& dtype) {
  const DType parsed = parse<DType>("dtype", dtype, kDTypeNames);
  const py::gil_scoped_release others_may_run;
  return cpu::product_rate(parsed);
}

double cpu_read_rate(int64_t bytes) {
  const py::gil_scoped_release others_may_run;
  return cpu::read_rate(bytes);
}

double cpu_pointwise_seconds(const py::kwargs& given) {
  constexpr const char* kPasses[] = {"inference", "training", "backward"};
  Keywords k("cpu_pointwise_seconds", given);
  const CellKind cell = parse_cell(k.take<std::string>("cell"));
  const DType dtype = parse<DType>("dtype", k.take<std::string>("dtype"), kDTypeNames);
  const auto pass = parse<cpu::Pointwise>("pass", k.take<std::string>("pass_"), kPasses);
  const int rows = k.take<int>("rows");
  const int64_t H = k.take<int64_t>("H");
  k.end();
  const py::gil_scoped_release others_may_run;
  return cpu::pointwise_seconds(cell, dtype, pass, rows, H);
}

}  // namespace

void bind_plan(py::module_& module) {
  module.def(
      "plan", &plan,
      "plan(*, cell, dtype, T, B, I, H, device, P=H, D=1, allow_tf32=False, ragged=False, training=False, "
      "backward=False, forced=None, preferred=None): the CUDA kernels that would serve one layer on a device given by "
      "its properties; preferred: the family that serves where it can. No GPU is needed.");
  module.def(
      "formula_plan", &formula_plan,
      "formula_plan(*, traits, dtype, T, B, H, D, heads, backward, device, reset_states=False, d_series=False, "
      "I=0, forced=None): the family, launches and memory of a formula's layer on a device given by its properties. "
      "reset_states: resets put states of their own; d_series: there are gradients of states after each step; I: columns of "
      "the input that forward can read. No GPU is needed.");
  module.def(
      "cudnn_lacks", &cudnn_lacks_of,
      "cudnn_lacks(*, cell, T, enabled, deterministic, one_step, modified, empty): why cuDNN cannot serve the call of "
      "a stack on a GPU (csrc/plan/cudnn.h), as a clause; '' where it can. No GPU is needed.");
  module.def("overlap", &overlap,
             "overlap(*, layers, first_input, rows=T*B, dropout=0.0, chunks=None, and plan's): how the layers of a stack "
             "would overlap on a device given by its properties; I: of the layers above the first; rows: in memory, if "
             "packed. No GPU is needed.");
  module.def("overlap_tasks", &tasks, py::arg("layers"), py::arg("directions"), py::arg("backward"), py::arg("T"),
             py::arg("chunk_steps"), py::arg("concurrent_layers"),
             "The parts of an overlap, in the order in which they go to their streams.");
  module.def(
      "machine_constants", &machine_constants,
      "Constants of the CUDA planner's cost model (csrc/plan/machine.h) that the benchmark's floor is made of: clock_ghz "
      "of the SMs; launch_us; shared_l2_bytes_per_clock, into each SM while all read; peak_math_rate, multiply-adds per "
      "clock and SM of an H100 by the kind of arithmetic.");
#ifdef FUSED_RNN_WITH_CUDA
  module.def("cuda_device", &cuda_device, "The properties of a visible device that plan() asks for.");
#endif
  module.def("cpu_plan", &cpu_plan,
             "cpu_plan(*, cell, dtype, T, B, I, H, P=H, D=1, training=False, backward=False): how the threads of a call on "
             "this machine's CPU, made now, would divide the work of one layer.");
  module.def("cpu_product_rate", &cpu_product_rate, py::arg("dtype"),
             "Floating-point operations a second of this thread and instruction set: a product whose operands are in the "
             "nearest cache, measured now.");
  module.def("cpu_read_rate", &cpu_read_rate, py::arg("bytes"),
             "Bytes a second that a product with one row reads of so many bytes of weights in float32, by this thread, "
             "measured now.");
  module.def("cpu_pointwise_seconds", &cpu_pointwise_seconds,
             "cpu_pointwise_seconds(*, cell, dtype, pass_, rows, H): seconds of the pointwise half of one step by this "
             "thread, measured now on arrays in its cache; pass_: inference, training (forward) or backward.");
}

}  // namespace fused_rnn
