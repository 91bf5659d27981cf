"""How many threads a call may use: never more than there are processors for the process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fused_rnn
from fused_rnn import _backend
from fused_rnn._backend import has_cpu_kernels

pytestmark = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")
needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")


@pytest.fixture
def many_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(32)
    yield
    torch.set_num_threads(before)


def planned() -> int:
    """Threads of a layer that is worth as many as there are."""
    plan = fused_rnn.explain(fused_rnn.LSTM(256, 512), torch.zeros(100, 512, 256), show=False).layers[0].forward
    return plan.threads or 0


@needs_affinity
def test_no_more_threads_than_processors(many_threads: None) -> None:
    assert 1 <= planned() <= len(os.sched_getaffinity(0))
    assert _backend.extension.processors() <= len(os.sched_getaffinity(0))  # type: ignore[union-attr]


@needs_affinity
def test_affinity_is_asked_again(many_threads: None) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        time.sleep(0.15)
        assert planned() == 1
    finally:
        os.sched_setaffinity(0, before)
    time.sleep(0.15)
    assert _backend.extension.processors() <= len(before)  # type: ignore[union-attr]


@needs_affinity
def test_a_process_of_one_core() -> None:
    code = (
        "import os, torch, fused_rnn; torch.set_num_threads(8)\n"
        "m, x = fused_rnn.LSTM(64, 256), torch.zeros(50, 64, 64)\n"
        "print(fused_rnn.explain(m, x, show=False).layers[0].forward.threads)\n"
        "before = len(os.listdir('/proc/self/task')) if os.path.exists('/proc/self/task') else 0\n"
        "torch.inference_mode()(m)(x)\n"
        "print(len(os.listdir('/proc/self/task')) - before if before else 0)"
    )
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "0"], done.stderr


def test_results_do_not_depend_on_the_number_asked_for() -> None:
    module, x = fused_rnn.LSTM(16, 64), torch.randn(20, 16, 16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 32):
            torch.set_num_threads(threads)
            with torch.no_grad():
                results.append(module(x)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# --- control groups ---

V2 = "0::/user.slice/app\n"
V1 = "12:memory:/docker/7\n4:cpu,cpuacct:/docker/7\n3:cpuset:/other\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {}, 0),
        (V2, {"user.slice/app/cpu.max": "max 100000"}, 0),
        (V2, {"user.slice/app/cpu.max": "200000 100000"}, 2),
        (V2, {"user.slice/app/cpu.max": "150000 100000"}, 2),  # a part of one is one
        (V2, {"user.slice/app/cpu.max": "10000 100000"}, 1),
        (V2, {"user.slice/app/cpu.max": "400000 100000", "user.slice/cpu.max": "300000 100000"}, 3),  # of a group above
        (V2, {"user.slice/app/cpu.max": "max 100000", "cpu.max": "500000 100000"}, 5),  # the container's own is the root
        ("0::/\n", {"cpu.max": "100000 50000"}, 2),
        (V1, {"cpu,cpuacct/docker/7/cpu.cfs_quota_us": "-1", "cpu,cpuacct/docker/7/cpu.cfs_period_us": "100000"}, 0),
        (V1, {"cpu/docker/7/cpu.cfs_quota_us": "250000", "cpu/docker/7/cpu.cfs_period_us": "100000"}, 3),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "400000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 4),
        (V1, {"memory/docker/7/cpu.cfs_quota_us": "100000", "memory/docker/7/cpu.cfs_period_us": "100000"}, 0),
        ("nonsense\n", {"cpu.max": "100000 100000"}, 0),
        ("", {}, 0),
    ],
)
def test_quota_of_control_groups(groups: str, files: dict[str, str], expected: int, tmp_path: Path) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert _backend.extension.processors_of_groups(groups, str(tmp_path)) == expected  # type: ignore[union-attr]
