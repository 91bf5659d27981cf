// The forward of a module in one C++ call, for the case that streaming makes most often: plain CPU tensors, no gradients. A step of
// a small network takes a few microseconds, and Python's share of it was as much again. Both functions return None for every
// other case and for arguments that do not fit: the Python code then takes its general way, and raises what there is to raise.
#include "module_call.h"

#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "ops.h"

namespace fused_rnn {
namespace {

// The names of an nn.Module's fields.
struct Names {
  PyObject *parameters, *weights_override, *flat_weights_names, *num_layers, *bidirectional, *batch_first, *input_size,
      *hidden_size, *proj_size, *bias, *dropout, *training;
  PyObject* cell_weights;  // tuple
};
const Names& names() {
  static const Names all = [] {
    const auto name = PyUnicode_InternFromString;
    PyObject* cell = PyTuple_Pack(4, name("weight_ih"), name("weight_hh"), name("bias_ih"), name("bias_hh"));
    return Names{name("_parameters"),
                 name("_weights_override"),
                 name("_flat_weights_names"),
                 name("num_layers"),
                 name("bidirectional"),
                 name("batch_first"),
                 name("input_size"),
                 name("hidden_size"),
                 name("proj_size"),
                 name("bias"),
                 name("dropout"),
                 name("training"),
                 cell};
  }();
  return all;
}

// A module's __dict__. Every getter returns false where the field is missing or of another type.
class Fields {
 public:
  explicit Fields(PyObject* dict) : dict_(dict) {}
  bool has(PyObject* name) const { return PyDict_Contains(dict_, name) == 1; }
  PyObject* get(PyObject* name) const { return PyDict_GetItemWithError(dict_, name); }  // borrowed
  bool read(PyObject* name, int64_t& value) const {
    PyObject* item = get(name);
    if (!item || !PyLong_Check(item)) return false;
    value = PyLong_AsLongLong(item);
    return !(value == -1 && PyErr_Occurred());
  }
  bool read(PyObject* name, bool& value) const {
    PyObject* item = get(name);
    if (!item || !PyBool_Check(item)) return false;
    value = item == Py_True;
    return true;
  }
  bool read(PyObject* name, double& value) const {
    PyObject* item = get(name);
    if (!item || !PyFloat_Check(item)) {
      int64_t integer = 0;
      if (!read(name, integer)) return false;
      value = static_cast<double>(integer);
      return true;
    }
    value = PyFloat_AsDouble(item);
    return true;
  }
  // The parameters of these names (a list or a tuple), in order.
  bool parameters(PyObject* wanted, std::vector<Tensor>& weights, bool skip_none) const {
    PyObject* all = get(names().parameters);
    if (!all || !PyDict_Check(all) || !wanted || !(PyList_Check(wanted) || PyTuple_Check(wanted))) return false;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(wanted);
    weights.reserve(count);
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* item = PyDict_GetItemWithError(all, PySequence_Fast_GET_ITEM(wanted, i));
      if (item == Py_None && skip_none) continue;
      if (!item || !THPVariable_CheckExact(item)) return false;
      weights.push_back(THPVariable_Unpack(item));
    }
    return !weights.empty();
  }

 private:
  PyObject* dict_;
};

bool read_state(PyObject* object, OptionalTensor& state) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  state = THPVariable_Unpack(object);
  return true;
}

bool fits(const OptionalTensor& state, at::IntArrayRef shape, const Tensor& input) {
  return !state || (state->sizes() == shape && state->scalar_type() == input.scalar_type());
}

// An owned reference, or none and nothing raised: a failed lookup may have left an error.
PyObject* general_way() {
  PyErr_Clear();
  Py_RETURN_NONE;
}

PyObject* pair_of(Tensor&& h, Tensor&& c) {
  PyObject* result = PyTuple_New(2);
  PyTuple_SET_ITEM(result, 0, THPVariable_Wrap(std::move(h)));
  PyTuple_SET_ITEM(result, 1, THPVariable_Wrap(std::move(c)));
  return result;
}

}  // namespace

PyObject* call_layers(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  OptionalTensor h0, c0;
  if (count != 5 || !PyDict_Check(args[0]) || !PyLong_Check(args[1]) || !THPVariable_CheckExact(args[2]) ||
      !read_state(args[3], h0) || !read_state(args[4], c0)) {
    return general_way();
  }
  const Fields fields(args[0]);
  const int64_t cell = PyLong_AsLongLong(args[1]);
  const Tensor& input = THPVariable_Unpack(args[2]);
  const Names& n = names();
  int64_t num_layers = 0, input_size = 0, hidden = 0, proj = 0;
  bool bidirectional = false, batch_first = false, bias = false, training = false;
  double dropout = 0;
  std::vector<Tensor> weights;
  if (fields.has(n.weights_override) || !fields.read(n.num_layers, num_layers) || !fields.read(n.input_size, input_size) ||
      !fields.read(n.hidden_size, hidden) || !fields.read(n.proj_size, proj) ||
      !fields.read(n.bidirectional, bidirectional) || !fields.read(n.batch_first, batch_first) ||
      !fields.read(n.bias, bias) || !fields.read(n.training, training) || !fields.read(n.dropout, dropout) ||
      !fields.parameters(fields.get(n.flat_weights_names), weights, false)) {
    return general_way();
  }
  if (input.dim() != 3 || input.size(2) != input_size || input.size(0) == 0 || input.size(1) == 0 ||
      input.scalar_type() != weights[0].scalar_type() || !runs_plainly_on_cpu(input, h0, c0, weights)) {
    return general_way();
  }
  const int64_t rows = num_layers * (bidirectional ? 2 : 1), batch = input.size(batch_first ? 0 : 1);
  if (!fits(h0, {rows, batch, proj ? proj : hidden}, input) || !fits(c0, {rows, batch, hidden}, input)) return general_way();
  auto [y, h_n, c_n] = [&] {
    const pybind11::gil_scoped_release no_gil;
    return rnn_on_cpu(input, h0, c0, weights, std::nullopt, std::nullopt, std::nullopt, cell, num_layers, bias,
                      bidirectional, dropout, training, batch_first);
  }();
  PyObject* states = c_n.defined() ? pair_of(std::move(h_n), std::move(c_n)) : THPVariable_Wrap(std::move(h_n));
  PyObject* result = PyTuple_New(2);
  PyTuple_SET_ITEM(result, 0, THPVariable_Wrap(std::move(y)));
  PyTuple_SET_ITEM(result, 1, states);
  return result;
  END_HANDLE_TH_ERRORS
}

PyObject* call_cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  OptionalTensor h, c;
  if (count != 5 || !PyDict_Check(args[0]) || !PyLong_Check(args[1]) || !THPVariable_CheckExact(args[2]) ||
      !read_state(args[3], h) || !read_state(args[4], c)) {
    return general_way();
  }
  const Fields fields(args[0]);
  const Tensor& input = THPVariable_Unpack(args[2]);
  const int64_t cell = PyLong_AsLongLong(args[1]);
  int64_t input_size = 0, hidden = 0;
  std::vector<Tensor> weights;
  if (fields.has(names().weights_override) || !fields.read(names().input_size, input_size) ||
      !fields.read(names().hidden_size, hidden) || !fields.parameters(names().cell_weights, weights, true)) {
    return general_way();
  }
  if (input.dim() != 2 || input.size(1) != input_size || input.size(0) == 0 ||
      (weights.size() != 2 && weights.size() != 4) || input.scalar_type() != weights[0].scalar_type() ||
      !fits(h, {input.size(0), hidden}, input) || !fits(c, {input.size(0), hidden}, input) ||
      !runs_plainly_on_cpu(input, h, c, weights)) {
    return general_way();
  }
  auto [new_h, new_c] = [&] {
    const pybind11::gil_scoped_release no_gil;
    return cell_on_cpu(input, h, c, weights, weights.size() == 4, cell);
  }();
  if (!new_c.defined()) return THPVariable_Wrap(std::move(new_h));
  return pair_of(std::move(new_h), std::move(new_c));
  END_HANDLE_TH_ERRORS
}

}  // namespace fused_rnn
