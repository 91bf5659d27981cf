"""Which implementation serves a call of a cell: its compiled kernels, or ``step`` in a loop."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from fused_rnn import _backend, _settings
from fused_rnn.formula import build, cuda_build, ops

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
    demand = _backend.Demand(device_type, dtype, transformed=_backend.forward_mode())
    reason = _backend.why_not(_backend.forced or device_type, demand)
    if reason is not None:
        return reason
    if len(cell.declaration.states) > MOST_STATES:
        return _backend.Reason(f"formula:{formula}", f"{name} has more than {MOST_STATES} states")
    if len(cell.phases) > MOST_PHASES:
        return _backend.Reason(f"formula:{formula}", f"{name} has more than {MOST_PHASES} products and norms in its step")
    return _reasons.get((formula, dtype, device_type)) or _why_not_now(formula, device_type, dtype)


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
            _prepare(formula, device_type, dtype)
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


def _reaches_other_calls() -> bool:
    """Whether what the thread has on (transforms, hooks of saved tensors, which activation checkpointing sets, modes and
    tracers) would reach what traces and compares here. A thread of its own has nothing on."""
    return (
        _backend.is_transformed()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _prepare(formula: str, device_type: str, dtype: torch.dtype) -> None:
    key = (formula, dtype, _setting_of(device_type))
    if key in _ready:
        return
    if _reaches_other_calls():
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_prepare, formula, device_type, dtype).result()
    else:
        with _lock:
            if device_type == "cpu":
                build.prepare(formula, dtype)
            else:
                cuda_build.prepare(formula, dtype)
        _ready.add(key)
