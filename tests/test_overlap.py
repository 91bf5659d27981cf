"""The overlap of layers in time (csrc/plan/overlap.h): its plans and its tasks without a GPU, its results on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GRADIENT_TOLERANCE, Case, make_data
from settings import Setting
from test_cuda_graphs import check_replay
from test_layers import assert_near, results_and_gradients
from test_plan import DEVICES, C
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn import use_backend

F16, BF16, F32 = "float16", "bfloat16", "float32"


def overlap(device: str, **more: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {"cell": "lstm", "dtype": F16, "T": 256, "B": 8, "H": 256, "D": 1, "layers": 4} | more
    sizes = {"I": sizes["D"] * sizes["H"], "training": True} | sizes
    result: dict[str, Any] = C.overlap(**{"first_input": sizes["I"]} | sizes, device=DEVICES[device])
    return result


# device, family, cell, B, H, layers, directions: chunks, recurrences at once, SMs that they use; idle SMs
PLANNED = [
    ("A100", "grid", "lstm", 8, 256, 4, 1, (8, 4, 64, 44)),
    ("A100", "grid", "lstm", 16, 512, 4, 1, (1, 1, 0, 0)),
    ("A100", "grid", "gru", 16, 768, 3, 1, (1, 1, 0, 0)),
    ("A100", "grid", "lstm", 64, 512, 1, 1, (1, 1, 0, 0)),
    ("A100", "grid", "lstm", 8, 256, 2, 2, (1, 1, 0, 0)),
    ("H100", "grid", "lstm", 8, 256, 4, 1, (8, 4, 64, 68)),
    ("H100", "grid", "lstm", 16, 512, 4, 1, (1, 1, 0, 0)),
    ("H100", "grid", "gru", 16, 768, 3, 1, (1, 1, 0, 0)),
    ("H100", "grid", "lstm", 64, 512, 1, 1, (1, 1, 0, 0)),
    ("H100", "grid", "lstm", 8, 256, 2, 2, (1, 1, 0, 0)),
    ("H100", "cluster", "lstm", 8, 256, 4, 1, (4, 4, 64, 68)),
    ("H100", "cluster", "lstm", 16, 512, 4, 1, (4, 3, 96, 36)),
    ("H100", "cluster", "gru", 16, 768, 3, 1, (8, 3, 96, 36)),
    ("H100", "cluster", "lstm", 64, 512, 1, 1, (1, 1, 0, 0)),
    ("H100", "cluster", "lstm", 8, 256, 2, 2, (1, 1, 0, 0)),
    ("H200", "grid", "lstm", 8, 256, 4, 1, (8, 4, 64, 68)),
    ("H200", "grid", "lstm", 16, 512, 4, 1, (1, 1, 0, 0)),
    ("H200", "grid", "gru", 16, 768, 3, 1, (1, 1, 0, 0)),
    ("H200", "grid", "lstm", 64, 512, 1, 1, (1, 1, 0, 0)),
    ("H200", "grid", "lstm", 8, 256, 2, 2, (1, 1, 0, 0)),
    ("H200", "cluster", "lstm", 8, 256, 4, 1, (4, 4, 64, 68)),
    ("H200", "cluster", "lstm", 16, 512, 4, 1, (4, 3, 96, 36)),
    ("H200", "cluster", "gru", 16, 768, 3, 1, (8, 3, 96, 36)),
    ("H200", "cluster", "lstm", 64, 512, 1, 1, (1, 1, 0, 0)),
    ("H200", "cluster", "lstm", 8, 256, 2, 2, (1, 1, 0, 0)),
    ("RTX 4090", "grid", "lstm", 8, 256, 4, 1, (8, 4, 64, 64)),
    ("RTX 4090", "grid", "lstm", 16, 512, 4, 1, (2, 1, 64, 64)),
    ("RTX 4090", "grid", "gru", 16, 768, 3, 1, (1, 1, 0, 0)),
    ("RTX 4090", "grid", "lstm", 64, 512, 1, 1, (1, 1, 0, 0)),
    ("RTX 4090", "grid", "lstm", 8, 256, 2, 2, (1, 1, 0, 0)),
    ("B200", "grid", "lstm", 8, 256, 4, 1, (8, 4, 64, 84)),
    ("B200", "grid", "lstm", 16, 512, 4, 1, (8, 2, 128, 20)),
    ("B200", "grid", "gru", 16, 768, 3, 1, (1, 1, 0, 0)),
    ("B200", "grid", "lstm", 64, 512, 1, 1, (1, 1, 0, 0)),
    ("B200", "grid", "lstm", 8, 256, 2, 2, (1, 1, 0, 0)),
    ("B200", "cluster", "lstm", 8, 256, 4, 1, (4, 4, 64, 84)),
    ("B200", "cluster", "lstm", 16, 512, 4, 1, (8, 4, 128, 20)),
    ("B200", "cluster", "gru", 16, 768, 3, 1, (8, 3, 96, 52)),
    ("B200", "cluster", "lstm", 64, 512, 1, 1, (1, 1, 0, 0)),
    ("B200", "cluster", "lstm", 8, 256, 2, 2, (1, 1, 0, 0)),
]


@pytest.mark.parametrize("row", PLANNED, ids=lambda row: "-".join(map(str, row[:7])))
def test_plan(row: tuple[Any, ...]) -> None:
    """Frozen outputs of the cost model, not measurements."""
    device, family, cell, batch, hidden, layers, directions, expected = row
    result = overlap(device, forced=family, cell=cell, B=batch, H=hidden, layers=layers, D=directions)
    assert tuple(result[key] for key in ("chunks", "concurrent_layers", "sms_in_use", "sms_idle")) == expected, result[
        "text"
    ]
    assert result["sms_in_use"] + result["sms_idle"] <= DEVICES[device]["sm_count"]
    assert result["us"] <= result["us_in_turn"]


# The same for backward, layers of one direction.
PLANNED_BACKWARD = [
    ("A100", "grid", "lstm", 8, 256, 4, (8, 4, 64, 44)),
    ("A100", "grid", "gru", 16, 512, 3, (1, 1, 0, 0)),
    ("H100", "grid", "lstm", 8, 256, 4, (8, 4, 64, 68)),
    ("H100", "grid", "gru", 16, 512, 3, (4, 2, 128, 4)),
    ("H100", "cluster", "lstm", 8, 256, 4, (4, 4, 64, 68)),
    ("H100", "cluster", "gru", 16, 512, 3, (8, 3, 96, 36)),
    ("H200", "grid", "lstm", 8, 256, 4, (8, 4, 64, 68)),
    ("H200", "grid", "gru", 16, 512, 3, (4, 2, 128, 4)),
    ("H200", "cluster", "lstm", 8, 256, 4, (4, 4, 64, 68)),
    ("H200", "cluster", "gru", 16, 512, 3, (8, 3, 96, 36)),
    ("RTX 4090", "grid", "lstm", 8, 256, 4, (8, 4, 64, 64)),
    ("RTX 4090", "grid", "gru", 16, 512, 3, (1, 1, 0, 0)),
    ("B200", "grid", "lstm", 8, 256, 4, (8, 4, 64, 84)),
    ("B200", "grid", "gru", 16, 512, 3, (4, 2, 128, 20)),
    ("B200", "cluster", "lstm", 8, 256, 4, (4, 4, 64, 84)),
    ("B200", "cluster", "gru", 16, 512, 3, (8, 3, 96, 52)),
]


@pytest.mark.parametrize("row", PLANNED_BACKWARD, ids=lambda row: "-".join(map(str, row[:6])))
def test_plan_of_backward(row: tuple[Any, ...]) -> None:
    device, family, cell, batch, hidden, layers, expected = row
    result = overlap(device, forced=family, cell=cell, B=batch, H=hidden, layers=layers, backward=True)
    assert tuple(result[key] for key in ("chunks", "concurrent_layers", "sms_in_use", "sms_idle")) == expected, result[
        "text"
    ]


REASONS = [
    ("H100", {"forced": "step"}, "family step takes all SMs in turn"),
    ("H100", {}, "family step takes all SMs in turn"),
    ("H100", {"forced": "grid", "dropout": 1.0}, "dropout leaves nothing of a layer's output"),
    ("H100", {"forced": "cluster", "dropout": 0.5, "T": 32}, "chunks would save too little"),
    (
        "RTX 4090",
        {"forced": "grid", "H": 2048, "dtype": F16, "cell": "rnn_tanh"},
        "one layer's 128 blocks take the whole device",
    ),
    ("H100", {"forced": "cluster", "T": 16}, "chunks would save too little"),
    ("H100", {"forced": "cluster", "T": 1}, "chunks would save too little"),
    ("H100", {"forced": "cluster", "chunks": 1}, "so many chunks are asked for"),
    ("H100", {"forced": "cluster", "chunks": 0}, "so many chunks are asked for"),
    ("H100", {"forced": "cluster", "backward": True, "layers": 1}, "there is one layer"),
    (
        *("H100", {"forced": "cluster", "backward": True, "D": 2}),
        "the gradient of an output has a part from both ends of the sequence",
    ),
]


@pytest.mark.parametrize("row", REASONS, ids=lambda row: str(row[:2]))
def test_in_turn(row: tuple[Any, ...]) -> None:
    device, more, reason = row
    result = overlap(device, **more)
    assert (result["chunks"], result["concurrent_layers"], result["chunk_steps"]) == (1, 1, more.get("T", 256))
    assert result["text"] == f"layers in turn, because {reason}\n"


def test_fewer_rows_of_packed_steps() -> None:
    """Projections cost what their rows cost; the recurrence of a step does not ask for how many rows it runs."""
    sizes: dict[str, Any] = {"forced": "cluster", "B": 128, "H": 512, "ragged": True}
    dense, packed = overlap("H100", **sizes), overlap("H100", **sizes, rows=256 * 40)
    assert dense == overlap("H100", **sizes, rows=256 * 128)
    assert packed["us_in_turn"] < dense["us_in_turn"]


def test_explain_packed(setting: Setting) -> None:
    setting("FUSED_RNN_PLAN", "cluster")
    lstm = fused_rnn.LSTM(256, 256, num_layers=4, dtype=torch.float16)
    rows = [torch.empty(n, 256, dtype=torch.float16) for n in (256, 200, 100, 9)]
    packed = torch.nn.utils.rnn.pack_sequence(rows)
    result = fused_rnn.explain(lstm, packed, device="H100", show=False)
    assert result.forward_overlap is not None and result.backward_overlap is not None
    assert result.forward_overlap.chunks == result.backward_overlap.chunks == 4


def test_chunks_that_are_asked_for() -> None:
    result = overlap("H100", forced="cluster", T=7, layers=3, chunks=3)
    assert (result["chunks"], result["chunk_steps"]) == (3, 3)
    assert overlap("H100", forced="grid", T=2, D=2, chunks=5)["chunks"] == 2


def ordered_before(tasks: list[dict[str, Any]]) -> list[set[int]]:
    """For each task those that have ended when it begins: before it in its stream, awaited, and what those came after."""
    before: list[set[int]] = []
    last_of_stream: dict[int, int] = {}
    for number, task in enumerate(tasks):
        known = {last_of_stream[task["stream"]]} if task["stream"] in last_of_stream else set()
        if task["after"] >= 0:
            assert task["after"] < number, "awaited before it was handed to its stream"
            known.add(task["after"])
        before.append(known.union(*(before[k] for k in known)))
        last_of_stream[task["stream"]] = number
    return before


@pytest.mark.parametrize(("directions", "backward"), [(1, False), (2, False), (1, True)])
def test_tasks(directions: int, backward: bool) -> None:
    """Every part once; each after what it reads; recurrences of a layer in order; no more streams than asked for."""
    for layers in range(1, 7):
        for steps, chunk_steps in ((1, 1), (2, 1), (7, 2), (8, 2), (9, 4), (20, 1)):
            chunks = -(-steps // chunk_steps)
            for at_once in range(1, min(layers, chunks) + 1 if directions == 1 else 2):
                tasks = C.overlap_tasks(layers, directions, backward, steps, chunk_steps, at_once)
                bounds = [(c * chunk_steps, min(steps, (c + 1) * chunk_steps)) for c in range(chunks)]
                place = {(t["project"], t["layer"], t["first"], t["end"]): n for n, t in enumerate(tasks)}
                order = [*reversed(range(layers))] if backward else [*range(layers)]
                parts = {(project, layer, *b) for project in (True, False) for layer in order for b in bounds}
                if backward:  # the gradient of the last layer's output is given
                    parts -= {(True, layers - 1, *b) for b in bounds}
                assert set(place) == parts and len(tasks) == len(parts)
                before = ordered_before(tasks)
                for number, task in enumerate(tasks):
                    layer, part, number_of = task["layer"], (task["first"], task["end"]), order.index(task["layer"])
                    assert task["stream"] == (0 if task["project"] else 1 + number_of % at_once)
                    needs = []
                    if not task["project"]:
                        needs = [(True, layer, *part)] if number_of > 0 or not backward else []
                        needs += [(False, layer, *b) for b in bounds if b < part]
                    elif number_of > 0:
                        below = order[number_of - 1]
                        needs = [(False, below, *b) for b in bounds if b <= part or directions == 2]
                    assert {place[need] for need in needs} <= before[number], (task, needs)


def test_layers_follow_each_other_a_chunk_apart() -> None:
    """And the first layer's projections a chunk ahead, before those that wait for a recurrence of the same wave."""
    tasks = C.overlap_tasks(3, 1, False, 8, 2, 3)
    scans = [(t["layer"], t["first"] // 2) for t in tasks if not t["project"]]
    waves = [layer + chunk for layer, chunk in scans]
    assert waves == sorted(waves)
    projected = [(t["layer"], t["first"] // 2) for t in tasks if t["project"]]
    for chunk in range(1, 4):
        assert projected.index((0, chunk)) < projected.index((1, chunk - 1))


def test_explain(setting: Setting) -> None:
    setting("FUSED_RNN_PLAN", "cluster")
    lstm = fused_rnn.LSTM(256, 256, num_layers=4, dropout=1.0, dtype=torch.float16, device="meta")
    x = torch.empty(256, 8, 256, dtype=torch.float16, device="meta")
    assert "forward: layers in turn, because dropout" in str(fused_rnn.explain(lstm, x, device="H100", show=False))
    lstm.dropout = 0.1
    with_dropout = fused_rnn.explain(lstm, x, device="H100", show=False)
    result = fused_rnn.explain(lstm.eval(), x, device="H100", show=False)
    for passes in ("forward_overlap", "backward_overlap"):
        slower, plan = getattr(with_dropout, passes), getattr(result, passes)
        assert slower.chunks == plan.chunks == 4 and slower.us > plan.us
    assert "\nforward: overlap: 4 chunks of 64 steps, 4 recurrences at once on 64 SMs, projections on 68; " in str(result)
    setting("FUSED_RNN_OVERLAP", "0")
    in_turn = fused_rnn.explain(lstm, x, device="H100", show=False)
    assert in_turn.forward_overlap is not None and in_turn.forward_overlap.chunks == 1 and in_turn.backward_overlap is None
    assert fused_rnn.explain(fused_rnn.LSTMCell(4, 5), torch.zeros(3, 4), device="H100", show=False).forward_overlap is None
    assert fused_rnn.explain(fused_rnn.LSTM(4, 5), torch.zeros(3, 2, 4), show=False).forward_overlap is None


# ---- on a GPU ----

FAMILY = {"grid": (8, 0), "cluster": (9, 0)}
CASES = [
    Case("LSTM", 13, 9, 24, 64, layers=3, ragged="lengths", resets=True, dtype=torch.float16),
    Case("GRU", 13, 9, 24, 64, layers=4, batch_first=True, dtype=torch.bfloat16),
    Case("RNN_TANH", 13, 9, 24, 64, layers=2, bidirectional=True),
    Case("LSTM", 13, 9, 24, 64, layers=3, ragged="packed", resets=True, dtype=torch.float16),
    Case("LSTM", 13, 9, 24, 64, layers=1, states=False),
]


@pytest.fixture(params=FAMILY)
def family(request: pytest.FixtureRequest, setting: Setting) -> str:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < FAMILY[request.param]:
        pytest.skip(f"needs a GPU of compute capability {FAMILY[request.param]}")
    setting("FUSED_RNN_PLAN", request.param)
    setting("FUSED_RNN_OVERLAP", "4")
    return str(request.param)


def everything(case: Case) -> list[Tensor]:
    with use_backend("cuda"):
        results, grads = results_and_gradients(case, make_data(case, "cuda"))
    return [t.detach() for t in (*results, *grads)]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_near_layers_in_turn(case: Case, family: str, setting: Setting) -> None:
    """Not bitwise: cuBLAS may multiply fewer rows by another algorithm."""
    overlapped = everything(case)
    setting("FUSED_RNN_OVERLAP", "0")
    for index, (actual, want) in enumerate(zip(overlapped, everything(case), strict=True)):
        assert_near(f"tensor {index}", actual, want.double(), GRADIENT_TOLERANCE[case.dtype])


SERIAL = """
import conftest, sys, torch
from test_overlap import CASES, everything
torch.save([everything(case) for case in CASES], sys.argv[1])
"""


@pytest.mark.gpu
def test_bitwise_as_one_launch_after_the_other(family: str, tmp_path: Path) -> None:
    """100 times what a process gives whose host waits for every launch: no task begins before what it reads is there."""
    file, here = tmp_path / "serial.pt", str(Path(__file__).parent)
    environment = {**os.environ, "CUDA_LAUNCH_BLOCKING": "1", "PYTHONPATH": f"{here}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([sys.executable, "-c", SERIAL, str(file)], check=True, env=environment, timeout=45)
    serial = torch.load(file)
    for case, want in zip(CASES, serial, strict=True):
        different = torch.zeros(len(want), dtype=torch.int64, device="cuda")
        for _ in range(100):
            different += torch.stack([(a != b).any() for a, b in zip(everything(case), want, strict=True)])
        assert different.tolist() == [0] * len(want), str(case)


@pytest.mark.gpu
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", [fused_rnn.LSTM, fused_rnn.GRU, fused_rnn.RNN])
def test_dropout(cell: Any, bidirectional: bool, grad: bool, family: str, setting: Setting) -> None:
    """The masks of the layers in turn, from the same seed."""
    options = {"device": "cuda", "dtype": torch.float16}
    rnn = cell(24, 64, num_layers=3, bidirectional=bidirectional, dropout=0.4, **options)
    x = torch.randn(13, 9, 24, requires_grad=grad, **options)

    def run() -> list[Tensor]:
        torch.manual_seed(7)
        with torch.set_grad_enabled(grad):
            y = rnn(x)[0]
            return [y, *torch.autograd.grad(y.float().square().sum(), [x, *rnn.parameters()])] if grad else [y]

    overlapped, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(overlapped, again, strict=True))
    setting("FUSED_RNN_OVERLAP", "0")
    for index, (actual, want) in enumerate(zip(overlapped, run(), strict=True)):
        assert_near(f"tensor {index}", actual, want.double(), GRADIENT_TOLERANCE[torch.float16])


@pytest.mark.gpu
def test_dropout_in_a_graph(family: str) -> None:
    """A replay draws new masks: those that a call from the generator's seed would draw."""
    lstm = fused_rnn.LSTM(24, 64, num_layers=3, dropout=0.4, device="cuda", dtype=torch.float16)
    x = torch.randn(13, 9, 24, device="cuda", dtype=torch.float16)

    def run() -> list[Tensor]:
        y = lstm(x)[0]
        return [y, *torch.autograd.grad(y.float().square().sum(), lstm.parameters())]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    outputs = []
    for seed in (1, 2):
        torch.cuda.manual_seed(seed)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [t.clone() for t in captured]
        torch.cuda.manual_seed(seed)
        assert all(torch.equal(a, b) for a, b in zip(replayed, run(), strict=True))
        outputs.append(replayed[0])
    assert not torch.equal(*outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_differentiated_twice(dropout: float, family: str, setting: Setting) -> None:
    lstm = fused_rnn.LSTM(24, 64, num_layers=3, dropout=dropout, device="cuda")
    x = torch.randn(13, 9, 24, device="cuda", requires_grad=True)

    def second() -> list[Tensor]:
        torch.manual_seed(7)
        first = torch.autograd.grad(lstm(x)[0].square().sum(), [x, *lstm.parameters()], create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *lstm.parameters()]))

    overlapped = second()
    setting("FUSED_RNN_OVERLAP", "0")
    for index, (actual, want) in enumerate(zip(overlapped, second(), strict=True)):
        assert_near(f"gradient {index}", actual, want.double(), 4 * GRADIENT_TOLERANCE[torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_captured_in_a_graph(training: bool, packed: bool, family: str) -> None:
    lstm = fused_rnn.LSTM(24, 64, num_layers=3, device="cuda", dtype=torch.float16)
    batch_sizes = torch.tensor([9, 9, 8, 5, 5, 5, 4, 3, 3, 1, 1, 1, 1])
    shape = (int(batch_sizes.sum()), 24) if packed else (13, 9, 24)
    x = torch.randn(shape, device="cuda", dtype=torch.float16, requires_grad=training)

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(training):
            y = lstm(PackedSequence(x, batch_sizes))[0].data if packed else lstm(x)[0]
            return [y, *torch.autograd.grad(y.float().sum(), [x, *lstm.parameters()])] if training else [y]

    check_replay(run, [x])
