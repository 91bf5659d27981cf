"""The operations of a formula, by torch's names, and what to write instead of others."""

from __future__ import annotations

import torch

# Names in torch, torch.Tensor, torch.nn.functional and torch.special.
_NAMES = (
    "add sub subtract mul multiply div divide true_divide neg negative reciprocal square rsub "
    "sigmoid expit tanh relu exp log sqrt abs absolute minimum maximum clamp clip clamp_min clamp_max where "
    "gt greater ge greater_equal lt less le less_equal eq ne not_equal "
    "softplus silu gelu hardtanh hardsigmoid softsign elu leaky_relu relu6 logsigmoid "
    "erf sin cos expm1 log1p "
    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __div__ __rdiv__ __neg__ __pos__ __abs__ "
    "__gt__ __ge__ __lt__ __le__ __eq__ __ne__"
).split()
_SPACES = (torch, torch.Tensor, torch.nn.functional, torch.special)


def _functions(names: list[str]) -> frozenset[object]:
    plain = [(space, name) for space in _SPACES for name in names if not name.startswith("__")]
    plain += [(torch.Tensor, name) for name in names if name.startswith("__")]  # modules have some of these too
    return frozenset(getattr(space, name) for space, name in plain if hasattr(space, name))


ALLOWED = _functions(_NAMES)
MAKERS_OF_MASKS = frozenset(
    "gt greater ge greater_equal lt less le less_equal eq ne not_equal __gt__ __ge__ __lt__ __le__ __eq__ __ne__".split()
)
LISTED = (
    "+ - * /, sigmoid, tanh, relu, exp, log, sqrt, abs, square, minimum, maximum, clamp, where, comparisons, softplus, "
    "silu, gelu, hardtanh, hardsigmoid, softsign, elu, leaky_relu, relu6, logsigmoid, erf, sin, cos, expm1, log1p"
)

# (last parts of names, what to write instead)
_HINTS = (
    (
        "matmul mm bmm mv dot addmm addmv baddbmm einsum linear tensordot outer inner bilinear __matmul__ "
        "__rmatmul__ chain_matmul",
        'self.product("name", value) for a product with a learnable matrix, or one more gate for one with x or h',
    ),
    (
        "layer_norm rms_norm batch_norm group_norm normalize instance_norm",
        'self.layer_norm(value, "name") or self.rms_norm(value, "name")',
    ),
    (
        "sum mean prod amax amin aminmax norm softmax log_softmax logsumexp cumsum cumprod std var std_mean var_mean argmax "
        "argmin any all median mode count_nonzero nansum nanmean",
        "self.layer_norm or self.rms_norm for a norm over the units; nothing else of a formula looks at several units",
    ),
    ("max fmax", "torch.maximum(a, b)"),
    ("min fmin", "torch.minimum(a, b)"),
    ("pow __pow__ __rpow__ float_power", "a * a, torch.sqrt(a), or torch.exp(p * torch.log(a)) for a > 0"),
    ("rsqrt", "1 / torch.sqrt(a)"),
    ("lerp", "a + w * (b - a)"),
    ("addcmul addcdiv", "the sum and the product as operators"),
    ("sign sgn", "torch.where(a > 0, 1.0, torch.where(a < 0, -1.0, a))"),
    (
        "rand randn randint rand_like randn_like randint_like bernoulli normal dropout alpha_dropout feature_dropout "
        "multinomial poisson randperm rrelu gumbel_softmax",
        "a formula without random numbers; dropout is Layer(dropout=..., recurrent_dropout=..., zoneout=...)",
    ),
    (
        "to float double half bfloat16 int long short char byte bool type type_as cfloat cdouble",
        "the value as it is: the layer chooses the dtype, and arithmetic on 16 bits is in float32",
    ),
    (
        "__bool__ item tolist numpy __float__ __int__ __index__ __array__ __contains__ equal allclose is_nonzero nonzero",
        "torch.where(condition, a, b): every unit chooses for itself",
    ),
    (
        "view reshape cat stack concat hstack vstack chunk split tensor_split unbind unsqueeze squeeze transpose permute "
        "expand expand_as repeat flip roll __getitem__ narrow select index_select gather take_along_dim flatten "
        "unflatten movedim swapaxes broadcast_to tile repeat_interleave diagonal masked_select t",
        "one gate a value: gates are row blocks of the weights, so nothing needs to be cut or joined",
    ),
    (
        "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_tensor tensor "
        "as_tensor scalar_tensor arange linspace eye from_numpy new_empty",
        "the number itself",
    ),
    (
        "shape size dim ndim numel dtype device __len__ stride is_cuda layout __get__ data requires_grad grad",
        "a formula that does not ask: sizes, dtype and device are the layer's",
    ),
    (
        "detach requires_grad_ register_hook retain_grad backward",
        "nothing: gradients flow through all of a formula",
    ),
    (
        "logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not __and__ __or__ __invert__ "
        "__xor__",
        "torch.where inside of torch.where",
    ),
)
_HINT_OF = {name: hint for names, hint in _HINTS for name in names.split()}


def hint_for(name: str) -> str:
    """What to write instead of the function of this name, "torch.Tensor.add_"."""
    parts = [part for part in name.split(".") if part != "__get__"]
    last = parts[-1]
    if last in _HINT_OF:
        return _HINT_OF[last]
    inplace = (last.endswith("_") and not last.endswith("__")) or (last.startswith("__i") and last.endswith("__"))
    if inplace or last in ("__setitem__", "__set__"):
        return "the operation that returns a new tensor: h = h + a, not h += a or h.add_(a)"
    return f"operations of the table: {LISTED}"
