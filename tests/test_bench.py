"""The benchmark: cases, sides, budget, result lines, tables and plots. Nothing here looks at times."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from settings import Setting

import fused_rnn
from fused_rnn import _backend, _settings, bench
from fused_rnn.__main__ import main, parser
from fused_rnn.bench import timing
from fused_rnn.bench.cases import CELLS, CPU_SHAPES, GPU_SIZES, MODES, BenchCase, cpu_cases, gpu_cases
from fused_rnn.bench.cpu_floor import CpuRates, cpu_floor_us_per_step
from fused_rnn.bench.floor import TABLE, floor_us_per_step, table_us
from fused_rnn.bench.memory import Prober
from fused_rnn.bench.sides import (
    BASELINES,
    CannotServe,
    Side,
    flashrnn_run,
    make_sides,
    missing,
)

ROOT = Path(__file__).parent.parent
TINY = BenchCase("GRU", "fp32", "training", 4, 2, 3, 5)


def load_compare() -> Any:
    spec = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gpu_cases_are_the_grid() -> None:
    cases = list(gpu_cases())
    assert len(cases) >= 200 and len(set(cases)) == len(cases)
    for cell in ("LSTM", "GRU", "RNN"):
        for dtype in ("fp32", "fp16", "bf16"):
            for mode in ("inference", "training"):
                for batch, hidden in GPU_SIZES:
                    assert BenchCase(cell, dtype, mode, 256, batch, hidden, hidden) in cases
    rest = cases[3 * 3 * 2 * len(GPU_SIZES) :]
    assert {(c.layers, c.bidirectional, c.lengths, c.T, c.H) for c in rest} == {
        (2, False, "dense", 256, 256), (4, False, "dense", 256, 256), (1, True, "dense", 256, 256),
        (1, False, "ragged", 256, 256), (1, False, "dense", 1, 256), (1, False, "dense", 256, 100),
        (1, False, "dense", 256, 300),
    }  # fmt: skip


def test_the_cpu_cases_are_the_goals() -> None:
    """fp32 first, in all three modes; bf16 for inference and training."""
    cases = list(cpu_cases())
    assert len(set(cases)) == len(cases)
    dtypes = [case.dtype for case in cases]
    assert dtypes == sorted(dtypes, key=("fp32", "bf16").index)
    for cell, (t, b, i, h), mode in itertools.product(CELLS, CPU_SHAPES, MODES):
        assert BenchCase(cell, "fp32", mode, t, b, i, h) in cases
        assert (BenchCase(cell, "bf16", mode, t, b, i, h) in cases) == (mode != "training_forward")


@pytest.mark.skipif(_backend.extension is None, reason="needs the compiled extension")
def test_floor() -> None:
    """At the table's rows the table; between them between; other cells and dtypes at the same number of bytes."""
    for hidden, kib in ((128, 128), (512, 2048), (768, 4608), (2048, 32768)):
        lstm = BenchCase("LSTM", "fp16", "inference", 10**9, 8, hidden, hidden)
        assert floor_us_per_step(lstm, 90, True) == pytest.approx(TABLE[kib][0], rel=1e-6)
        both = floor_us_per_step(dataclasses.replace(lstm, mode="training"), 90, True)
        assert both == pytest.approx(sum(TABLE[kib]), rel=1e-6)
    assert TABLE[512][0] < table_us(1000, False) < TABLE[2048][0]
    assert table_us(1, True) == TABLE[128][1] and table_us(1e9, True) == TABLE[32768][1]
    rnn = BenchCase("RNN", "fp16", "inference", 256, 8, 512, 512)
    lstm = BenchCase("LSTM", "fp16", "inference", 256, 8, 256, 256)
    assert floor_us_per_step(rnn, 90, True) == floor_us_per_step(lstm, 90, True)
    assert floor_us_per_step(lstm, 80, True) is None
    # Large batches are bound by arithmetic, and TF32 has half the rate of fp16, strict fp32 a sixteenth.
    large = [floor_us_per_step(BenchCase("LSTM", d, "inference", 10**9, 65536, 1024, 1024), 90, t)
             for d, t in (("fp16", True), ("fp32", True), ("fp32", False))]  # fmt: skip
    assert large[1] == pytest.approx(2 * large[0]) and large[2] == pytest.approx(16 * large[0])
    # 64 MiB of weights do not fit the chip.
    huge = floor_us_per_step(BenchCase("LSTM", "fp32", "inference", 10**9, 1, 2048, 2048), 90, True)
    assert huge == pytest.approx((64 << 20) / 5.5e6, rel=0.05)  # the published bandwidth of an H100's L2
    single = floor_us_per_step(BenchCase("LSTM", "fp16", "inference", 1, 1, 128, 128), 90, True)
    assert single == pytest.approx(0.3 + 2.1)


def test_floor_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its constants are the planner's: without them there is no floor, and a warning says what is missing."""
    monkeypatch.setattr(_backend, "extension", None)
    monkeypatch.setattr(_backend, "import_error", "it was not built")
    lstm = BenchCase("LSTM", "fp16", "inference", 256, 8, 256, 256)
    assert floor_us_per_step(lstm, 80, True) is None
    with pytest.warns(RuntimeWarning, match=r"csrc/plan/machine\.h.*extension, which is missing: it was not built"):
        assert floor_us_per_step(lstm, 90, True) is None


class MadeUpRates(CpuRates):
    """Products at 1e9, reading at 1e6, a unit's pointwise half in 1, 2 or 3 microseconds; nothing is measured."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.product = self._answer(lambda dtype: 1e9)
        self.read = self._answer(lambda size: 1e6)
        times = {"inference": 1e-6, "training": 2e-6, "backward": 3e-6}
        self.pointwise = self._answer(lambda kind, dtype, pass_: times[pass_])

    def _answer(self, function: Any) -> Any:
        def answer(*args: Any) -> float:
            self.asked.append(args)
            return function(*args)

        return answer


def test_cpu_floor_is_the_sum_of_its_parts() -> None:
    rates = MadeUpRates()
    # A step of 100 rows: products of 2 * 4 * 8 * (5 + 8) each; reading 1 KiB takes longer than the 51.2 us of its product.
    lstm = BenchCase("LSTM", "fp32", "inference", 11, 100, 5, 8)
    product, recurrent, reading, pointwise = 11 * 100 * 320 / 1e9, 10 * 100 * 512 / 1e9, 10 * 1024 / 1e6, 1100 * 8e-6
    assert reading > recurrent
    expected = 1e6 * (product + reading + pointwise) / 11
    assert cpu_floor_us_per_step(lstm, rates) == pytest.approx(expected)
    assert rates.asked == [("fp32",), (1024,), ("lstm", "fp32", "inference")]
    training = dataclasses.replace(lstm, mode="training")
    expected = 1e6 * (3 * product + 2 * reading + recurrent + 5 * pointwise) / 11
    assert cpu_floor_us_per_step(training, rates) == pytest.approx(expected)
    # More rows hide the reading.
    large = dataclasses.replace(lstm, B=10000)
    expected = 1e6 * (100 * product + 100 * recurrent + 100 * pointwise) / 11
    assert cpu_floor_us_per_step(large, rates) == pytest.approx(expected)
    # Two directions read twice as much; the second layer's input has both directions' outputs.
    stack = dataclasses.replace(lstm, layers=2, bidirectional=True)
    second = 11 * 100 * 2 * 32 * 16 / 1e9
    expected = 1e6 * 2 * (product + second + 2 * reading + 2 * pointwise) / 22
    assert cpu_floor_us_per_step(stack, rates) == pytest.approx(expected)
    assert (2048,) in rates.asked
    # Padding counts nowhere. A packed batch has no gradient of the input.
    ragged = dataclasses.replace(training, lengths="ragged")
    share = ragged.rows / 1100
    assert 0.3 < share < 0.8
    rows_after_first = (ragged.rows - 100) * 512 / 1e9
    expected = 1e6 * (2 * share * product + 2 * reading + rows_after_first + share * 5 * pointwise) / 11
    assert cpu_floor_us_per_step(ragged, rates) == pytest.approx(expected)
    # The first step alone multiplies no state.
    one = dataclasses.replace(lstm, T=1)
    assert cpu_floor_us_per_step(one, rates) == pytest.approx(1e6 * (product + pointwise) / 11)


@pytest.mark.skipif(not _backend.has_cpu_kernels(), reason="needs the CPU kernels")
def test_cpu_rates() -> None:
    """They are measured: doubles are not much faster than floats, memory is not much faster than a cache."""
    rates = CpuRates(1)
    assert 1e8 < rates.product("fp64") < 1.5 * rates.product("fp32") < 1e13
    assert rates.product("bf16") > 0.5 * rates.product("fp32")
    assert 1e8 < rates.read(1 << 26) < 2 * rates.read(1 << 15) < 1e13
    for kind in ("lstm", "gru", "rnn_tanh"):
        for pass_ in ("inference", "training", "backward"):
            assert 1e-11 < rates.pointwise(kind, "fp32", pass_) < 1e-6
    assert rates.product("fp32") is rates.product("fp32")
    for wrong in ({"cell": "elman"}, {"dtype": "int8"}, {"pass_": "sideways"}, {"rows": 0}, {"rows": 5000}, {"H": 1 << 62}):
        with pytest.raises(ValueError):
            given = {"cell": "lstm", "dtype": "float32", "pass_": "inference", "rows": 1, "H": 8}
            _backend.extension.cpu_pointwise_seconds(**given | wrong)
    for size in (0, 1 << 62):
        with pytest.raises(ValueError, match="bytes: expected 1 to "):
            _backend.extension.cpu_read_rate(size)


def test_cpu_rates_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "extension", None)
    monkeypatch.setattr(_backend, "import_error", "it was not built")
    with pytest.raises(RuntimeError, match="the compiled extension is missing: it was not built"):
        CpuRates(1)


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("lengths", ["dense", "ragged"])
def test_both_sides_compute_the_same(cell: str, lengths: str) -> None:
    case = BenchCase(cell, "fp32", "inference", 6, 3, 4, 5, layers=2, bidirectional=True, lengths=lengths)
    ours, theirs = case.modules("cpu")
    (x,) = case.inputs("cpu")
    with torch.no_grad():
        y, expected = (module(x)[0] for module in (ours, theirs))
    if lengths == "ragged":
        assert int(x.batch_sizes[0]) == 3 and len(x.batch_sizes) == 6 and len(x.data) < 18
        y, expected = y.data, expected.data
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_onnx_sides_compute_the_same(name: str, cell: str) -> None:
    """make_sides compares the results itself and raises if they differ."""
    if (package := missing(name)) is not None:
        pytest.skip(f"needs {package}")
    case = BenchCase(cell, "fp32", "inference", 6, 3, 4, 5, layers=2, bidirectional=True)
    sides, refused, _ = make_sides(case, "cpu", [name], 1)
    assert [side.name for side in sides] == ["fused_rnn", name] and not refused
    sides[1].run()
    _, refused, _ = make_sides(TINY, "cpu", [name], 1)
    assert refused == {name: "only dense fp32 inference"}


def test_flashrnn_side_computes_the_same() -> None:
    """On flashrnn's own reference in plain torch, which needs no GPU."""
    case = BenchCase("LSTM", "fp32", "training", 6, 3, 4, 16)
    ours, theirs = case.modules("cpu")
    with pytest.raises(CannotServe, match="only one dense LSTM layer"):
        flashrnn_run(TINY, theirs, [])
    if (package := missing("flashrnn")) is not None:
        with pytest.raises(CannotServe, match="flashrnn is not installed"):
            flashrnn_run(case, theirs, case.inputs("cpu"))
        pytest.skip(f"needs {package}")
    flashrnn_run(case, theirs, case.inputs("cpu"), backend="vanilla")()


def test_the_step_side_is_forced_and_only_it(setting: Setting) -> None:
    setting("FUSED_RNN_PLAN", "grid")
    seen: list[str] = []
    step, own = (Side(name, lambda: seen.append(_settings.value("FUSED_RNN_PLAN")), plan) for name, plan in
                 (("step", "step"), ("fused_rnn", None)))  # fmt: skip
    for side in (step, own):
        timing.timed(side, 2, "cpu")
    assert seen == ["step"] * 3 + ["grid"] * 3  # one call before those that count
    setting("FUSED_RNN_PLAN", "")
    timing.timed(step, 1, "cpu", warm_up=False)
    assert len(seen) == 7
    assert _settings.value("FUSED_RNN_PLAN") == ""


@pytest.mark.parametrize("mode", ["inference", "training_forward", "training"])
def test_inference_records_no_graph(mode: str) -> None:
    sides, _, _ = make_sides(BenchCase("GRU", "fp32", mode, 6, 3, 4, 5), "cpu", ["torch.nn"], 1)
    for side in sides:
        with side.active():
            assert torch.is_grad_enabled() == (mode != "inference")
            side.run()
        assert torch.is_grad_enabled()
    assert len(sides) == 2


def test_rounds_are_fair_and_end() -> None:
    calls: list[int] = []
    sides = [Side(str(i), lambda i=i: calls.append(i)) for i in range(3)]  # type: ignore[misc]
    timings = timing.measure(sides, "cpu", 1e-9)
    assert [len(t.samples) for t in timings] == [timing.FEWEST_ROUNDS] * 3
    assert {calls.count(i) for i in range(3)} == {1 + 2 * timing.FEWEST_ROUNDS}  # short calls: one more before each sample
    firsts = [calls[3 + 6 * r] for r in range(timing.FEWEST_ROUNDS)]
    assert firsts == [0, 1, 2]
    calls.clear()
    long = Side("long", lambda: (calls.append(0), time.sleep(1.2e-3 * timing.WARM_UP_MS)))  # type: ignore[arg-type]
    timing.measure([long], "cpu", 1e-9)
    assert len(calls) == 1 + timing.FEWEST_ROUNDS
    slow, fast = timing.Timing([2.0, 4.0, 6.0]), timing.Timing([1.0, 1.0, 2.0])
    assert slow.ratios(fast)[1] == 3.0 and fast.quartiles()[1] == 1.0


@pytest.mark.skipif(not _backend.has_cpu_kernels(), reason="needs the compiled extension")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
def test_memory_of_both_sides() -> None:
    """The LSTM keeps its gates, cell states and output: at least these must show, and not several times as much."""
    case = BenchCase("LSTM", "fp32", "training", 64, 64, 64, 256)
    prober = Prober(threads=1)
    try:
        peaks = prober.peaks(case)
        assert prober.peaks(TINY).keys() == peaks.keys() == {"fused_rnn", "torch.nn"}
    finally:
        prober.close()
    kept = 64 * 64 * 256 * 4 * (4 + 1 + 1)
    assert kept < peaks["fused_rnn"] < 4 * kept and kept < peaks["torch.nn"]


def test_memory_of_a_process_that_fails() -> None:
    prober = Prober(threads=1)
    with pytest.raises(RuntimeError, match="the process that measures memory ended with 1"):
        prober.peaks(dataclasses.replace(TINY, cell="NONE"))


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> list[BenchCase]:
    cases = [TINY, dataclasses.replace(TINY, cell="LSTM", mode="inference", layers=2), dataclasses.replace(TINY, cell="RNN")]
    monkeypatch.setattr(bench, "cpu_cases", lambda: iter(cases))
    monkeypatch.setattr(timing, "MOST_ROUNDS", timing.FEWEST_ROUNDS)
    return cases


def test_result_lines(few_cases: list[BenchCase], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "results.jsonl"
    arguments = ["bench", "--device", "cpu", "--baseline", "torch.nn", "--budget", "100", "--no-memory"]
    arguments += ["--output", str(output)]
    main([*arguments, "--threads", "1", "2"])
    lines = [json.loads(text) for text in output.read_text().splitlines()]
    assert [line["threads"] for line in lines] == [1, 1, 1, 2, 2, 2]
    for line, case in zip(lines, few_cases * 2, strict=True):
        assert tuple(line)[: len(bench.FIELDS)] == bench.FIELDS
        assert {name: line[name] for name in dataclasses.asdict(case)} == dataclasses.asdict(case)
        assert line["baseline"] == "torch.nn"
        if _backend.has_cpu_kernels():
            assert 0 < line["floor_us_per_step"] < line["us_per_step"] and line["gflops"] < line["peak_gflops"]
        else:
            assert line["floor_us_per_step"] is None and line["peak_gflops"] is None
        assert line["ms_p25"] <= line["ms"] <= line["ms_p75"] and line["baseline_ms"] > 0
        assert line["us_per_step"] == pytest.approx(line["ms"] * 1e3 / (case.T * case.layers))
        assert line["ratio_p25"] <= line["ratio"] <= line["ratio_p75"]
        expected = {"backend", "forward"} | ({"backward"} if case.mode == "training" else set())
        assert set(line["plan"]) == (expected if _backend.has_cpu_kernels() else {"backend"})
    out = capsys.readouterr().out
    assert "geometric mean" in out and "/floor  peak" in out
    main([*arguments, "--cell", "LSTM"])
    assert len(output.read_text().splitlines()) == 7


def test_a_spent_budget_is_said(few_cases: list[BenchCase], capsys: pytest.CaptureFixture[str]) -> None:
    options = parser().parse_args(["bench", "--device", "cpu", "--budget", "0", "--no-memory"])
    assert bench.main(options) == []
    out = capsys.readouterr().out
    assert "not measured, the budget of 0 s was spent: 3 cases" in out and str(TINY) in out


def test_a_case_that_fails_does_not_stop_the_others(
    few_cases: list[BenchCase], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, whole = tmp_path / "lines.jsonl", bench.result_lines

    def result_lines(case: BenchCase, *args: Any) -> Any:
        if case == few_cases[0]:
            raise RuntimeError("kernel nonsense: no")
        return whole(case, *args)

    monkeypatch.setattr(bench, "result_lines", result_lines)
    options = ["bench", "--device", "cpu", "--no-memory", "--budget", "5", "--baseline", "torch.nn", "--output", str(file)]
    with pytest.raises(SystemExit, match="1 cases failed") as failure:
        bench.main(parser().parse_args(options))
    assert str(few_cases[0]) in str(failure.value)
    assert "FAILED: kernel nonsense: no" in capsys.readouterr().out
    assert len(file.read_text().splitlines()) == len(few_cases) - 1 > 0


def test_options() -> None:
    with pytest.raises(SystemExit, match="step does not run on cpu; these do: torch.nn"):
        main(["bench", "--device", "cpu", "--baseline", "step"])
    if (package := missing("onnxruntime")) is not None:
        with pytest.raises(SystemExit, match=f"onnxruntime needs {package}"):
            main(["bench", "--device", "cpu", "--baseline", "onnxruntime"])
    options = parser().parse_args(["bench", "--device", "cuda", "--dtype", "bf16", "--hidden", "768", "--mode", "training"])
    assert {(c.dtype, c.H, c.mode) for c in bench.selected(options)} == {("bf16", 768, "training")}
    assert all(c in list(cpu_cases()) for c in bench.selected(parser().parse_args(["bench", "--device", "cpu"])))
    assert BASELINES["cuda"] == ("torch.nn", "step", "flashrnn")


@pytest.mark.skipif(not _backend.has_cpu_kernels(), reason="needs the compiled extension")
def test_table_of_plans() -> None:
    options = ["--device", "H100", "A100", "--cell", "RNN", "--dtype", "fp16"]
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "plans.py"), *options]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line for line in text.splitlines() if line.startswith("| RNN fp16")]
    assert len(rows) == 2 * len(GPU_SIZES)
    assert all("no: needs compute capability 9.0" in row for row in rows[len(GPU_SIZES) :])
    assert all(row.split(" | ")[-1] in ("block |", "cluster |", "grid |", "step |", "gemm |") for row in rows)


def test_the_script_is_the_command() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--budget" in done.stdout


class StandInEvent:
    """torch.cuda.Event without CUDA."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: StandInEvent) -> float:
        return (end.at - self.at) * 1e3


@pytest.mark.skipif(not _backend.has_cpu_kernels(), reason="needs the compiled extension")
@pytest.mark.parametrize("plan", ["auto", "cheapest", "grid", "single", "cudnn"])
def test_the_gpu_path_with_a_stand_in_for_cuda(
    plan: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything that --device cuda does but the kernels: sides, families, memory, floor, lines. On CPU tensors."""
    for name in ("modules", "inputs"):
        original = getattr(BenchCase, name)
        monkeypatch.setattr(BenchCase, name, lambda self, device, original=original: original(self, "cpu"))
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "Event", StandInEvent)
    monkeypatch.setattr(cuda, "get_device_properties", lambda index: types.SimpleNamespace(name="Stand-in"))
    monkeypatch.setattr(cuda, "get_device_capability", lambda: (9, 0))
    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 100)):
        monkeypatch.setattr(cuda, name, lambda value=value: value)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda: 400)
    monkeypatch.setattr(fused_rnn, "explain", functools.partial(fused_rnn.explain, device="H100"))
    monkeypatch.setattr(timing, "MOST_ROUNDS", timing.FEWEST_ROUNDS)
    cases = [BenchCase(c, d, m, 5, 3, 16, 16, lengths=ragged) for c, d, m, ragged in
             (("LSTM", "fp32", "training", "dense"), ("GRU", "bf16", "inference", "ragged"))]  # fmt: skip
    monkeypatch.setattr(bench, "gpu_cases", lambda: iter(cases))
    # torch.testing._internal, which other tests import, freezes these switches.
    with torch.backends.__allow_nonbracketed_mutation():
        switches = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
        try:
            options = ["bench", "--device", "cuda", "--budget", "60", "--plan", plan, "--baseline", "torch.nn", "step"]
            lines = bench.main(parser().parse_args(options))
            assert torch.backends.cuda.matmul.allow_tf32 == switches[1], "both sides run under torch's default switches"
            bench.main(parser().parse_args([*options, "--fp32", "tf32", "--first", "2"]))
            assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        finally:
            torch.backends.cudnn.allow_tf32 = False  # as conftest has it
            torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32 = switches
    out = capsys.readouterr().out
    if plan == "single":
        assert not lines and out.count("plan single is left out: kernel family single cannot serve this layer") == 2
        return
    families = [line["plan"]["forward"]["family"] for line in lines]
    assert set(families) == {"auto": {"cudnn"}, "cheapest": {"block"}}.get(plan, {plan})
    for line, family in zip(lines, families, strict=True):
        assert tuple(line)[: len(bench.FIELDS)] == bench.FIELDS and json.loads(json.dumps(line)) == line
        assert line["baseline"] in ("torch.nn", "step") and (line["baseline"] != "step" or family != "step")
        assert line["device"] == "Stand-in" and line["peak_bytes"] == line["baseline_peak_bytes"] == 300
        assert line["floor_us_per_step"] > 0 and line["threads"] is None
        figures = line["plan"]
        assert figures["backend"] == "cuda"
        assert figures["forward"]["expected_us_per_step"] > 0
        if family == "cudnn":
            assert "torch asks cuDNN for its" in figures["forward"]["reason"]
        else:
            assert figures["forward"]["smem_bytes"] > 0
        assert ("backward" in figures) == (line["mode"] == "training")
    assert [line["baseline"] for line in lines].count("torch.nn") == 2 and "100%" in out


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(TINY, cell="LSTM", dtype="bf16", H=64, I=64, T=16)
    monkeypatch.setattr(bench, "gpu_cases", lambda: iter([case]))
    lines = bench.main(parser().parse_args(["bench", "--device", "cuda", "--budget", "5", "--baseline", "torch.nn", "step"]))
    assert lines[0]["baseline"] == "torch.nn" and lines[0]["driver"] and lines[0]["cudnn"]
    assert lines[0]["peak_bytes"] > 0 and lines[0]["baseline_peak_bytes"] > 0
    family = lines[0]["plan"]["forward"]["family"]
    assert ("step" in [line["baseline"] for line in lines]) == (family != "step")


# --- compare ---


def made_up_line(**changes: Any) -> dict[str, Any]:
    line = {
        "date": "2030-01-02", "commit": "abc", "device": "GPU X", "driver": "1", "torch": "2.0", "cuda": "13", "cudnn": 9,
        "cell": "LSTM", "dtype": "fp16", "mode": "training", "T": 256, "B": 16, "I": 768, "H": 768, "layers": 1,
        "bidirectional": False, "lengths": "dense", "plan": {}, "ms": 1.0, "ms_p25": 0.9, "ms_p75": 1.1,
        "baseline": "torch.nn", "baseline_ms": 4.0, "us_per_step": 3.9, "floor_us_per_step": 2.0, "ratio": 4.0,
        "ratio_p25": 3.5, "ratio_p75": 4.5, "peak_bytes": 30, "baseline_peak_bytes": 100,
    }  # fmt: skip
    return line | changes


@pytest.fixture
def results(tmp_path: Path) -> Path:
    lines = [
        made_up_line(ratio=99.0),  # measured again below
        made_up_line(),
        made_up_line(cell="GRU", ratio=0.5, ratio_p25=0.4, ratio_p75=0.6, floor_us_per_step=None),
        made_up_line(H=256, I=256, layers=2, bidirectional=True, lengths="ragged", ratio=1.0),
        made_up_line(dtype="bf16", ratio=9.0),
        made_up_line(baseline="step", ratio=2.0),
        made_up_line(
            device="CPU Y", threads=2, mode="inference", T=1, baseline_peak_bytes=None, gflops=30.0, peak_gflops=60.0
        ),
    ]
    path = tmp_path / "made_up.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def test_tables(results: Path) -> None:
    compare = load_compare()
    text = compare.tables(compare.read([results]))
    assert "### training against torch.nn: GPU X, torch 2.0, cuDNN 9, 2030-01-02, abc" in text
    assert "| 256x16x768x768 fp16 | 4.00 (3.50-4.50) | 0.50 (0.40-0.60) |" in text
    assert "| 256x16x256x256 fp16 2 layers bidirectional ragged | 1.00 (3.50-4.50) |  |" in text
    assert "| **geometric mean fp16** | **2.00** | **0.50** |" in text and "99.00" not in text
    assert "| **geometric mean bf16** | **9.00** |  |" in text
    assert "Below 1: GRU 256x16x768x768 fp16 0.50." in text
    assert "Memory, share of the baseline's: median 30%, most 30%." in text
    assert "Times the floor: median 1.95, most 1.95 (LSTM 256x16x768x768 fp16)." in text
    assert "| 1x16x768x768 fp16 | 4.00 (3.50-4.50), 1.95 floors, 50% of peak |" in text
    assert "### training against step: GPU X" in text and "### inference against torch.nn: CPU Y, 2 thread(s)" in text


def test_a_line_that_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(made_up_line()) + "\n{}\n")
    with pytest.raises(SystemExit, match="broken.jsonl:2: not a result line"):
        load_compare().read([path])


def test_plots(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    compare = load_compare()
    compare.main([str(results), "--plots", str(tmp_path / "plots")])
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {f"made_up{n}_{kind}.png" for n in ("", "_2") for kind in ("ratio", "us_per_step")}
    import matplotlib.pyplot as plt

    lines = [line for line in compare.read([results]) if line["device"] == "GPU X" and line["baseline"] == "torch.nn"]
    axes = compare.draw_steps(plt, lines).axes[0]
    floors = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert floors == {"LSTM, least possible": [2.0, 2.0]}
    bars = [bar.get_height() for bar in compare.draw_ratios(plt, lines).axes[0].patches]
    assert bars == [0.5, 1.0, 4.0, 9.0]
    plt.close("all")


def test_flops_and_roofline() -> None:
    lstm = BenchCase("LSTM", "fp32", "inference", 5, 3, 7, 11)
    assert lstm.flops == 5 * 3 * 2 * 4 * 11 * (7 + 11)
    stack = BenchCase("GRU", "fp32", "training", 5, 3, 7, 11, layers=2, bidirectional=True)
    assert stack.flops == 3 * 5 * 3 * 2 * 3 * 11 * 2 * ((7 + 11) + (22 + 11))
    ragged = BenchCase("RNN", "fp32", "inference", 5, 3, 7, 11, lengths="ragged")
    assert ragged.flops == ragged.rows * 2 * 11 * (7 + 11) and 7 <= ragged.rows < 15
    assert bench.sgemm_gflops(size=64, rounds=2) > 0


def test_a_first_call_that_prepares_things(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken for no measure of the later ones: both sides' samples hold as many calls."""
    now, calls = 0.0, {"slow start": 0, "even": 0}

    def side(name: str, first: float) -> Side:
        def run() -> None:
            nonlocal now
            calls[name] += 1
            now += first if calls[name] == 1 else 2e-4

        return Side(name, run)

    def pause(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = types.SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now, sleep=pause)
    monkeypatch.setattr(timing, "time", clock)
    timings = timing.measure([side("slow start", 0.3), side("even", 2e-4)], "cpu", 0.9)
    assert calls["slow start"] > 0.5 * calls["even"]
    slow, even = (t.quartiles()[1] for t in timings)
    assert slow < 2 * even


def test_machine_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No git on the machine: results name the version."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(bench, "sgemm_gflops", lambda: 1.0)
    assert bench.machine("cpu")["commit"] == fused_rnn.__version__
