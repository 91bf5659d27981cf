"""CONTRIBUTING's "Adding a cell in five steps", followed in a copy of the tree: all that it promises is there, and right."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from new_cell.steps import MODE, STEPS

ROOT = Path(__file__).parent.parent
PARTS = ("csrc", "fused_rnn", "tests", "build_support", "setup.py", "pyproject.toml", "CONTRIBUTING.md", "README.md")
COMPILER = os.environ.get("CXX", "c++").split()[0]

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler ({COMPILER})")


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the tree with the new cell, nothing compiled."""
    root = tmp_path_factory.mktemp("new_cell")
    compiled = shutil.ignore_patterns("*.so", "_C*.json", "__pycache__", ".pytest_cache")
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=compiled)
        else:
            shutil.copy(source, root / name)
    for edit in (edit for edits in STEPS.values() for edit in edits):
        edit.apply(root)
    yield root
    shutil.rmtree(root)


def done(root: Path, *command: str) -> str:
    """Standard output of a command in the copy, whose package and tests come first."""
    path = os.pathsep.join([str(root), str(root / "tests"), str(root / "tests" / "simt")])
    environment = {**os.environ, "PYTHONPATH": path, "FUSED_RNN_CUDA": "0", "MAX_JOBS": os.environ.get("MAX_JOBS", "2")}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout[-6000:]}\n{run.stderr[-6000:]}"
    return run.stdout


def test_contributing_names_these_files() -> None:
    """Every file that a step edits is one that the step's text names."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.split("## Adding a cell in five steps")[1].split("\n## ")[0]
    for title, edits in STEPS.items():
        number = title.partition(":")[0]
        match = re.search(rf"^{number}\. (.*?)(?=^\d\. |\Z)", section, re.DOTALL | re.MULTILINE)
        assert match, f"CONTRIBUTING.md has no step {number}"
        for edit in edits:
            assert Path(edit.file).name in match[1], f"step {number} does not name {edit.file}"


def pytest_of(root: Path, *files: str, choice: str = "") -> None:
    """Runs tests of the copy."""
    options = ["-q", "-x", "-p", "no:cacheprovider", *(["-k", choice] if choice else [])]
    done(root, sys.executable, "-m", "pytest", *options, *files)


def test_every_edit_finds_its_place(edited: Path) -> None:
    """Without compiling: an edit whose anchor has changed fails here, in every run of the tests."""
    assert MODE in (edited / "fused_rnn" / "_kinds.py").read_text()


def test_classes_know_their_cell(edited: Path) -> None:
    """Without compiling, on the reference: options, explain and errors are those of the new cell."""
    done(edited, sys.executable, "tests/new_cell/classes.py")


@pytest.mark.slow
@needs_compiler
def test_on_a_cpu(edited: Path) -> None:
    """On every instruction set: against float64 and the formulas; the tests that follow from the cell's name."""
    done(edited, sys.executable, "setup.py", "build_ext", "--inplace")
    done(edited, sys.executable, "tests/new_cell/cpu.py")
    following = ("layers", "ops", "op_checks", "cpu", "cpu_sizes", "kinds", "plan", "plan_cudnn")
    pytest_of(edited, *(f"tests/test_{name}.py" for name in following), choice=f"{MODE} or kinds")


@pytest.mark.slow
@needs_compiler
def test_in_the_simulator(edited: Path) -> None:
    """The CUDA kernels of every family."""
    pytest_of(edited, "tests/new_cell/simulated.py")
