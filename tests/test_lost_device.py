"""What tests/conftest.py does about kernels that end the CUDA context or hang: one bad test must not hide the others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# A GPU that is lost in the test of number 2, until the process ends; the test of number 5 hangs.
TESTS = """
import time
import pytest, torch

lost = False

def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize

@pytest.mark.parametrize("number", range(8))
def test(number):
    global lost
    lost = lost or number == 2
    if number == 5:
        time.sleep(600)
"""


def run(folder: Path, *options: str) -> str:
    (folder / "test_made_up.py").write_text(TESTS)
    shutil.copy(HERE / "conftest.py", folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": f"{HERE}:{HERE.parent}:{os.environ.get('PYTHONPATH', '')}", "FUSED_RNN_TEST_LIMIT": "2"}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_test_that_lost_the_device_fails_and_is_the_last(tmp_path: Path) -> None:
    text = run(tmp_path)
    assert "1 failed, 2 passed" in text and "FAILED test_made_up.py::test[2] - RuntimeError: CUDA error" in text
    assert "the CUDA context is lost: CUDA error" in text


def test_a_test_that_hangs_ends_its_process(tmp_path: Path) -> None:
    text = run(tmp_path, "-k", "test[5]")
    assert "Timeout" in text and "test_made_up.py" in text


@pytest.mark.slow
def test_other_processes_go_on(tmp_path: Path) -> None:
    pytest.importorskip("xdist", reason="needs pytest-xdist")
    text = run(tmp_path, "-n", "1")
    passed = [number for number in range(8) if f"PASSED test_made_up.py::test[{number}]" in text]
    assert passed == [0, 1, 3, 4, 6, 7], text
    assert "test[2] - RuntimeError: CUDA error" in text and "crashed while running 'test_made_up.py::test[5]'" in text
    assert "Timeout" in text, "the stack of what hangs"
