// METH_FASTCALL and METH_VARARGS functions of module_call.cpp.
#pragma once
#include <Python.h>

namespace fused_rnn {

// call_module(module, input, hx=None) -> what the module's forward returns; None where nn.Module.__call__ must be asked.
PyObject* call_module(PyObject* self, PyObject* const* args, Py_ssize_t count);
// watch_modules(nn.Module, (global hook dict, ...), ((forward function, is_cell, cell or -1), ...)): the forwards that
// call_module stands for, and what may keep it from doing so.
PyObject* watch_modules(PyObject* self, PyObject* args);

}  // namespace fused_rnn
