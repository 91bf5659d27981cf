// The planner for Python: plan(...) takes a problem and a device as plain values and gives a dict.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <stdexcept>
#include <string>

#include "cuda/persistent.h"
#include "plan.h"

namespace fused_rnn {
namespace {

namespace py = pybind11;

constexpr const char* kCells[] = {"rnn_tanh", "rnn_relu", "rnn_identity", "lstm", "gru"};
constexpr const char* kDTypes[] = {"float64", "float32", "float16", "bfloat16"};
constexpr const char* kTiles[] = {"small", "medium", "large"};
constexpr const char* kMaths[] = {"fp64", "fp32", "tf32", "fp16", "bf16"};

template <class Enum, size_t kCount>
Enum parse(const char* what, const std::string& name, const char* const (&names)[kCount]) {
  for (size_t i = 0; i < kCount; ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
  }
  throw std::invalid_argument(std::string("unknown ") + what + " '" + name + "'");
}

py::dict to_dict(const Problem& problem, const KernelPlan& kernel) {
  const cuda::TileShape tile = cuda::tile_shape(kernel.role, kernel.math, kernel.tile);
  py::dict result;
  result["name"] = to_string(kernel.role);
  result["tile"] = kTiles[static_cast<int>(kernel.tile)];
  result["math"] = kMaths[static_cast<int>(kernel.math)];
  result["units"] = tile.units;
  result["batch"] = tile.batch;
  result["grid"] = py::make_tuple(kernel.grid_x, kernel.grid_y, kernel.grid_z);
  result["threads"] = kernel.threads;
  result["stages"] = kernel.stages;
  result["smem_bytes"] = kernel.smem_bytes;
  result["least_smem_bytes"] = cuda::smem_bytes(kernel.role, problem.cell, kernel.math, tile, cuda::kMinStages);
  result["us"] = kernel.us;
  return result;
}

py::dict to_dict(const PersistentPlan& plan) {
  py::dict result;
  result["math"] = kMaths[static_cast<int>(plan.math)];
  result["units"] = plan.unit_tiles * cuda::kTileUnits;
  result["blocks"] = plan.slices;
  result["tiles"] = plan.tiles;
  result["groups"] = plan.groups;
  result["directions"] = plan.directions;
  result["launches"] = plan.launches;
  result["register_chunks"] = plan.register_chunks;
  result["smem_chunks"] = plan.smem_chunks;
  result["smem_bytes"] = plan.smem_bytes;
  return result;
}

py::dict plan(const std::string& cell, const std::string& dtype, int64_t T, int64_t B, int64_t I, int64_t H,
              const py::dict& device, std::optional<int64_t> P, int D, bool allow_tf32, bool ragged, bool training,
              bool backward, const std::optional<std::string>& forced) {
  const Problem problem{parse<CellKind>("cell", cell, kCells),
                        parse<DType>("dtype", dtype, kDTypes),
                        allow_tf32,
                        T,
                        B,
                        I,
                        H,
                        P.value_or(H),
                        D,
                        ragged,
                        training,
                        backward};
  const auto field = [&device](const char* name) { return device[name].cast<int>(); };
  const DeviceInfo info{field("compute_capability"),
                        field("sm_count"),
                        field("smem_per_block"),
                        field("smem_per_sm"),
                        field("registers_per_sm"),
                        field("threads_per_sm"),
                        device["l2_bytes"].cast<int64_t>(),
                        field("max_cluster")};
  const Plan made = make_plan(problem, info, forced ? std::optional<Family>(parse_family(*forced)) : std::nullopt);
  py::list kernels;
  for (const KernelPlan& kernel : made.kernels) kernels.append(to_dict(problem, kernel));
  py::dict rejected;
  for (const Rejection& rejection : made.rejected) rejected[to_string(rejection.family)] = rejection.reason;
  py::dict result;
  result["family"] = to_string(made.family);
  result["kernels"] = kernels;
  if (made.persistent) result["persistent"] = to_dict(*made.persistent);
  result["overlapped_launches"] = made.pdl;
  result["workspace_bytes"] = made.workspace_bytes;
  result["us_per_step"] = made.us_per_step;
  result["reason"] = made.reason;
  result["rejected"] = rejected;
  result["text"] = to_string(made);
  return result;
}

}  // namespace

void bind_plan(py::module_& module) {
  module.def("plan", &plan, py::kw_only(), py::arg("cell"), py::arg("dtype"), py::arg("T"), py::arg("B"), py::arg("I"),
             py::arg("H"), py::arg("device"), py::arg("P") = py::none(), py::arg("D") = 1, py::arg("allow_tf32") = false,
             py::arg("ragged") = false, py::arg("training") = false, py::arg("backward") = false,
             py::arg("forced") = py::none(),
             "The CUDA kernels that would serve one layer on a device given by its properties. No GPU is needed.");
}

}  // namespace fused_rnn
