// Python's view of the extension: what was built, and the two composites as plain functions. torch.ops.fused_rnn.rnn and
// .cell are the same ops; their generic call converts every argument through a boxed value, which takes longer than a small
// step.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "cpu/cpu.h"
#include "cpu/gemm/weight_cache.h"
#include "cpu/isa/kernels.h"
#include "cpu/processors.h"
#include "torch/formula_ops.h"
#ifdef FUSED_RNN_WITH_CUDA
#include "torch/formula_device.h"
#endif
#include "torch/memory.h"
#include "torch/module_call.h"
#include "torch/ops.h"
#include "torch/second_order.h"
#include "torch/settings.h"

namespace fused_rnn {
void bind_plan(pybind11::module_& module);    // plan_bindings.cpp
void bind_choice(pybind11::module_& module);  // choice_bindings.cpp
}  // namespace fused_rnn

namespace {

using at::Tensor;

pybind11::dict build_info() {
  pybind11::dict info;
#ifdef FUSED_RNN_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cpu_instruction_set"] = fused_rnn::cpu::instruction_set();
  info["cpu_instruction_sets"] = fused_rnn::cpu::available_instruction_sets();
  return info;
}

pybind11::dict weight_cache() {
  const fused_rnn::cpu::WeightCacheStatistics statistics = fused_rnn::cpu::weight_cache_statistics();
  using pybind11::arg;
  return pybind11::dict(arg("limit") = statistics.limit, arg("bytes") = statistics.bytes,
                        arg("matrices") = statistics.matrices, arg("panels_found") = statistics.panels_found,
                        arg("panels_packed") = statistics.panels_packed);
}

pybind11::dict memory_pool() {
  const fused_rnn::MemoryPool::Statistics statistics = fused_rnn::MemoryPool::statistics();
  using pybind11::arg;
  return pybind11::dict(arg("shared_bytes") = statistics.shared_bytes, arg("shared_blocks") = statistics.shared_blocks,
                        arg("thread_bytes") = statistics.thread_bytes, arg("threads") = statistics.threads);
}

int64_t free_memory() {
  const pybind11::gil_scoped_release no_gil;
  const int64_t bytes = fused_rnn::MemoryPool::free() + fused_rnn::cpu::free_weight_cache();
#ifdef __GLIBC__
  malloc_trim(0);  // smaller blocks otherwise stay in the heaps of the threads that asked for them
#endif
  return bytes;
}

uint64_t content_hash(const Tensor& tensor) {
  TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), "tensor: expected contiguous memory of a CPU");
  return fused_rnn::cpu::selected_kernels().f32.hash(fused_rnn::cpu::hash_keys(), tensor.const_data_ptr(),
                                                     static_cast<int64_t>(tensor.nbytes()), 0);
}

// What a Python object is as an argument of one of the ops, of this name.
template <class T>
struct Argument;
template <>
struct Argument<Tensor> {
  static const Tensor& of(PyObject* object, const char* name) {
    TORCH_CHECK_TYPE(THPVariable_Check(object), name, ": expected a Tensor, got ", Py_TYPE(object)->tp_name);
    return THPVariable_Unpack(object);
  }
};
template <>
struct Argument<std::vector<Tensor>> {
  static std::vector<Tensor> of(PyObject* object, const char* name) {
    TORCH_CHECK_TYPE(PyList_Check(object), name, ": expected a list, got ", Py_TYPE(object)->tp_name);
    std::vector<Tensor> result;
    result.reserve(PyList_GET_SIZE(object));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(object); ++i) {
      result.push_back(Argument<Tensor>::of(PyList_GET_ITEM(object, i), name));
    }
    return result;
  }
};
template <>
struct Argument<int64_t> {
  static int64_t of(PyObject* object, const char*) {
    const int64_t value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw python_error();
    return value;
  }
};
template <>
struct Argument<double> {
  static double of(PyObject* object, const char*) {
    const double value = PyFloat_AsDouble(object);
    if (value == -1.0 && PyErr_Occurred()) throw python_error();
    return value;
  }
};

// Positional arguments of a METH_FASTCALL function, taken in order.
class Arguments {
 public:
  Arguments(const char* function, PyObject* const* args, Py_ssize_t count, Py_ssize_t expected) : next_(args) {
    TORCH_CHECK_TYPE(count == expected, function, ": expected ", expected, " arguments, got ", count);
  }
  template <class T>
  decltype(auto) take(const char* name) {
    return Argument<T>::of(*next_++, name);
  }

 private:
  PyObject* const* next_;
};

PyObject* list_of_tensors(std::vector<Tensor> tensors) {
  PyObject* result = PyList_New(static_cast<Py_ssize_t>(tensors.size()));
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyList_SET_ITEM(result, static_cast<Py_ssize_t>(i), THPVariable_Wrap(std::move(tensors[i])));
  }
  return result;
}

// rnn(input, states, weights, rows, recipe, dropout) -> (output, last)
PyObject* rnn(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static const auto op = fused_rnn::find_op<fused_rnn::RnnSignature>("fused_rnn::rnn");
  Arguments a("rnn", args, count, 6);
  const Tensor& input = a.take<Tensor>("input");
  const auto states = a.take<std::vector<Tensor>>("states"), weights = a.take<std::vector<Tensor>>("weights");
  const auto rows = a.take<std::vector<Tensor>>("rows");
  const auto recipe = a.take<int64_t>("recipe");
  const auto dropout = a.take<double>("dropout");
  auto [y, last] = [&] {
    const pybind11::gil_scoped_release no_gil;
    if (!fused_rnn::only_transforms()) return op.call(input, states, weights, rows, recipe, dropout);
    // Each level of torch.func would take the op apart: this is what it consists of.
    return fused_rnn::rnn_op(input, states, weights, rows, recipe, dropout);
  }();
  PyObject* result = PyTuple_New(2);
  PyTuple_SET_ITEM(result, 0, THPVariable_Wrap(std::move(y)));
  PyTuple_SET_ITEM(result, 1, list_of_tensors(std::move(last)));
  return result;
  END_HANDLE_TH_ERRORS
}

// cell(input, states, params, recipe) -> last
PyObject* cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static const auto op = fused_rnn::find_op<fused_rnn::CellSignature>("fused_rnn::cell");
  Arguments a("cell", args, count, 4);
  const Tensor& input = a.take<Tensor>("input");
  const auto states = a.take<std::vector<Tensor>>("states"), params = a.take<std::vector<Tensor>>("params");
  const auto recipe = a.take<int64_t>("recipe");
  return list_of_tensors([&] {
    const pybind11::gil_scoped_release no_gil;
    return op.call(input, states, params, recipe);
  }());
  END_HANDLE_TH_ERRORS
}

PyMethodDef fast_calls[] = {
    {"rnn", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(rnn)), METH_FASTCALL, "torch.ops.fused_rnn.rnn"},
    {"cell", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(cell)), METH_FASTCALL, "torch.ops.fused_rnn.cell"},
    {"call_module", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fused_rnn::call_module)), METH_FASTCALL,
     "A module's call on plain CPU tensors, or None where nn.Module.__call__ must be asked."},
    {"watch_modules", fused_rnn::watch_modules, METH_VARARGS, "What call_module stands for."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info,
        "cuda: whether CUDA kernels were built; cpu_instruction_set: the one in use; cpu_instruction_sets: those that this "
        "machine can run.");
  m.def(
      "cells",
      [] {
        pybind11::list all;
        for (int cell = 0; cell < fused_rnn::kCellCount; ++cell) {
          const auto traits = fused_rnn::traits_of(static_cast<fused_rnn::CellKind>(cell));
          all.append(pybind11::make_tuple(traits.name, traits.gates, traits.slots, traits.saved, traits.has_c,
                                          traits.reads_h, traits.may_project));
        }
        return all;
      },
      "csrc/core/params.h's list of cells: (name, gates, slots, saved, has_c, reads_h, may_project) of each.");
  m.def(
      "unpack_recipe",
      [](int64_t packed) {
        const fused_rnn::Recipe r = fused_rnn::recipe_of(packed, 0);
        return pybind11::make_tuple(static_cast<int>(r.cell), r.num_layers, r.has_biases, r.bidirectional, r.batch_first,
                                    r.training, r.all_states, r.family, r.in_graph);
      },
      "(cell, num_layers, has_biases, bidirectional, batch_first, training, all_states, family, in_graph) of an op's "
      "argument `recipe`.");
  m.def("weight_cache", &weight_cache,
        "Packed weights that are kept from one inference to the next on a CPU: limit and bytes, matrices that no call has "
        "in use, and "
        "panels of weights found as they were or packed, since the process began.");
  m.def("memory_pool", &memory_pool,
        "Memory of calls that is kept on a CPU for the next one: bytes and blocks that all threads share, bytes that single "
        "threads have, and how many threads there are that have called.");
  m.def("free_memory", &free_memory,
        "Frees the memory and the packed weights that no call has in use; returns their bytes.");
  m.def("set_idle_seconds", &fused_rnn::MemoryPool::set_idle_seconds,
        "After how many seconds memory that all threads share and none wants is freed (10), for tests.");
  m.def(
      "content_hash", [](pybind11::handle tensor) { return content_hash(THPVariable_Unpack(tensor.ptr())); },
      "Of a CPU tensor's memory, as panels of weights are recognised by it (csrc/cpu/isa/content_hash.h).");
  m.def(
      "second_order_serves",
      [](const pybind11::handle& x) {
        if (!THPVariable_Check(x.ptr())) throw pybind11::type_error("x: expected a Tensor");
        return fused_rnn::second_order_serves(THPVariable_Unpack(x.ptr()));
      },
      pybind11::arg("x"), "Whether the kernels' second derivatives and tangents may serve tensors of x's device now.");
  m.def("processors", &fused_rnn::cpu::processors, "How many processors the calling thread may use.");
  m.def("processors_of_groups", &fused_rnn::cpu::processors_of_groups, pybind11::arg("groups"), pybind11::arg("mount"),
        "Processors' worth of time that control groups allow, 0 for no limit (csrc/cpu/processors.h).");
  m.def("set_setting", &fused_rnn::set_setting, pybind11::arg("name"), pybind11::arg("value"),
        "What an environment variable chooses (csrc/torch/settings.h); an empty value is the default.");
  m.def("register_formula", &fused_rnn::register_formula, pybind11::arg("formula"), pybind11::arg("path"),
        "Lets the library at this path serve the formula (csrc/torch/formula_ops.h).");
  m.def("forget_formula", &fused_rnn::forget_formula, pybind11::arg("formula"), pybind11::arg("dtype"),
        "The formula's library does not serve it any more.");
#ifdef FUSED_RNN_WITH_CUDA
  m.def("register_formula_on_device", &fused_rnn::register_formula_on_device, pybind11::arg("formula"),
        pybind11::arg("path"), "Lets the CUDA kernels in this file serve the formula (csrc/torch/formula_device.h).");
  m.def("add_formula_on_device", &fused_rnn::add_formula_on_device, pybind11::arg("formula"), pybind11::arg("path"),
        "Adds the CUDA kernels in this file, of further families, to those that serve the formula.");
  m.def("forget_formula_on_device", &fused_rnn::forget_formula_on_device, pybind11::arg("formula"), pybind11::arg("dtype"),
        pybind11::arg("capability"), "The formula's CUDA kernels do not serve it any more.");
  m.def("has_formula_on_device", &fused_rnn::has_formula_on_device, pybind11::arg("formula"), pybind11::arg("dtype"),
        pybind11::arg("capability"), "Whether CUDA kernels serve the formula on devices of this compute capability.");
  m.def("set_formula_family", &fused_rnn::set_formula_family, pybind11::arg("formula"), pybind11::arg("dtype"),
        pybind11::arg("capability"), pybind11::arg("family"), pybind11::arg("state"), pybind11::arg("ranks") = 0,
        "Whether the formula's kernels of family single, cluster or grid serve: 0: not yet, 1: wherever they can, with so "
        "many blocks of a team, 2: as FUSED_RNN_PLAN says (csrc/torch/formula_device.h).");
  m.def("formula_plan_on_device", &fused_rnn::formula_plan_on_device, pybind11::arg("formula"), pybind11::arg("dtype"),
        pybind11::arg("device"), pybind11::arg("T"), pybind11::arg("B"), pybind11::arg("H"), pybind11::arg("D"),
        pybind11::arg("heads"), pybind11::arg("backward"), "Family, launches, tiles and memory of a layer, as a sentence.");
#endif
  m.def("formula_facts", &fused_rnn::formula_facts, pybind11::arg("formula"), pybind11::arg("dtype"),
        "(saved, phases, reads_series) of a registered formula (csrc/cpu/isa/formula.h).");
  m.def("formula_constants", &fused_rnn::formula_constants,
        "Bits and limits of the ops of formulas, by their names in fused_rnn/formula.");
  m.def("has_formula", &fused_rnn::has_formula, pybind11::arg("formula"), pybind11::arg("dtype"),
        "Whether a library serves the formula for a dtype (0: float64, float32, float16, bfloat16) on the instruction set "
        "in use.");
  fused_rnn::bind_plan(m);
  fused_rnn::bind_choice(m);
  if (PyModule_AddFunctions(m.ptr(), fast_calls) != 0) throw pybind11::error_already_set();
}
