"""The microbenchmarks (benchmarks/micro), as far as they go without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "micro"
PROGRAMS = sorted(FOLDER.glob("*.cu"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_names_constants_that_the_planner_has(program: Path) -> None:
    text = program.read_text()
    planner = "".join(path.read_text() for path in (ROOT / "csrc" / "plan").glob("*"))
    named = set(re.findall(r'"(k[A-Z]\w+|persistent_math_rate|clusters_at_once)"', text))
    assert named, "a microbenchmark measures a constant of the cost model"
    assert all(re.search(rf"\b{name}\b", planner) for name in named)
    comment = text[: text.index("#include")]
    assert all(name in comment for name in named), "the opening comment says which"


def test_unknown_program() -> None:
    done = subprocess.run([sys.executable, str(FOLDER / "run.py"), "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "unknown: nonsense; known are clusters" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_compiles(program: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc on PATH")
    command = [sys.executable, str(FOLDER / "run.py"), program.stem, "--build-only", "--arch", "sm_90a"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.slow
def test_run_on_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(FOLDER / "run.py"), "--output", str(tmp_path / "m.jsonl")])
    assert done.returncode == 0 and (tmp_path / "m.jsonl").read_text()
