"""The one generator of test cases: configurations of a stack of recurrent layers, their inputs, and their tolerances."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fused_rnn._kinds import KINDS

CELLS = ("RNN_TANH", "RNN_RELU", "RNN_IDENTITY", "GRU", "LSTM")
GATES = {kind.mode: kind.gates for kind in KINDS}
TORCH_NN: dict[str, Callable[..., torch.nn.RNNBase]] = {
    "RNN_TANH": functools.partial(torch.nn.RNN, nonlinearity="tanh"),
    "RNN_RELU": functools.partial(torch.nn.RNN, nonlinearity="relu"),
    "GRU": torch.nn.GRU,
    "LSTM": torch.nn.LSTM,
}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Largest error allowed, relative to the largest value of the compared tensor (at least 1): a few units in the last place of
# the number format (2^-53, 2^-24, 2^-11, 2^-8), for outputs of a recurrence over at most ~10 steps with results and saved
# gates rounded once a step. Gradients pass through as many roundings again and are sums over steps and rows.
OUTPUT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1.2e-1}


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration. Sizes as in csrc/core/params.h; ragged is "dense", "lengths" or "packed"."""

    cell: str
    steps: int = 5
    batch: int = 3
    input_size: int = 4
    hidden: int = 6
    proj: int = 0
    layers: int = 1
    bidirectional: bool = False
    has_biases: bool = True
    ragged: str = "dense"
    states: bool = True
    resets: bool = False
    batch_first: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"T{self.steps}-B{self.batch}-I{self.input_size}-H{self.hidden}"
        flags = [
            f"P{self.proj}" * bool(self.proj),
            f"L{self.layers}" * (self.layers > 1),
            "bi" * self.bidirectional,
            "nobias" * (not self.has_biases),
            self.ragged * (self.ragged != "dense"),
            "nohx" * (not self.states),
            "resets" * self.resets,
            "bf" * self.batch_first,
        ]
        return "-".join([self.cell, sizes, *filter(None, flags), dtype])

    @property
    def output(self) -> int:
        return self.proj or self.hidden

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def weights(self, generator: torch.Generator) -> list[Tensor]:
        """Random weights in torch.nn's order, uniform within 1 / sqrt(H), with float32's precision at most."""
        rows, scale = GATES[self.cell] * self.hidden, self.hidden**-0.5
        shapes: list[tuple[int, ...]] = []
        for group in range(self.layers * self.directions):
            shapes += [(rows, self.input_size if group < self.directions else self.directions * self.output)]
            shapes += [(rows, self.output)] + [(rows,), (rows,)] * self.has_biases
            shapes += [(self.proj, self.hidden)] * bool(self.proj)
        values = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return [((value * 2 - 1) * scale).to(torch.float32).to(self.dtype) for value in values]

    def module(self, device: str = "cpu") -> torch.nn.RNNBase:
        """torch.nn's module of this configuration, with weights of its own; for the cells in TORCH_NN."""
        kwargs: dict[str, object] = {
            "num_layers": self.layers,
            "bias": self.has_biases,
            "bidirectional": self.bidirectional,
            "batch_first": self.batch_first,
        }
        module = TORCH_NN[self.cell](
            self.input_size, self.hidden, **kwargs, **({"proj_size": self.proj} if self.proj else {})
        )
        return module.to(device=device, dtype=self.dtype)


@dataclasses.dataclass
class Data:
    """Tensors of a case, as keyword arguments of fused_rnn.functional's functions, and gradients of their results."""

    input: Tensor
    weights: list[Tensor]
    h0: Tensor | None
    c0: Tensor | None
    lengths: Tensor | None
    batch_sizes: Tensor | None
    resets: Tensor | None
    dy: Tensor
    dh_n: Tensor
    dc_n: Tensor

    def differentiable(self) -> list[Tensor]:
        return [t for t in (self.input, self.h0, self.c0, *self.weights) if t is not None]

    def to(self, dtype: torch.dtype) -> Data:
        """A detached copy in another dtype (the same values where it holds them)."""

        def convert(t: Tensor) -> Tensor:
            return t.detach().to(dtype) if t.dtype.is_floating_point else t

        fields = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            fields[field.name] = (
                None if value is None else [convert(w) for w in value] if isinstance(value, list) else convert(value)
            )
        return Data(**fields)


def make_data(case: Case, device: str = "cpu", seed: int = 0) -> Data:
    """Random tensors of the case, the same for every device."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(case.dtype).to(device)

    steps, batch, out = case.steps, case.batch, case.directions * case.output
    lengths = batch_sizes = None
    if case.ragged != "dense":
        values = torch.randint(1, steps + 1, (batch,), generator=g)
        if batch:
            values[0] = steps
        if case.ragged == "packed":
            values = values.sort(descending=True).values
            batch_sizes = torch.stack([(values > t).sum() for t in range(steps)])
        elif batch > 2:
            values[1] = 0
        lengths = values
    if case.ragged == "packed":
        rows: tuple[int, ...] = (int(batch_sizes.sum()),)
    else:
        rows = (batch, steps) if case.batch_first else (steps, batch)
    states = case.layers * case.directions
    resets = (torch.rand(rows, generator=g) < 0.3).to(device) if case.resets else None
    weights = [weight.to(device) for weight in case.weights(g)]
    return Data(
        input=randn(*rows, case.input_size),
        weights=weights,
        h0=randn(states, batch, case.output) if case.states else None,
        c0=randn(states, batch, case.hidden) if case.states and case.cell == "LSTM" else None,
        lengths=lengths.to(device) if case.ragged == "lengths" and lengths is not None else None,
        batch_sizes=batch_sizes,
        resets=resets,
        dy=randn(*rows, out),
        dh_n=randn(states, batch, case.output),
        dc_n=randn(states, batch, case.hidden),
    )


def layer_cases() -> Iterator[Case]:
    """Every cell x dtype x way of being ragged, every option alone and together, odd sizes."""
    for cell, dtype, ragged in itertools.product(CELLS, DTYPES, ("dense", "lengths", "packed")):
        yield Case(cell, ragged=ragged, dtype=dtype)
        yield Case(cell, ragged=ragged, dtype=dtype, bidirectional=True, resets=True, hidden=9, batch=5)
    for cell in CELLS:
        yield Case(cell, states=False, has_biases=False)
        yield Case(cell, states=False, bidirectional=True, ragged="lengths")
        yield Case(cell, states=False, bidirectional=True, ragged="packed", layers=2)
        yield Case(cell, layers=3, bidirectional=True, batch_first=True)
        yield Case(cell, layers=2, batch_first=True, ragged="lengths", resets=True)
        yield Case(cell, has_biases=False, bidirectional=True, dtype=torch.float64)
        yield Case(cell, batch=0)
        yield Case(cell, steps=1, batch=1)
        yield Case(cell, steps=1, bidirectional=True)
        for hidden, batch, input_size in ((1, 1, 1), (7, 33, 2), (33, 7, 129), (129, 2, 33), (64, 16, 64), (130, 9, 8)):
            yield Case(cell, steps=3, hidden=hidden, batch=batch, input_size=input_size)
            yield Case(cell, steps=3, hidden=hidden, batch=batch, input_size=input_size, dtype=torch.bfloat16)
    for dtype, ragged in itertools.product(DTYPES, ("dense", "lengths", "packed")):
        yield Case("LSTM", proj=4, ragged=ragged, dtype=dtype, bidirectional=True, layers=2)
        yield Case("LSTM", proj=1, ragged=ragged, dtype=dtype, resets=True)
    yield Case("LSTM", proj=33, hidden=70, batch=17, steps=3)
    yield Case("LSTM", hidden=1134, batch=2, steps=2, input_size=3)
