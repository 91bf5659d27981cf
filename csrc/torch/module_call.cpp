// A call of a module in one C++ call, for the case that streaming makes most often: plain CPU tensors, no hooks. A step of a small
// network takes a few microseconds, and nn.Module.__call__, forward and the dispatcher were more than that. Returns None in
// every other case and for arguments that do not fit: nn.Module.__call__ then runs forward, which raises what there is to raise.
#include "torch/module_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "torch/ops.h"

namespace fused_rnn {
namespace {

// The names of an nn.Module's fields.
struct Names {
  PyObject *parameters, *weights_override, *flat_weights_names, *num_layers, *bidirectional, *batch_first, *input_size,
      *hidden_size, *proj_size, *bias, *dropout, *training, *mode, *nonlinearity, *forward, *compiled, *call;
  PyObject* cell_weights;  // tuple
  PyObject* hooks[4];
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
                 name("mode"),
                 name("nonlinearity"),
                 name("forward"),
                 name("_compiled_call_impl"),
                 name("__call__"),
                 cell,
                 {name("_forward_hooks"), name("_forward_pre_hooks"), name("_backward_hooks"), name("_backward_pre_hooks")}};
  }();
  return all;
}

// What Python told at import (watch_modules).
struct Watched {
  struct Forward {
    PyObject* function;
    bool is_cell;
    int64_t cell;  // -1: by the module's `mode` or `nonlinearity`
  };
  std::vector<Forward> forwards;
  PyTypeObject* module = nullptr;  // nn.Module
  PyObject* call = nullptr;        // its __call__
  PyObject* global_hooks = nullptr;
  PyObject *modes = nullptr, *nonlinearities = nullptr;  // dicts: the number of a cell by either
};
Watched& watched() {
  static Watched all;
  return all;
}

// Tensors that somebody else keeps alive. Owning one that Python holds counts a reference there as well, which takes longer than an
// element-wise operation of a small step.
class Borrowed {
 public:
  Borrowed() = default;
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  ~Borrowed() {
    for (Tensor& t : tensors_) c10::MaybeOwnedTraits<Tensor>::destroyBorrow(t);
  }
  void reserve(size_t count) { tensors_.reserve(count); }
  void push_back(const Tensor& t) { tensors_.push_back(c10::MaybeOwnedTraits<Tensor>::createBorrow(t)); }
  const std::vector<Tensor>& tensors() const { return tensors_; }

 private:
  std::vector<Tensor> tensors_;
};

// A module's __dict__. Every getter returns false where the field is missing or of another type.
class Fields {
 public:
  explicit Fields(PyObject* dict) : dict_(dict) {}
  bool has(PyObject* name) const { return PyDict_Contains(dict_, name) == 1; }
  PyObject* get(PyObject* name) const { return PyDict_GetItemWithError(dict_, name); }  // borrowed
  bool read(PyObject* name, int64_t& value) const {
    PyObject* item = get(name);
    if (!item || !PyLong_CheckExact(item)) return false;  // not a bool
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
  bool parameters(PyObject* wanted, Borrowed& weights, bool skip_none) const {
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
    return !weights.tensors().empty();
  }

 private:
  PyObject* dict_;
};

// A state that is borrowed or none.
class BorrowedState {
 public:
  BorrowedState() = default;
  BorrowedState(const BorrowedState&) = delete;
  BorrowedState& operator=(const BorrowedState&) = delete;
  ~BorrowedState() {
    if (state_) c10::MaybeOwnedTraits<Tensor>::destroyBorrow(*state_);
  }
  // object: a tensor, None, or null for None; false for anything else.
  bool read(PyObject* object) {
    if (!object || object == Py_None) return true;
    if (!THPVariable_CheckExact(object)) return false;
    state_.emplace(c10::MaybeOwnedTraits<Tensor>::createBorrow(THPVariable_Unpack(object)));
    return true;
  }
  const OptionalTensor& get() const { return state_; }

 private:
  OptionalTensor state_;
};

bool same_dtype(const Tensor& input, const std::vector<Tensor>& weights) {
  return std::all_of(weights.begin(), weights.end(),
                     [&](const Tensor& w) { return w.scalar_type() == input.scalar_type(); });
}

bool fits(const OptionalTensor& state, at::IntArrayRef shape, const Tensor& input) {
  return !state || (state->sizes() == shape && state->scalar_type() == input.scalar_type());
}
// An LSTM's c may be float where the input has 16 bits.
bool c_fits(const OptionalTensor& c, at::IntArrayRef shape, const Tensor& input) {
  return fits(c, shape, input) || (input.element_size() == 2 && c->scalar_type() == at::kFloat && c->sizes() == shape);
}

// Runs f without the GIL, and with the tensors owned, where it takes long enough for another thread to gain from it: more than
// `work` multiply-adds, some ten microseconds.
template <class F>
auto run(const Tensor& input, const OptionalTensor& h, const OptionalTensor& c, const std::vector<Tensor>& weights,
         int64_t steps, F&& f) {
  constexpr int64_t kShort = int64_t{1} << 19;
  int64_t work = 0;
  for (const Tensor& w : weights) work += w.numel();
  if (work * steps <= kShort) return f();
  const std::vector<Tensor> owned = weights;
  const Tensor owned_input = input;
  const OptionalTensor owned_h = h, owned_c = c;
  const pybind11::gil_scoped_release no_gil;
  return f();
}

PyObject* pair_of(PyObject* first, PyObject* second) {
  PyObject* result = PyTuple_New(2);
  PyTuple_SET_ITEM(result, 0, first);
  PyTuple_SET_ITEM(result, 1, second);
  return result;
}

// The call of a layer module; null where the general way must be taken.
PyObject* call_layers(const Fields& fields, int64_t cell, const Tensor& input, const OptionalTensor& h0,
                      const OptionalTensor& c0) {
  const Names& n = names();
  int64_t num_layers = 0, input_size = 0, hidden = 0, proj = 0;
  bool bidirectional = false, batch_first = false, bias = false, training = false;
  double dropout = 0;
  Borrowed borrowed;
  if (fields.has(n.weights_override) || !fields.read(n.num_layers, num_layers) || !fields.read(n.input_size, input_size) ||
      !fields.read(n.hidden_size, hidden) || !fields.read(n.proj_size, proj) ||
      !fields.read(n.bidirectional, bidirectional) || !fields.read(n.batch_first, batch_first) ||
      !fields.read(n.bias, bias) || !fields.read(n.training, training) || !fields.read(n.dropout, dropout) ||
      !fields.parameters(fields.get(n.flat_weights_names), borrowed, false)) {
    return nullptr;
  }
  const std::vector<Tensor>& weights = borrowed.tensors();
  if (input.dim() != 3 || input.size(2) != input_size || input.size(0) == 0 || input.size(1) == 0 ||
      !same_dtype(input, weights) || !runs_plainly_on_cpu(input, h0, c0, weights)) {
    return nullptr;
  }
  const int64_t rows = num_layers * (bidirectional ? 2 : 1), batch = input.size(batch_first ? 0 : 1);
  if (!fits(h0, {rows, batch, proj ? proj : hidden}, input) || !c_fits(c0, {rows, batch, hidden}, input)) return nullptr;
  auto [y, h_n, c_n] = run(input, h0, c0, weights, input.size(0) * input.size(1), [&] {
    return rnn_on_cpu(input, h0, c0, weights, std::nullopt, std::nullopt, std::nullopt, cell, num_layers, bias,
                      bidirectional, dropout, training, batch_first);
  });
  PyObject* output = THPVariable_Wrap(std::move(y));
  PyObject* h = THPVariable_Wrap(std::move(h_n));
  return pair_of(output, c_n.defined() ? pair_of(h, THPVariable_Wrap(std::move(c_n))) : h);
}

// The call of a cell module; null where the general way must be taken.
PyObject* call_cell(const Fields& fields, int64_t cell, const Tensor& input, const OptionalTensor& h,
                    const OptionalTensor& c) {
  int64_t input_size = 0, hidden = 0;
  Borrowed borrowed;
  if (!fields.read(names().input_size, input_size) || !fields.read(names().hidden_size, hidden) ||
      !fields.parameters(names().cell_weights, borrowed, true)) {
    return nullptr;
  }
  const std::vector<Tensor>& weights = borrowed.tensors();
  if (input.dim() != 2 || input.size(1) != input_size || input.size(0) == 0 ||
      (weights.size() != 2 && weights.size() != 4) || !same_dtype(input, weights) ||
      !fits(h, {input.size(0), hidden}, input) || !c_fits(c, {input.size(0), hidden}, input) ||
      !runs_plainly_on_cpu(input, h, c, weights)) {
    return nullptr;
  }
  auto [new_h, new_c] =
      run(input, h, c, weights, input.size(0), [&] { return cell_on_cpu(input, h, c, weights, weights.size() == 4, cell); });
  PyObject* result = THPVariable_Wrap(std::move(new_h));
  return new_c.defined() ? pair_of(result, THPVariable_Wrap(std::move(new_c))) : result;
}

// Which forward nn.Module.__call__ would run, if it would do nothing else; null where it would or where forward is another's.
const Watched::Forward* plain_forward(PyObject* module, const Fields& fields) {
  const Watched& all = watched();
  const Names& n = names();
  if (!all.module || _PyType_Lookup(all.module, n.call) != all.call) return nullptr;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(all.global_hooks); ++i) {
    if (PyDict_GET_SIZE(PyTuple_GET_ITEM(all.global_hooks, i)) != 0) return nullptr;
  }
  for (PyObject* name : n.hooks) {
    PyObject* hooks = fields.get(name);
    if (!hooks || !PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) != 0) return nullptr;
  }
  if (fields.has(n.forward) || fields.has(n.compiled)) return nullptr;  // an instance's own, and what compile() made
  const PyObject* forward = _PyType_Lookup(Py_TYPE(module), n.forward);
  for (const Watched::Forward& known : all.forwards) {
    if (known.function == forward) return &known;
  }
  return nullptr;
}

// The cell of an RNN by its `mode` or an RNNCell's `nonlinearity`; -1 if it is no cell's.
int64_t cell_by_name(const Fields& fields, bool is_cell) {
  PyObject* name = fields.get(is_cell ? names().nonlinearity : names().mode);
  PyObject* cell = name && PyUnicode_Check(name)
                       ? PyDict_GetItemWithError(is_cell ? watched().nonlinearities : watched().modes, name)
                       : nullptr;
  return cell ? PyLong_AsLongLong(cell) : -1;
}

PyObject* call(PyObject* module, PyObject* input, PyObject* hx) {
  if (!THPVariable_CheckExact(input) || at::impl::torch_function_mode_enabled()) return nullptr;
  if (THPVariable_Unpack(input).is_complex() || THPVariable_Unpack(input).is_nested()) return nullptr;  // have no kernels
  const auto dict = pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(module, nullptr));
  if (!dict || !PyDict_Check(dict.ptr())) return nullptr;
  const Fields fields(dict.ptr());
  const Watched::Forward* forward = plain_forward(module, fields);
  if (!forward) return nullptr;
  const int64_t cell = forward->cell >= 0 ? forward->cell : cell_by_name(fields, forward->is_cell);
  if (cell < 0) return nullptr;
  BorrowedState h, c;
  if (traits_of(static_cast<CellKind>(cell)).has_c && hx && hx != Py_None) {
    if (!PyTuple_Check(hx) || PyTuple_GET_SIZE(hx) != 2 || PyTuple_GET_ITEM(hx, 0) == Py_None ||
        PyTuple_GET_ITEM(hx, 1) == Py_None || !h.read(PyTuple_GET_ITEM(hx, 0)) || !c.read(PyTuple_GET_ITEM(hx, 1))) {
      return nullptr;
    }
  } else if (!h.read(hx)) {
    return nullptr;
  }
  return (forward->is_cell ? call_cell : call_layers)(fields, cell, THPVariable_Unpack(input), h.get(), c.get());
}

}  // namespace

PyObject* call_module(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  PyObject* result = count == 2 || count == 3 ? call(args[0], args[1], count == 3 ? args[2] : nullptr) : nullptr;
  if (result) return result;
  PyErr_Clear();  // a failed lookup may have left an error
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* watch_modules(PyObject*, PyObject* args) {
  PyObject *module = nullptr, *global_hooks = nullptr, *forwards = nullptr, *modes = nullptr, *nonlinearities = nullptr;
  if (!PyArg_ParseTuple(args, "O!O!O!O!O!", &PyType_Type, &module, &PyTuple_Type, &global_hooks, &PyTuple_Type, &forwards,
                        &PyDict_Type, &modes, &PyDict_Type, &nonlinearities)) {
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(global_hooks); ++i) {
    if (!PyDict_Check(PyTuple_GET_ITEM(global_hooks, i))) {
      PyErr_SetString(PyExc_TypeError, "global_hooks: expected a tuple of dict");
      return nullptr;
    }
  }
  Watched& all = watched();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(forwards); ++i) {
    PyObject* function = nullptr;
    int is_cell = 0;
    long long cell = 0;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(forwards, i), "OpL", &function, &is_cell, &cell)) return nullptr;
    Py_INCREF(function);
    all.forwards.push_back({function, is_cell != 0, cell});
  }
  // They last as long as the process.
  all.module = reinterpret_cast<PyTypeObject*>(module);
  all.call = _PyType_Lookup(all.module, names().call);
  all.global_hooks = global_hooks;
  all.modes = modes;
  all.nonlinearities = nonlinearities;
  Py_INCREF(module);
  Py_INCREF(all.call);
  Py_INCREF(global_hooks);
  Py_INCREF(modes);
  Py_INCREF(nonlinearities);
  Py_RETURN_NONE;
}

}  // namespace fused_rnn
