"""The lists of cells: Python's and C++'s say the same."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_rnn
from fused_rnn import _backend, _kinds, _onnx, _recipe, _settings, _tangents, cells, modules, reference
from fused_rnn._kinds import KINDS, Kind
from fused_rnn.tuning import here


@pytest.mark.skipif(_backend.extension is None, reason="needs the compiled extension")
def test_the_lists_are_equal() -> None:
    ours = [(kind.name, kind.gates, kind.slots, kind.saved, kind.has_c, kind.reads_h, kind.may_project) for kind in KINDS]
    assert ours == _backend.extension.cells()


@pytest.mark.skipif(_backend.extension is None, reason="needs the compiled extension")
def test_what_has_gates() -> None:
    """The op takes factors of a candidate for the cells for which the constructors do."""
    for number, kind in enumerate(KINDS):
        rows = _recipe.Rows(options=_recipe.StepOptions(candidate=torch.ones(1, 2, 4)))
        params = [torch.zeros(kind.gates * 4, 3), torch.zeros(kind.gates * 4, 4)]
        packed = recipe_of(number).packed | rows.bits
        taken = True
        try:
            torch.ops.fused_rnn.layer(torch.zeros(5, 2, 3), [], params, rows.given(), packed, False)
        except ValueError as error:
            assert "candidate: expected none for a cell without gates" in str(error)
            taken = False
        assert taken == kind.has_gates, kind.name


def recipe_of(number: int) -> _recipe.Recipe:
    return _recipe.Recipe(number, has_biases=False)


@pytest.mark.skipif(_backend.extension is None, reason="needs the compiled extension")
def test_families_are_the_planners() -> None:
    """The names of the GPU's families stand in csrc/plan/family.h alone."""
    assert list(here.FAMILIES) == list(_settings.FAMILIES) == _backend.extension.families


def test_what_has_tangents_and_an_operator_of_onnx() -> None:
    of_torch = {number for number, kind in enumerate(KINDS) if kind.mode in _kinds.TORCH_LAYERS or kind.nonlinearity}
    assert set(_onnx.OPERATORS) == of_torch
    for number, operator in _onnx.OPERATORS.items():
        assert sorted(operator.gates) == list(range(KINDS[number].gates))
    x = torch.zeros(5, 2, 3)
    assert {n for n in range(len(KINDS)) if _tangents.serves(x, 2, _recipe.Rows(), recipe_of(n))} == of_torch


def test_no_name_of_a_cell_is_compared() -> None:
    """Outside of _kinds.py the package asks for a kind's properties, or for the numbers that _kinds.py names."""
    package = Path(__file__).parent.parent / "fused_rnn"
    names = {name for kind in KINDS for name in (kind.name, kind.mode, kind.nonlinearity) if name} | {"RNN"}
    found = [
        f"{path.relative_to(package)}:{node.lineno}: {part.value}"
        for path in sorted(package.rglob("*.py"))
        if path.name not in ("_kinds.py", "_keras_cells.py") and path.parent.name != "zoo"  # activations in general
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
        for part in (side.elts if isinstance(side, (ast.Tuple, ast.List, ast.Set)) else [side])
        if isinstance(part, ast.Constant) and part.value in names
    ]
    assert found == []


def test_modes_are_torchs() -> None:
    for kind in KINDS:
        assert kind.mode == kind.name.upper()
        assert kind.mode == ("RNN_" + kind.nonlinearity.upper() if kind.nonlinearity else kind.mode)


def test_a_class_says_its_cell() -> None:
    """Its subclasses have the same; a class that says none is refused, where one of ours was taken for it."""
    expected = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}
    for name, kind in expected.items():
        for cls in (getattr(fused_rnn, name), getattr(fused_rnn, f"{name}Cell")):
            of_user = type("Theirs", (cls,), {})(3, 4)
            assert _kinds.kind_of(of_user).name == kind and _kinds.name_of_class(of_user) == cls.__name__
    for nonlinearity in ("tanh", "relu", "identity"):
        for cls in (fused_rnn.RNN, fused_rnn.RNNCell):
            assert _kinds.kind_of(cls(3, 4, nonlinearity=nonlinearity)).nonlinearity == nonlinearity

    class NewCell(cells._Cell):
        def __init__(self) -> None:
            super().__init__(3, 4, True, num_chunks=2)

    class NewLayer(modules._Layer):
        def __init__(self) -> None:
            super().__init__("RNN_TANH", 3, 4)

    for new in (NewCell, NewLayer):
        expected_text = f"{new.__name__}._cell_number: expected the number of a cell, 0 to {len(KINDS) - 1}, got None"
        with pytest.raises(TypeError, match=expected_text):
            new()


def test_the_reference_refuses_a_cell_without_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recipe, "KINDS", (*KINDS, Kind("NEW", "new", 1, 1, 0, False, False, False)))
    x, h, params = torch.zeros(2, 3), torch.zeros(2, 4), [torch.zeros(4, 3), torch.zeros(4, 4)]
    with pytest.raises(NotImplementedError, match="the reference has no step of the cell new"):
        reference.step(x, [h], params, _recipe.Recipe(len(KINDS), has_biases=False))


def test_torchs_layers() -> None:
    for name, number in _kinds.TORCH_LAYERS.items():
        assert _kinds.number_of_torch_layer(name) == _kinds.number_of_torch_layer(f"{name}Cell") == number
        assert getattr(nn, name)(3, 4).mode == KINDS[number].mode
    with pytest.raises(ValueError, match="cell: expected one of LSTM, GRU, RNN, or its cell, got 'SRU'"):
        _kinds.number_of_torch_layer("SRU")


def test_no_switch_names_cells() -> None:
    """A switch is made of the list: one that names cells would stop the compiler at each new cell. A comparison with one
    cell is an answer that a new cell gets by chance; what is so of a cell stands in cells.h or in a table of cells."""
    root = Path(__file__).parent.parent / "csrc"
    named = [
        f"{file.relative_to(root)}: {line.strip()}"
        for file in sorted(root.rglob("*"))
        if file.is_file()
        for line in file.read_text().splitlines()
        if re.search(r"\bcase CellKind::k[A-Z]|[=!]= CellKind::k[A-Z]|CellKind::k[A-Z]\w* [=!]=", line)
        and file != root / "core" / "cells.h"  # the RNNs, which are one class
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


def test_both_compilers_refuse_a_switch_that_lacks_a_case() -> None:
    """g++ and, for the host's part of a .cu, nvcc's own."""
    text = (Path(__file__).parent.parent / "setup.py").read_text()
    assert re.search(r'^WARNINGS = \[.*"-Werror=switch"', text, re.M)
    assert re.search(r"^ +cxx = \[.*\*WARNINGS\]", text, re.M)
    assert re.search(r'"nvcc": \[.*"-Xcompiler", ",".join\(WARNINGS\)', text)
