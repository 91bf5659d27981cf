"""fused_rnn.explain: tables per device, agreement with what a call does, and its errors."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest
import torch
from settings import Setting
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from fused_rnn import _backend, _explain, _settings
from fused_rnn._explain import DEVICES
from fused_rnn.explanation import Explanation, PassPlan, Rejection

needs_extension = pytest.mark.skipif(not _backend.has_cpu_kernels(), reason="needs the compiled extension")
FAMILIES = {"single", "step", "grid", "cluster", "block", "gemm"}


def explain(module: torch.nn.Module, input: Any, **kwargs: Any) -> Explanation:
    return fused_rnn.explain(module, input, show=False, **kwargs)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def large_lstm(dtype: torch.dtype = torch.float16, **kwargs: Any) -> torch.nn.Module:
    return fused_rnn.LSTM(768, 768, dtype=dtype, device="meta", **kwargs)


@needs_extension
@pytest.mark.parametrize(
    ("gpu", "grid", "cluster"),
    [
        ("T4", "needs compute capability 8.0", "needs compute capability 9.0"),
        ("A100", None, "needs compute capability 9.0"),
        ("RTX 4090", None, "needs compute capability 9.0"),
        ("H100", None, None),
        ("h200", None, None),
        ("B200", None, None),
    ],
)
def test_table_of_devices(gpu: str, grid: str | None, cluster: str | None, setting: Setting) -> None:
    """Which persistent families a device can hold for an LSTM of 256 units; every other family has its reason."""
    lstm = fused_rnn.LSTM(64, 256, dtype=torch.float16, device="meta")
    x = meta(100, 16, 64, dtype=torch.float16)
    by_default = explain(lstm, x, device=gpu)
    setting("FUSED_RNN_PLAN", "cheapest")
    for result in (by_default, explain(lstm, x, device=gpu)):
        assert result.backend == "cuda" and result.device == gpu
        (layer,) = result.layers
        assert layer.backward is not None
        for plan in (layer.forward, layer.backward):
            rejected = {other.name: other.reason for other in plan.rejected}
            assert {*rejected, plan.family} - {"cudnn"} == FAMILIES and plan.family not in rejected
            assert rejected["single"] == "serves one time step, not 100"
            for family, reason in (("grid", grid), ("cluster", cluster)):
                if reason is not None:
                    assert rejected[family] == reason
            assert plan.us is not None and plan.us_per_step is not None and plan.us > plan.us_per_step > 0
            assert plan.cheapest in {one.family for one in plan.candidates}
            assert (plan.family == "cudnn" and not plan.kernels) == (result is by_default)
            for kernel in plan.kernels:
                assert kernel.persistent == (plan.family in ("grid", "cluster"))
                assert kernel.blocks > 0 and 0 < kernel.smem_bytes <= DEVICES[gpu.upper()]["smem_per_block"]


@needs_extension
def test_default_of_a_described_device() -> None:
    """cuDNN, where it can, as csrc/torch/choice_cuda.cpp has it while nothing is verified; else the planner's choice."""
    for module, x in (
        (fused_rnn.LSTM(4, 5, num_layers=2, proj_size=3), torch.zeros(7, 3, 4)),
        (fused_rnn.RNN(4, 5), torch.zeros(1, 3, 4)),
        (fused_rnn.GRU(4, 5), pack_sequence([torch.zeros(n, 4) for n in (6, 2)])),
    ):
        result = explain(module, x, device="A100")
        assert result.family == "cudnn" and result.layers[0].forward.launches is None
        assert "\ncudnn serves: the default until another family is verified on the device" in str(result)
        for layer in result.layers:
            assert layer.backward is not None
            for plan in (layer.forward, layer.backward):
                assert plan.family == "cudnn" and plan.reason is not None and "torch asks cuDNN for its" in plan.reason
                assert Rejection("step", "cudnn is chosen for this call") in plan.rejected
    lacking = (fused_rnn.RNN(4, 5, nonlinearity="identity"), fused_rnn.LSTMCell(4, 5), fused_rnn.GRU(4, 5))
    shapes = ((7, 3, 4), (3, 4), (65536, 1, 4))
    for module, shape, family in zip(lacking, shapes, ("step", "single", "step"), strict=True):
        result = explain(module, meta(*shape), device="A100")
        assert result.family is None and result.layers[0].forward.family == family
    lstm, x = fused_rnn.LSTM(4, 5), torch.zeros(7, 3, 4)
    torch.use_deterministic_algorithms(True)
    try:
        assert explain(lstm, x, device="A100").layers[0].forward.family == "step"
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
        assert explain(lstm, x, device="A100").layers[0].forward.family == "step"


@needs_extension
@pytest.mark.parametrize("family", ["step", "grid", "cluster"])
def test_forced_family(family: str, setting: Setting) -> None:
    setting("FUSED_RNN_PLAN", family)
    lstm = fused_rnn.LSTM(64, 256, dtype=torch.float16, device="meta")
    x = meta(100, 16, 64, dtype=torch.float16)
    result = explain(lstm, x, device="H100")
    plan = result.layers[0].forward
    assert plan.family == family and f"FUSED_RNN_PLAN={family}\n" in str(result)
    if family != "step":
        (held,) = plan.kernels
        slices = held.grid[0]
        assert f"{held.blocks} blocks at most in a launch" in plan.text and plan.launches == held.launches == 1
        # A group's blocks share the units, the groups share the rows.
        assert slices * held.units >= 256 and (held.grid[1] - 1) * held.rows < 16 <= held.grid[1] * held.rows
        assert held.threads * held.weight_registers * 4 == held.weight_bytes_in_registers
        # The registers and the shared memory of all blocks of a group hold the weights: 4 gates, 256 x 256, 2 bytes.
        in_registers = slices * held.threads * held.weight_registers * 4
        in_smem = slices * held.weight_bytes_in_smem
        assert in_registers + in_smem >= 4 * 256 * 256 * 2
        with pytest.raises(ValueError, match=f"kernel family {family} cannot serve this layer: {family} needs compute"):
            explain(lstm, x, device="T4")


@needs_extension
def test_forced_cudnn(setting: Setting) -> None:
    """As the call itself: it serves layers, refuses those it lacks something for, and leaves cells to the planner."""
    setting("FUSED_RNN_PLAN", "cudnn")
    result = explain(fused_rnn.GRU(4, 5), torch.zeros(7, 3, 4), device="T4")
    assert result.layers[0].forward.family == "cudnn" and "FUSED_RNN_PLAN=cudnn\n" in str(result) and result.family is None
    with pytest.raises(ValueError, match="cudnn cannot serve this layer: cudnn has no cell rnn_identity"):
        explain(fused_rnn.RNN(4, 5, nonlinearity="identity"), torch.zeros(7, 3, 4), device="T4")
    cell = explain(fused_rnn.GRUCell(4, 5), torch.zeros(3, 4), device="T4")
    assert cell.layers[0].forward.family == "single" and cell.forced_family is None and cell.family is None


@needs_extension
def test_cheapest_families(setting: Setting) -> None:
    """For each layer and pass its own, and where a family cannot serve a layer, another."""
    setting("FUSED_RNN_PLAN", "cheapest")
    lstm = fused_rnn.LSTM(64, 512, num_layers=2, device="meta")
    x = meta(100, 64, 64)
    result = explain(lstm, x, device="H100", training=True)
    assert [(layer.forward.family, layer.backward and layer.backward.family) for layer in result.layers] == [
        ("grid", "cluster")
    ] * 2
    assert "FUSED_RNN_PLAN=cheapest\n" in str(result) and "because grid is the cheapest by the cost model" in str(result)
    for dtype, device in ((torch.float64, "H100"), (torch.float16, "T4")):
        result = explain(lstm.to(dtype), x.to(dtype), device=device)
        assert result.layers[0].forward.family == "step"


@needs_extension
def test_every_layer_has_its_sizes(setting: Setting) -> None:
    setting("FUSED_RNN_PLAN", "step")
    lstm = fused_rnn.LSTM(12, 40, num_layers=3, bidirectional=True, proj_size=7, batch_first=True)
    result = explain(lstm, torch.zeros(5, 9, 12), device="A100")
    sizes = [(y.T, y.B, y.N, y.I, y.H, y.P, y.D) for y in result.layers]
    assert sizes == [(9, 5, 45, 12, 40, 7, 2), (9, 5, 45, 14, 40, 7, 2), (9, 5, 45, 14, 40, 7, 2)]
    assert [kernel.name for kernel in result.layers[0].forward.kernels] == ["forward", "project"]
    text = str(result)
    assert "layer 1: I=12 H=40 P=7, 2 directions" in text and "layers 2 to 3, each: I=14" in text
    assert "not grid: has no projection" in text


@needs_extension
def test_saved_bytes_are_those_of_autograd() -> None:
    """What the layer op keeps for backward beside its inputs and outputs: the gates and the cell states."""
    for kind in (fused_rnn.LSTM, fused_rnn.GRU, fused_rnn.RNN):
        module = kind(6, 10, bidirectional=True)
        x = torch.randn(4, 3, 6)
        saved: dict[int, int] = {}

        def keep(t: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = module(x)[0]
        known = [x, y, *module.parameters()]
        extra = sum(n for p, n in saved.items() if p not in {t.untyped_storage().data_ptr() for t in known})
        assert extra == explain(module, x).layers[0].saved_bytes, kind
        with torch.no_grad():
            assert explain(module, x).layers[0].saved_bytes == 0
            assert explain(module, x).layers[0].backward is None


class SavedBytes(TorchDispatchMode):
    """Collects, of every call of a layer's op, the bytes of its third result: what forward makes for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.of_layers: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func in (torch.ops.fused_rnn.layer.default, torch.ops.fused_rnn.layer_checkpointed.default):
            self.of_layers.append(sum(t.nbytes for t in results[2]))
        return results


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zoneout": {"zoneout": 0.1},
    "recurrent_dropout": {"recurrent_dropout": 0.3},
    "weight_dropout": {"weight_dropout": 0.3},
    "state_clip": {"state_clip": 1.5},
    "projection": {"proj_size": 5},
}
CELLS = ("LSTM", "GRU", "tanh", "relu", "identity")


def has(cell: str, options: str) -> bool:
    return options != "projection" or cell == "LSTM"


def with_cell(cell: str, suffix: str, *args: Any, **kwargs: Any) -> torch.nn.Module:
    if cell in ("LSTM", "GRU"):
        return getattr(fused_rnn, cell + suffix)(*args, **kwargs)
    return getattr(fused_rnn, "RNN" + suffix)(*args, nonlinearity=cell, **kwargs)


@needs_extension
@pytest.mark.parametrize(("cell", "options"), [pair for pair in itertools.product(CELLS, OPTIONS) if has(*pair)])
def test_saved_bytes_are_those_of_the_op(cell: str, options: str) -> None:
    """Of every layer, dense and packed, in training and eval mode, with and without kept states alone; and of cells."""
    given = OPTIONS[options]
    ragged = [5, 2, 4]
    for dtype, every in itertools.product((torch.float64, torch.float32, torch.float16, torch.bfloat16), (0, 2, 5)):
        made = with_cell(cell, "", 7, 6, num_layers=2, bidirectional=True, checkpoint=every, dtype=dtype, **given)
        packed = pack_sequence([torch.zeros(n, 7, dtype=dtype) for n in ragged], enforce_sorted=False)
        calls: list[Any] = [(made, torch.zeros(5, 3, 7, dtype=dtype)), (made, packed)]
        if not every and options not in ("recurrent_dropout", "projection"):
            calls.append((with_cell(cell, "Cell", 7, 6, dtype=dtype, **given), torch.zeros(3, 7, dtype=dtype)))
        for (module, x), training in itertools.product(calls, (True, False)):
            module.train(training)
            with SavedBytes() as found:
                module(x)
            assert [layer.saved_bytes for layer in explain(module, x).layers] == found.of_layers, (dtype, every, training)
            assert [layer.saved_bytes for layer in explain(module, x, training=False).layers] == [0] * len(found.of_layers)


@needs_extension
def test_saved_bytes_on_a_gpu(setting: Setting) -> None:
    """The ops' own, whatever the family; with kept states alone a GPU keeps none; cuDNN does not say."""
    x = torch.zeros(5, 3, 7)
    assert explain(fused_rnn.LSTM(7, 6), x, device="H100").layers[0].saved_bytes is None
    setting("FUSED_RNN_PLAN", "step")
    for kept, expected in ((fused_rnn.LSTM(7, 6), 15 * 6 * 5 * 4), (fused_rnn.LSTM(7, 6, checkpoint=2), 0)):
        assert explain(kept, x, device="H100").layers[0].saved_bytes == expected


@needs_extension
def test_inputs_that_the_modules_take() -> None:
    gru = fused_rnn.GRU(4, 5)
    unbatched = explain(gru, torch.zeros(7, 4), device="H100").layers[0]
    assert (unbatched.T, unbatched.B) == (7, 1)
    for lengths in ((3, 1, 2), (2, 2)):
        packed = explain(gru, pack_sequence([torch.zeros(n, 4) for n in lengths], enforce_sorted=False), device="H100")
        layer = packed.layers[0]
        assert (layer.T, layer.B, layer.N, packed.packed) == (max(lengths), len(lengths), sum(lengths), True)
        assert f"packed into {sum(lengths)} rows" in str(packed)
    for module in (fused_rnn.GRUCell(4, 5), fused_rnn.RNNCell(4, 5, nonlinearity="relu")):
        for x, batch in ((torch.zeros(3, 4), 3), (torch.zeros(4), 1)):
            result = explain(module, x, device="A100")
            assert result.layers[0].forward.family == "single" and result.layers[0].B == batch
    assert explain(fused_rnn.RNN(4, 5, nonlinearity="identity"), torch.zeros(2, 1, 4), device="T4").cell == "rnn_identity"
    empty = explain(gru, torch.zeros(7, 0, 4), device="H100")
    assert empty.layers[0].forward == PassPlan() and "the batch is empty" in str(empty)


@needs_extension
def test_arithmetic_follows_torchs_switch(setting: Setting) -> None:
    setting("FUSED_RNN_PLAN", "step")
    x = meta(10, 4, 768)
    lstm = large_lstm(torch.float32)
    before = torch.backends.cudnn.rnn.fp32_precision
    try:
        for precision, math in (("ieee", "fp32"), ("tf32", "tf32")):
            torch.backends.cudnn.rnn.fp32_precision = precision
            assert explain(lstm, x, device="H100").layers[0].forward.kernels[0].math == math
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before


@needs_extension
def test_autocast_decides_the_dtype() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert explain(fused_rnn.LSTM(4, 5), torch.zeros(3, 2, 4)).dtype == "bfloat16"
        assert explain(fused_rnn.LSTM(4, 5).double(), torch.zeros(3, 2, 4).double()).dtype == "float64"


@needs_extension
def test_on_this_cpu(setting: Setting) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        result = explain(fused_rnn.LSTM(32, 512), torch.zeros(50, 1, 32))
        assert result.layers[0].forward.threads in (1, 2)
        torch.set_num_threads(1)
        layer = explain(fused_rnn.LSTM(32, 512), torch.zeros(50, 1, 32)).layers[0]
        assert layer.backward is not None and layer.forward.threads == layer.backward.threads == 1
    finally:
        torch.set_num_threads(threads)
    assert result.backend == "cpu" and result.instruction_set == fused_rnn.build_info()["cpu_instruction_set"]
    assert f"cpu backend, {result.instruction_set} (the input is on cpu)" in str(result)
    for plan in (result.layers[0].forward, result.layers[0].backward):
        assert plan is not None and plan.shares is not None
        assert plan.threads == plan.shares.directions * plan.shares.batch_rows * plan.shares.hidden_units
    assert "W_hh " in str(result)
    assert "2 threads: 1 of directions x " in str(result) or "1 thread: 1 of directions x " in str(result)
    setting("FUSED_RNN_CPU", "portable")
    assert explain(fused_rnn.LSTM(3, 4), torch.zeros(2, 1, 3)).instruction_set == "portable"


def test_on_the_reference(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gru, x = fused_rnn.GRU(3, 4), torch.zeros(2, 1, 3)
    with fused_rnn.use_backend("reference"):
        result = fused_rnn.explain(gru, x)
        assert capsys.readouterr().out == f"{result}\n"
        assert result.backend == "reference" and "it is forced" in str(result)
    for module in (_backend, _settings):
        monkeypatch.setattr(module, "extension", None)
        monkeypatch.setattr(module, "import_error", "the extension was never compiled")
    monkeypatch.setattr(_backend, "_native", {})
    monkeypatch.setattr(_backend, "forced", None)
    assert "reference backend (the extension was never compiled)" in str(explain(gru, x))
    with pytest.raises(RuntimeError, match="there is no planner: the extension was never compiled"):
        explain(gru, x, device="H100")
    with fused_rnn.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' is forced but the extension was never"):
        explain(gru, x)
    with fused_rnn.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' is forced but the input is on 'cpu'"):
        explain(gru, x)


@pytest.mark.parametrize(
    ("module", "input", "error", "message"),
    [
        (torch.nn.LSTM(3, 4), torch.zeros(2, 1, 3), TypeError, "got torch.nn.modules.rnn.LSTM; fused_rnn.convert makes"),
        (torch.nn.Linear(3, 4), torch.zeros(2, 3), TypeError, "module: expected fused_rnn's RNN, LSTM, GRU or one of its"),
        (fused_rnn.GRU(3, 4), [1.0], TypeError, "input: expected a Tensor or a PackedSequence, got list"),
        (fused_rnn.GRUCell(3, 4), pack_sequence([torch.zeros(2, 3)]), TypeError, "expected a Tensor, got PackedSequence"),
        (fused_rnn.GRU(3, 4), torch.zeros(3), ValueError, "input: expected 2-D or 3-D, got 1-D"),
        (fused_rnn.GRUCell(3, 4), torch.zeros(2, 1, 3), ValueError, "input: expected 1-D or 2-D, got 3-D"),
        (fused_rnn.GRU(3, 4), torch.zeros(2, 1, 5), ValueError, r"input: expected 3 features \(input_size\), got 5"),
        (fused_rnn.GRU(3, 4), torch.zeros(0, 1, 3), ValueError, "at least 1 time step, got 0"),
        (fused_rnn.GRU(3, 4), torch.zeros(2, 1, 3).double(), ValueError, "expected dtype torch.float32 .*got torch.float64"),
        (fused_rnn.GRU(3, 4), meta(2, 1, 3), ValueError, "device: expected one of T4, A100"),
    ],
)
def test_errors(module: torch.nn.Module, input: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        explain(module, input)


def test_errors_of_device() -> None:
    gru, x = fused_rnn.GRU(3, 4), torch.zeros(2, 1, 3)
    with pytest.raises(ValueError, match="device: expected one of T4, A100, .*, got 'H900'"):
        explain(gru, x, device="H900")
    with pytest.raises(ValueError, match="got none of sm_count"):
        explain(gru, x, device={key: value for key, value in DEVICES["H100"].items() if key != "sm_count"})
    with pytest.raises(TypeError, match="device: expected a name, a mapping or None, got int"):
        explain(gru, x, device=0)  # type: ignore[arg-type]


@needs_extension
def test_overlapping_layers_say_what_their_times_leave_out(setting: Setting) -> None:
    lstm = fused_rnn.LSTM(256, 256, num_layers=4, dtype=torch.float16, device="meta")
    x = meta(256, 8, 256, dtype=torch.float16)
    setting("FUSED_RNN_PLAN", "grid")
    alone = "1 direction; its times are those of its recurrence alone, without overlap\n"
    for chunks, overlaps in (("4", True), ("0", False)):
        setting("FUSED_RNN_OVERLAP", chunks)
        text = str(explain(lstm, x, device="H100"))
        assert ("forward: overlap: 4 chunks" in text) == overlaps == (alone in text)
        assert ("forward: layers in turn, because" in text) != overlaps


@needs_extension
def test_code_of_another_architecture(setting: Setting) -> None:
    """explain shows why a family has no code; forced, it raises with the reason; without any code everything does."""
    lstm = fused_rnn.LSTM(64, 256, dtype=torch.float16, device="meta")
    x = meta(100, 16, 64, dtype=torch.float16)
    device = {**DEVICES["B200"], "compiled_for": 80}
    assert "not cluster: needs code for compute capability 9.0, this build's for the device is for 8.0: add 10.0 to " in str(
        explain(lstm, x, device=device)
    )
    setting("FUSED_RNN_PLAN", "cluster")
    with pytest.raises(ValueError, match="cluster cannot serve this layer: cluster needs code for .* TORCH_CUDA_ARCH_LIST"):
        explain(lstm, x, device=device)
    setting("FUSED_RNN_PLAN", "")
    with pytest.raises(ValueError, match=r"not compiled for compute capability 10\.0, .* TORCH_CUDA_ARCH_LIST"):
        explain(lstm, x, device={**device, "compiled_for": 0})


def keys(value: Any) -> Any:
    """The names in nested plain values, whatever the values are; of a list those of its first element."""
    if isinstance(value, dict):
        return {name: keys(inner) for name, inner in value.items() if inner not in (None, [], ())}
    return keys(value[0]) if isinstance(value, list) and value else None


@needs_extension
def test_the_same_fields_on_every_backend(setting: Setting) -> None:
    """Plain values that json takes; None, or nothing in a list, where a backend has nothing to say."""
    setting("FUSED_RNN_PLAN", "step")
    lstm = fused_rnn.LSTM(4, 5, num_layers=2)
    x = torch.zeros(7, 3, 4)
    made = {"cuda": explain(lstm, x, device="H100"), "cpu": explain(lstm, x)}
    with fused_rnn.use_backend("reference"):
        made["reference"] = explain(lstm, x)
    fields = {}
    for backend, result in made.items():
        plain = json.loads(json.dumps(dataclasses.asdict(result)))
        assert plain["backend"] == backend and isinstance(hash(result), int)
        (fields[backend],) = {(*plain, *layer, *layer["forward"], *layer["backward"]) for layer in plain["layers"]}
        filled = set(keys(plain["layers"])["forward"]) if backend != "reference" else set()
        for name in ("family", "kernels", "rejected", "candidates", "us", "workspace_bytes", "launches"):
            assert (name in filled) == (backend == "cuda"), (backend, name)
        for name in ("threads", "shares", "weights"):
            assert (name in filled) == (backend == "cpu"), (backend, name)
        assert (plain["instruction_set"] is not None) == (backend == "cpu")
        assert (plain["layers"][0]["saved_bytes"] is None) == (backend == "reference")
    assert len(set(fields.values())) == 1


@needs_extension
def test_why_not_the_backends_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down the list of backends, each with its reason."""
    gru, x = fused_rnn.GRU(3, 4), torch.zeros(2, 1, 3)
    assert explain(gru, x, device="H100").rejected == ()
    on_cpu = explain(gru, x)
    assert on_cpu.rejected == (Rejection("cuda", "the input is on 'cpu'"),)
    assert "\nnot cuda: the input is on 'cpu'\n" in str(on_cpu)
    for forced, text in (("reference", "backend 'reference' is forced"), (None, "there are no kernels for torch.complex64")):
        dtype = torch.complex64 if forced is None else torch.float32
        with fused_rnn.use_backend(forced):
            result = explain(fused_rnn.GRU(3, 4, dtype=dtype), x.to(dtype))
        assert [other.name for other in result.rejected] == ["cuda", "cpu"] and result.backend == "reference"
        assert result.rejected[1].reason == text
        assert result.reason == ("it is forced" if forced else text)
    with fused_rnn.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' is forced but the input is on 'cpu'"):
        explain(fused_rnn.GRU(3, 4, dtype=torch.complex64), x.to(torch.complex64))


@needs_extension
def test_launches(setting: Setting) -> None:
    """As csrc/cuda/backend.cu makes them: one for each kernel and step, and one for the gradient of h0."""
    setting("FUSED_RNN_PLAN", "step")
    for proj, forward, backward in ((0, 100, 101), (7, 200, 201)):
        lstm = fused_rnn.LSTM(12, 40, proj_size=proj)
        layer = explain(lstm, torch.zeros(100, 5, 12), device="A100").layers[0]
        assert layer.backward is not None
        assert (layer.forward.launches, layer.backward.launches) == (forward, backward)


@pytest.mark.gpu
def test_on_the_gpu_that_is_there() -> None:
    lstm = fused_rnn.LSTM(64, 64, device="cuda")
    result = explain(lstm, torch.zeros(10, 4, 64, device="cuda"))
    capability = torch.cuda.get_device_capability()
    assert (
        result.backend == "cuda"
        and _explain.planner().cuda_device(0)["compute_capability"] == capability[0] * 10 + capability[1]
    )
    device = _explain.planner().cuda_device(0)
    code = device["compiled_for"]
    clusters = device["active_clusters"]
    if code >= 90:
        assert clusters[device["max_cluster"]] >= 1 and not any(clusters[device["max_cluster"] + 1 :])
        assert all(size * count <= device["sm_count"] for size, count in enumerate(clusters))
    else:
        assert clusters == [0] * 17
    assert 75 <= code <= capability[0] * 10 + capability[1]
    built_for = {name.removesuffix("+PTX").rstrip("af") for name in fused_rnn.build_info()["cuda_architectures"]}
    if "{}.{}".format(*capability) in built_for:
        assert code == capability[0] * 10 + capability[1]
