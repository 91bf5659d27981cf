"""fused_rnn.explain: how the call of a module would be carried out, without making it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import _backend, _checkpoint, _checks, _ops, _settings, functional
from fused_rnn._kinds import KINDS, Kind, number_of
from fused_rnn._pass_plans import pass_on_cpu, pass_on_cuda
from fused_rnn._quick_call import QuickCall
from fused_rnn._recipe import Recipe, Rows, StepOptions
from fused_rnn._regularisation import options_of
from fused_rnn.explanation import Explanation, LayerPlan, Overlap, PassPlan, Rejection
from fused_rnn.formula.explaining import explain_formula, sizes_of
from fused_rnn.formula.modules import Layer, Step

_KIB = 1024


def _device(cc: int, sms: int, block: int, sm: int, threads: int, l2: int, cluster: int, dram: int) -> dict[str, int]:
    return {
        "compute_capability": cc, "sm_count": sms, "smem_per_block": block * _KIB, "smem_per_sm": sm * _KIB,
        "registers_per_sm": 65536, "threads_per_sm": threads, "l2_bytes": l2 << 20, "max_cluster": cluster,
        "compiled_for": cc, "dram_gb_per_s": dram,
    }  # fmt: skip


# What the planner knows of a device (csrc/plan/device_info.h), as if the kernels had been compiled for it. CUDA programming
# guide, "Technical specifications per compute capability", and the vendor's data sheets; these do not say how many clusters
# run at once (active_clusters), which the planner then estimates.
DEVICES = {
    "T4": _device(75, 40, 64, 64, 1024, 4, 1, 320),
    "A100": _device(80, 108, 163, 164, 2048, 40, 1, 2039),
    "RTX 3090": _device(86, 82, 99, 100, 1536, 6, 1, 936),
    "RTX 4090": _device(89, 128, 99, 100, 1536, 72, 1, 1008),
    "H100": _device(90, 132, 227, 228, 2048, 50, 16, 3350),
    "H200": _device(90, 132, 227, 228, 2048, 50, 16, 4800),
    "B200": _device(100, 148, 227, 228, 2048, 126, 16, 8000),
    "RTX 5090": _device(120, 170, 99, 100, 1536, 96, 8, 1792),
}


def explain(
    module: nn.Module,
    input: Tensor | PackedSequence,
    *,
    device: str | Mapping[str, Any] | None = None,
    training: bool | None = None,
    show: bool = True,
) -> Explanation:
    """Prints and returns how ``module(input)`` would be carried out, without running it.

    The result, an :class:`fused_rnn.explanation.Explanation`, has the same fields for every backend. It names the backend
    and says why each one before it in the order cuda, cpu, reference does not serve the call. On CUDA it has, for forward
    and backward of every layer (both directions together), the kernel family with its kernels, their blocks, shared memory
    and registers, the microseconds that the cost model expects of the layer's kernels alone, and why each other family was
    not taken; and whether the layers overlap in time and what that makes of the whole. cuDNN, whose kernels are not known,
    is the family wherever nothing better has been verified on the device; of a ``device`` that is only described, nothing
    has. FUSED_RNN_PLAN=cheapest shows what the cost model would take. On a CPU it has the instruction set and how the
    threads divide the work.

    Args:
        module: fused_rnn's RNN, LSTM, GRU or one of its cells; or a Layer or Step of a cell of your own.
        input: what would be passed to it: [T, B, I] ([B, T, I] with batch_first), [T, I] or a PackedSequence; for cells
            [B, I] or [I]. Its values are not read: a tensor on the meta device will do if ``device`` is given.
        device: plan for this GPU instead of the input's device; none has to be there. "T4", "A100", "RTX 3090",
            "RTX 4090", "H100", "H200", "B200", "RTX 5090", as if the kernels had been compiled for it, or a mapping with the
            fields of csrc/plan/device_info.h, of which active_clusters and dram_gb_per_s
            may be left out.
        training: whether backward is explained too; by default, whether autograd would record the call.
        show: whether to print it.

    Raises:
        TypeError: module or input is of another kind.
        ValueError: input does not fit the module; an unknown device; or, as the call itself would, no kernel family can
            serve the call (with the reasons).
        RuntimeError: as the call itself would, the forced backend cannot serve the input.
    """
    if training is None:
        training = _records(module, input)
    if isinstance(module, (Layer, Step)):
        sizes, rows = sizes_of(module, input)
        data = input.data if isinstance(input, PackedSequence) else input
        described, where = _described_device(device), None
        if described is not None:
            where = device if isinstance(device, str) else "the given device"
        elif data.is_cuda and _backend.has_cuda_kernels():
            described = planner().cuda_device(_number_of(data.device))
        dtype = _dtype(module, data, data.device.type if where is None else "cuda")
        result = explain_formula(module, input, dtype, (sizes, rows, training), described, where)
        if show:
            print(result)
        return result
    sizes, rows = _sizes(module, input)
    data = input.data if isinstance(input, PackedSequence) else input
    described = _described_device(device)
    device_type = "cuda" if described is not None else data.device.type
    if device_type == "meta":
        raise ValueError(f"device: expected one of {', '.join(DEVICES)} for an input on the meta device, got None")
    dtype = _dtype(module, data, device_type)
    where = device if isinstance(device, str) else str(data.device) if device is None else "the given device"
    options = options_of(module)
    modified = options is not None and options.modifies_steps(module.training)
    backend, reason, rejected = _backend_for(device_type, dtype, where, described is not None)
    gpu = None  # the number of one that is there
    if backend == "cuda" and described is None:
        gpu = _number_of(data.device)
        described = planner().cuda_device(gpu)
    call = _Call(
        cell=number_of(module), backend=backend, dtype=dtype, device=described, packed=isinstance(input, PackedSequence),
        training=training, forced=_forced(module), modified=modified, checkpoint=getattr(module, "checkpoint", 0),
    )  # fmt: skip
    family = record = None
    if backend == "cuda" and not _settings.value("FUSED_RNN_PLAN") and sizes[0]["B"] and not modified:
        family, record = _recorded(module, gpu, call, sizes) if gpu is not None else _unverified(module, call, sizes)
        call = dataclasses.replace(call, preferred=family if family in planner().families else None)
    layers = tuple(_layer(call, size, rows) for size in sizes)
    forward, backward = _overlaps(module, call, layers)
    result = Explanation(
        module=type(module).__name__, cell=call.kind.name, dtype=call.dtype_name, packed=call.packed, device=where,
        backend=backend, reason=reason, rejected=rejected,
        instruction_set=_backend.build_info()["cpu_instruction_set"] if backend == "cpu" else None,
        forced_family=call.forced if backend == "cuda" else None, layers=layers,
        forward_overlap=forward, backward_overlap=backward, family=family, record=record,
    )  # fmt: skip
    if show:
        print(result)
    return result


def _records(module: nn.Module, input: Any) -> bool:
    """Whether autograd would record the call."""
    data = input.data if isinstance(input, PackedSequence) else input
    asks = isinstance(data, Tensor) and data.requires_grad
    return torch.is_grad_enabled() and (asks or any(p.requires_grad for p in module.parameters()))


def _forced(module: nn.Module) -> str | None:
    """What FUSED_RNN_PLAN makes of the call: cudnn is for layers, and leaves cells to the planner."""
    forced = _settings.value("FUSED_RNN_PLAN") or None
    return None if forced == "cudnn" and isinstance(module, nn.RNNCellBase) else forced


def _number_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def planner() -> Any:
    """The compiled extension, which plans.

    Raises:
        RuntimeError: it is not there.
    """
    if _settings.extension is None:
        raise RuntimeError(f"there is no planner: {_settings.import_error}")
    return _settings.extension


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the plans of all layers have in common."""

    cell: int  # its number
    backend: str
    dtype: torch.dtype
    device: Mapping[str, Any] | None  # fields of csrc/plan/device_info.h; CUDA
    packed: bool
    training: bool
    forced: str | None
    preferred: str | None = None  # the family that serves where it can
    modified: bool = False  # steps are more than the cell's
    checkpoint: int = 0  # the number of steps between the states that are kept for backward; 0: everything is kept

    @property
    def kind(self) -> Kind:
        return KINDS[self.cell]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def problem(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The arguments of the CUDA planner but the direction of the pass."""
        return {
            "cell": self.kind.name, "dtype": self.dtype_name, **sizes, "device": dict(self.device or {}),
            "allow_tf32": _tf32(self.dtype), "ragged": self.packed, "training": self.training, "forced": self.forced,
            "preferred": self.preferred, "modified": self.modified,
        }  # fmt: skip


def _recorded(module: nn.Module, gpu: int, call: _Call, sizes: Sequence[Mapping[str, int]]) -> tuple[str | None, str | None]:
    """(the family that serves the call, what is recorded of such calls); as csrc/torch/choice_cuda.cpp asks."""
    from fused_rnn.tuning import here, serve  # nobody else needs them where there is no GPU

    first, is_layer = sizes[0], isinstance(module, nn.RNNBase)
    dropout = isinstance(module, nn.RNNBase) and module.training and module.dropout > 0 and module.num_layers > 1
    question = {
        **{name: first[name] for name in "TBIHP"}, "directions": first["D"], "layers": len(sizes), "cell": call.kind.name,
        "dtype": call.dtype_name, "tf32": _tf32(call.dtype), "training": call.training, "one_step": not is_layer,
        "rows": ("packed" if call.packed else "dense") + "+dropout" * dropout, "may_time": True,
        "deterministic": torch.are_deterministic_algorithms_enabled(), "device": gpu,
        "cudnn": _cudnn_serves(module, call, sizes),
        "ours": [family for family in here.FAMILIES if family != "cudnn" and _serves(family, call, sizes)],
    }  # fmt: skip
    if not question["cudnn"] and not question["ours"]:
        return None, None  # the planner says why
    return serve.explained(question)


def _unverified(module: nn.Module, call: _Call, sizes: Sequence[Mapping[str, int]]) -> tuple[str | None, str | None]:
    """(the family that serves the call on a device where nothing is verified, why), if that is cuDNN; else the planner's."""
    if not _cudnn_serves(module, call, sizes):
        return None, None
    return "cudnn", "the default until another family is verified on the device (python -m fused_rnn verify)"


def _cudnn_serves(module: nn.Module, call: _Call, sizes: Sequence[Mapping[str, int]]) -> bool:
    """What csrc/plan/cudnn.h says of what a module and its input tell; the rest of a call is taken to lack nothing."""
    lacking = planner().cudnn_lacks(
        cell=call.kind.name, T=sizes[0]["T"], enabled=torch.backends.cudnn.enabled, modified=call.modified,
        deterministic=torch.are_deterministic_algorithms_enabled(), one_step=not isinstance(module, nn.RNNBase),
        empty=0 in (sizes[0]["B"], sizes[0]["I"]),
    )  # fmt: skip
    return not lacking and _serves("cudnn", call, sizes)


def _serves(family: str, call: _Call, sizes: Sequence[Mapping[str, int]]) -> bool:
    """Whether a family can serve all layers, forward and, for training, backward."""
    try:
        for backward, size in itertools.product((False, True)[: 1 + call.training], sizes[:2]):
            planner().plan(**{**call.problem(size), "forced": family}, backward=backward)
    except ValueError:
        return False
    return True


def _sizes(module: nn.Module, input: Tensor | PackedSequence) -> tuple[list[dict[str, int]], int]:
    """(T, B, I, H, P, D of every layer, rows in memory); raises for a module or an input that does not fit."""
    if not (isinstance(module, QuickCall) and isinstance(module, (nn.RNNBase, nn.RNNCellBase))):
        hint = "; fused_rnn.convert makes one of it" if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) else ""
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(f"module: expected fused_rnn's RNN, LSTM, GRU or one of its cells, got {name}{hint}")
    packed = isinstance(input, PackedSequence)
    if not isinstance(input, Tensor) and not (packed and isinstance(module, nn.RNNBase)):
        also = " or a PackedSequence" if isinstance(module, nn.RNNBase) else ""
        raise TypeError(f"input: expected a Tensor{also}, got {type(input).__name__}")
    data = input.data if isinstance(input, PackedSequence) else input
    dims = (2,) if packed else (2, 3) if isinstance(module, nn.RNNBase) else (1, 2)
    if data.dim() not in dims:
        raise ValueError(f"input: expected {' or '.join(f'{d}-D' for d in dims)}, got {data.dim()}-D")
    if data.shape[-1] != module.input_size:
        raise ValueError(f"input: expected {module.input_size} features (input_size), got {data.shape[-1]}")
    hidden = int(module.hidden_size)
    if isinstance(module, nn.RNNCellBase):
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
    if functional.autocast_on(device_type) and data.is_floating_point() and data.dtype != torch.float64:
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


def _backend_for(
    device_type: str, dtype: torch.dtype, where: str, described: bool
) -> tuple[str, str, tuple[Rejection, ...]]:
    """(backend, why it, the backends before it with their reasons), with the errors of a call."""
    forced = _backend.forced_backend()
    planned = described and not dtype.is_complex and forced in (None, "cuda")
    if forced is not None and not planned:
        _backend.uses_ops(device_type, dtype, None)  # raises where it cannot serve
    if planned:
        planner()
    demand = _backend.Demand(device_type, dtype)
    rejected: list[Rejection] = []
    for backend in _backend.BACKENDS:
        if planned and backend == "cuda":
            break
        if forced not in (None, backend):
            rejected.append(Rejection(backend, f"backend {forced!r} is forced"))
            continue
        why_not = _backend.why_not(backend, demand)
        if why_not is None:
            break
        rejected.append(Rejection(backend, why_not.text))
    if forced is not None:
        reason = "it is forced"
    elif backend == "reference":
        reason = next((other.reason for other in rejected if other.name == device_type), rejected[-1].reason)
    else:
        reason = f"as planned for {where}" if described else f"the input is on {where}"
    return backend, reason, tuple(rejected)


def _layer(call: _Call, sizes: Mapping[str, int], rows: int) -> LayerPlan:
    forward = _pass(call, sizes, backward=False)
    backward = _pass(call, sizes, backward=True) if call.training else None
    unknown = call.backend == "reference" or forward.family == "cudnn"
    saved = None if unknown else _saved_bytes(call, sizes, rows) if call.training else 0
    return LayerPlan(N=rows, forward=forward, backward=backward, saved_bytes=saved, **sizes)


def _saved_bytes(call: _Call, sizes: Mapping[str, int], rows: int) -> int:
    """What the layer's op returns for backward, by its fake kernel, which tells the shapes of its results."""
    steps, batch, hidden, out = (sizes[name] for name in "TBHP")

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=call.dtype, device="meta")

    gates, directions = call.kind.gates * hidden, sizes["D"]
    x = empty(rows, sizes["I"]) if call.packed else empty(steps, batch, sizes["I"])
    states = [empty(directions, batch, size) for size in (out, hidden)[: call.kind.states]]
    params = [empty(gates, sizes["I"]), empty(gates, out)] * directions
    offsets = torch.empty(steps + 1, dtype=torch.int64, device="meta") if call.packed else None
    some = Rows(offsets=offsets, options=StepOptions(clip=1.0) if call.modified else StepOptions())
    numbers = Recipe(call.cell, 1, False, directions == 2).packed | some.bits
    if not call.checkpoint:
        saved = _ops.fake_layer(x, states, params, some.given(), numbers, save=True)[2]
    elif _checkpoint.keeps_states(call.backend):
        saved = _checkpoint.fake_layer(x, states, params, some.given(), [numbers, call.checkpoint])[2]
    else:
        saved = []
    return sum(tensor.nbytes for tensor in saved)


def _pass(call: _Call, sizes: Mapping[str, int], backward: bool) -> PassPlan:
    """The planner's answer for one layer; empty where nothing is planned."""
    if call.backend == "reference" or sizes["B"] == 0:
        return PassPlan()
    if call.backend == "cpu":
        return pass_on_cpu(
            planner().cpu_plan(
                cell=call.kind.name, dtype=call.dtype_name, **sizes, training=call.training, backward=backward
            )
        )
    return pass_on_cuda(planner().plan(**call.problem(sizes), backward=backward), sizes, backward)


def _tf32(dtype: torch.dtype) -> bool:
    """torch's own switch for recurrent layers, as csrc/torch/ops_cuda.cpp reads it."""
    switch: Any = torch.backends.cudnn.rnn
    return dtype == torch.float32 and switch.fp32_precision == "tf32"


def _overlaps(module: nn.Module, call: _Call, layers: Sequence[LayerPlan]) -> tuple[Overlap | None, Overlap | None]:
    """(forward's, backward's); None for a cell and where nothing is planned, backward's also where forward's is in turn."""
    last = layers[-1]
    if call.backend != "cuda" or call.modified or not isinstance(module, nn.RNNBase):
        return None, None
    if last.B == 0 or last.forward.family == "cudnn":
        return None, None
    chunks = _settings.value("FUSED_RNN_OVERLAP")
    stack = {
        **call.problem({size: getattr(last, size) for size in "TBIHPD"}),
        "layers": len(layers), "first_input": layers[0].I, "rows": last.N, "chunks": int(chunks) if chunks else None,
        "dropout": float(module.dropout) if len(layers) > 1 and module.training else 0.0,
    }  # fmt: skip
    forward = _overlap(planner().overlap(**stack))
    backward = _overlap(planner().overlap(**stack, backward=True)) if call.training and forward.chunks > 1 else None
    return forward, backward


def _overlap(made: Mapping[str, Any]) -> Overlap:
    return Overlap(**{**made, "text": made["text"].rstrip("\n")})
