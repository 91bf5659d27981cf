"""Which implementation serves a tensor: the C++/CUDA extension or the pure-Python reference."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fused_rnn._build import build_record, runs_on
from fused_rnn._settings import extension, import_error

BACKENDS = ("cuda", "cpu", "reference")


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


forced: str | None = None
if os.environ.get("FUSED_RNN_BACKEND"):
    forced = _checked(os.environ["FUSED_RNN_BACKEND"], "FUSED_RNN_BACKEND")

_forced_by_environment = forced
_blocks: list[list[str | None]] = []  # the use_backend blocks that are open now, in the order in which they were entered
_blocks_lock = threading.Lock()

_warned: set[str] = set()


def build_info() -> dict[str, Any]:
    """What the compiled extension holds; empty if it could not be imported.

    Returns:
        ``cuda`` (bool: CUDA kernels were built), ``cuda_architectures``, ``cuda_skipped`` (why there are none),
        ``cuda_mend`` (what to do about it), ``cpu_instruction_set`` (the one in use), ``cpu_instruction_sets`` (those that
        this machine can run), ``torch``, ``torch_cuda``, ``python`` and ``nvcc`` (versions it was built with).
    """
    return {} if extension is None else {**(build_record() or {}), **extension.build_info()}


def free_memory() -> int:
    """Free the memory on a CPU that the calls of all threads keep for the next one.

    That is workspaces, blocks of what training steps saved, and packed weights.

    Running calls, and graphs that wait for their backward, are not disturbed: what they use comes back later. The next
    calls are slower, as they ask the system for memory and pack weights again. Without it, memory that no thread wants
    goes back about ten seconds later, when some thread calls a layer; packed weights stay, up to
    ``FUSED_RNN_WEIGHT_CACHE``.

    Returns:
        The number of bytes freed; 0 where nothing was compiled.
    """
    return 0 if extension is None else int(extension.free_memory())


def has_cpu_kernels() -> bool:
    """Whether the compiled extension, which always has the CPU kernels, is there."""
    return extension is not None


def has_cuda_kernels() -> bool:
    """Whether the compiled extension has the CUDA kernels."""
    return bool(build_info().get("cuda", False))


# The backend of each device type when none is forced; built once, as it is looked up at every call.
_native = {
    "cpu": has_cpu_kernels(),
    "cuda": has_cuda_kernels(),
    # Shape inference goes through the ops' fake kernels wherever the ops exist.
    "meta": has_cpu_kernels(),
}


def _choose(question: dict[str, Any], arguments: tuple[Any, ...] | None) -> Any:
    from fused_rnn.tuning import serve  # it imports the reference, which asks here

    return serve.answer(question, arguments)


if extension is not None and hasattr(extension, "set_chooser"):  # it has CUDA kernels
    extension.set_chooser(_choose)


_gpus_without_code: dict[int, str] | None = None  # by number: why; None: no call on a GPU has been made yet


def _find_gpus_without_code() -> None:
    """Asks every visible GPU for its compute capability; no context is made on any."""
    global _gpus_without_code
    architectures = build_info().get("cuda_architectures", [])
    found = {}
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not runs_on(architectures, capability):
            found[index] = (
                f"the kernels were built for {';'.join(architectures)}, which GPU {index} of compute capability "
                f"{capability[0]}.{capability[1]} cannot run"
            )
    _gpus_without_code = found


_find_gpus_without_code._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see _warn_once


def why_not_native(device_type: str) -> str | None:
    """None if compiled kernels serve tensors of this device type, else the reason as a sentence."""
    if _native.get(device_type, False):
        return None
    if extension is None:
        return import_error
    if device_type == "cuda":
        return "fused_rnn was built without CUDA kernels"
    return f"fused_rnn has no kernels for {device_type!r} tensors"


class Demand(NamedTuple):
    """What a call asks of a backend."""

    device_type: str
    dtype: torch.dtype
    gpu: int | None = None  # the number of the GPU; None: none is there
    transformed: bool = False  # by forward-mode AD


class Reason(NamedTuple):
    """Why a backend does not serve a call."""

    key: str  # each is warned of once
    text: str  # a clause
    mend: str = ""


def why_not(backend: str, demand: Demand) -> Reason | None:
    """None if this backend can serve such a call, else the reason. A call takes the first of BACKENDS that can.

    What a backend lacks whatever the cell: a feature that it has not yet is a field of Demand and a line here. What one
    cell lacks is asked elsewhere: tangents of a layer by _tangents.serves, which makes `transformed` False where the ops
    have them, and kernels of a formula by formula.serve.why_not, which goes on to ask here.
    """
    device_type, dtype, _, transformed = demand
    if backend == "reference":
        return None
    if backend != device_type:
        return Reason("device", f"the input is on {device_type!r}")
    if dtype.is_complex:
        return Reason("complex", f"there are no kernels for {dtype}")
    if transformed:
        in_autocast = dtype == torch.float32 and torch.is_autocast_enabled(device_type)
        if in_autocast or dtype in (torch.float16, torch.bfloat16):
            return Reason(
                "torch.func", f"forward-mode AD{' under autocast' * in_autocast}: no kernel has tangents of 16 bits"
            )
        return Reason("torch.func", "forward-mode AD does not reach the compiled kernels of such a call")
    missing = why_not_native(device_type)
    lacking = None if missing or demand.gpu is None else (_gpus_without_code or {}).get(demand.gpu)
    if lacking:
        return Reason(f"code for GPU {demand.gpu}", lacking, "add it to TORCH_CUDA_ARCH_LIST and build again")
    return Reason(device_type, missing, "python -m fused_rnn info says what is missing") if missing else None


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is at work."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0
    )


def forward_mode() -> bool:
    """Whether forward-mode AD is at work; torch.func.jvp is a level of it."""
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


def uses_ops(
    device_type: str,
    dtype: torch.dtype,
    device: torch.device | None = None,
    has_tangents: bool = False,
) -> bool:
    """True if the compiled ops serve this device type and dtype now, False if the reference does; then it warns, once.

    Args:
        device: the input's; None: none has to be there.
        has_tangents: the ops have the tangents of such a call.

    Raises:
        RuntimeError: a backend was forced that cannot serve the call.
    """
    transformed = not has_tangents and forward_mode()
    if device_type == "cuda" and device is not None and _gpus_without_code is None and _native.get("cuda", False):
        _find_gpus_without_code()
    lacking = device_type == "cuda" and bool(_gpus_without_code)
    if forced is None and not transformed and not dtype.is_complex and not lacking and _native.get(device_type, False):
        return True
    if forced == "reference":
        return False
    gpu = None
    if lacking and device is not None:
        gpu = torch.cuda.current_device() if device.index is None else device.index
    reason = why_not(forced or device_type, Demand(device_type, dtype, gpu, transformed))
    if reason is None:
        return True
    text = f"{reason.text}; {reason.mend}" if reason.mend else reason.text
    if forced is not None:
        raise RuntimeError(f"backend {forced!r} is forced but {text}")
    warn_once(reason.key, text)
    return False


# Where the files of frames lie that are no caller's: this package, torch, and the code that torch.fx generates.
_OUR_FRAMES = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep, "<eval_with_key>")


def warn_once(key: str, reason: str) -> None:
    """Warns that the reference runs, at the line of the first caller outside fused_rnn and torch."""
    if key in _warned:
        return
    _warned.add(key)
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OUR_FRAMES):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"fused_rnn runs on its slow Python reference: {reason}", RuntimeWarning, stacklevel=level)


# What torch.compiler.assume_constant_result sets, without its import of Dynamo: Dynamo calls the function while it compiles.
warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forced_backend() -> str | None:
    """The backend forced by FUSED_RNN_BACKEND or use_backend, or None."""
    return forced


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend inside a ``with`` block, for the whole process.

    Blocks may nest and may overlap between threads: the one entered last decides, and when all have ended, the choice is
    what it was before the first.

    Args:
        name: ``"cuda"``, ``"cpu"``, ``"reference"``, or None for the automatic choice.

    Raises:
        ValueError: unknown name. A call inside the block raises RuntimeError if the backend cannot serve its tensors.
    """
    entry = [None if name is None else _checked(name, "use_backend")]
    with _blocks_lock:
        _blocks.append(entry)
        _set_forced()
    try:
        yield
    finally:
        with _blocks_lock:
            _blocks[:] = [other for other in _blocks if other is not entry]
            _set_forced()


def _set_forced() -> None:
    global forced
    forced = _blocks[-1][0] if _blocks else _forced_by_environment
