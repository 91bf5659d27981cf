"""Time fused_rnn against torch.nn (cuDNN on a GPU, oneDNN and MKL on a CPU) and other implementations.

All sides of a case run in one process on the same weights and inputs, turn by turn (timing.py). A case's figure is the
median over rounds, with the quartiles; one line of JSON for each case and baseline goes to a file. Its fields:

    date commit device driver torch cuda cudnn cell dtype mode T B I H layers bidirectional lengths plan ms ms_p25 ms_p75
    baseline baseline_ms us_per_step floor_us_per_step

and beside these: ratio, ratio_p25, ratio_p75 (baseline over ours, round by round), baseline_ms_p25, baseline_ms_p75, rounds,
peak_bytes and baseline_peak_bytes (of one call, beside weights and input: device memory on a GPU, resident memory for
training on a CPU), gflops (of the matrix products), peak_gflops (of a CPU's products at best, by the case's dtype and the
instruction set in use), sgemm_gflops (of torch.mm, float32, measured at the start), tf32, matmul_tf32 (torch's switches for
recurrent layers and for matrix products), threads, instruction_set. us_per_step is for one step of one layer, both
directions; floor_us_per_step is the bound of floor.py, on a CPU of cpu_floor.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import faulthandler
import itertools
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import fused_rnn
from fused_rnn._backend import has_cpu_kernels
from fused_rnn._settings import FAMILIES
from fused_rnn.bench.cases import CELLS, DTYPES, LOOPED, MODES, PRESETS, BenchCase, cpu_cases, gpu_cases, thinned
from fused_rnn.bench.cpu_floor import CpuRates, cpu_floor_us_per_step
from fused_rnn.bench.floor import floor_us_per_step
from fused_rnn.bench.memory import Prober
from fused_rnn.bench.sides import BASELINES, CannotServe, explained, make_sides, missing
from fused_rnn.bench.timing import driver, measure, peak_bytes_cuda, summary
from fused_rnn.explanation import PassPlan

FIELDS = (
    "date", "commit", "device", "driver", "torch", "cuda", "cudnn", "cell", "dtype", "mode", "T", "B", "I", "H", "layers",
    "bidirectional", "lengths", "plan", "ms", "ms_p25", "ms_p75", "baseline", "baseline_ms", "us_per_step",
    "floor_us_per_step",
)  # fmt: skip
CASE_LIMIT = 40  # seconds


def machine(device: str) -> dict[str, Any]:
    """What a result depends on besides the case."""
    on_gpu = device == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "device": torch.cuda.get_device_properties(0).name if on_gpu else _cpu_name(),
        "driver": driver() if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "tf32": torch.backends.cudnn.allow_tf32 if on_gpu else None,
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32 if on_gpu else None,
        "threads": None if on_gpu else torch.get_num_threads(),
        "instruction_set": None if on_gpu else fused_rnn.build_info().get("cpu_instruction_set"),
        "sgemm_gflops": None if on_gpu else sgemm_gflops(),
    }


def _commit() -> str:
    """The commit of the source tree, with +changes where files differ; the version where git or its folder is missing."""

    def git(*arguments: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            command = ["git", "-C", str(Path(__file__).parent), *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return ""

    commit = git("rev-parse", "--short", "HEAD")
    return commit + "+changes" * bool(git("status", "--porcelain", "-uno")) if commit else fused_rnn.__version__


def sgemm_gflops(size: int = 1024, rounds: int = 12) -> float:
    """The best of some float32 products of square matrices by torch.mm, with torch's threads."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return round(2 * size**3 / min(times) * 1e-9, 1)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def plan_of(module: torch.nn.Module, x: Any, mode: str, asked_for: str | None) -> dict[str, Any]:
    """Family and main figures of the first layer's plan, forward and (training) backward, under this FUSED_RNN_PLAN."""
    explanation = explained(module, x, mode, asked_for)
    layer = explanation.layers[0]
    result: dict[str, Any] = {"backend": explanation.backend}
    for name, plan in (("forward", layer.forward), ("backward", layer.backward if mode == "training" else None)):
        if plan is not None and plan != PassPlan():
            result[name] = figures_of(plan)
    return result


def figures_of(plan: PassPlan) -> dict[str, Any]:
    """What a result line keeps of a pass: of CUDA the family with its last kernel, of cuDNN its algorithm, of the CPU how
    threads share the work."""
    if plan.shares is not None:
        teams = {"direction_teams": plan.shares.directions, "batch_teams": plan.shares.batch_rows}
        return {"threads": plan.threads, **teams, "split": plan.shares.hidden_units, "weights": plan.weights}
    figures: dict[str, Any] = {"family": plan.family, "expected_us_per_step": round(plan.us_per_step or 0.0, 3)}
    if not plan.kernels:  # cuDNN's are not known
        return {**figures, "reason": plan.reason}
    kernel = plan.kernels[-1]
    figures |= {"units": kernel.units, "batch": kernel.rows, "threads": kernel.threads, "math": kernel.math}
    if kernel.persistent:
        blocks, groups, directions = kernel.grid
        figures |= {"blocks": blocks, "groups": groups, "directions": directions}
        figures |= {"launches": kernel.launches, "weight_registers": kernel.weight_registers}
    else:
        figures |= {"stages": kernel.stages, "grid": list(kernel.grid)}
    return {**figures, "smem_bytes": kernel.smem_bytes}


def floor_of(case: BenchCase, device: str, tf32: bool, rates: CpuRates | None) -> float | None:
    """Microseconds of a step and layer, at least; None where they are not known."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return floor_us_per_step(case, 10 * major + minor, tf32)
    return None if rates is None else cpu_floor_us_per_step(case, rates)


def result_lines(
    case: BenchCase,
    about: dict[str, Any],
    device: str,
    baselines: list[str],
    seconds: float,
    prober: Prober | None,
    asked_for: str,
    rates: CpuRates | None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(a result line for each baseline that can run the case, the reason for each one that cannot)."""
    start = time.monotonic()
    threads = torch.get_num_threads()
    try:
        sides, refused, (module, x) = make_sides(case, device, baselines, threads, asked_for)
    except CannotServe as reason:
        return [], {f"plan {asked_for}": str(reason)}
    plan = plan_of(module, x, case.mode, sides[0].plan)
    families = {figures["family"] for figures in plan.values() if isinstance(figures, dict) and "family" in figures}
    if families == {"step"} and any(side.plan == "step" for side in sides):
        sides = [side for side in sides if side.plan != "step"]
        refused["step"] = "it is our own plan"
    peaks: dict[str, int] = {}
    if device == "cuda":
        peaks = {side.name: peak_bytes_cuda(side) for side in sides}
    elif prober is not None and case.mode == "training":
        peaks = prober.peaks(case)
    timings = measure(sides, device, seconds - (time.monotonic() - start))
    ours = timings[0]
    floor = floor_of(case, device, bool(about["tf32"]), rates)
    peak = None if rates is None else round(rates.product(case.dtype) * 1e-9, 1)
    lines = []
    for side, timing in zip(sides[1:], timings[1:], strict=True):
        line = about | dataclasses.asdict(case) | {"plan": plan} | summary(ours, "") | {"baseline": side.name}
        line |= summary(timing, "baseline_")
        line |= dict(zip(("ratio_p25", "ratio", "ratio_p75"), timing.ratios(ours), strict=True))
        line["us_per_step"] = line["ms"] * 1e3 / (case.T * case.layers)
        line["floor_us_per_step"] = floor
        line |= {"rounds": len(ours.samples), "gflops": round(case.flops / line["ms"] * 1e-6, 2), "peak_gflops": peak}
        line |= {"peak_bytes": peaks.get(sides[0].name), "baseline_peak_bytes": peaks.get(side.name)}
        lines.append({key: line[key] for key in (*FIELDS, *sorted(line.keys() - set(FIELDS)))})
    return lines, refused


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the bench command."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    text = (
        "a grid instead of the device's own cases. cells: the cells in a loop of 10 steps, forward and backward; "
        "steps: inference of 1 to 8 steps, on 1 and 2 threads; both have hundreds of cases: see --limit. "
        "first: 40 cases for the first minutes on a GPU"
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), help=text)
    parser.add_argument("--limit", type=_positive, help="only so many of the cases, a sample that is the same in every run")
    parser.add_argument("--cell", choices=CELLS + LOOPED, nargs="+", help="only these cells")
    parser.add_argument("--mode", choices=MODES, nargs="+", help="only these modes")
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", help="only these dtypes")
    parser.add_argument("--hidden", type=int, nargs="+", help="only these hidden sizes")
    parser.add_argument("--batch", type=int, nargs="+", help="only these batch sizes")
    known = tuple(dict.fromkeys(itertools.chain(*BASELINES.values())))
    parser.add_argument("--baseline", choices=known, nargs="+", help="only these; default: all of the device's installed")
    parser.add_argument("--threads", type=int, nargs="+", help="CPU: everything with each of these numbers of threads")
    parser.add_argument(
        "--plan", choices=("auto", "cheapest", *FAMILIES), default="auto",
        help="GPU: the kernel family; cheapest: what the planner's model expects to be, for each layer and pass (auto)",
    )  # fmt: skip
    parser.add_argument(
        "--fp32", choices=("default", "tf32", "ieee"), default="default",
        help="GPU: torch's switches, for both sides; default: as torch has them, TF32 in recurrent layers alone (default)",
    )  # fmt: skip
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for the whole run (480)")
    parser.add_argument("--no-memory", action="store_true", help="CPU: do not measure memory")
    parser.add_argument("--output", type=Path, help="append a line of JSON for each case and baseline to this file")
    parser.add_argument("--first", type=int, default=0, help="leave out so many cases at the beginning (0)")
    text = f"keep in this file the number of the case that has begun, at last 'end'; one of {CASE_LIMIT} s ends the process"
    parser.add_argument("--begun", type=Path, help=text)


def selected(args: argparse.Namespace) -> list[BenchCase]:
    """The cases that the options leave."""
    if args.preset:
        cases = PRESETS[args.preset].cases()
    else:
        cases = gpu_cases() if args.device == "cuda" else cpu_cases()
    wanted = ((args.cell, "cell"), (args.mode, "mode"), (args.dtype, "dtype"), (args.hidden, "H"), (args.batch, "B"))
    left = [case for case in cases if all(not values or getattr(case, field) in values for values, field in wanted)]
    return thinned(left, args.limit)


def _numbers_of_threads(args: argparse.Namespace) -> list[int]:
    if args.threads:
        return list(args.threads)
    return list(PRESETS[args.preset].threads) if args.preset and args.device == "cpu" else [torch.get_num_threads()]


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the cases that args select; prints a table and returns the result lines.

    Each case gets an even share of what is left of the budget. A case whose turn comes after the budget is spent is not
    measured; the output names it.

    Raises:
        SystemExit: the options do not fit; or, once all cases have had their turn, some failed.
    """
    if args.device == "cuda":
        torch.backends.cudnn.benchmark = True
        if args.fp32 != "default":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.fp32 == "tf32"
    possible = BASELINES[args.device]
    wanted = args.baseline or [name for name in possible if missing(name) is None]
    for name in wanted:
        if name not in possible:
            raise SystemExit(f"bench: {name} does not run on {args.device}; these do: {', '.join(possible)}")
        if (package := missing(name)) is not None:
            raise SystemExit(f"bench: {name} needs {package}, which is not installed")
    work = list(itertools.product(_numbers_of_threads(args), selected(args)))
    deadline = time.monotonic() + args.budget
    results: list[dict[str, Any]] = []
    left_out, failed = [], []
    threads_before = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads_before)
        for threads, group in itertools.groupby(enumerate(work), key=lambda item: item[1][0]):
            torch.set_num_threads(threads)
            about = machine(args.device)
            prober = Prober(threads) if args.device == "cpu" and not args.no_memory else None
            if prober is not None:
                stack.callback(prober.close)
            rates = CpuRates(threads) if args.device == "cpu" and has_cpu_kernels() else None
            _print_head(about)
            for index, (_, case) in group:
                if index < args.first:
                    continue
                if args.begun:
                    args.begun.write_text(str(index))
                    faulthandler.dump_traceback_later(CASE_LIMIT, exit=True, file=2)
                left = deadline - time.monotonic()
                if left <= 0:
                    left_out.append(str(case))
                    continue
                try:
                    lines, refused = result_lines(
                        case, about, args.device, wanted, left / (len(work) - index), prober, args.plan, rates
                    )
                except RuntimeError as error:  # the cases after it are measured nevertheless
                    failed.append(str(case))
                    print(f"{case!s:58} FAILED: {error}", flush=True)
                    if args.device == "cuda":
                        torch.cuda.synchronize()  # raises, and ends the run, where the device can do nothing any more
                    continue
                _print_case(case, lines, refused)
                results += lines
                if args.output:
                    args.output.parent.mkdir(parents=True, exist_ok=True)
                    with args.output.open("a") as file:
                        file.writelines(json.dumps(line) + "\n" for line in lines)
    if args.begun:
        faulthandler.cancel_dump_traceback_later()
        args.begun.write_text("end")
    _print_means(results)
    if left_out:
        print(
            f"\nnot measured, the budget of {args.budget:g} s was spent: {len(left_out)} cases\n  " + "\n  ".join(left_out)
        )
    if failed:
        raise SystemExit(f"\nbench: {len(failed)} cases failed\n  " + "\n  ".join(failed))
    return results


def _print_head(about: dict[str, Any]) -> None:
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    titles = f"{'case':58} {'ms':>10} {'baseline':>11} {'ms':>10} {'ratio':>6} {'quartiles':>13} {'memory':>7}"
    print(f"{titles} {'/floor':>6} {'peak':>5}")


def _print_case(case: BenchCase, lines: list[dict[str, Any]], refused: dict[str, str]) -> None:
    name = str(case)
    for line in lines:
        quartiles = f"{line['ratio_p25']:.2f}-{line['ratio_p75']:.2f}"
        ours, theirs = line["peak_bytes"], line["baseline_peak_bytes"]
        memory = f"{ours / theirs:.0%}" if ours is not None and theirs else ""
        figures = f"{line['ms']:10.4f} {line['baseline']:>11} {line['baseline_ms']:10.4f} {line['ratio']:6.2f}"
        bounds = f"{_times(line['us_per_step'], line['floor_us_per_step'])} {_share(line['gflops'], line['peak_gflops'])}"
        print(f"{name:58} {figures} {quartiles:>13} {memory:>7} {bounds}", flush=True)
        name = ""
    for baseline, reason in refused.items():
        if reason.startswith(("only ", "it is our own")):  # of the baseline's nature, for many cases alike
            continue
        print(f"{name:58} {baseline} is left out: {reason}", flush=True)


def _times(value: float, floor: float | None) -> str:
    return f"{value / floor:6.2f}" if floor else " " * 6


def _share(value: float, peak: float | None) -> str:
    return f"{value / peak:5.0%}" if peak else " " * 5


def _print_means(results: list[dict[str, Any]]) -> None:
    print()
    groups: dict[tuple, list[float]] = {}
    for line in results:
        key = tuple(line[field] for field in ("baseline", "threads", "dtype", "cell", "mode"))
        groups.setdefault(key, []).append(line["ratio"])
    for (baseline, threads, dtype, cell, mode), ratios in groups.items():
        where = f" on {threads} thread(s)" if threads else ""
        mean = statistics.geometric_mean(ratios)
        print(f"{cell} {dtype} {mode} against {baseline}{where}: geometric mean {mean:.2f} over {len(ratios)} cases")
