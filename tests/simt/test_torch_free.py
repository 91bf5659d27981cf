"""The torch-free program (benchmarks/torch_free): its checks on the simulated device, and that nvcc takes it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import builder
import pytest

PROGRAM = builder.ROOT / "benchmarks" / "torch_free"
FAMILIES = ("single", "step", "grid", "cluster", "block", "gemm")


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checks as a program for the host."""
    library = builder.build()
    target = tmp_path_factory.mktemp("torch_free") / "checks"
    folders = [f"-I{folder}" for folder in (builder.HERE / "torch_free", builder.HERE / "include", builder.ROOT / "csrc")]
    command = [builder.CXX, *builder.COMMON, "-O1", *folders, str(builder.HERE / "torch_free" / "main.cpp"), str(library)]
    subprocess.run([*command, f"-Wl,-rpath,{library.parent}", "-o", str(target)], check=True)
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell_is_right(checks: Path, family: str) -> None:
    done = subprocess.run([str(checks), family], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("9 right, 0 wrong\n"), done.stdout
    assert done.stdout.count(f": {family} / {family}\n") == 9


def test_an_error_is_found(checks: Path) -> None:
    """No kernel is as exact as float64: where no error is accepted every case is wrong."""
    done = subprocess.run([str(checks), "single", "0"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.endswith("0 right, 9 wrong\n") and "WRONG lstm float32" in done.stdout


@pytest.mark.slow
def test_nvcc_compiles_it(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc on PATH")
    command = [sys.executable, str(PROGRAM / "build.py"), "--output", str(tmp_path / "first"), "--sources", "main.cu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_unknown_source(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM / "build.py"), "--output", str(tmp_path / "first"), "--sources", "nothing.cu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 or "no nvcc" in done.stderr
