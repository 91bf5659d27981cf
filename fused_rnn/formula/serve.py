"""Which implementation serves a call of a cell: its compiled kernels, or ``step`` in a loop."""

from __future__ import annotations

import threading

import torch

from fused_rnn import _backend, _settings
from fused_rnn.formula import build, cuda_build, ops
from fused_rnn.formula.alone import alone
from fused_rnn.formula.language import Cell

MOST_STATES, MOST_PHASES = 8, 12  # csrc/core/formula.h's kMostFormulaStates, kMostFormulaPhases

_lock = threading.RLock()  # one compiler at a time in this process
_ready: set[tuple[str, torch.dtype, str]] = set()  # by formula, dtype and _setting_of its device
_reasons: dict[tuple[str, torch.dtype, str], _backend.Reason] = {}  # why a cell has none, found by trying


def why_not(formula: str, device_type: str, dtype: torch.dtype) -> _backend.Reason | None:
    """None if compiled kernels could serve such a call of the cell now, else the reason; compiles nothing."""
    cell = ops.cell_of(formula)
    name = type(cell).__name__
    if _backend.forced == "reference":
        return _backend.Reason("forced", "backend 'reference' is forced")
    if device_type not in ("cpu", "cuda"):
        return _backend.Reason("formula:device", f"cells written as formulas have no kernels for {device_type!r} tensors")
    refused = _why_no_tangents(cell, device_type, dtype) if _backend.forward_mode() else None
    if refused is not None:
        return refused
    reason = _backend.why_not(_backend.forced or device_type, _backend.Demand(device_type, dtype))
    if reason is not None:
        return reason
    if len(cell.declaration.states) > MOST_STATES:
        return _backend.Reason(f"formula:{formula}", f"{name} has more than {MOST_STATES} states")
    if len(cell.phases) > MOST_PHASES:
        return _backend.Reason(f"formula:{formula}", f"{name} has more than {MOST_PHASES} products and norms in its step")
    return _reasons.get((formula, dtype, device_type)) or _why_not_now(formula, device_type, dtype)


def _why_no_tangents(cell: Cell, device_type: str, dtype: torch.dtype) -> _backend.Reason | None:
    """None if forward-mode AD of a call that begins now can run on the kernels, else the reason."""
    from fused_rnn.formula import second_order  # which needs this module

    name, levels = type(cell).__name__, torch._C._functorch.get_interpreter_stack() or []
    kind, kinds = torch._C._functorch.TransformType, [level.key() for level in levels]  # the outermost first
    for repeated, what in ((kind.Jvp, "jvp"), (kind.Grad, "grad")):
        if kinds.count(repeated) > 1:
            text = f"forward-mode AD of {name} inside of two levels of torch.func.{what}: third derivatives are not compiled"
            return _backend.Reason(f"formula:{name}:forward-mode:{what}", text)
    inside_grad = kinds[kinds.index(kind.Grad) :] if kind.Grad in kinds else []
    if kind.Vmap in inside_grad and kind.Jvp in inside_grad:
        text = f"forward-mode AD of {name} under vmap inside of torch.func.grad: its gradients have no rule of vmap"
        return _backend.Reason(f"formula:{name}:forward-mode:vmap", text)
    why = second_order.why_not(cell, device_type, dtype)
    if why is None and dtype == torch.float32 and torch.is_autocast_enabled(device_type):
        why = "there are no tangents under autocast"
    return None if why is None else _backend.Reason(f"formula:{name}:forward-mode", f"forward-mode AD of {name}: {why}")


def _why_not_now(formula: str, device_type: str, dtype: torch.dtype) -> _backend.Reason | None:
    """Kernels that have not been verified cannot be while a CUDA graph is captured."""
    if (
        device_type == "cuda"
        and (formula, dtype, _setting_of(device_type)) not in _ready
        and torch.cuda.is_current_stream_capturing()
    ):
        name = type(ops.cell_of(formula)).__name__
        return _backend.Reason(
            f"formula:{formula}:capture",
            f"the kernels of {name} for {dtype} have not run yet and cannot be verified during the capture of a CUDA graph; "
            "call the module once before it",
        )
    return None


def has_kernels(formula: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether compiled kernels serve the call; they are made if need be. Else ``step`` does, and a warning says why, once.

    formula: the cell's name (ops.remember).

    Raises:
        RuntimeError: a backend was forced that cannot serve the call; or the kernels disagree with ``step``.
    """
    if _backend.forced == "reference":
        return False
    reason = why_not(formula, device_type, dtype)
    if reason is None:
        try:
            prepare(formula, device_type, dtype)
            return True
        except build.BuildError as error:
            name = type(ops.cell_of(formula)).__name__
            reason = _backend.Reason(f"formula:{formula}:{dtype}:{device_type}", f"{name} could not be compiled: {error}")
            _reasons[formula, dtype, device_type] = reason
    if _backend.forced is not None:
        raise RuntimeError(f"backend {_backend.forced!r} is forced but {reason.text}")
    _backend.warn_once(reason.key, reason.text)
    return False


# Dynamo calls the function while it compiles, and takes the answer for a constant.
has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _setting_of(device_type: str) -> str:
    """What a setting says of the kernels that serve: a CPU's instruction set; of a GPU which families may."""
    if device_type == "cpu":
        return _settings.value("FUSED_RNN_CPU")
    return ", ".join((device_type, *cuda_build.persistent_families()))


def prepare(formula: str, device_type: str, dtype: torch.dtype) -> None:
    """Makes the kernels of a cell ready.

    Raises:
        BuildError: they cannot be made.
        RuntimeError: they are there, but disagree with ``step``.
    """
    key = (formula, dtype, _setting_of(device_type))
    if key not in _ready:
        alone(_prepare, formula, device_type, dtype)
        _ready.add(key)


def _prepare(formula: str, device_type: str, dtype: torch.dtype) -> None:
    with _lock:
        if device_type == "cpu":
            build.prepare(formula, dtype)
        else:
            cuda_build.prepare(formula, dtype)
