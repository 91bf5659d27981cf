"""Peak memory of a call on a CPU: how far resident memory rises during it, measured in a process of its own.

The process reads a case (the fields of BenchCase, JSON) a line and answers with a line, {side: bytes} for fused_rnn and
torch.nn. Its malloc returns freed memory to the system at once, so that no call can use what an earlier one freed.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import torch

import fused_rnn
from fused_rnn.bench.cases import BenchCase
from fused_rnn.bench.sides import Side, make_sides

# No call keeps packed weights for the next one: they count in each.
_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
    "FUSED_RNN_WEIGHT_CACHE": "0",
}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_bytes_cpu(side: Side) -> int:
    """The most resident memory that one call adds to what was resident before it; Linux.

    The call runs in a new thread, after the memory that earlier calls keep has been freed: what it keeps counts too.
    """
    with ThreadPoolExecutor(1) as thread:
        thread.submit(side.run).result()
    gc.collect()
    fused_rnn.free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    with ThreadPoolExecutor(1) as thread:
        thread.submit(side.run).result()
    return max(0, _status("VmHWM") - before)


class Prober:
    """The process that measures; started at the first case."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.process: subprocess.Popen[str] | None = None

    def peaks(self, case: BenchCase, timeout: float = 120.0) -> dict[str, int]:
        """{"fused_rnn": bytes, "torch.nn": bytes}; raises RuntimeError if the process ended or took too long."""
        if self.process is None:
            path = os.pathsep.join([str(Path(fused_rnn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
            env = os.environ | _ENVIRONMENT | {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": path.rstrip(os.pathsep)}
            command = [
                sys.executable,
                "-c",
                "import sys; from fused_rnn.bench import memory; memory.main(sys.stdin, sys.stdout)",
            ]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert self.process.stdin is not None and self.process.stdout is not None
        late = threading.Timer(timeout, self.process.kill)
        late.start()
        try:
            self.process.stdin.write(json.dumps(dataclasses.asdict(case)) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        finally:
            late.cancel()
        if not answer:
            raise RuntimeError(f"the process that measures memory ended with {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None and self.process.stdout is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
            self.process = None


def main(cases: IO[str], answers: IO[str]) -> None:
    for line in cases:
        case = BenchCase(**json.loads(line))
        sides, _, _ = make_sides(case, "cpu", ["torch.nn"], torch.get_num_threads())
        answers.write(json.dumps({side.name: peak_bytes_cpu(side) for side in sides}) + "\n")
        answers.flush()
