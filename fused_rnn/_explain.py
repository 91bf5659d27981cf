"""fused_rnn.explain: how the call of a module would be carried out, without making it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import _backend, _checks, _settings, functional
from fused_rnn._kinds import KINDS, NUMBER_OF_MODE, NUMBER_OF_NONLINEARITY
from fused_rnn.cells import _Cell
from fused_rnn.modules import _Layer

_KIB = 1024


def _device(cc: int, sms: int, block: int, sm: int, threads: int, l2: int, cluster: int) -> dict[str, int]:
    return {
        "compute_capability": cc, "sm_count": sms, "smem_per_block": block * _KIB, "smem_per_sm": sm * _KIB,
        "registers_per_sm": 65536, "threads_per_sm": threads, "l2_bytes": l2 << 20, "max_cluster": cluster,
        "compiled_for": cc,
    }  # fmt: skip


# What the planner knows of a device (csrc/plan/device_info.h), as if the kernels had been compiled for it. CUDA programming
# guide, "Technical specifications per compute capability", and the vendor's data sheets; these do not say how many clusters
# run at once (active_clusters), which the planner then estimates.
DEVICES = {
    "T4": _device(75, 40, 64, 64, 1024, 4, 1),
    "A100": _device(80, 108, 163, 164, 2048, 40, 1),
    "RTX 3090": _device(86, 82, 99, 100, 1536, 6, 1),
    "RTX 4090": _device(89, 128, 99, 100, 1536, 72, 1),
    "H100": _device(90, 132, 227, 228, 2048, 50, 16),
    "H200": _device(90, 132, 227, 228, 2048, 50, 16),
    "B200": _device(100, 148, 227, 228, 2048, 126, 16),
    "RTX 5090": _device(120, 170, 99, 100, 1536, 96, 8),
}


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One layer, all its directions. Sizes as in fused_rnn.functional; N rows in memory (T*B, fewer if packed)."""

    T: int
    B: int
    N: int
    I: int  # noqa: E741
    H: int
    P: int
    D: int
    forward: dict[str, Any]  # as the planner gives it; empty on the reference and where B is 0
    backward: dict[str, Any] | None  # None without gradients
    saved_bytes: int  # kept for backward, beside the layer's input and output


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """How a call would be carried out; ``str()`` is what :func:`explain` prints."""

    module: str
    cell: str
    dtype: str
    packed: bool  # the input is a PackedSequence
    backend: str  # "cuda", "cpu" or "reference"
    device: str  # what it was explained for
    why: str  # this backend
    forced: str | None  # FUSED_RNN_PLAN: a kernel family, or "cheapest"
    layers: tuple[LayerPlan, ...]
    overlap: dict[str, dict[str, Any]]  # on CUDA, "forward" and "backward" (if forward's do): whether the layers overlap

    def __repr__(self) -> str:
        return f"<fused_rnn.Explanation: {self.module} on {self.backend}, {len(self.layers)} layer(s)>"

    def __str__(self) -> str:
        first = self.layers[0]
        head = f"{self.module}, {self.dtype}, T={first.T} B={first.B}" + f" packed into {first.N} rows" * self.packed
        lines = [f"{head}: {self.backend} backend ({self.why})"]
        if self.forced and self.backend == "cuda":
            lines.append(f"FUSED_RNN_PLAN={self.forced}")
        lines += [f"{name}: " + plan["text"].rstrip("\n") for name, plan in self.overlap.items()]
        overlaps = any(plan["chunks"] > 1 for plan in self.overlap.values())
        alone = "; its times are those of its recurrence alone, without overlap" * overlaps
        number = 1
        for layer, group in itertools.groupby(self.layers):
            last = number + len(list(group)) - 1
            which = f"layer {number}" if last == number else f"layers {number} to {last}, each"
            sizes = f"I={layer.I} H={layer.H}" + (f" P={layer.P}" if layer.P != layer.H else "")
            lines.append(f"{which}: {sizes}, {layer.D} direction{'s' * (layer.D > 1)}{alone}")
            if layer.B == 0:
                lines.append("  nothing to do: the batch is empty")
            for name, plan in (("forward", layer.forward), ("backward", layer.backward)):
                if plan:
                    lines += _described(name, plan)
            if layer.backward is not None:
                lines.append(f"  saves {layer.saved_bytes} bytes for backward, beside input and output")
            number = last + 1
        return "\n".join(lines)


def _described(name: str, plan: dict[str, Any]) -> list[str]:
    if "text" in plan:  # the CUDA planner's own words
        blocks = f", {plan['ctas']} blocks at most in a launch"
        first, *rest = plan["text"].rstrip("\n").split("\n")
        registers = plan.get("persistent", {}).get("weight_registers")
        held = [] if registers is None else [f"    {registers} registers of each thread hold weights"]
        return [f"  {name}: {first}{blocks}", *("  " + line for line in rest), *held]
    shares = (
        f"{plan['direction_teams']} of directions x {plan['batch_teams']} of batch rows x {plan['split']} of hidden units"
    )
    return [f"  {name}: {plan['threads']} thread{'s' * (plan['threads'] > 1)}: {shares}; W_hh {plan['weights']}"]


def explain(
    module: nn.Module,
    input: Tensor | PackedSequence,
    *,
    device: str | Mapping[str, Any] | None = None,
    training: bool | None = None,
    show: bool = True,
) -> Explanation:
    """Prints and returns how ``module(input)`` would be carried out, without running it.

    On CUDA: for every layer (both directions together), forward and backward, the kernel family with its tiles, blocks,
    shared memory, registers, the microseconds per step that the cost model expects of the layer's kernels alone, and why
    each other family was not taken; before the layers, whether they overlap in time and what that makes of the whole. On
    a CPU: the instruction set and how the threads divide the work. On the reference: why there are no kernels.

    Args:
        module: fused_rnn's RNN, LSTM, GRU or one of its cells.
        input: what would be passed to it: [T, B, I] ([B, T, I] with batch_first), [T, I] or a PackedSequence; for cells
            [B, I] or [I]. Its values are not read: a tensor on the meta device will do if ``device`` is given.
        device: plan for this GPU instead of the input's device; none has to be there. "T4", "A100", "RTX 3090",
            "RTX 4090", "H100", "H200", "B200", "RTX 5090", as if the kernels had been compiled for it, or a mapping with the
            fields of csrc/plan/device_info.h, of which active_clusters may be left out.
        training: whether backward is explained too; by default, whether autograd would record the call.
        show: whether to print it.

    Raises:
        TypeError: module or input is of another kind.
        ValueError: input does not fit the module; an unknown device; or, as the call itself would, no kernel family can
            serve the call (with the reasons).
        RuntimeError: as the call itself would, the forced backend cannot serve the input.
    """
    sizes, rows = _sizes(module, input)
    data = input.data if isinstance(input, PackedSequence) else input
    described = _described_device(device)
    device_type = "cuda" if described is not None else data.device.type
    if device_type == "meta":
        raise ValueError(f"device: expected one of {', '.join(DEVICES)} for an input on the meta device, got None")
    dtype = _dtype(module, data, device_type)
    if training is None:
        training = torch.is_grad_enabled() and (data.requires_grad or any(p.requires_grad for p in module.parameters()))
    where = device if isinstance(device, str) else str(data.device) if device is None else "the given device"
    backend, why = _backend_for(device_type, dtype, where, described is not None)
    forced = _settings.value("FUSED_RNN_PLAN") or None
    if backend == "cuda" and described is None:
        described = _C().cuda_device(torch.cuda.current_device() if data.device.index is None else data.device.index)
    kind = KINDS[_kind(module)]
    cell = kind.name
    layers = []
    packed = isinstance(input, PackedSequence)
    for size in sizes:
        problem = {"cell": cell, "dtype": str(dtype).removeprefix("torch."), **size}
        forward = _plan(backend, problem, described, forced, packed, training, backward=False)
        backward = _plan(backend, problem, described, forced, packed, training, backward=True) if training else None
        saved = size["D"] * rows * size["H"] * (kind.saved + kind.has_c) * dtype.itemsize
        saved = saved if training and backend != "reference" else 0
        layers.append(LayerPlan(N=rows, forward=forward, backward=backward, saved_bytes=saved, **size))
    name = str(dtype).removeprefix("torch.")
    overlap = _overlap(module, layers, cell, name, described, forced, packed, training) if backend == "cuda" else {}
    result = Explanation(type(module).__name__, cell, name, packed, backend, where, why, forced, tuple(layers), overlap)
    if show:
        print(result)
    return result


def _C() -> Any:
    if _backend._C is None:
        raise RuntimeError(f"there is no planner: {_backend.import_error}")
    return _backend._C


def _kind(module: nn.Module) -> int:
    if isinstance(module, _Layer):
        return NUMBER_OF_MODE[module.mode]
    if isinstance(module, nn.RNNCell):
        return NUMBER_OF_NONLINEARITY[module.nonlinearity]
    return NUMBER_OF_MODE["LSTM" if isinstance(module, nn.LSTMCell) else "GRU"]


def _sizes(module: nn.Module, input: Tensor | PackedSequence) -> tuple[list[dict[str, int]], int]:
    """(T, B, I, H, P, D of every layer, rows in memory); raises for a module or an input that does not fit."""
    if not isinstance(module, (_Layer, _Cell)):
        hint = "; fused_rnn.convert makes one of it" if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) else ""
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(f"module: expected fused_rnn's RNN, LSTM, GRU or one of its cells, got {name}{hint}")
    packed = isinstance(input, PackedSequence)
    if not isinstance(input, Tensor) and not (packed and isinstance(module, _Layer)):
        also = " or a PackedSequence" if isinstance(module, _Layer) else ""
        raise TypeError(f"input: expected a Tensor{also}, got {type(input).__name__}")
    data = input.data if isinstance(input, PackedSequence) else input
    dims = (2,) if packed else (2, 3) if isinstance(module, _Layer) else (1, 2)
    if data.dim() not in dims:
        raise ValueError(f"input: expected {' or '.join(f'{d}-D' for d in dims)}, got {data.dim()}-D")
    if data.shape[-1] != module.input_size:
        raise ValueError(f"input: expected {module.input_size} features (input_size), got {data.shape[-1]}")
    hidden = int(module.hidden_size)
    if isinstance(module, _Cell):
        batch = 1 if data.dim() == 1 else data.shape[0]
        return [{"T": 1, "B": batch, "I": data.shape[-1], "H": hidden, "P": hidden, "D": 1}], batch
    if isinstance(input, PackedSequence):
        steps, batch, rows = len(input.batch_sizes), int(input.batch_sizes[0]), data.shape[0]
    else:
        first, second = (data.shape[0], 1) if data.dim() == 2 else data.shape[:2]
        steps, batch = (second, first) if module.batch_first and data.dim() == 3 else (first, second)
        rows = steps * batch
    if steps == 0:
        raise ValueError("input: expected at least 1 time step, got 0")
    out, directions = int(module.proj_size) or hidden, 1 + bool(module.bidirectional)
    sizes = {"T": steps, "B": batch, "H": hidden, "P": out, "D": directions}
    features = [data.shape[-1]] + [directions * out] * (module.num_layers - 1)
    return [{**sizes, "I": count} for count in features], rows


def _dtype(module: nn.Module, data: Tensor, device_type: str) -> torch.dtype:
    """The dtype in which the call runs; raises where input and weights differ outside autocast."""
    weight = next(p for p in module.parameters())
    if functional._autocast_on(device_type) and data.is_floating_point() and data.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    if data.dtype != weight.dtype:
        raise ValueError(f"input: expected dtype {weight.dtype} (the module's), got {data.dtype}")
    _checks.check_dtype(data)
    return data.dtype


def _described_device(device: str | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if isinstance(device, Mapping):
        missing = [field for field in DEVICES["H100"] if field not in device]
        if missing:
            raise ValueError(f"device: expected the fields {', '.join(DEVICES['H100'])}, got none of {', '.join(missing)}")
        return device
    if device is None:
        return None
    if not isinstance(device, str):
        raise TypeError(f"device: expected a name, a mapping or None, got {type(device).__name__}")
    for name, fields in DEVICES.items():
        if device.lower() == name.lower():
            return fields
    raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {device!r}")


def _backend_for(device_type: str, dtype: torch.dtype, where: str, described: bool) -> tuple[str, str]:
    """(backend, why), with the errors of a call."""
    forced = _backend.forced_backend()
    if forced == "reference":
        return "reference", "it is forced"
    if dtype.is_complex:
        if forced is not None:
            raise RuntimeError(f"backend {forced!r} is forced but for complex numbers only the reference runs")
        return "reference", f"there are no kernels for {dtype}"
    if forced is not None and forced != device_type:
        raise RuntimeError(f"backend {forced!r} is forced but the input is on {device_type!r}")
    if described:
        _C()
        return "cuda", f"as planned for {where}"
    reason = _backend.why_not_native(device_type)
    if reason is None:
        info = _backend.build_info()
        return device_type, f"{where}, {info['cpu_instruction_set']}" if device_type == "cpu" else where
    if forced is not None:
        raise RuntimeError(f"backend {forced!r} is forced but {reason}; see python -m fused_rnn info")
    return "reference", reason


def _plan(
    backend: str,
    problem: dict[str, Any],
    device: Mapping[str, Any] | None,
    forced: str | None,
    packed: bool,
    training: bool,
    backward: bool,
) -> dict[str, Any]:
    """The planner's answer for one layer; empty where nothing is planned."""
    if backend == "reference" or problem["B"] == 0:
        return {}
    if backend == "cpu":
        return _C().cpu_plan(**problem, training=training, backward=backward)
    plan = _C().plan(
        **problem, device=dict(device or {}), allow_tf32=_tf32(problem["dtype"]), ragged=packed, training=training,
        backward=backward, forced=forced,
    )  # fmt: skip
    blocks = [x * y * z for x, y, z in (kernel["grid"] for kernel in plan["kernels"])]
    if held := plan.get("persistent"):
        blocks.append(held["blocks"] * held["groups"] * held["directions"])
    plan["ctas"] = max(blocks)
    return plan


def _tf32(dtype: str) -> bool:
    """torch's own switch for recurrent layers, as csrc/torch/ops_cuda.cpp reads it."""
    switch: Any = torch.backends.cudnn.rnn
    return dtype == "float32" and switch.fp32_precision == "tf32"


def _overlap(
    module: nn.Module,
    layers: Sequence[LayerPlan],
    cell: str,
    dtype: str,
    device: Mapping[str, Any] | None,
    forced: str | None,
    packed: bool,
    training: bool,
) -> dict[str, dict[str, Any]]:
    """Whether the layers overlap in time, and why not; empty for a cell and where nothing is planned."""
    last = layers[-1]
    if not isinstance(module, _Layer) or last.B == 0:
        return {}
    chunks = _settings.value("FUSED_RNN_OVERLAP")
    problem = {
        "cell": cell, "dtype": dtype, "T": last.T, "B": last.B, "I": last.I, "H": last.H, "P": last.P, "D": last.D,
        "device": dict(device or {}), "allow_tf32": _tf32(dtype), "ragged": packed, "training": training, "forced": forced,
        "layers": len(layers), "first_input": layers[0].I, "rows": last.N, "chunks": int(chunks) if chunks else None,
        "dropout": float(module.dropout) if len(layers) > 1 and module.training else 0.0,
    }  # fmt: skip
    result = {"forward": _C().overlap(**problem)}
    if training and result["forward"]["chunks"] > 1:
        result["backward"] = _C().overlap(**problem, backward=True)
    return result
