// The arguments of a stack, a layer or a step in one place, and their checks. Letters: core/params.h.
#pragma once
#include <c10/util/SmallVector.h>

#include "core/recipe.h"
#include "torch/tensors.h"

namespace fused_rnn {

using States = c10::SmallVector<Tensor, 2>;  // h, and c of a cell that has one

// What modifies the steps of rows (core/modifier.h). None of it has a gradient. Numbers are tensors of the host's.
struct StepOptions {
  OptionalTensor zoneout_h, zoneout_c;  // each the flags [L * D, N, H], bool, or a share [], double
  OptionalTensor clip;                  // [] double, more than 0
  OptionalTensor product, candidate;    // factors [L * D, B, P] and [L * D, B, H] in the layer's dtype
  OptionalTensor values;  // [L * D, N, K, H] in the layer's dtype: of a formula the values of its last K input gates

  bool any() const { return zoneout_h || zoneout_c || clip || product || candidate || values; }
  // In the order of schemas.
  c10::SmallVector<OptionalTensor*, 6> all() { return {&zoneout_h, &zoneout_c, &clip, &product, &candidate, &values}; }
};

// Which rows take part at each step, and which start again (core/active.h, core/modifier.h).
struct Rows {
  OptionalTensor lengths, offsets, resets;
  OptionalTensor host_offsets;  // the offsets where the host can read them; not among a schema's
  // Of each state what resets replace it by; none: zeros. [L * D, 1 or B, .], or of every step [T, L * D, B, .]
  std::vector<Tensor> reset_states{};
  StepOptions options{};

  bool ragged() const { return lengths || offsets; }
  bool all() const { return !lengths && !offsets && !resets; }  // take part in every step, and none is reset
  bool plain() const { return all() && !options.any(); }
};
// As schemas have them: the tensors that are given, in this order, and the bits of a packed recipe that say which they are.
// A list of optional tensors would not do: torch does not resolve negated views in one, and torch.jit.trace refuses it.
struct RowList {
  c10::SmallVector<Tensor, 4> tensors;
  int64_t bits = 0;
};
RowList list_of(const Rows& rows);
// Raises unless the list has the tensors that the packed recipe says.
Rows rows_of(at::TensorList list, int64_t packed);

// References live as long as the call.
struct Call {
  // A stack: [T, B, I] ([B, T, I]: recipe.batch_first); a layer: [T, B, I]; packed: [N, I]; a step: [B, I]. Or int64 without
  // the last dimension: ids, each standing for a row that is 1 at its place and 0 elsewhere.
  const Tensor& x;
  at::TensorList states;  // none (zeros), or of each state [L * D, B, .], a step's [B, .]
  at::TensorList params;  // of all layers, in torch.nn's order
  const Rows& rows;
  Recipe recipe;
  bool one_step = false;

  const Tensor* h0() const { return states.empty() ? nullptr : &states[0]; }
  const Tensor* c0() const { return states.size() < 2 ? nullptr : &states[1]; }
  bool has_ids() const { return x.scalar_type() == at::kLong; }
  // A tensor of the layer's dtype, on its device.
  const Tensor& like() const { return has_ids() ? params[0] : x; }
  // Whether c0 is float where the others have 16 bits: c_n is then float too.
  bool has_wide_c() const { return like().element_size() == 2 && c0() && c0()->scalar_type() == at::kFloat; }
  at::TensorList params_of_direction(int64_t d) const {
    const size_t count = params.size() / recipe.directions();
    return params.slice(d * count, count);
  }
};

// A schema's recipe; raises for a number that is none, or is not one layer's.
Recipe recipe_of(int64_t packed, double dropout);
Recipe layer_recipe_of(int64_t packed);

// The states, the parameters, the reset states and the step's options of one layer of a stack.
States states_of_layer(const Call& stack, int64_t layer);
at::TensorList params_of_layer(const Call& stack, int64_t layer);
std::vector<Tensor> reset_states_of_layer(const Call& stack, int64_t layer);
StepOptions options_of_layer(const Call& stack, int64_t layer);

// The checked sizes of a layer's call.
struct LayerShapes {
  int64_t T, B, N, I, H, P;
  int D;
  int64_t per_direction;  // parameters of one direction
  bool projection;

  at::DimVector state(const Call& call, int64_t size) const {
    return call.one_step ? at::DimVector{B, size} : at::DimVector{D, B, size};
  }
  at::DimVector output(const Call& call) const {
    return call.rows.offsets ? at::DimVector{N, D * P} : at::DimVector{T, B, D * P};
  }
};

// Checks everything that memory safety depends on, and raises with the name of the argument: device, dtype, layout, shape
// and memory of every tensor, and the values of offsets on a CPU. On CUDA, where reading them would wait for the device,
// offsets are cut to [0, N] later; lengths are cut by the kernels.
LayerShapes check_layer(const Call& call);
// The same of a whole stack that is [T, B, I] or packed, without reset states and options of steps.
void check_stack(const Call& stack);
// Its parts that concern no weights: the number of x's dimensions; T, B and N; lengths, offsets and resets.
void check_dimensions(const Call& call);
void measure_rows(const Call& call, LayerShapes& s);
void check_rows(const Call& call, const LayerShapes& s);
// Sizes of each state's reset state [D, 1 or B, size] or [T, D, B, size]; there are as many of them or none.
void check_reset_states(const Call& call, const LayerShapes& s, at::IntArrayRef sizes);

void check_options(const Call& call, const LayerShapes& s);

// A storage may be smaller than its tensors: FSDP and others free it by resizing it to 0.
void check_memory(const char* name, const Tensor& t);
// A tensor of a layer's call, or of its backward, against x's device.
void check_tensor(const char* name, const Tensor& t, at::IntArrayRef shape, const Tensor& x, at::ScalarType dtype);
void check_optional(const char* name, const OptionalTensor& t, at::IntArrayRef shape, const Tensor& x, at::ScalarType dtype);

// Whether autograd is to have a node of this call.
bool differentiates(const Call& call);
inline bool any_requires_grad(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.defined() && t.requires_grad(); });
}
inline OptionalTensor optional_of(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
inline Tensor tensor_of(const OptionalTensor& t) { return t ? *t : Tensor(); }
// A copy for backward of what callers write into call after call.
inline Tensor owned(const OptionalTensor& t) { return t && t->defined() ? t->clone() : Tensor(); }

}  // namespace fused_rnn
