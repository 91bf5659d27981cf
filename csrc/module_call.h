// METH_FASTCALL functions of module_call.cpp.
#pragma once
#include <Python.h>

namespace fused_rnn {

// call_layers(module.__dict__, cell, input [T, B, I] or [B, T, I], h0 or None, c0 or None) -> (output, h_n), an LSTM's h_n a pair with
// c_n; or None.
PyObject* call_layers(PyObject* module, PyObject* const* args, Py_ssize_t count);
// call_cell(module.__dict__, cell, input [B, I], h or None, c or None) -> h', an LSTM's a pair with c'; or None.
PyObject* call_cell(PyObject* module, PyObject* const* args, Py_ssize_t count);

}  // namespace fused_rnn
