// Formulas on CUDA tensors: the kernels that were registered, and one layer's scans on the current stream
// (formula_device_cuda.cpp; tests/simt/torch_host has another file of this kind).
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <string>

#include "cpu/formula/formula.h"

namespace fused_rnn {

// From now on the kernels in this file serve the formula on devices of the file's compute capability, for its dtype.
void register_formula_on_device(const std::string& formula, const std::string& path);
// The kernels of further families, beside those that serve already.
void add_formula_on_device(const std::string& formula, const std::string& path);
void forget_formula_on_device(const std::string& formula, int dtype, int capability);
bool has_formula_on_device(const std::string& formula, int dtype, int capability);
// Whether the kernels of family "single", "cluster" or "grid" serve too: state 0: not before they are verified; 1: with so
// many blocks of a team wherever they can, for the verification; 2: as FUSED_RNN_PLAN says.
void set_formula_family(const std::string& formula, int dtype, int capability, const std::string& family, int state,
                        int ranks);

// What the kernels say of the cell; null where there are none. device: a tensor's; -1: any.
const FormulaTraits* formula_traits_on_device(const std::string& formula, DType dtype, int device);

// The scans. What is set in p are pointers to the device's memory, as csrc/cpu/formula has them; p.x may be null. x: the
// input, or like it. input_products: makes them with their biases [D, N, Gi, H]; not called where the kernels do.
void formula_forward_on_device(const std::string& formula, const cpu::FormulaForward& p, const at::Tensor& x,
                               const std::function<at::Tensor()>& input_products);
void formula_backward_on_device(const std::string& formula, const cpu::FormulaBackward& p, const at::Tensor& x);
// What the planner says of a layer on this device whose input has H columns: family, launches, tiles, memory.
std::string formula_plan_on_device(const std::string& formula, int dtype, int device, int64_t T, int64_t B, int64_t H, int D,
                                   int heads, bool backward);

}  // namespace fused_rnn
