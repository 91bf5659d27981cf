"""What fuzz.py draws: sizes and options of a call, and its tensors in random layouts."""

from __future__ import annotations

import dataclasses
import random

import torch
from cases import CELLS, DTYPES, GATES
from process_state import instruction_sets
from torch import Tensor

STEPS = (1, 1, 2, 3, 5, 8)
ROWS = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33)
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 70)
FORMS = ("layer", "layer", "packed layer", "function", "function", "function", "packed function", "cell", "cell function")
LAYOUTS = ("plain", "plain", "transposed", "strided", "expanded", "offset", "unaligned", "negated")
MODES = ("grad", "grad", "grad", "grad", "no_grad", "inference")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; everything else of it is drawn by the same generator after these."""

    kind: str
    form: str
    dtype: torch.dtype
    steps: int
    rows: int  # 0: none; unbatched: 1
    inputs: int
    hidden: int
    proj: int
    layers: int
    bidirectional: bool
    has_biases: bool
    batch_first: bool
    unbatched: bool
    lengths: bool
    resets: bool
    states: bool
    mode: str
    edits: bool  # outputs are edited in place before backward
    tied: bool  # weights of one shape are the same tensor
    instruction_set: str
    threads: int

    @property
    def is_cell(self) -> bool:
        return self.form.startswith("cell")

    @property
    def is_packed(self) -> bool:
        return self.form.startswith("packed")

    @property
    def is_module(self) -> bool:
        return self.form in ("layer", "packed layer", "cell")

    @property
    def output(self) -> int:
        return self.proj or self.hidden

    @property
    def directions(self) -> int:
        return 1 + self.bidirectional

    def __str__(self) -> str:
        fields = (f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return ", ".join(fields)


def draw_case(r: random.Random) -> Case:
    """A case of at most some milliseconds."""
    while True:
        kind, form = r.choice(CELLS), r.choice(FORMS)
        cell, packed = form.startswith("cell"), form.startswith("packed")
        function = form.endswith("function")
        hidden = r.choice(SIZES)
        case = Case(
            kind=kind,
            form=form,
            dtype=r.choice(DTYPES),
            steps=1 if cell else r.choice(STEPS),
            rows=r.choice(ROWS),
            inputs=r.choice((0, *SIZES)) if function else r.choice(SIZES),
            hidden=hidden,
            proj=r.randrange(hidden) if kind == "LSTM" and not cell and r.random() < 0.3 else 0,
            layers=1 if cell else r.choice((1, 1, 2, 3)),
            bidirectional=not cell and r.random() < 0.4,
            has_biases=r.random() < 0.8,
            batch_first=not cell and not packed and r.random() < 0.4,
            unbatched=not packed and r.random() < 0.1,
            lengths=form == "function" and r.random() < 0.4,
            resets=form.endswith("function") and not cell and r.random() < 0.4,
            states=r.random() < 0.6,
            mode=r.choice(MODES),
            edits=r.random() < 0.2,
            tied=r.random() < 0.1,
            instruction_set=r.choice(instruction_sets()),
            threads=r.choice((1, 2)),
        )
        if case.unbatched:
            case = dataclasses.replace(case, rows=1)
        if packed and case.rows == 0:
            continue
        gates = GATES[kind]
        work = case.steps * case.rows * case.layers * case.directions * gates * hidden * (case.inputs + hidden)
        if work < 10_000_000:
            return case


class Draw:
    """Random tensors of a case in random layouts."""

    def __init__(self, r: random.Random, dtype: torch.dtype) -> None:
        self.r, self.dtype = r, dtype
        self.generator = torch.Generator().manual_seed(r.getrandbits(60))
        self.layouts: list[str] = []

    def values(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(self.dtype)

    def tensor(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Of this shape, its layout drawn."""
        layout = self.r.choice(LAYOUTS)
        self.layouts.append(layout)
        return place(self.values(*shape, scale=scale), layout, self.r)


def place(values: Tensor, layout: str, r: random.Random) -> Tensor:
    """The same values in another layout; "expanded" repeats the first along a dimension."""
    shape = values.shape
    if layout == "transposed" and len(shape) > 1:
        a, b = r.sample(range(len(shape)), 2)
        return values.transpose(a, b).contiguous().transpose(a, b)
    if layout == "strided" and len(shape) > 0:
        dim, step = r.randrange(len(shape)), r.choice((2, 3))
        room = torch.full([n * step if i == dim else n for i, n in enumerate(shape)], float("nan"), dtype=values.dtype)
        view = room[tuple(slice(None, None, step) if i == dim else slice(None) for i in range(len(shape)))]
        return view.copy_(values)
    if layout == "expanded" and values.numel():
        return values.narrow(r.randrange(len(shape)), 0, 1).expand(shape)
    if layout == "offset":
        offset = r.choice((1, 3, 5))
        room = torch.full((offset + values.numel() + 3,), float("nan"), dtype=values.dtype)
        return room[offset : offset + values.numel()].view(shape).copy_(values)
    if layout == "unaligned" and values.numel():
        room = bytearray(values.numel() * values.element_size() + 8)
        view = torch.frombuffer(room, dtype=values.dtype, count=values.numel(), offset=r.choice((1, 2, 3))).view(shape)
        return view.copy_(values)
    if layout == "negated":
        return torch._neg_view(-values)
    return values.clone()


@dataclasses.dataclass
class Arguments:
    """Tensors in the form of the call, and what makes the oracle's form of them."""

    x: Tensor  # [T, B, I], [B, T, I], [T, I], packed [N, I]; cells [B, I] or [I]
    h0: Tensor | None
    c0: Tensor | None
    weights: list[Tensor]
    lengths: Tensor  # [B]
    batch_sizes: Tensor | None
    resets: Tensor | None  # in x's form

    def tensors(self) -> list[Tensor]:
        """Different ones that can have gradients."""
        given = [t for t in (self.x, self.h0, self.c0, *self.weights) if t is not None]
        return list({id(t): t for t in given}.values())


def draw_arguments(case: Case, r: random.Random) -> Arguments:
    draw = Draw(r, case.dtype)
    steps, rows, d = case.steps, case.rows, case.directions
    lengths = torch.full((rows,), steps)
    if case.lengths:
        lengths = torch.tensor([r.randint(0, steps) for _ in range(rows)], dtype=torch.int64)
    batch_sizes = None
    if case.is_packed:
        lengths = torch.tensor(sorted([steps, *(r.randint(1, steps) for _ in range(rows - 1))], reverse=True))
        batch_sizes = torch.stack([(lengths > t).sum() for t in range(steps)])
    if case.is_packed:
        shape: tuple[int, ...] = (int(lengths.sum()),)
    elif case.is_cell:
        shape = () if case.unbatched else (rows,)
    elif case.unbatched:
        shape = (steps,)
    else:
        shape = (rows, steps) if case.batch_first else (steps, rows)
    state_rows = () if case.is_cell else (case.layers * d,)
    state_columns = () if case.unbatched else (rows,)
    x = draw.tensor(*shape, case.inputs)
    h0 = c0 = None
    if case.states:
        h0 = draw.tensor(*state_rows, *state_columns, case.output)
        c0 = draw.tensor(*state_rows, *state_columns, case.hidden) if case.kind == "LSTM" else None
    resets = torch.rand(shape, generator=draw.generator) < 0.3 if case.resets else None
    if resets is not None and resets.dim() == 2 and r.random() < 0.5:
        resets = resets.t().contiguous().t()
    weights: list[Tensor] = []
    rows_of_gates, scale = GATES[case.kind] * case.hidden, max(case.hidden, case.inputs) ** -0.5
    for layer in range(case.layers):
        for _ in range(d):
            inputs = case.inputs if layer == 0 else d * case.output
            shapes = [(rows_of_gates, inputs), (rows_of_gates, case.output)]
            shapes += [(rows_of_gates,)] * 2 if case.has_biases else []
            shapes += [(case.proj, case.hidden)] if case.proj else []
            for weight_shape in shapes:
                same = [w for w in weights if case.tied and tuple(w.shape) == weight_shape]
                weights.append(same[0] if same else draw.tensor(*weight_shape, scale=scale))
    return Arguments(x, h0, c0, weights, lengths, batch_sizes, resets)
