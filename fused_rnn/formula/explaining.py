"""What explain says of a Layer or a Step of a cell that is a formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import _backend
from fused_rnn.explanation import Explanation, LayerPlan, PassPlan, Rejection
from fused_rnn.formula import serve
from fused_rnn.formula.language import Cell
from fused_rnn.formula.modules import Layer, Step


def explain_formula(
    module: Layer | Step, input: Tensor | PackedSequence, dtype: torch.dtype, sizes: list[dict[str, int]], rows: int
) -> Explanation:
    """How ``module(input)`` would be carried out, forward and backward; nothing is compiled.

    sizes: T, B, I, H, P and D of every layer; rows: in memory.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    where = str(data.device)
    reason = serve.why_not(module.formula, data.device.type, dtype)
    demand = _backend.Demand(data.device.type, dtype)
    not_cuda = _backend.why_not("cuda", demand) or serve.why_not(module.formula, "cuda", dtype)
    rejected = [Rejection(name, why.text) for name, why in (("cuda", not_cuda), ("cpu", reason)) if why is not None]
    backend = "cpu" if reason is None else "reference"
    passes = _passes(module.cell, rows) if backend == "cpu" else (PassPlan(), PassPlan(), None)
    layers = tuple(
        LayerPlan(
            **size,
            N=rows,
            forward=passes[0],
            backward=passes[1],
            saved_bytes=None if passes[2] is None else passes[2] * rows * size["H"] * size["D"] * dtype.itemsize,
        )
        for size in sizes
    )
    return Explanation(
        module=type(module).__name__, cell=type(module.cell).__name__, dtype=str(dtype).removeprefix("torch."),
        packed=isinstance(input, PackedSequence), device=where, backend=backend,
        reason="it is compiled from the formula" if backend == "cpu" else "no backend before it serves the call",
        rejected=tuple(rejected),
        instruction_set=_backend.build_info()["cpu_instruction_set"] if backend == "cpu" else None,
        forced_family=None, layers=layers, forward_overlap=None, backward_overlap=None,
    )  # fmt: skip


def _passes(cell: Cell, rows: int) -> tuple[PassPlan, PassPlan, int]:
    """Forward, backward, and how many numbers a unit saves for a step's backward."""
    from fused_rnn.formula.plan import make_plan  # it imports torch's decompositions

    plan = make_plan(cell)
    says = cell.declaration
    heads = f", in {says.heads} heads" * (says.heads > 1)
    phases = "".join(f", {phase.kind} {phase.name} inside of the step" for phase in cell.phases)
    forward = (
        f"a scan over {rows} rows: {len(says.input_gates)} input products, {len(says.recurrent_gates)} recurrent ones{heads}"
        f"{phases}; {type(cell).__name__}.step is compiled"
    )
    backward = f"the scan backwards; {plan.saved_per_unit} numbers of a unit are kept of each step, beside the output"
    return PassPlan(text=forward), PassPlan(text=backward), plan.saved_per_unit


def sizes_of(module: Layer | Step, input: Any) -> tuple[list[dict[str, int]], int]:
    """(T, B, I, H, P, D of every layer, rows in memory) of a call.

    Raises:
        TypeError, ValueError: the input does not fit.
    """
    packed = isinstance(input, PackedSequence)
    if not isinstance(input, Tensor) and not (packed and isinstance(module, Layer)):
        raise TypeError(f"input: expected a Tensor or, of a Layer, a PackedSequence, got {type(input).__name__}")
    data = input.data if packed else input
    if data.shape[-1] != module.input_size:
        raise ValueError(f"input: expected {module.input_size} features (input_size), got {data.shape[-1]}")
    hidden = module.hidden_size
    if isinstance(module, Step):
        batch = 1 if data.dim() == 1 else data.shape[0]
        return [{"T": 1, "B": batch, "I": module.input_size, "H": hidden, "P": hidden, "D": 1}], batch
    if packed:
        steps, batch, rows = len(input.batch_sizes), int(input.batch_sizes[0]), data.shape[0]
    else:
        first, second = (data.shape[0], 1) if data.dim() == 2 else data.shape[:2]
        steps, batch = (second, first) if module.batch_first and data.dim() == 3 else (first, second)
        rows = steps * batch
    directions = 1 + module.bidirectional
    features = [module.input_size] + [directions * hidden] * (module.num_layers - 1)
    return [{"T": steps, "B": batch, "I": count, "H": hidden, "P": hidden, "D": directions} for count in features], rows
