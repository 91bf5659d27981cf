"""The torch side of the CUDA backend (csrc/*_cuda.cpp) for CPU tensors, with the simulator as the device.

torch_host/ has stand-ins for CUDA's streams and events, which only check that no event is awaited before it is recorded. In
a process of its own, since the ops can be registered once.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "torch_host"
CHECKS = [str(FOLDER / name) for name in ("checks.py", "cudnn_checks.py", "tuning_checks.py")]


@pytest.mark.slow
def test_ops_on_the_simulated_device() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", *CHECKS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 100
