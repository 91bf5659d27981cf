"""A formula's kernels against ``step`` in float64, on a small problem, before they serve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_rnn import reference
from fused_rnn._backend import extension
from fused_rnn._recipe import Recipe, Rows, StepOptions
from fused_rnn.formula import ops
from fused_rnn.formula.language import Cell, GivenGate
from fused_rnn.formula.parameters import OWN_KIND, as_declared, outputs_first, specs_of, step_function

# What a result may differ by, relative to the largest number of its tensor and at least to _LEAST. The worst of the zoo and
# of the tests' cells on avx2: float32 1.3e-6, float16 3.0e-3, bfloat16 2.7e-2.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}
_LEAST = 1 / 16
_T, _B, _I = 4, 3, 5
UNITS_OF_TEAMS = 33  # of a head: three or four times 16 units with padding, which teams of several blocks divide


def _hidden(cell: Cell, units: int | None) -> int:
    heads = cell.declaration.heads
    return heads * (units or (19 if heads == 1 else 3))


def plans(cell: Cell, formula: str, dtype: torch.dtype, device: torch.device, family: str) -> bool:
    """Whether check_kernels with UNITS_OF_TEAMS would be served by this family, forward and backward, on a GPU."""
    assert extension is not None
    sizes = (_T, _B, _hidden(cell, UNITS_OF_TEAMS), 2, cell.declaration.heads)
    texts = [
        extension.formula_plan_on_device(formula, ops.dtype_number(dtype), device.index or 0, *sizes, backward)
        for backward in (False, True)
    ]
    return all(text.startswith(f"family {family},") for text in texts)


def check_kernels(
    cell: Cell,
    formula: str,
    dtype: torch.dtype,
    device: torch.device | None = None,
    batch: int = _B,
    steps: int = _T,
    units: int | None = None,
) -> None:
    """Compares outputs and all gradients of one layer of both directions, on a CPU or the device. units: of a head.

    Raises:
        RuntimeError: a tensor differs; the message has both numbers.
    """
    hidden = _hidden(cell, units)
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5).to(dtype)

    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        specs = specs_of(cell, _I, hidden, bias=True)
        states = [made(2, batch, hidden) for _ in cell.declaration.states]
        given = made(2, steps * batch, len(cell.declaration.given_gates), hidden)
        inputs = [made(steps, batch, _I), *states, *(made(*spec.shape) for _ in range(2) for spec in specs)]
        parameters = len(inputs)
        numbers = sum(isinstance(gate, GivenGate) and gate.differentiates for gate in cell.declaration.gates)
        if numbers:
            inputs.append(given[:, :, :numbers])
        weights = [made(steps, batch, 2 * hidden), *(made(2, batch, hidden) for _ in states)]
        names = ["input", *cell.declaration.states, *(spec.name + suffix for suffix in ("", "_reverse") for spec in specs)]
        names += ["values"] * bool(numbers)
        recipe = Recipe(OWN_KIND, bidirectional=True)
        count = len(states)

        def rows(leaves: Sequence[Tensor]) -> Rows:
            """With numbers for gates that are given and have gradients, which are leaves, and flags for the others."""
            flags = (given[:, :, numbers:] > 0).to(leaves[0].dtype).to(leaves[0].device)
            values = torch.cat([leaves[parameters], flags], 2) if numbers else flags
            return Rows(options=StepOptions(values=values)) if values.numel() else Rows()

        def ours(leaves: Sequence[Tensor]) -> list[Tensor]:
            own = leaves[1 + count : parameters]
            y, last = ops.layer(formula, leaves[0], leaves[1 : 1 + count], own, rows(leaves), recipe)
            return [y, *last]

        def theirs(leaves: Sequence[Tensor]) -> list[Tensor]:
            first = outputs_first(cell, leaves[1 : 1 + count])
            own = leaves[1 + count : parameters]
            y, last = reference.layer(leaves[0], first, own, rows(leaves), recipe, step_function(cell))
            return [y, *as_declared(cell, last)]

        place = torch.device("cpu") if device is None else device
        got = _results_and_gradients(ours, [t.to(place) for t in inputs], [t.to(place) for t in weights])
        expected = _results_and_gradients(theirs, [t.double() for t in inputs], [t.double() for t in weights])
    labels = ["output", *(f"last {name}" for name in cell.declaration.states), *(f"gradient of {name}" for name in names)]
    for label, mine, wanted in zip(labels, got, expected, strict=True):
        compare(cell, dtype, label, mine.cpu().double(), wanted)


def _results_and_gradients(run: object, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    assert callable(run)
    leaves = [t.detach().requires_grad_() for t in inputs]
    results = run(leaves)
    gradients = torch.autograd.grad(results, leaves, list(weights), materialize_grads=True)
    return [t.detach() for t in (*results, *gradients)]


def compare(cell: Cell, dtype: torch.dtype, label: str, got: Tensor, expected: Tensor) -> None:
    expected = torch.where(expected.isfinite(), expected, torch.nan)  # what the formula itself has none for is not compared
    allowed = TOLERANCES[dtype] * max(_LEAST, float(expected.abs().nan_to_num(0.0).max()) if expected.numel() else 0.0)
    difference = torch.where(expected.isnan(), 0.0, (got - expected).abs().nan_to_num(nan=torch.inf))
    if difference.numel() and float(difference.max()) > allowed:
        place = int(difference.argmax())
        raise RuntimeError(
            f"{type(cell).__name__}: the compiled kernels for {dtype} disagree with step: {label} has "
            f"{float(got.flatten()[place])!r} where step has {float(expected.flatten()[place])!r} (allowed difference "
            f"{allowed:.1e}). This is a fault of fused_rnn; fused_rnn.use_backend('reference') runs step itself"
        )
