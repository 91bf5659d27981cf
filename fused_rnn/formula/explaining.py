"""What explain says of a Layer or a Step of a cell that is a formula."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import _backend, _checkpoint, _settings
from fused_rnn.explanation import Candidate, Explanation, LayerPlan, PassPlan, Rejection
from fused_rnn.formula import ops, serve
from fused_rnn.formula.language import Cell
from fused_rnn.formula.modules import Layer, Step


def explain_formula(
    module: Layer | Step,
    input: Tensor | PackedSequence,
    dtype: torch.dtype,
    call: tuple[list[dict[str, int]], int, bool],
    device: Mapping[str, Any] | None = None,
    where: str | None = None,
) -> Explanation:
    """How ``module(input)`` would be carried out, forward and, for training, backward; nothing is compiled.

    call: T, B, I, H, P and D of every layer; the rows in memory; whether backward is explained. device: of a GPU that is
    described or there, the fields of csrc/plan/device_info.h; where: its name if it is described.
    """
    sizes, rows, training = call
    data = input.data if isinstance(input, PackedSequence) else input
    device_type = data.device.type if where is None else "cuda"
    demand = _backend.Demand(device_type, dtype)
    rejected: list[Rejection] = []
    backend = "reference"
    for name in ("cuda", "cpu"):
        reason = _backend.why_not(name, demand) if name != device_type else None
        if name == device_type and where is None:  # a described GPU is planned for as if kernels had been built
            reason = serve.why_not(module.formula, name, dtype)
        if reason is None:
            backend = name
            break
        rejected.append(Rejection(name, reason.text))
    layers = tuple(_layer(module, backend, dtype, (size, rows, training), device) for size in sizes)
    return Explanation(
        module=type(module).__name__, cell=type(module.cell).__name__, dtype=str(dtype).removeprefix("torch."),
        packed=isinstance(input, PackedSequence), device=where or str(data.device), backend=backend,
        reason="no backend before it serves the call" if backend == "reference" else "it is compiled from the formula",
        rejected=tuple(rejected),
        instruction_set=_backend.build_info()["cpu_instruction_set"] if backend == "cpu" else None,
        forced_family=(_settings.value("FUSED_RNN_PLAN") or None) if backend == "cuda" else None, layers=layers,
        forward_overlap=None, backward_overlap=None,
    )  # fmt: skip


def _layer(
    module: Layer | Step,
    backend: str,
    dtype: torch.dtype,
    call: tuple[dict[str, int], int, bool],
    device: Mapping[str, Any] | None,
) -> LayerPlan:
    size, rows, training = call
    if backend == "reference":
        return LayerPlan(**size, N=rows, forward=PassPlan(), backward=PassPlan() if training else None, saved_bytes=None)
    cell = ops.cell_of(module.formula)  # with the module's options
    every, keeps = getattr(module, "checkpoint", 0), _checkpoint.keeps_states(backend)
    forward, backward, saved = _passes(cell, rows)
    if every:
        some = f"states are kept every {every} steps, and the steps between them run again"
        backward = PassPlan(
            text=f"the scan backwards; {some if keeps else 'nothing is kept, and forward runs again before it'}"
        )
    if backend == "cuda":
        forward = _on_gpu(cell, dtype, size, device or {}, forward.text, backward=False)
        if training:
            backward = _on_gpu(cell, dtype, size, device or {}, backward.text, backward=True)
    saved_bytes = saved * rows * size["H"] * size["D"] * dtype.itemsize
    if every:
        saved_bytes = _kept(cell, every, size, dtype) if keeps else 0
    saved_bytes *= training
    return LayerPlan(**size, N=rows, forward=forward, backward=backward if training else None, saved_bytes=saved_bytes)


def _kept(cell: Cell, every: int, size: dict[str, int], dtype: torch.dtype) -> int:
    """Bytes of the states that checkpoint=k keeps on a CPU; masks of options come on top."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    return size["D"] * ((size["T"] - 1) // every) * len(cell.declaration.states) * size["B"] * size["H"] * wide


def _on_gpu(
    cell: Cell, dtype: torch.dtype, size: dict[str, int], device: Mapping[str, Any], words: str, backward: bool
) -> PassPlan:
    """The pass as the planner of the kernels has it."""
    from fused_rnn.formula.cuda import traits_of
    from fused_rnn.formula.plan import make_plan

    columns = 0 if backward or cell.declaration.given_gates else size["I"]
    made = _backend.extension.formula_plan(  # type: ignore[union-attr]
        traits=traits_of(make_plan(cell)), dtype=str(dtype).removeprefix("torch."), T=size["T"], B=size["B"], H=size["H"],
        D=size["D"], heads=cell.declaration.heads, backward=backward, I=columns, device=dict(device),
        forced=_settings.value("FUSED_RNN_PLAN") or None,
    )  # fmt: skip
    return PassPlan(
        family=made["family"], reason=made["reason"],
        rejected=tuple(Rejection(name, why) for name, why in made["rejected"].items()),
        candidates=tuple(
            Candidate(name, found["us"], found["us_per_step"]) for name, found in made["candidates"].items()
        ),
        cheapest=made["cheapest"], launches=made["launches"], overlapped_launches=made["overlapped_launches"],
        workspace_bytes=made["workspace_bytes"], us=made["us"], us_per_step=made["us_per_step"],
        text=f"{words}; {made['text']}",
    )  # fmt: skip


def _passes(cell: Cell, rows: int) -> tuple[PassPlan, PassPlan, int]:
    """Forward, backward, and how many numbers a unit saves for a step's backward."""
    from fused_rnn.formula.plan import make_plan  # it imports torch's decompositions

    plan = make_plan(cell)
    says = cell.declaration
    heads = f", in {says.heads} heads" * (says.heads > 1)
    phases = "".join(f", {phase.kind} {phase.name} inside of the step" for phase in cell.phases)
    products = f"{len(says.weighted_gates)} input products, {len(says.recurrent_gates)} recurrent ones"
    forward = f"a scan over {rows} rows: {products}{heads}{phases}; {type(cell).__name__}.step is compiled"
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
