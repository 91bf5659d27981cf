"""The lists of cells: Python's and C++'s say the same."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fused_rnn import _backend
from fused_rnn._kinds import KINDS


@pytest.mark.skipif(_backend.extension is None, reason="needs the compiled extension")
def test_the_lists_are_equal() -> None:
    ours = [(kind.name, kind.gates, kind.slots, kind.saved, kind.has_c, kind.reads_h, kind.may_project) for kind in KINDS]
    assert ours == _backend.extension.cells()


def test_modes_are_torchs() -> None:
    for kind in KINDS:
        assert kind.mode == kind.name.upper()
        assert kind.mode == ("RNN_" + kind.nonlinearity.upper() if kind.nonlinearity else kind.mode)


def test_no_switch_names_cells() -> None:
    """A switch is made of the list: one that names cells would stop the compiler at each new cell."""
    root = Path(__file__).parent.parent / "csrc"
    named = [
        f"{file.relative_to(root)}: {line.strip()}"
        for file in sorted(root.rglob("*"))
        if file.is_file()
        for line in file.read_text().splitlines()
        if re.search(r"\bcase CellKind::k[A-Z]", line)
    ]
    assert named == []


# Gates 0 and 2 of Apart have accumulators of their own for the recurrent part, as GRU's n has.
SLOTS = """
#include "core/cells.h"
using namespace fused_rnn;
struct Apart {
  static constexpr int kGates = 3, kSlots = 5;
  static constexpr int recurrent_slot(int gate) { return gate == 0 ? 3 : gate == 2 ? 4 : gate; }
};
template <class C>
constexpr int slots() {
  int digits = 0;
  for (int gate = 0; gate < C::kGates; ++gate) digits = 10 * digits + input_gradient_slot<C>(gate);
  return digits;
}
static_assert(slots<Cell<CellKind::kRnnTanh>>() == 0);
static_assert(slots<Cell<CellKind::kLstm>>() == 123);
static_assert(slots<Cell<CellKind::kGru>>() == 120);
static_assert(slots<Apart>() == 31);  // 0, 3, 1
"""
COMPILER = os.environ.get("CXX", "c++").split()[0]


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler ({COMPILER})")
def test_slots_of_input_gradients() -> None:
    """Where d_gates has the gradient of each gate's input part follows from the accumulators that a cell names."""
    include = f"-I{Path(__file__).parent.parent / 'csrc'}"
    command = [COMPILER, "-std=c++17", "-fsyntax-only", include, "-x", "c++", "-"]
    run = subprocess.run(command, input=SLOTS, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
