// A module's call as one C++ call, where streaming needs it most: plain CPU tensors, or torch.func's wrappers of such, and
// no hooks. A step of a small network takes a few microseconds; nn.Module.__call__, forward and the dispatcher took longer
// than the step. In every other case, and for arguments that the layer's checks refuse (call.h), the result is None:
// nn.Module.__call__ then runs forward, and the checks of modules.py and cells.py raise torch.nn's errors.
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
  PyObject *parameters, *weights_override, *regularisation, *flat_weights_names, *num_layers, *bidirectional, *batch_first,
      *input_size, *hidden_size, *bias, *dropout, *training, *mode, *nonlinearity, *forward, *compiled, *call, *checkpoint;
  PyObject* cell_weights;  // tuple
  PyObject* hooks[4];
};
const Names& names() {
  static const Names all = [] {
    const auto name = PyUnicode_InternFromString;
    PyObject* cell = PyTuple_Pack(4, name("weight_ih"), name("weight_hh"), name("bias_ih"), name("bias_hh"));
    return Names{name("_parameters"),
                 name("_weights_override"),
                 name("_regularisation"),
                 name("_flat_weights_names"),
                 name("num_layers"),
                 name("bidirectional"),
                 name("batch_first"),
                 name("input_size"),
                 name("hidden_size"),
                 name("bias"),
                 name("dropout"),
                 name("training"),
                 name("mode"),
                 name("nonlinearity"),
                 name("forward"),
                 name("_compiled_call_impl"),
                 name("__call__"),
                 name("checkpoint"),
                 cell,
                 {name("_forward_hooks"), name("_forward_pre_hooks"), name("_backward_hooks"), name("_backward_pre_hooks")}};
  }();
  return all;
}

// What watch_modules was told when Python imported the modules.
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

// Tensors that the caller keeps alive. Owning a tensor that Python holds would count a reference in Python too, which takes
// longer than an element-wise operation of a small step.
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
  at::TensorList tensors() const { return tensors_; }

 private:
  c10::SmallVector<Tensor, 5> tensors_;
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
  // The parameters of these names (a list or a tuple), in order: at least two, matrices first.
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
    return weights.tensors().size() >= 2 && weights.tensors()[0].dim() == 2;
  }

 private:
  PyObject* dict_;
};

// Runs f(call). A call of more than kShort multiply-adds, some ten microseconds, owns its tensors and releases the GIL, so
// that other threads of Python run meanwhile.
template <class F>
Results run(const Call& call, F&& f) {
  constexpr int64_t kShort = int64_t{1} << 19;
  int64_t work = 0;
  for (const Tensor& w : call.params) work += w.numel();
  const int64_t rows = call.has_ids() ? call.x.numel() : call.x.numel() / std::max<int64_t>(call.x.size(-1), 1);
  if (work * rows <= kShort) return f(call);
  const std::vector<Tensor> params = call.params.vec(), states = call.states.vec();
  const Tensor x = call.x;
  const pybind11::gil_scoped_release no_gil;
  return f(Call{x, states, params, call.rows, call.recipe, call.one_step});
}

PyObject* pair_of(PyObject* first, PyObject* second) {
  PyObject* result = PyTuple_New(2);
  PyTuple_SET_ITEM(result, 0, first);
  PyTuple_SET_ITEM(result, 1, second);
  return result;
}

// A state, or a tuple of two.
PyObject* wrapped(States states) {
  PyObject* h = THPVariable_Wrap(std::move(states[0]));
  return states.size() == 2 ? pair_of(h, THPVariable_Wrap(std::move(states[1]))) : h;
}

// Under torch.func: tensors on a CPU, or a transform's wrappers of such.
bool runs_transformed_on_cpu(const Call& call) {
  const auto serves = [](const Tensor& t) {
    return t.is_cpu() && t.layout() == at::kStrided && !t.unsafeGetTensorImpl()->is_python_dispatch() && !t.is_nested();
  };
  return only_transforms() && !call.has_ids() && serves(call.x) &&
         std::all_of(call.states.begin(), call.states.end(), serves) &&
         std::all_of(call.params.begin(), call.params.end(), serves);
}

// False where the call must go through nn.Module.__call__, also for what the layer's checks refuse.
bool run_call(const Call& call, Results& results) {
  const bool plain = runs_plainly_on_cpu(call);
  if (!plain && !runs_transformed_on_cpu(call)) return false;
  try {
    results = run(call, plain ? run_on_cpu : run_composite);
  } catch (const c10::Error&) {
    return false;
  }
  return true;
}

// (output, last states) of a layer module; null where nn.Module.__call__ must be asked.
PyObject* call_layers(const Fields& fields, CellKind cell, const Tensor& input, at::TensorList states) {
  const Names& n = names();
  Recipe recipe;
  recipe.cell = cell;
  int64_t input_size = 0, hidden_size = 0;
  Borrowed weights;
  const int64_t ids = input.scalar_type() == at::kLong;  // have one dimension less
  if (input.dim() != 3 - ids || fields.has(n.weights_override) || fields.has(n.checkpoint) ||
      !fields.read(n.num_layers, recipe.num_layers) || recipe.num_layers < 1 ||
      !fields.read(n.bidirectional, recipe.bidirectional) || !fields.read(n.batch_first, recipe.batch_first) ||
      !fields.read(n.bias, recipe.has_biases) || !fields.read(n.training, recipe.training) ||
      !fields.read(n.dropout, recipe.dropout) || !fields.read(n.input_size, input_size) ||
      !fields.read(n.hidden_size, hidden_size) || !fields.parameters(fields.get(n.flat_weights_names), weights, false)) {
    return nullptr;
  }
  const at::TensorList params = weights.tensors();
  if ((ids ? params[0].size(1) : input.size(2)) != input_size || input.size(0) == 0 || input.size(1) == 0 ||
      params[0].size(0) != gate_count(cell) * hidden_size) {
    return nullptr;
  }
  const Rows all;
  Results results;
  if (!run_call({input, states, params, all, recipe}, results)) return nullptr;
  PyObject* output = THPVariable_Wrap(std::move(results.y));
  return pair_of(output, wrapped(std::move(results.last)));
}

// The last states of a cell module; null where nn.Module.__call__ must be asked.
PyObject* call_cell(const Fields& fields, CellKind cell, const Tensor& input, at::TensorList states) {
  Recipe recipe;
  recipe.cell = cell;
  int64_t input_size = 0, hidden_size = 0;
  Borrowed weights;
  const int64_t ids = input.scalar_type() == at::kLong;
  if (input.dim() != 2 - ids || !fields.read(names().input_size, input_size) ||
      !fields.read(names().hidden_size, hidden_size) || !fields.parameters(names().cell_weights, weights, true)) {
    return nullptr;
  }
  const at::TensorList params = weights.tensors();
  if ((ids ? params[0].size(1) : input.size(1)) != input_size || input.size(0) == 0 ||
      (params.size() != 2 && params.size() != 4) || params[1].dim() != 2 || params[1].size(1) != hidden_size) {
    return nullptr;
  }
  recipe.has_biases = params.size() == 4;
  const Rows all;
  Results results;
  if (!run_call({input, states, params, all, recipe, /*one_step=*/true}, results)) return nullptr;
  return wrapped(std::move(results.last));
}

// The forward that nn.Module.__call__ would run, if running it is all that it would do; null otherwise, and for a forward
// that watch_modules was not told.
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
  // An instance's own, what compile() made, and options beyond torch.nn's.
  if (fields.has(n.forward) || fields.has(n.compiled) || fields.has(n.regularisation)) return nullptr;
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

// Reads hx: a tensor, a tuple of `count` tensors, or None (or null) for no states. False for anything else.
bool read_states(PyObject* hx, int count, Borrowed& states) {
  if (!hx || hx == Py_None) return true;
  states.reserve(count);
  if (count == 1) {
    if (!THPVariable_CheckExact(hx)) return false;
    states.push_back(THPVariable_Unpack(hx));
    return true;
  }
  if (!PyTuple_Check(hx) || PyTuple_GET_SIZE(hx) != count) return false;
  for (int i = 0; i < count; ++i) {
    if (!THPVariable_CheckExact(PyTuple_GET_ITEM(hx, i))) return false;
    states.push_back(THPVariable_Unpack(PyTuple_GET_ITEM(hx, i)));
  }
  return true;
}

PyObject* call(PyObject* module, PyObject* input, PyObject* hx) {
  if (!THPVariable_CheckExact(input) || at::impl::torch_function_mode_enabled()) return nullptr;
  if (!nothing_intercepts() && !only_transforms()) return nullptr;  // before sizes are read, which a mode may not know
  if (THPVariable_Unpack(input).is_complex() || THPVariable_Unpack(input).is_nested()) return nullptr;  // have no kernels
  const auto dict = pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(module, nullptr));
  if (!dict || !PyDict_Check(dict.ptr())) return nullptr;
  const Fields fields(dict.ptr());
  const Watched::Forward* forward = plain_forward(module, fields);
  if (!forward) return nullptr;
  const int64_t number = forward->cell >= 0 ? forward->cell : cell_by_name(fields, forward->is_cell);
  if (number < 0) return nullptr;
  const auto cell = static_cast<CellKind>(number);
  Borrowed states;
  if (!read_states(hx, state_count(cell), states)) return nullptr;
  return (forward->is_cell ? call_cell : call_layers)(fields, cell, THPVariable_Unpack(input), states.tensors());
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
  // These objects last as long as the process.
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
