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
from new_cell.steps import STEPS, UNNAMED

ROOT = Path(__file__).parent.parent
PARTS = ("csrc", "fused_rnn", "tests", "build_support", "setup.py", "pyproject.toml", "CONTRIBUTING.md", "README.md")
COMPILER = os.environ.get("CXX", "c++").split()[0]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler ({COMPILER})"),
]


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
    for edit in [*(edit for edits in STEPS.values() for edit in edits), *UNNAMED]:
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


def test_nothing_else_has_to_be_edited() -> None:
    """Edits that no step names."""
    assert not [edit.file for edit in UNNAMED]


def test_on_every_instruction_set(edited: Path) -> None:
    done(edited, sys.executable, "setup.py", "build_ext", "--inplace")
    done(edited, sys.executable, "tests/new_cell/cpu.py")


def test_in_every_family(edited: Path) -> None:
    """The kernels of CUDA, in the simulator; Python's side needs no compiled extension."""
    done(edited, sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/new_cell/simulated.py")
