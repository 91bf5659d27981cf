"""Timing against torch.nn (cuDNN on a GPU, oneDNN and MKL on a CPU): ``python -m fused_rnn bench``.

Both sides run in one process on the same weights and inputs, turn by turn, so that whatever else the machine does hits both.
A case's figure is the median over rounds, with the quartiles; a line of JSON a case goes to a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_rnn

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# (T, B, I, H): streaming, forecasting, small training, speech, large models, long single sequences.
CPU_SHAPES = (
    (1, 1, 128, 128),
    (35, 32, 28, 256),
    (100, 1, 64, 64),
    (128, 16, 128, 128),
    (128, 64, 256, 256),
    (256, 32, 512, 512),
    (64, 8, 1024, 1024),
    (512, 1, 256, 256),
)
GPU_SIZES = (
    (1, 128), (1, 512), (8, 256), (16, 768), (32, 128), (64, 256), (64, 512), (64, 1024), (128, 512), (256, 256), (32, 2048),
)  # fmt: skip
MODES = ("inference", "training_forward", "training")


@dataclasses.dataclass(frozen=True)
class BenchCase:
    """One measured configuration; ``mode`` "training" is forward and backward, "training_forward" forward with grad."""

    cell: str
    dtype: str
    mode: str
    T: int
    B: int
    I: int  # noqa: E741  (the field's name in results)
    H: int
    layers: int = 1
    bidirectional: bool = False
    lengths: str = "dense"

    def modules(self, device: str) -> tuple[torch.nn.Module, torch.nn.Module]:
        """(fused_rnn's, torch.nn's) with the same weights."""
        torch.manual_seed(0)
        options: dict[str, Any] = {"num_layers": self.layers, "bidirectional": self.bidirectional}
        kind = "RNN" if self.cell == "RNN" else self.cell
        theirs = getattr(torch.nn, kind)(self.I, self.H, **options).to(device=device, dtype=DTYPES[self.dtype])
        ours = getattr(fused_rnn, kind)(self.I, self.H, **options).to(device=device, dtype=DTYPES[self.dtype])
        ours.load_state_dict(theirs.state_dict())
        for module in (ours, theirs):
            module.train(self.mode != "inference")
        return ours, theirs

    def inputs(self, device: str) -> list[Any]:
        """Inputs to rotate over: enough of them to leave a GPU's L2 cache between two uses, at most 8."""
        bytes_each = self.T * self.B * self.I * DTYPES[self.dtype].itemsize
        count = 1 if device == "cpu" else max(1, min(8, -(-128_000_000 // max(1, bytes_each))))
        generator = torch.Generator().manual_seed(1)
        made: list[Any] = []
        for _ in range(count):
            x = torch.randn(self.T, self.B, self.I, generator=generator).to(device=device, dtype=DTYPES[self.dtype])
            x.requires_grad_(self.mode != "inference")
            if self.lengths == "ragged":
                lengths = torch.randint(1, self.T + 1, (self.B,), generator=generator)
                lengths[0] = self.T
                made.append(torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))
            else:
                made.append(x)
        return made


def cpu_cases() -> Iterator[BenchCase]:
    """The eight shapes of the CPU goals, every cell and mode, and the cases that torch.nn serves worst."""
    for (t, b, i, h), cell, mode in itertools.product(CPU_SHAPES, ("LSTM", "GRU", "RNN"), MODES):
        yield BenchCase(cell, "fp32", mode, t, b, i, h)
    for cell, mode in itertools.product(("LSTM", "GRU", "RNN"), ("inference", "training")):
        yield BenchCase(cell, "fp32", mode, 128, 16, 128, 128, lengths="ragged")
        yield BenchCase(cell, "fp32", mode, 64, 16, 64, 128, layers=2, bidirectional=True)
        yield BenchCase(cell, "bf16", mode, 128, 16, 128, 128)
        yield BenchCase(cell, "fp32", mode, 50, 7, 33, 100)


def gpu_cases() -> Iterator[BenchCase]:
    """The grid of the GPU goals, then stacked, bidirectional, ragged, odd and single-step cases."""
    cells, dtypes, modes = ("LSTM", "GRU", "RNN"), ("fp32", "fp16", "bf16"), ("inference", "training")
    for cell, dtype, (b, h), mode in itertools.product(cells, dtypes, GPU_SIZES, modes):
        yield BenchCase(cell, dtype, mode, 256, b, h, h)
    for cell, mode in itertools.product(cells, modes):
        for dtype in ("fp32", "bf16"):
            yield BenchCase(cell, dtype, mode, 256, 32, 256, 256, layers=2)
            yield BenchCase(cell, dtype, mode, 256, 32, 256, 256, layers=4)
            yield BenchCase(cell, dtype, mode, 256, 32, 256, 256, bidirectional=True)
            yield BenchCase(cell, dtype, mode, 256, 32, 256, 256, lengths="ragged")
            yield BenchCase(cell, dtype, mode, 1, 1, 256, 256)
            yield BenchCase(cell, dtype, mode, 256, 7, 100, 100)
            yield BenchCase(cell, dtype, mode, 256, 33, 300, 300)


def _runner(module: torch.nn.Module, inputs: list[Any], mode: str) -> Callable[[], None]:
    rotation = itertools.cycle(inputs)
    parameters = list(module.parameters())

    def output_of(x: Any) -> Tensor:
        y = module(x)[0]
        return y.data if isinstance(x, torch.nn.utils.rnn.PackedSequence) else y

    def inference() -> None:
        with torch.no_grad():
            output_of(next(rotation))

    def forward() -> None:
        output_of(next(rotation))

    dy = torch.randn_like(output_of(inputs[0]))

    def training() -> None:
        x = next(rotation)
        leaves = parameters if isinstance(x, torch.nn.utils.rnn.PackedSequence) else [x, *parameters]
        y = output_of(x)
        torch.autograd.grad(y, leaves, dy[: y.shape[0]])

    return {"inference": inference, "training_forward": forward, "training": training}[mode]


def _timed(run: Callable[[], None], repeats: int, device: str) -> float:
    """Milliseconds of one call, over `repeats` calls."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) * 1e3 / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def measure(case: BenchCase, device: str, seconds: float) -> dict[str, Any]:
    """Times both sides of a case for about `seconds`; returns a result line without the machine's part."""
    ours, theirs = case.modules(device)
    if device == "cuda":
        theirs.flatten_parameters()  # type: ignore[operator]
    inputs = case.inputs(device)
    runs = [_runner(module, inputs, case.mode) for module in (ours, theirs)]
    for run in runs:
        run()
        run()
    once = [_timed(run, 1, device) for run in runs]
    repeats = [max(1, round(min(5.0, seconds * 50) / max(t, 1e-3))) for t in once]
    rounds = max(5, min(200, round(seconds * 1e3 / sum(t * r for t, r in zip(once, repeats, strict=True)))))
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side in (0, 1):
            samples[side].append(_timed(runs[side], repeats[side], device))
    low, middle, high = statistics.quantiles(samples[0], n=4)
    base = statistics.quantiles(samples[1], n=4)
    ratios = statistics.quantiles([b / a for a, b in zip(*samples, strict=True)], n=4)
    return {
        **dataclasses.asdict(case),
        "ms": middle,
        "ms_p25": low,
        "ms_p75": high,
        "baseline": "torch.nn",
        "baseline_ms": base[1],
        "baseline_ms_p25": base[0],
        "baseline_ms_p75": base[2],
        "ratio": ratios[1],
        "ratio_p25": ratios[0],
        "ratio_p75": ratios[2],
        "rounds": rounds,
        "us_per_step": middle * 1e3 / (case.T * case.layers),
    }


def machine(device: str) -> dict[str, Any]:
    """What a result depends on besides the case."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    line: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or fused_rnn.__version__,
        "torch": torch.__version__,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
        line |= {
            "device": properties.name,
            "driver": driver.stdout.strip(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": torch.backends.cudnn.allow_tf32,
        }
    else:
        line |= {
            "device": _cpu_name(),
            "threads": torch.get_num_threads(),
            "instruction_set": fused_rnn.build_info().get("cpu_instruction_set"),
        }
    return line


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the bench command."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cell", choices=("LSTM", "GRU", "RNN"), help="only this cell")
    parser.add_argument("--mode", choices=MODES, help="only this mode")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="only this dtype")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads before measuring (CPU)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each case (default 1)")
    parser.add_argument("--output", type=Path, help="append a line of JSON a case to this file")


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the cases that args select; prints a table and returns the result lines."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    about = machine(args.device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'case':62} {'fused_rnn ms':>13} {'torch.nn ms':>12} {'ratio':>6} {'quartiles':>13}")
    results = []
    for case in gpu_cases() if args.device == "cuda" else cpu_cases():
        if any(
            want not in (None, have)
            for want, have in ((args.cell, case.cell), (args.mode, case.mode), (args.dtype, case.dtype))
        ):
            continue
        line = about | measure(case, args.device, args.seconds)
        results.append(line)
        name = f"{case.cell} {case.dtype} {case.mode} T={case.T} B={case.B} I={case.I} H={case.H}"
        name += f" L={case.layers}" * (case.layers > 1) + " bidirectional" * case.bidirectional
        name += " ragged" * (case.lengths == "ragged")
        quartiles = f"{line['ratio_p25']:.2f}-{line['ratio_p75']:.2f}"
        print(f"{name:62} {line['ms']:13.4f} {line['baseline_ms']:12.4f} {line['ratio']:6.2f} {quartiles:>13}", flush=True)
        if args.output:
            with args.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
    for cell, mode in itertools.product(("LSTM", "GRU", "RNN"), MODES):
        ratios = [r["ratio"] for r in results if r["cell"] == cell and r["mode"] == mode]
        if ratios:
            print(f"{cell} {mode}: geometric mean {statistics.geometric_mean(ratios):.2f} over {len(ratios)} cases")
    return results
