"""The torch side of the CUDA backend (csrc/*_cuda.cpp) for CPU tensors, with the simulator as the device.

torch_host/ has stand-ins for CUDA's streams and events, which only check that no event is awaited before it is recorded. In
a process of its own, since the ops can be registered once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "torch_host"
CHECKS = (
    "checks.py",
    "cudnn_checks.py",
    "graph_checks.py",
    "options_checks.py",
    "second_order_checks.py",
    "tuning_checks.py",
)


def run(*options: str, checks: Sequence[str] = CHECKS, formula: str = "with options") -> int:
    """The number of checks that have passed; a failed one is an error."""
    files = [str(FOLDER / name) for name in checks]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", *options, *files]
    paths = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=FOLDER.parents[2],
        env={**os.environ, "PYTHONPATH": paths, "TORCH_HOST_FORMULA": formula},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    return int(passed[1])


@pytest.mark.slow
def test_ops_on_the_simulated_device() -> None:
    """Every third case: CI's part."""
    assert run("-p", "every_third") > 150


@pytest.mark.slow
def test_one_step_of_a_formula() -> None:
    assert run(checks=["formula_step_checks.py"], formula="plain") > 2


@pytest.mark.slow
def test_every_op_on_the_simulated_device() -> None:
    assert run() > 500
