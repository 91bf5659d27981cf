"""How a CUDA device is asked for its clusters, with a made-up CUDA runtime: needs nvcc, no GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
INVALID_VALUE, LAUNCH_FAILURE, INVALID_CLUSTER_SIZE = 1, 719, 912  # of cudaError_t


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc on PATH")
    target = tmp_path_factory.mktemp("device_query") / "program"
    sources = [str(HERE / "device_query" / name) for name in ("main.cu", "runtime.cpp")]
    command = [
        "nvcc",
        "-std=c++17",
        "-arch=sm_90a",
        "-cudart",
        "none",
        f"-I{CSRC}",
        f"-I{CSRC / 'cuda' / 'device'}",
        *sources,
    ]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def counts(largest: int, none: int = 0) -> list[int]:
    return [0, 132, *(120 // n if n <= largest and n != none else 0 for n in range(2, 17))]


# Compute capability, that of the code, largest cluster, error for larger ones, a size that does not run: compiled_for,
# max_cluster, active_clusters.
@pytest.mark.parametrize(
    ("made_up", "expected"),
    [
        ((90, 90, 16, 0, 0), [90, 16, *counts(16)]),
        ((90, 90, 16, 0, 0, 0), [90, 16, *counts(16)]),  # a block of a persistent kernel does not fit
        ((90, 90, 16, 0, 16), [90, 15, *counts(16, none=16)]),
        ((90, 90, 16, 0, 7), [90, 16, *counts(16, none=7)]),
        ((90, 90, 8, INVALID_CLUSTER_SIZE, 0), [90, 8, *counts(8)]),
        ((90, 90, 8, INVALID_VALUE, 0), [90, 8, *counts(8)]),
        ((90, 90, 1, INVALID_CLUSTER_SIZE, 0), [90, 1, *counts(1)]),
        ((120, 120, 16, 0, 0), [120, 8, *counts(8)]),  # no larger ones are asked for
        ((90, 80, 16, 0, 0), [80, 16, *[0] * 17]),  # nothing asks, as no code could run in clusters
        ((80, 80, 1, INVALID_CLUSTER_SIZE, 0), [80, 1, *[0] * 17]),
        ((90, 0, 16, 0, 0), [0, 16, *[0] * 17]),
    ],
    ids=str,
)
def test_query(program: Path, made_up: tuple[int, ...], expected: list[int]) -> None:
    """The current device, the capture mode and the error state are afterwards what they were."""
    fits = made_up[5] if len(made_up) > 5 else 1
    done = subprocess.run([str(program), "1", *map(str, (*made_up[:5], fits))], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout, done.stderr)
    resident = 0 if expected[0] == 0 else 132 if fits else -1
    assert [int(number) for number in done.stdout.split()] == [resident, *expected]


def test_unexpected_error(program: Path) -> None:
    """A device that fails is not taken for one without clusters."""
    arguments = ("1", "90", "90", "4", str(LAUNCH_FAILURE), "0", "1")
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "fused_rnn: clusters of 5 blocks: made-up error")
