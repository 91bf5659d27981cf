"""Memory that is not to be had: an exception, and the next call is right (failing_allocations.py).

test_cpu_kernels.py does the same with every single allocation of the kernels alone.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import native
import pytest

from fused_rnn._backend import has_cpu_kernels

pytestmark = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")
HERE = Path(__file__).parent


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler (gcc)")
def test_every_larger_allocation_fails_once(tmp_path: Path) -> None:
    library = tmp_path / "failing_malloc.so"
    subprocess.run(
        [
            "gcc",
            "-O1",
            "-shared",
            "-fPIC",
            "-std=gnu11",
            "-Wall",
            "-Werror",
            str(HERE / "failing_malloc.c"),
            "-o",
            str(library),
        ],
        check=True,
    )
    paths = os.pathsep.join([str(native.ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "LD_PRELOAD": str(library)}
    script = HERE / "failing_allocations.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env, timeout=600)
    assert result.returncode == 0, f"status {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    counts = {name: int(n) for name, n in (line.rsplit(": ", 1) for line in result.stdout.splitlines())}
    assert len(counts) == 23 and min(counts.values()) >= 2, counts
