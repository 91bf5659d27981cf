"""What test_torch_host.py runs: the ops for CUDA with all they do around the kernels, against the reference."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parents[2])]
import build  # noqa: E402

EXTENSION = build.load()

from cases import CELLS, GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Case, make_data  # noqa: E402
from settings import Setting  # noqa: E402
from settings import setting as setting  # noqa: E402
from test_layers import assert_near, results_and_gradients  # noqa: E402

import fused_rnn  # noqa: E402
from fused_rnn import use_backend  # noqa: E402
from fused_rnn._explain import DEVICES  # noqa: E402
from fused_rnn.tuning import cases as verification_cases  # noqa: E402
from fused_rnn.tuning.verification import Finding, judge  # noqa: E402

F16 = torch.float16
torch.backends.cudnn.allow_tf32 = False
torch.backends.cudnn.enabled = False  # families of ours; cudnn_checks.py has the other one
EXTENSION.set_chooser(None)  # the planner chooses; tuning_checks.py has the other way


def calls() -> tuple[int, int]:
    """Calls of the backend so far: for whole layers, and for some steps of a layer."""
    counts = (ctypes.c_int * 2)()
    ctypes.CDLL(EXTENSION.__file__).torch_host_calls(counts)
    return counts[0], counts[1]


def cases() -> Iterator[Case]:
    for cell in CELLS:
        yield Case(cell, 5, 9, 4, 21, layers=2, bidirectional=True, ragged="lengths", resets=True)
        yield Case(cell, 5, 9, 4, 21, layers=2, ragged="lengths", resets=True)
        yield Case(cell, 5, 9, 4, 21, layers=2, ragged="packed", dtype=F16)
        yield Case(cell, 7, 9, 4, 21, layers=3, ragged="packed", resets=True)
        yield Case(cell, 5, 9, 4, 21, layers=2, bidirectional=True, ragged="packed", states=False)
        yield Case(cell, 5, 3, 4, 21, layers=3, states=False, has_biases=False)
        yield Case(cell, 1, 3, 4, 21)
    yield Case("LSTM", 5, 3, 4, 21, proj=7, layers=2, bidirectional=True)
    yield Case("GRU", 5, 3, 4, 21, layers=2, batch_first=True, dtype=torch.float64)


def persistent(case: Case, choice: str) -> tuple[bool, bool]:
    """Whether forward and backward of a case (of any layer, if it has several steps) are made by a persistent family."""
    problem = {
        "cell": case.cell.lower(), "dtype": str(case.dtype).removeprefix("torch."), "T": case.steps, "B": case.batch,
        "I": case.input_size, "H": case.hidden, "P": case.output, "D": case.directions, "training": True,
    }  # fmt: skip
    device = DEVICES["H100"]  # as in backend.cpp
    forced = choice or None
    plans = [EXTENSION.plan(**problem, device=device, backward=backward, forced=forced) for backward in (False, True)]
    return plans[0]["family"] in ("grid", "cluster"), plans[1]["family"] in ("grid", "cluster")


@pytest.mark.parametrize("overlap", ["0", "3"])
@pytest.mark.parametrize("family", ["", "step", "grid", "cluster", "gemm", "cheapest"])
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_against_fp64(case: Case, family: str, overlap: str, setting: Setting) -> None:
    if family in ("grid", "cluster") and (case.proj or case.dtype == torch.float64):
        pytest.skip("needs a family that has such a layer")
    if overlap != "0" and family in ("", "step", "gemm"):
        pytest.skip("needs a family whose layers overlap")
    setting("FUSED_RNN_PLAN", family)
    setting("FUSED_RNN_OVERLAP", overlap)
    data = make_data(case)
    with use_backend("reference"):
        expected, expected_grads = results_and_gradients(case, data.to(torch.float64))
    before = calls()
    with use_backend("cpu"):
        results, grads = results_and_gradients(case, data)
    whole, parts = (after - start for after, start in zip(calls(), before, strict=True))
    may_overlap = overlap != "0" and case.steps > 1
    overlaps, backward_overlaps = (may_overlap and family_may for family_may in persistent(case, family))
    backward_overlaps = backward_overlaps and case.layers > 1 and not case.bidirectional
    assert whole == case.layers * (2 - overlaps - backward_overlaps)
    assert (parts > 0) == (overlaps or backward_overlaps)
    growth = max(1.0, math.sqrt(max(case.hidden, case.input_size) / 32))
    for index, (actual, want) in enumerate(zip(results, expected, strict=True)):
        assert_near(f"result {index}", actual, want, OUTPUT_TOLERANCE[case.dtype] * growth)
    norm = 2 if case.cell == "RNN_RELU" and case.dtype == F16 else math.inf
    for index, (actual, want) in enumerate(zip(grads, expected_grads, strict=True)):
        assert_near(f"gradient {index}", actual, want, GRADIENT_TOLERANCE[case.dtype] * growth, norm)


@pytest.mark.parametrize("dtype", [torch.float32, F16], ids=str)
@pytest.mark.parametrize("cell", [fused_rnn.LSTM, fused_rnn.GRU, fused_rnn.RNN])
def test_backward_by_another_family(cell: type, dtype: torch.dtype, setting: Setting) -> None:
    """What a forward saves, the backward of every family reads."""
    rnn = cell(4, 36, dtype=dtype)
    x, dy = torch.randn(5, 9, 4, dtype=dtype), torch.randn(5, 9, 36, dtype=dtype)
    exact = cell(4, 36, dtype=torch.float64)
    exact.load_state_dict(rnn.state_dict())
    with use_backend("reference"):
        expected = torch.autograd.grad(exact(x.double())[0], list(exact.parameters()), dy.double())
    for first, then in itertools.permutations(("step", "grid", "cluster"), 2):
        setting("FUSED_RNN_PLAN", first)
        y = rnn(x)[0]
        setting("FUSED_RNN_PLAN", then)
        for actual, want in zip(torch.autograd.grad(y, list(rnn.parameters()), dy), expected, strict=True):
            assert_near(f"{first}, then {then}", actual, want, GRADIENT_TOLERANCE[dtype] * math.sqrt(36 / 32))


@pytest.mark.parametrize("family", ["grid", "cluster"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", [fused_rnn.LSTM, fused_rnn.GRU, fused_rnn.RNN])
def test_dropout(cell: type, bidirectional: bool, packed: bool, family: str, setting: Setting) -> None:
    """The masks of the layers in turn, from the same seed; second derivatives too."""
    setting("FUSED_RNN_PLAN", family)
    rnn = cell(4, 20, num_layers=3, bidirectional=bidirectional, dropout=0.4)
    batch_sizes = torch.tensor([3, 3, 3, 2, 2, 1, 1])
    x = torch.randn((int(batch_sizes.sum()), 4) if packed else (7, 3, 4), requires_grad=True)

    def output() -> Tensor:
        return rnn(PackedSequence(x, batch_sizes))[0].data if packed else rnn(x)[0]

    def run() -> list[Tensor]:
        torch.manual_seed(7)
        y = output()
        inputs = [x, *rnn.parameters()]
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, retain_graph=True)
        return [y, *first, *second, *torch.autograd.grad(y.square().sum(), inputs)]

    setting("FUSED_RNN_OVERLAP", "0")
    expected = run()
    setting("FUSED_RNN_OVERLAP", "3")
    before = calls()
    for index, (actual, want) in enumerate(zip(run(), expected, strict=True)):
        assert_near(f"tensor {index}", actual, want.double(), 4 * GRADIENT_TOLERANCE[torch.float32])
    assert calls()[1] > before[1]
    with torch.no_grad():
        torch.manual_seed(7)
        assert_near("inference", output(), expected[0].double(), OUTPUT_TOLERANCE[torch.float32])


def test_errors_of_a_stack(setting: Setting) -> None:
    setting("FUSED_RNN_PLAN", "grid")
    setting("FUSED_RNN_OVERLAP", "0")
    lstm = fused_rnn.LSTM(4, 20, num_layers=2)
    with pytest.raises(RuntimeError, match="kernel family grid cannot serve this layer: grid has no fp64 kernels"):
        lstm.double()(torch.zeros(5, 3, 4).double())


@pytest.mark.parametrize("overlap", ["0", "3"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("family", ["step", "cluster"])
@pytest.mark.parametrize("cell", [fused_rnn.LSTM, fused_rnn.GRU, fused_rnn.RNN])
def test_results_written_in_place(cell: type, family: str, dropout: float, overlap: str, setting: Setting) -> None:
    """The output and the final states are the caller's: backward makes an output that was written again."""
    setting("FUSED_RNN_PLAN", family)
    setting("FUSED_RNN_OVERLAP", overlap)
    rnn = cell(4, 20, num_layers=2, dropout=dropout)
    x = torch.randn(7, 3, 4, requires_grad=True)

    def run(write: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        y, state = rnn(x)
        states = state if isinstance(state, tuple) else (state,)
        scaled = [t.mul_(3) if write else t * 3 for t in (y, *states)]
        return torch.autograd.grad(sum(t.square().sum() for t in scaled), [x, *rnn.parameters()])

    # Not bit for bit: the output is made again in one piece, whose products round otherwise than those of the chunks.
    for written, expected in zip(run(True), run(False), strict=True):
        assert_near("gradient", written, expected, GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.parametrize("family", ["step", "grid", "cluster"])
def test_batched_gradients_of_a_stack(family: str, setting: Setting) -> None:
    setting("FUSED_RNN_PLAN", family)
    setting("FUSED_RNN_OVERLAP", "3")
    rnn = fused_rnn.GRU(4, 20, num_layers=2)
    y = rnn(torch.randn(7, 3, 4))[0]
    grads = torch.randn(2, *y.shape)
    found = torch.autograd.grad(y, list(rnn.parameters()), grads, is_grads_batched=True, retain_graph=True)
    for index in range(2):
        single = torch.autograd.grad(y, list(rnn.parameters()), grads[index], retain_graph=True)
        for batched, expected in zip(found, single, strict=True):
            torch.testing.assert_close(batched[index], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["step", "grid", "cluster"])
def test_wide_c_of_a_stack(family: str, setting: Setting) -> None:
    """c in float32 is handed from call to call: two halves are the whole, bit for bit."""
    setting("FUSED_RNN_PLAN", family)
    setting("FUSED_RNN_OVERLAP", "2")
    rnn = fused_rnn.LSTM(4, 20, num_layers=2, dtype=F16)
    x, h0, c0 = torch.randn(8, 3, 4, dtype=F16), torch.zeros(2, 3, 20, dtype=F16), torch.randn(2, 3, 20)
    with torch.no_grad():
        y, (h_n, c_n) = rnn(x, (h0, c0))
        first, state = rnn(x[:4], (h0, c0))
        second, (h, c) = rnn(x[4:], state)
    assert c_n.dtype == torch.float32
    assert torch.equal(torch.cat([first, second]), y) and torch.equal(h, h_n) and torch.equal(c, c_n)


@pytest.mark.parametrize("family", ["single", "step", "grid", "cluster"])
def test_cases_of_verification(family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What a child process runs on a GPU, on the simulated one: every family passes, and an error is seen."""
    monkeypatch.setattr(verification_cases, "HIDDEN", (17, 66))
    monkeypatch.setattr(verification_cases, "BATCH", (1, 9))
    before = calls()[0]
    verification_cases.run_cases(family, "cpu", DEVICES["H100"])
    assert judge(capsys.readouterr().out, 0, 20) == Finding(True, "")
    assert calls()[0] > before + 30
    exact = verification_cases.functional.gru

    def wrong(*args: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        y, h_n = exact(*args, **options)
        return y, h_n * (1 if h_n.dtype == torch.float64 else 1.05)

    monkeypatch.setattr(verification_cases.functional, "gru", wrong)
    verification_cases.run_cases(family, "cpu", DEVICES["H100"])
    finding = judge(capsys.readouterr().out, 0, 20)
    assert finding.verified is False and finding.reason.startswith("case gru T=")


@pytest.fixture
def recurrent_switch() -> Iterator[Callable[[str], None]]:
    """Sets torch's switch of fp32 for recurrent layers; the one for matrix products keeps its default."""

    def switch(precision: str) -> None:
        torch.backends.cudnn.rnn.fp32_precision = precision

    assert not torch.backends.cuda.matmul.allow_tf32
    yield switch
    torch.backends.cudnn.allow_tf32 = False


def tf32_products() -> int:
    return ctypes.CDLL(EXTENSION.__file__).torch_host_tf32_products()


@pytest.mark.parametrize("overlap", ["0", "3"])
@pytest.mark.parametrize("family", ["step", "grid", "cluster", "gemm"])
@pytest.mark.parametrize("case", [c for c in cases() if c.dtype == torch.float32 and c.cell != "RNN_RELU"], ids=str)
def test_products_follow_the_recurrent_switch(
    case: Case, family: str, overlap: str, setting: Setting, recurrent_switch: Callable[[str], None]
) -> None:
    """With torch's defaults all products of a layer are in TF32, as cuDNN's are; without TF32 none is.

    Not for a relu, whose derivative jumps where TF32 changes the sign of an argument.
    """
    if case.proj and family not in ("step", "gemm"):
        pytest.skip("needs a family that has such a layer")
    if overlap != "0" and family == "gemm":
        pytest.skip("needs a family whose layers overlap")
    setting("FUSED_RNN_PLAN", family)
    setting("FUSED_RNN_OVERLAP", overlap)
    data = make_data(case)
    with use_backend("reference"):
        expected, expected_grads = results_and_gradients(case, data.to(torch.float64))
    growth = max(1.0, math.sqrt(max(case.hidden, case.input_size) / 32))
    layers = case.layers * case.directions
    for precision, of_dtype, fewest in (("tf32", F16, 3 * layers), ("ieee", torch.float32, 0)):  # x W, dW_ih, dx
        recurrent_switch(precision)
        before = tf32_products()
        with use_backend("cpu"):
            results, grads = results_and_gradients(case, data)
        count = tf32_products() - before
        assert (count >= fewest) if fewest else count == 0
        for index, (actual, want) in enumerate(zip([*results, *grads], [*expected, *expected_grads], strict=True)):
            allowed = (OUTPUT_TOLERANCE if index < len(results) else GRADIENT_TOLERANCE)[of_dtype]
            assert_near(f"{precision}, tensor {index}", actual, want, allowed * growth)


FAMILIES = ("single", "step", "grid", "cluster", "block", "gemm")
IN_PROCESS_OF_ITS_OWN = """
import ctypes, importlib.util, os, sys, warnings
import torch
spec = importlib.util.spec_from_file_location("_C", {extension!r})
sys.modules["fused_rnn._C"] = EXTENSION = importlib.util.module_from_spec(spec)
spec.loader.exec_module(EXTENSION)
import fused_rnn
from fused_rnn import _settings, use_backend

torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.enabled = False
EXTENSION.set_chooser(None)
library = ctypes.CDLL(EXTENSION.__file__)

def calls():
    counts = (ctypes.c_int * 2)()
    library.torch_host_calls(counts)
    return counts[0], counts[1]

def check(lstm):
    x = torch.randn(6, 3, 4)
    exact = fused_rnn.LSTM(4, {hidden}, num_layers=2, dtype=torch.float64)
    exact.load_state_dict(lstm.state_dict())
    with use_backend("reference"):
        y = exact(x.double())[0]
        expected = [y, *torch.autograd.grad(y.sum(), list(exact.parameters()))]
    y = lstm(x)[0]
    for actual, want in zip([y, *torch.autograd.grad(y.sum(), list(lstm.parameters()))], expected):
        assert (actual - want).abs().max() < 1e-4

lstm = fused_rnn.LSTM(4, {hidden}, num_layers=2)
"""


def in_process_of_its_own(code: str, hidden: int = 21) -> None:
    """A device stays refused for the rest of its process. hidden: units of `lstm`; family block takes even numbers."""
    before = IN_PROCESS_OF_ITS_OWN.format(extension=EXTENSION.__file__, hidden=hidden)
    command = [sys.executable, "-c", before + code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("overlap", ["0", "3"])
@pytest.mark.parametrize(
    "refused", [("grid",), ("cluster",), ("grid", "cluster"), ("cluster", "step"), ("block", "cluster")], ids=str
)
def test_refused_launches(refused: tuple[str, ...], overlap: str) -> None:
    """The next family serves, forward and backward, with one warning for each that was refused."""
    bits = sum(1 << FAMILIES.index(family) for family in refused)
    in_process_of_its_own(f"""
library.torch_host_device({bits}, False)
with _settings.use("FUSED_RNN_OVERLAP", {overlap!r}), _settings.use("FUSED_RNN_PLAN", "cheapest"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(lstm)
        check(lstm)
    texts = [str(one.message) for one in caught if "does not serve" in str(one.message)]
    tried = [f for f in {refused!r} if any(f"kernel family {{f}} does not serve on device" in text for text in texts)]
    assert len(texts) == len(tried) and "cluster" in tried or "cluster" not in {refused!r}, texts
    assert calls()[0] + calls()[1] > 0
    if {{"grid", "cluster"}} <= set(tried) or {overlap!r} == "0":  # step's layers do not overlap
        assert calls()[0] >= 8, "both calls, both layers, forward and backward"
""", hidden=20 if "block" in refused else 21)  # fmt: skip


def test_block_takes_memory_that_is_aligned_to_pairs(setting: Setting) -> None:
    """What forward saved may come back to the op as any tensor: an error says so, before the kernel."""
    setting("FUSED_RNN_PLAN", "block")
    rnn, x, dy = fused_rnn.LSTM(4, 20).half(), torch.randn(3, 2, 4).half(), torch.randn(3, 2, 20).half()
    recipe = fused_rnn._recipe.Recipe(fused_rnn._kinds.NUMBER_OF_MODE["LSTM"]).packed
    params = [p.detach() for p in rnn.parameters()]
    with torch.no_grad():
        y, _, saved = torch.ops.fused_rnn.layer(x, [], params, [], recipe, True)
        arguments = (dy, [], x, [], params, [])
        expected = torch.ops.fused_rnn.layer_backward(*arguments, [*saved, y], recipe, [True] * 3)
        for place in range(2):
            moved = torch.empty(saved[place].numel() + 1).half()[1:].view_as(saved[place]).copy_(saved[place])
            with pytest.raises(RuntimeError, match=f"{('gates', 'cs')[place]}: family block takes memory that is aligned"):
                given = [*saved[:place], moved, *saved[place + 1 :], y]
                torch.ops.fused_rnn.layer_backward(*arguments, given, recipe, [True] * 3)
        moved = torch.empty(dy.numel() + 1).half()[1:].view_as(dy).copy_(dy)  # the caller's may begin anywhere
        found = torch.ops.fused_rnn.layer_backward(moved, *arguments[1:], [*saved, y], recipe, [True] * 3)
    assert torch.equal(found[0], expected[0])


def test_refused_launch_of_a_forced_family() -> None:
    in_process_of_its_own("""
library.torch_host_device(1 << 2, False)
with _settings.use("FUSED_RNN_PLAN", "grid"):
    try:
        check(lstm)
    except RuntimeError as error:
        assert "too many blocks in cooperative launch" in str(error)
    else:
        raise AssertionError("expected an error")
library.torch_host_device(0b111111, False)
try:
    check(lstm)
except RuntimeError as error:
    assert "no kernel family can serve this layer" in str(error) and "step the device does not take" in str(error)
else:
    raise AssertionError("expected an error")
""")


@pytest.mark.parametrize("status", [15, 8, 13])  # of cuBLAS: not supported, architecture mismatch, execution failed
def test_products_that_cublas_refuses(status: int) -> None:
    """The next family serves what the device's cuBLAS lacks, unless gemm is forced; another failure is an error."""
    in_process_of_its_own(f"""
import pytest
library.torch_host_cublas({status}, 9)
text = "CUDA error: cuBLAS status 13" if {status} == 13 else "cuBLAS has no such product for the device"
with _settings.use("FUSED_RNN_PLAN", "gemm"), pytest.raises(RuntimeError, match=text):
    check(lstm)
number = 1 + list(EXTENSION.families).index("gemm")
recipe = fused_rnn._recipe.Recipe(fused_rnn._kinds.NUMBER_OF_MODE["LSTM"], num_layers=2, family=number).packed
x, weights = torch.randn(6, 3, 4), [p.detach() for p in lstm.parameters()]
if {status} == 13:
    with pytest.raises(RuntimeError, match=text):
        EXTENSION.rnn(x, [], weights, [], recipe, 0.0)
else:
    with pytest.warns(UserWarning, match="kernel family gemm does not serve on device .* any more, .*no such product"):
        y = EXTENSION.rnn(x, [], weights, [], recipe, 0.0)[0]
    with use_backend("reference"):
        assert (y - lstm(x)[0]).abs().max() < 1e-5
""")


def test_no_cooperative_launch_in_a_graph_of_an_old_driver() -> None:
    in_process_of_its_own("""
library.torch_host_device(0, True)
with _settings.use("FUSED_RNN_PLAN", "grid"):
    check(lstm)
    os.environ["TORCH_HOST_CAPTURES"] = "1"
    try:
        check(lstm)
    except RuntimeError as error:
        assert "grid the device does not take its launches now" in str(error)
    else:
        raise AssertionError("expected an error")
    with _settings.use("FUSED_RNN_PLAN", "cheapest"):
        check(lstm)
    library.torch_host_device(0, False)
    check(lstm)
""")


@pytest.mark.parametrize("steps", [1, 7, 5000])  # 5000 x 7 flags take two launches
@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_of_the_host(steps: int, batch_first: bool) -> None:
    """They become the device's as arguments of launches: no copy waits, and a capture holds them."""
    library = ctypes.CDLL(EXTENSION.__file__)
    rnn = fused_rnn.RNN(2, 1, nonlinearity="relu", batch_first=batch_first)
    x = torch.randn((7, steps, 2) if batch_first else (steps, 7, 2))
    resets = torch.rand((7, steps) if batch_first else (steps, 7)) < 0.3
    weights = [p.detach() for p in rnn.parameters()]
    options = {"nonlinearity": "relu", "batch_first": batch_first}
    before = library.torch_host_flag_writes()
    if steps > 100:  # the flags alone: the simulator takes its time for so many steps
        room = torch.zeros(resets.numel() + 1, dtype=torch.bool)
        simulator_library().simt_write_flags(*(ctypes.c_void_p(t.data_ptr()) for t in (room, resets)), resets.numel())
        assert torch.equal(room[:-1].view_as(resets), resets) and not room[-1]
        return
    y, _ = fused_rnn.functional.rnn(x, weights, resets=resets, **options)
    assert library.torch_host_flag_writes() == before + 1
    with use_backend("reference"):
        expected, _ = fused_rnn.functional.rnn(x.double(), [w.double() for w in weights], resets=resets, **options)
    assert_near("y", y, expected, OUTPUT_TOLERANCE[torch.float32])


def simulator_library() -> ctypes.CDLL:
    library = ctypes.CDLL(os.environ["FUSED_RNN_SIMT_LIBRARY"])
    library.simt_write_flags.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return library


def data_of(tensor: Tensor | PackedSequence) -> Tensor:
    return tensor.data if isinstance(tensor, PackedSequence) else tensor


# As formulas.everything_with_options has them.
MODIFIES: dict[str, Any] = {"zoneout": (0.3, 0.0, 0.3), "recurrent_dropout": 0.3, "state_clip": (None, None, 0.2)}


@contextlib.contextmanager
def checkpoints_on_device() -> Iterator[None]:
    """checkpoint=k of own cells by the ops for CUDA, since CPU tensors are the device's here."""
    from fused_rnn.formula import checkpoint

    library = torch.library.Library("fused_rnn", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ops that have one already
        library.impl("formula_checkpointed", checkpoint._on_gpu, "CPU", allow_override=True)
        library.impl("formula_checkpointed_backward", checkpoint._backward_on_gpu, "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.mark.parametrize("ragged", ["", "lengths", "packed"])
@pytest.mark.parametrize(
    ("family", "more"),
    [("step", ""), ("cluster", ""), ("grid", ""), ("step", "one"), ("step", "steps"), ("cluster", "one"), ("grid", "every")],
)
def test_a_formula(ragged: str, family: str, more: str, monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    """A layer of a formula from the module to the kernels and back, with all gradients, and without any.

    more: the states of every step are results too, and resets put one state of all rows, or one of each row at all steps.
    """
    from formulas import Everything

    from fused_rnn.formula import Layer, serve

    layer = Layer(Everything(), 4, 18, num_layers=2, bidirectional=True, **MODIFIES)
    EXTENSION.register_formula_on_device(layer.formula, str(build.formula_source().with_suffix(".kernels")))
    setting("FUSED_RNN_PLAN", family)
    for verified in ("cluster", "grid"):
        EXTENSION.set_formula_family(layer.formula, 1, 90, verified, 2)
    exact = Layer(Everything(), 4, 18, num_layers=2, bidirectional=True, dtype=torch.float64, **MODIFIES)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4, 4)
    states = [torch.randn(4, 4, 18) for _ in range(3)]
    lengths = torch.tensor([5, 3, 3, 1])
    options: dict[str, Any] = {"lengths": lengths} if ragged == "lengths" else {}
    puts = []
    if ragged == "lengths" or more in ("one", "steps"):
        flags = torch.rand(5, 4) < 0.3
        flags[[0, -1], 0] = True
        options["resets"] = torch.nn.utils.rnn.pack_padded_sequence(flags, lengths).data if ragged == "packed" else flags
    if more in ("one", "steps"):
        puts = [torch.randn(*((5, 4, 4) if more == "steps" else (4, 1)), 18) for _ in range(3)]

    def run(layer: Layer, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *states, *puts)]
        given, keywords = leaves[0], dict(options)
        if puts:
            keywords["reset_state"] = tuple(leaves[4:])
        if ragged == "packed":
            given = torch.nn.utils.rnn.pack_padded_sequence(given, lengths)
        if more:
            keywords["return_all_states"] = True
        torch.manual_seed(1)
        y, last, *every = layer(given, tuple(leaves[1:4]), **keywords)
        results = [data_of(y), *last, *(data_of(state) for states in every for state in states)]
        generator = torch.Generator().manual_seed(0)
        weights = [torch.rand(t.shape, generator=generator, dtype=torch.float64).to(dtype) for t in results]
        grads = torch.autograd.grad(results, [*leaves, *layer.parameters()], weights)
        torch.manual_seed(1)
        with torch.no_grad():
            again = layer(given, tuple(leaves[1:4]), **keywords)
        return [*results, *grads, data_of(again[0]), *(data_of(state) for states in again[2:] for state in states)]

    with use_backend("reference"):
        expected = run(exact, torch.float64)
    monkeypatch.setattr(serve, "has_kernels", lambda *_: True)
    library = ctypes.CDLL(EXTENSION.__file__)
    before = library.torch_host_formula_launches()
    results = run(layer, torch.float32)
    # 2 layers, 2 forwards of 5 steps and a backward with the gradients of the initial states, 4 launches a step.
    # A persistent family leaves to it what has reset states, and backward with gradients of states of every step.
    step, persistent = 5 * 4, family in ("cluster", "grid")
    forward = 1 if persistent and not puts else step
    backward = 1 if persistent and not more else step + 1
    launches = 2 * (2 * forward + backward)
    assert library.torch_host_formula_launches() - before == launches
    for index, (actual, want) in enumerate(zip(results, expected, strict=True)):
        assert_near(f"tensor {index}", actual, want, 1e-5 * max(1.0, want.abs().max().item()))
    # The same bits again: no sum depends on an order that may change.
    assert all(torch.equal(*pair) for pair in zip(results, run(layer, torch.float32), strict=True))
    before = library.torch_host_formula_launches()
    with checkpoints_on_device():
        layer.checkpoint = 2
        assert all(torch.equal(*pair) for pair in zip(results, run(layer, torch.float32), strict=True))
    assert library.torch_host_formula_launches() - before == launches + 2 * forward  # backward runs forward again
    text = EXTENSION.formula_plan_on_device(layer.formula, 1, -1, 5, 4, 18, 2, 2, False)
    assert ("4 launches a step" if family == "step" else "1 launch for all steps") in text
    for verified in ("cluster", "grid"):
        EXTENSION.set_formula_family(layer.formula, 1, 90, verified, 0)  # not before it is verified
    assert "4 launches a step" in EXTENSION.formula_plan_on_device(layer.formula, 1, -1, 5, 4, 18, 2, 2, False)


@pytest.mark.parametrize("family", ["grid", "cheapest"])
def test_a_formula_whose_launch_is_refused(family: str, monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    """The next family serves, with one warning, and from then on; a forced family raises."""
    from formulas import Everything

    from fused_rnn.formula import Layer, serve

    layer = Layer(Everything(), 4, 40, **MODIFIES)
    EXTENSION.register_formula_on_device(layer.formula, str(build.formula_source().with_suffix(".kernels")))
    setting("FUSED_RNN_PLAN", family)
    EXTENSION.set_formula_family(layer.formula, 1, 90, "grid", 1, 2)  # as its verification does
    x = torch.randn(3, 2, 4)

    def run() -> Tensor:
        torch.manual_seed(1)
        return layer(x)[0]

    with use_backend("reference"):
        expected = run()
    monkeypatch.setattr(serve, "has_kernels", lambda *_: True)
    library = ctypes.CDLL(EXTENSION.__file__)
    plan = functools.partial(EXTENSION.formula_plan_on_device, layer.formula, 1, -1, 3, 2, 80, 1, 2, False)
    library.torch_host_formula_cooperative(False)
    try:
        if family == "grid":
            assert "family grid" in plan()
            with pytest.raises(RuntimeError, match="too many blocks in cooperative launch"):
                run()
            return
        with pytest.warns(UserWarning, match="grid of EverythingWithOptions-.* does not serve on cpu any more"):
            assert_near("y", run(), expected, 1e-5)
    finally:
        library.torch_host_formula_cooperative(True)
    EXTENSION.set_formula_family(layer.formula, 1, 90, "grid", 2)
    assert "not grid: the device does not take its launches now" in plan()
    before = library.torch_host_formula_launches()
    assert_near("y", run(), expected, 1e-5)
    assert library.torch_host_formula_launches() - before == 3 * 4  # family step
