"""Timing: the sides of a case take turns, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import time
from typing import Any

import torch

from fused_rnn.bench.sides import Side

FEWEST_ROUNDS, MOST_ROUNDS = 3, 200
SAMPLE_MS = 5.0  # of one side in one round, at most (one call, if that takes longer)
PAUSE = 0.005  # seconds before a sample on a CPU: the threads of the previous side stop spinning within it
WARM_UP_MS = 100.0  # calls shorter than this are made once, uncounted, after the pause


@dataclasses.dataclass
class Timing:
    """Milliseconds of one call in each round."""

    samples: list[float]

    def quartiles(self) -> tuple[float, float, float]:
        low, middle, high = statistics.quantiles(self.samples, n=4)
        return low, middle, high

    def ratios(self, ours: Timing) -> tuple[float, float, float]:
        """Quartiles of this over ours, round by round: how many times faster ours is."""
        low, middle, high = statistics.quantiles([b / a for a, b in zip(ours.samples, self.samples, strict=True)], n=4)
        return low, middle, high


def timed(side: Side, repeats: int, device: str, warm_up: bool = True) -> float:
    """Milliseconds of one call, the mean over ``repeats``; on a GPU by CUDA events.

    On a CPU the first call after the pause takes 1.3 to 2 times as long as later ones (calls of 2 to 25 ms), so one call
    goes before the counted ones, unless ``warm_up`` is false.
    """
    with side.active():
        if device == "cpu":
            time.sleep(PAUSE)
            if warm_up:
                side.run()
            start = time.perf_counter()
            for _ in range(repeats):
                side.run()
            return (time.perf_counter() - start) * 1e3 / repeats
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            side.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / repeats


def measure(sides: list[Side], device: str, seconds: float) -> list[Timing]:
    """Times every side for about `seconds` together, warm-up included; at least FEWEST_ROUNDS rounds."""
    deadline = time.monotonic() + seconds
    once = []
    for side in sides:
        first = timed(side, 1, device, warm_up=False)
        # A first call may prepare things for later ones, so it is a poor estimate; a long one must do all the same.
        once.append(first if first > seconds * 1e3 / 10 else timed(side, 2, device))
    share = max(deadline - time.monotonic(), 0.0) * 1e3 / 30 / len(sides)  # for about 30 rounds, where there is time

    def counts(times: list[float]) -> list[int]:
        return [max(1, round(min(SAMPLE_MS, share) / max(t, 1e-3))) for t in times]

    repeats = counts(once)
    samples: list[list[float]] = [[] for _ in sides]
    checked = False
    while len(samples[0]) < FEWEST_ROUNDS or (len(samples[0]) < MOST_ROUNDS and time.monotonic() < deadline):
        start = len(samples[0]) % len(sides)  # so that no side always follows the same one
        for index in (*range(start, len(sides)), *range(start)):
            samples[index].append(timed(sides[index], repeats[index], device, once[index] < WARM_UP_MS))
        if not checked:
            # A long first call stood for all: now there are better estimates.
            once = [min(t, sample[0]) for t, sample in zip(once, samples, strict=True)]
            better = counts(once)
            if any(more > 2 * count for more, count in zip(better, repeats, strict=True)):
                repeats, samples = better, [[] for _ in sides]
            checked = True
    return [Timing(values) for values in samples]


def peak_bytes_cuda(side: Side) -> int:
    """Device memory that one call takes at most, beside weights and input."""
    with side.active():
        side.run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side.run()
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def driver() -> str | None:
    """Version of the NVIDIA driver, if nvidia-smi is there to tell it."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    except FileNotFoundError:
        return None
    return lines[0].strip() if lines else None


def summary(timing: Timing, prefix: str) -> dict[str, Any]:
    """The three fields of a side's time."""
    low, middle, high = timing.quartiles()
    return {f"{prefix}ms": middle, f"{prefix}ms_p25": low, f"{prefix}ms_p75": high}
