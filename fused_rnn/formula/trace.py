"""The graph of a cell: forward from its ``step``, backward from torch's own autograd of it.

make_fx records the step and ``torch.autograd.grad`` of it as ATen's operations, as AOTAutograd's joint graph has them, with
torch's decompositions of what has no counterpart in C++ (softplus, gelu, elu and their derivatives). All tensors have one
shape, so that nothing broadcasts and no gradient is a sum: gradients of vectors and numbers are those of one unit of a row.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from fused_rnn.formula.graph import Graph, Value
from fused_rnn.formula.language import Cell, Phase, run_step

_ATEN = torch.ops.aten


@dataclasses.dataclass
class Traced:
    """The values of a step and of its gradients.

    Inputs of the graph: "x.<gate>", "r.<gate>", the states, "self.<parameter>", and "ph.<k>", the result of the k-th product
    or norm inside of the step; of its backward part also "d.<state>", the gradients of the states after the step, and
    "d.ph.<k>", the gradient of what the k-th product or norm takes.
    """

    graph: Graph
    after: dict[str, Value]  # the states after the step
    gradients: dict[str, Value]  # of every input, by its name
    names: dict[Value, str]  # the user's names of values
    phases: tuple[Value, ...] = ()  # what each product or norm takes

    @property
    def forward_roots(self) -> list[Value]:
        return [*self.after.values(), *self.phases]


def trace(cell: Cell) -> Traced:
    """Traces a step and its gradients."""
    says = cell.declaration
    names = [f"x.{gate}" for gate in says.input_gates] + [f"r.{gate}" for gate in says.recurrent_gates]
    names += [*says.states, *(f"self.{name}" for name in (*says.units, *says.scalars))]
    names += [f"ph.{k}" for k in range(len(cell.phases))]
    tangent_names = [f"d.{state}" for state in says.states] + [f"d.ph.{k}" for k in range(len(cell.phases))]
    local_names: list[str] = []

    def joint(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
        leaves = [primal.detach().requires_grad_() for primal in primals]
        after, phases, local = _run_with_locals(cell, dict(zip(names, leaves, strict=True)))
        results = [*after, *phases]
        gradients = torch.autograd.grad(results, leaves, tangents, materialize_grads=True)
        local_names[:] = local
        return [*results, *gradients, *local.values()]

    # The values do not matter: no operation of a formula depends on them, and none is taken for another at equal values.
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        primals = [torch.rand(2, 3, generator=generator, dtype=torch.float64) for _ in names]
        tangents = [torch.rand(2, 3, generator=generator, dtype=torch.float64) for _ in tangent_names]
        traced = make_fx(joint, decomposition_table=_decompositions())(primals, tangents)
    reader = _Reader(traced, [*names, *tangent_names])
    results = reader.run()
    states, forward, inputs = len(says.states), len(tangent_names), len(names)
    after, phases = results[:states], results[states:forward]
    gradients, local = results[forward : forward + inputs], results[forward + inputs :]
    return Traced(
        reader.graph,
        dict(zip(says.states, after, strict=True)),
        dict(zip(names, gradients, strict=True)),
        dict(reversed(list(zip(local, local_names, strict=True)))),
        tuple(phases),
    )


def _run_with_locals(cell: Cell, named: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """The states after the step, what its products and norms take, and the tensors among its local variables at its end."""
    says, found = cell.declaration, {}
    phases: list[Tensor] = []

    def run_phase(_: Phase, value: Tensor) -> Tensor:
        phases.append(value)
        return named[f"ph.{len(phases) - 1}"]

    code = cell._written_step.__code__

    def watch(frame: FrameType, event: str, result: Any) -> None:
        if event == "return" and frame.f_code is code:
            found.update({name: value for name, value in frame.f_locals.items() if isinstance(value, Tensor)})

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        result = run_step(
            cell,
            {gate: named[f"x.{gate}"] for gate in says.input_gates},
            {gate: named[f"r.{gate}"] for gate in says.recurrent_gates},
            [named[state] for state in says.states],
            {name: named[f"self.{name}"] for name in (*says.units, *says.scalars)},
            run_phase,
        )
    finally:
        sys.setprofile(before)
    return [result] if isinstance(result, Tensor) else list(result), phases, found


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """torch's, but for the operations that have a form of their own below."""
    table = {
        **core_aten_decompositions(),
        **get_decompositions([_ATEN.elu, _ATEN.gelu, _ATEN.hardtanh, _ATEN.leaky_relu]),
    }
    own = "sigmoid_backward tanh_backward threshold_backward hardsigmoid_backward masked_fill masked_fill_".split()
    return {op: form for op, form in table.items() if _name_of(op) not in own}


def _name_of(op: Any) -> str:
    """The name without namespace and overload: "masked_fill_"."""
    name: str = op._schema.name
    return name.rsplit("::", 1)[-1]


# --- from ATen's operations to ours ---

_SAME = {
    "mul": "mul",
    "div": "div",
    "neg": "neg",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "relu": "relu",
    "exp": "exp",
    "expm1": "expm1",
    "log": "log",
    "log1p": "log1p",
    "sqrt": "sqrt",
    "abs": "abs",
    "minimum": "minimum",
    "maximum": "maximum",
    "clamp_min": "maximum",
    "clamp_max": "minimum",
    "erf": "erf",
    "sin": "sin",
    "cos": "cos",
    "where": "where",
    "lt": "lt",
    "le": "le",
    "gt": "gt",
    "ge": "ge",
    "eq": "eq",
    "ne": "ne",
    "logical_and": "and",
    "logical_and_": "and",
    "bitwise_and": "and",
    "logical_or": "or",
    "bitwise_or": "or",
    "logical_not": "not",
    "bitwise_not": "not",
}
_SIXTH = 0.1666666716337204  # float32's, which torch's derivative of hardsigmoid has in float64 too
_PASS_ON = frozenset({"detach", "alias", "clone", "_to_copy", "lift_fresh_copy", "expand", "view_of", "to"})
# Empty memory is written before it is read: by copy_, in second derivatives.
_NUMBERS = {
    "empty_permuted": 0.0,
    "_efficientzerotensor": 0.0,
    "zeros_like": 0.0,
    "ones_like": 1.0,
    "new_zeros": 0.0,
    "new_ones": 1.0,
    "zeros": 0.0,
    "ones": 1.0,
}


class _Reader:
    """Makes values of make_fx's graph."""

    def __init__(self, traced: fx.GraphModule, inputs: Sequence[str]) -> None:
        self.graph = Graph()
        self.traced = traced
        self.inputs = iter(inputs)
        self.values: dict[fx.Node, Any] = {}

    def run(self) -> list[Value]:
        """The outputs."""
        for node in self.traced.graph.nodes:
            match node.op:
                case "placeholder":
                    self.values[node] = self.graph.input(next(self.inputs))
                case "get_attr":  # a number that torch made a tensor of
                    self.values[node] = self.graph.const(getattr(self.traced, node.target).item())
                case "call_function":
                    self.values[node] = self.call(node)
                case "output":
                    return [self.values[output] for output in node.args[0]]
        raise AssertionError("a graph without output")

    def call(self, node: fx.Node) -> Value:
        name = _name_of(node.target)
        args = [self.value_of(arg) for arg in node.args]
        return self.operation(name, args, dict(node.kwargs))

    def value_of(self, arg: Any) -> Any:
        """A value for a node or a number; what else there is (None, dtypes, shapes) as it is."""
        if isinstance(arg, fx.Node):
            return self.values[arg]
        if isinstance(arg, (int, float)):
            return self.graph.const(float(arg))
        return arg

    def operation(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Value:
        make, const = self.graph.make, self.graph.const
        if name.removesuffix("_") in ("add", "sub", "rsub", "mul", "div", "neg"):  # second derivatives count with masks
            args = [self.as_number(arg) for arg in args]
        if name in _SAME:
            return make(_SAME[name], *args)
        if name in _PASS_ON:
            value: Value = args[0]
            return value
        if name in _NUMBERS:
            return const(_NUMBERS[name])
        match name, args:
            case (("add_" | "sub_" | "mul_" | "div_"), _):  # what is read later is the result: make_fx has made sure
                return self.operation(name.removesuffix("_"), args, kwargs)
            case (("add" | "sub" | "rsub"), [a, b, *alpha]):
                factor = alpha[0] if alpha else const(kwargs.get("alpha", 1))
                scaled = make("mul", b, factor)
                return make("sub", b, make("mul", a, factor)) if name == "rsub" else make(name, a, scaled)
            case "copy_", [_, a]:
                value = a
                return value
            case "cosh", [a]:
                grows = make("exp", a)
                return make("mul", make("add", grows, make("div", const(1), grows)), const(0.5))
            case "reciprocal", [a]:
                return make("div", const(1), a)
            case "pow", [a, Value(op="const", number=number)]:
                return self.power(a, number)
            case (("sgn" | "sign"), [a]):
                negative = make("where", make("lt", a, const(0)), const(-1), a)
                return make("where", make("gt", a, const(0)), const(1), negative)
            case "clamp", [a, *bounds]:
                low, high = (*bounds, None, None)[:2]
                low, high = (self.value_of(kwargs.get(key, bound)) for key, bound in (("min", low), ("max", high)))
                a = a if low is None else make("maximum", a, low)
                return a if high is None else make("minimum", a, high)
            case "scalar_tensor", [a]:
                value = a
                return value
            case (("full" | "full_like" | "new_full"), [_, *_, a]):
                value = a
                return value
            case (("masked_fill" | "masked_fill_"), [a, mask, b]):
                return make("where", mask, b, a)
            case "sigmoid_backward", [d, y]:
                return make("mul", make("mul", d, y), make("sub", const(1), y))
            case "tanh_backward", [d, y]:
                return make("mul", d, make("sub", const(1), make("mul", y, y)))
            case "threshold_backward", [d, y, threshold]:
                return make("where", make("gt", y, threshold), d, const(0))
            case "hardsigmoid_backward", [d, a]:
                inside = make("and", make("gt", a, const(-3)), make("lt", a, const(3)))
                return make("where", inside, make("mul", d, const(_SIXTH)), const(0))
        raise NotImplementedError(f"no C++ for torch's operation aten.{name} with {len(args)} arguments")

    def as_number(self, arg: Any) -> Any:
        """A mask as 1 or 0; anything else as it is."""
        if not (isinstance(arg, Value) and arg.is_mask):
            return arg
        return self.graph.make("where", arg, self.graph.const(1), self.graph.const(0))

    def power(self, a: Value, exponent: float) -> Value:
        """a to an exponent that torch's derivatives and decompositions have."""
        make = self.graph.make
        if exponent == 0.5:
            return make("sqrt", a)
        if exponent < 0:
            return make("div", self.graph.const(1), self.power(a, -exponent))
        if exponent != int(exponent) or exponent > 8:
            raise NotImplementedError(f"no C++ for a power of {exponent}")
        result = self.graph.const(1)
        for _ in range(int(exponent)):
            result = make("mul", result, a)
        return result
