// Python's view of the extension: what was built, and the two composites as plain functions. torch.ops.fused_rnn.rnn and .cell
// are the same ops; their generic call converts every argument through a boxed value, which takes longer than a small step.
#include <ATen/core/dispatch/Dispatcher.h>
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
#include "torch/memory.h"
#include "torch/module_call.h"
#include "torch/ops.h"
#include "torch/settings.h"

namespace fused_rnn {
void bind_plan(pybind11::module_& module);  // plan_bindings.cpp
}

namespace {

using at::Tensor;
using fused_rnn::OptionalTensor;

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
  const fused_rnn::cpu::KeptStatistics statistics = fused_rnn::cpu::kept_statistics();
  using pybind11::arg;
  return pybind11::dict(arg("limit") = statistics.limit, arg("bytes") = statistics.bytes,
                        arg("matrices") = statistics.matrices, arg("panels_found") = statistics.panels_found,
                        arg("panels_packed") = statistics.panels_packed);
}

pybind11::dict kept_memory() {
  const fused_rnn::KeptMemory::Statistics statistics = fused_rnn::KeptMemory::statistics();
  using pybind11::arg;
  return pybind11::dict(arg("shared_bytes") = statistics.shared_bytes, arg("shared_blocks") = statistics.shared_blocks,
                        arg("thread_bytes") = statistics.thread_bytes, arg("threads") = statistics.threads);
}

int64_t free_memory() {
  const pybind11::gil_scoped_release no_gil;
  const int64_t bytes = fused_rnn::KeptMemory::free() + fused_rnn::cpu::free_kept_weights();
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

// Positional arguments of a METH_FASTCALL function.
class Arguments {
 public:
  Arguments(const char* function, PyObject* const* args, Py_ssize_t count, Py_ssize_t expected) : args_(args) {
    TORCH_CHECK_TYPE(count == expected, function, ": expected ", expected, " arguments, got ", count);
  }
  const Tensor& tensor(int i) const {
    TORCH_CHECK_TYPE(THPVariable_Check(args_[i]), "argument ", i, ": expected a Tensor, got ", Py_TYPE(args_[i])->tp_name);
    return THPVariable_Unpack(args_[i]);
  }
  OptionalTensor optional(int i) const { return args_[i] == Py_None ? std::nullopt : OptionalTensor(tensor(i)); }
  std::vector<Tensor> tensors(int i) const {
    TORCH_CHECK_TYPE(PyList_Check(args_[i]), "argument ", i, ": expected a list, got ", Py_TYPE(args_[i])->tp_name);
    std::vector<Tensor> result;
    const Py_ssize_t count = PyList_GET_SIZE(args_[i]);
    result.reserve(count);
    for (Py_ssize_t k = 0; k < count; ++k) {
      PyObject* item = PyList_GET_ITEM(args_[i], k);
      TORCH_CHECK_TYPE(THPVariable_Check(item), "argument ", i, "[", k, "]: expected a Tensor, got ",
                       Py_TYPE(item)->tp_name);
      result.push_back(THPVariable_Unpack(item));
    }
    return result;
  }
  bool boolean(int i) const {
    const int value = PyObject_IsTrue(args_[i]);
    if (value < 0) throw python_error();
    return value;
  }
  int64_t integer(int i) const {
    const int64_t value = PyLong_AsLongLong(args_[i]);
    if (value == -1 && PyErr_Occurred()) throw python_error();
    return value;
  }
  double number(int i) const {
    const double value = PyFloat_AsDouble(args_[i]);
    if (value == -1.0 && PyErr_Occurred()) throw python_error();
    return value;
  }

 private:
  PyObject* const* args_;
};

template <class... Tensors>
PyObject* tuple_of(Tensors&&... tensors) {
  PyObject* result = PyTuple_New(sizeof...(tensors));
  Py_ssize_t i = 0;
  (PyTuple_SET_ITEM(result, i++, THPVariable_Wrap(std::forward<Tensors>(tensors))), ...);
  return result;
}

// rnn(input, h0, c0, weights, lengths, offsets, resets, cell, num_layers, has_biases, bidirectional, dropout, training,
//     batch_first) -> (output, h_n, c_n)
PyObject* rnn(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_rnn::rnn", "").typed<fused_rnn::RnnSignature>();
  const Arguments a("rnn", args, count, 14);
  const auto weights = a.tensors(3);
  const OptionalTensor h0 = a.optional(1), c0 = a.optional(2), lengths = a.optional(4), offsets = a.optional(5),
                       resets = a.optional(6);
  const Tensor& input = a.tensor(0);
  const int64_t cell = a.integer(7), num_layers = a.integer(8);
  const double dropout = a.number(11);
  const bool has_biases = a.boolean(9), bidirectional = a.boolean(10), training = a.boolean(12), batch_first = a.boolean(13);
  auto [y, h_n, c_n] = [&] {
    const pybind11::gil_scoped_release no_gil;
    return op.call(input, h0, c0, weights, lengths, offsets, resets, cell, num_layers, has_biases, bidirectional, dropout,
                   training, batch_first);
  }();
  return tuple_of(std::move(y), std::move(h_n), std::move(c_n));
  END_HANDLE_TH_ERRORS
}

// cell(input, h, c, params, has_biases, cell) -> (h, c)
PyObject* cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_rnn::cell", "").typed<fused_rnn::CellSignature>();
  const Arguments a("cell", args, count, 6);
  const auto params = a.tensors(3);
  const OptionalTensor h = a.optional(1), c = a.optional(2);
  const Tensor& input = a.tensor(0);
  const bool has_biases = a.boolean(4);
  const int64_t kind = a.integer(5);
  auto [new_h, new_c] = [&] {
    const pybind11::gil_scoped_release no_gil;
    return op.call(input, h, c, params, has_biases, kind);
  }();
  return tuple_of(std::move(new_h), std::move(new_c));
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
          all.append(
              pybind11::make_tuple(traits.name, traits.gates, traits.slots, traits.saved, traits.has_c, traits.reads_h));
        }
        return all;
      },
      "csrc/core/params.h's list of cells: (name, gates, slots, saved, has_c, reads_h) of each.");
  m.def("weight_cache", &weight_cache,
        "Packed weights that are kept from one inference to the next on a CPU: limit and bytes, matrices that no call has "
        "in use, and "
        "panels of weights found as they were or packed, since the process began.");
  m.def("kept_memory", &kept_memory,
        "Memory of calls that is kept on a CPU for the next one: bytes and blocks that all threads share, bytes that single "
        "threads have, and how many threads there are that have called.");
  m.def("free_memory", &free_memory,
        "Frees the memory and the packed weights that no call has in use; returns their bytes.");
  m.def("set_idle_seconds", &fused_rnn::KeptMemory::set_idle_seconds,
        "After how many seconds memory that all threads share and none wants is freed (10), for tests.");
  m.def(
      "content_hash", [](pybind11::handle tensor) { return content_hash(THPVariable_Unpack(tensor.ptr())); },
      "Of a CPU tensor's memory, as panels of weights are recognised by it (csrc/cpu/isa/content_hash.h).");
  m.def("processors", &fused_rnn::cpu::processors, "How many processors the calling thread may use.");
  m.def("processors_of_groups", &fused_rnn::cpu::processors_of_groups, pybind11::arg("groups"), pybind11::arg("mount"),
        "Processors' worth of time that control groups allow, 0 for no limit (csrc/cpu/processors.h).");
  m.def("set_setting", &fused_rnn::set_setting, pybind11::arg("name"), pybind11::arg("value"),
        "What an environment variable chooses (csrc/torch/settings.h); an empty value is the default.");
  fused_rnn::bind_plan(m);
  if (PyModule_AddFunctions(m.ptr(), fast_calls) != 0) throw pybind11::error_already_set();
}
