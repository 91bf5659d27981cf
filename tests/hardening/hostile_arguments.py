"""Arguments of the ops, and ways to spoil them; hostile_calls.py makes calls of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_rnn import reference
from fused_rnn._kinds import GRU, LSTM
from fused_rnn._recipe import Recipe, Rows, unpacked

STEPS, ROWS, INPUTS, HIDDEN = 4, 3, 5, 8
GATES = {LSTM: 4, GRU: 3}
ops = torch.ops.fused_rnn

# What is to come of a call, unless it is a list of expected tensors.
ERROR = "an exception"
ANYTHING = "an exception or results"
META = "an exception, or results on meta"


@dataclasses.dataclass
class Layer:
    """Arguments of fused_rnn::layer by name; `changed` makes another call of them."""

    x: Any
    h0: Any
    c0: Any
    params: Any
    has_biases: Any = True
    lengths: Any = None
    offsets: Any = None
    resets: Any = None
    cell: Any = LSTM
    bidirectional: Any = False
    save: Any = False

    def changed(self, **changes: Any) -> Layer:
        return dataclasses.replace(self, **changes)

    @property
    def states(self) -> Any:
        return [state for state in (self.h0, self.c0) if state is not None]

    @property
    def rows(self) -> Any:
        return Rows(self.lengths, self.offsets, self.resets).given()

    @property
    def recipe(self) -> Any:
        bits = Rows(self.lengths, self.offsets, self.resets).bits
        return Recipe(self.cell, 1, self.has_biases, self.bidirectional).packed | bits

    def run(self) -> list[Tensor]:
        """y and the last states."""
        y, last, _ = ops.layer(self.x, self.states, self.params, self.rows, self.recipe, self.save)
        return [y, *last]


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype) * 0.5
    )


def layer(
    cell: int = LSTM, rows: int = ROWS, steps: int = STEPS, dtype: torch.dtype = torch.float32, **changes: Any
) -> Layer:
    g = GATES.get(cell, 1) * HIDDEN
    params = [rand(g, INPUTS), rand(g, HIDDEN), rand(g), rand(g, seed=1)]
    c0 = rand(1, rows, HIDDEN, seed=2) if cell == LSTM else None
    made = Layer(rand(steps, rows, INPUTS), rand(1, rows, HIDDEN), c0, params, cell=cell)
    if dtype != torch.float32:
        made = Layer(*[t.to(dtype) if isinstance(t, Tensor) else t for t in (made.x, made.h0, made.c0)], params, cell=cell)
        made.params = [p.to(dtype) for p in params]
    return made.changed(**changes)


def packed(offsets: list[int], rows: int = ROWS, total: int | None = None, cell: int = GRU) -> Layer:
    total = offsets[-1] if total is None else total
    return layer(cell, rows=rows).changed(x=rand(total, INPUTS), offsets=torch.tensor(offsets))


def right(call: Layer) -> list[Tensor]:
    """y and the last states, of the reference in plain torch."""
    rows = Rows(call.lengths, call.offsets, call.resets)
    y, last = reference.layer(call.x, call.states, call.params, rows, unpacked(call.recipe))
    return [y, *last]


class Backward:
    """fused_rnn::layer_backward of a layer, with arguments replaced by name."""

    def __init__(self, of: Layer, op: str = "layer_backward") -> None:
        self.op = op
        self.values = {f.name: getattr(of, f.name) for f in dataclasses.fields(of)}
        y, last, saved = ops.layer(of.x, of.states, of.params, of.rows, of.recipe, True)
        grads = [rand(*t.shape) for t in (y, *last)]
        self.values |= dict(zip(("dy", "dh_n", "dc_n"), [*grads, None][:3], strict=True))
        self.values |= dict(zip(("gates", "cs"), [*saved, None, None][:2], strict=True))
        self.values |= {"y": y, "mask": [True, True, True]}

    def run(self, **changes: Any) -> Any:
        values = {**self.values, **changes}
        of = Layer(**{f.name: values[f.name] for f in dataclasses.fields(Layer)})
        names = ("dh_n", "dc_n")[: 2 if self.values["dc_n"] is not None else 1]
        dlast = [torch.empty(0) if values[name] is None else values[name] for name in names]
        saved = [t for t in (values["gates"], values["cs"], values["y"]) if t is not None]
        op = getattr(ops, self.op)
        return op(values["dy"], dlast, of.x, of.states, of.params, of.rows, saved, of.recipe, values["mask"])


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def shrunk(t: Tensor) -> Tensor:
    """Its storage ends in the middle."""
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)
    return t


def zero(t: Tensor) -> Tensor:
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)


def huge(t: Tensor) -> Tensor:
    """Of 2**40 rows, all the same."""
    return t[:1].expand(2**40, *t.shape[1:])


SPOILED: dict[str, Callable[[Tensor], Any]] = {
    "meta": lambda t: t.to("meta"),
    "float64": lambda t: t.double(),
    "int64": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t]),
    "freed": freed,
    "shrunk": shrunk,
    "scalar": lambda t: t.flatten()[0],
    "empty": lambda t: t.new_empty(0),
    "one row more": lambda t: torch.cat([t, t[:1]]),
    "one row less": lambda t: t[1:],
    "one more dimension": lambda t: t.unsqueeze(0),
    "none": lambda t: None,
    "a number": lambda t: 3,
}
# What holds the same numbers in another way.
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "negated view": lambda t: torch._neg_view(-t),
    "imaginary of conj": lambda t: torch.complex(t, -t).conj().imag,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "subclass": lambda t: t.as_subclass(type("Subclass", (Tensor,), {})),
}


def flatten(result: Any) -> list[Any]:
    if isinstance(result, (tuple, list)):
        return [t for item in result for t in flatten(item)]
    return [result]
