"""patched: which names it replaces, when it puts them back, and what it warns about at its end."""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from module_pairs import CLASSES, warned
from test_convert import FUSED, Model, recurrent
from torch import nn
from torch.nn import LSTM as BOUND_BEFORE

import fused_rnn

NAMESPACES = (nn, nn.modules, nn.modules.rnn)


def names() -> list[Any]:
    return [getattr(namespace, name) for namespace in NAMESPACES for name in CLASSES]


ORIGINAL = names()


def test_patched_names() -> None:
    theirs = nn.GRU(4, 6)
    with fused_rnn.patched():
        assert names() == [getattr(fused_rnn, name) for _ in NAMESPACES for name in CLASSES]
        model = Model()
        with fused_rnn.patched():
            assert nn.LSTM is fused_rnn.LSTM
        assert nn.LSTM is fused_rnn.LSTM
        assert type(fused_rnn.convert(theirs)) is fused_rnn.GRU and type(fused_rnn.revert(theirs)) is ORIGINAL[2]
    assert names() == ORIGINAL
    assert {type(m) for m in recurrent(model)} == set(FUSED.values())
    torch.manual_seed(3)
    with fused_rnn.patched():
        ours = Model()
    torch.manual_seed(3)
    for a, b in zip(ours.parameters(), Model().parameters(), strict=True):
        assert torch.equal(a, b)


def test_patched_restores_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), fused_rnn.patched(), fused_rnn.patched():
        raise ZeroDivisionError
    assert names() == ORIGINAL


def test_patched_as_decorator() -> None:
    @fused_rnn.patched()
    def build() -> nn.Module:
        return nn.LSTM(4, 6)

    assert type(build()) is fused_rnn.LSTM and names() == ORIGINAL


def test_patched_blocks_that_overlap_in_time() -> None:
    """Two threads whose blocks interleave, first in first out: ours until the last one ends, torch.nn's after."""
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    seen: list[bool] = []

    def first() -> None:
        with fused_rnn.patched():
            first_in.set()
            second_in.wait(10)
        first_out.set()

    def second() -> None:
        first_in.wait(10)
        with fused_rnn.patched():
            second_in.set()
            first_out.wait(10)
            seen.append(nn.LSTM is fused_rnn.LSTM)

    threads = [threading.Thread(target=f) for f in (first, second)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seen == [True] and names() == ORIGINAL


def test_patched_leaves_others_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name replaced before is put back as it was found; one replaced inside the block stays."""

    class Other(nn.LSTM):
        pass

    monkeypatch.setattr(nn, "LSTM", Other)
    monkeypatch.setattr(nn, "GRU", nn.GRU)  # what the end of the test puts back, outside the block
    with fused_rnn.patched():
        assert nn.LSTM is fused_rnn.LSTM
        monkeypatch.setattr(nn, "GRU", Other)
    assert nn.LSTM is Other and nn.GRU is Other and nn.modules.rnn.GRU is ORIGINAL[2]


# --- what it warns about ---


class Before(BOUND_BEFORE):
    pass


class Table(nn.Module):
    """Classes bound before the block in every way that packages do."""

    cell = nn.GRUCell
    kinds = {"rnn": nn.RNN}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = BOUND_BEFORE(2, 3), self.cell(2, 3), self.kinds["rnn"](2, 3), Before(2, 3)
        self.e, self.f = nn.LSTM(2, 3), nn.GRUCell(2, 3)


def block(build: Any) -> list[tuple[type[Warning], str]]:
    def run() -> None:
        with fused_rnn.patched():
            build()

    return warned(run)


def test_layers_of_torch_are_named() -> None:
    here, inits = __name__, [base.__init__ for base in (nn.RNNBase, nn.RNNCellBase)]
    found = block(lambda: [Table(), Table()])
    assert [category for category, _ in found] == [UserWarning]
    text = found[0][1]
    assert "fused_rnn.convert(model)" in text and "subclasses=True" in text
    for name in ("torch.nn.LSTM", "torch.nn.GRUCell", "torch.nn.RNN", f"{here}.Before"):
        assert f"{name} in {here} (2 times)" in text, text
    assert text.count(" in ") == 4
    assert block(lambda: [getattr(nn, name)(2, 3) for name in CLASSES]) == [] and block(lambda: Table) == []
    assert inits == [base.__init__ for base in (nn.RNNBase, nn.RNNCellBase)]
    assert warned(lambda: Table()) == []


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_torch_is_named(name: str) -> None:
    original = getattr(nn, name)
    found = block(lambda: original(2, 3))
    assert len(found) == 1 and f"built, by names bound before the block: torch.nn.{name} in {__name__};" in found[0][1]


def test_the_warning_names_the_line_of_the_block() -> None:
    with pytest.warns(UserWarning) as caught:
        with fused_rnn.patched():
            BOUND_BEFORE(2, 3)
    assert [w.filename for w in caught] == [__file__]


def test_no_warning_hides_an_exception() -> None:
    def run() -> None:
        with pytest.raises(ZeroDivisionError), fused_rnn.patched():
            BOUND_BEFORE(2, 3)
            raise ZeroDivisionError

    assert warned(run) == [] and nn.RNNBase.__init__.__module__ == "torch.nn.modules.rnn"


def test_nested_blocks_warn_once_and_threads_count_together() -> None:
    def run() -> None:
        with fused_rnn.patched():
            threads = [threading.Thread(target=lambda: [BOUND_BEFORE(2, 3) for _ in range(20)]) for _ in range(4)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()

    found = block(run)
    assert len(found) == 1 and f"torch.nn.LSTM in {__name__} (80 times)" in found[0][1]


@pytest.mark.parametrize("name", CLASSES)
def test_classes_made_fused_for_ever_are_named(name: str) -> None:
    def build() -> None:
        class Inside(getattr(nn, name)):
            pass

        class Further(Inside):
            pass

        keep.extend((Inside, Further))

    keep: list[type] = []
    found = block(build)
    assert len(found) == 1 and "stay fused after it" in found[0][1]
    assert "build.<locals>.Inside" in found[0][1] and "build.<locals>.Further" in found[0][1]
    assert block(lambda: keep[1](2, 3)) == []  # known by then


def test_an_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebodys_model.py").write_text(
        "from torch import nn\nfrom torch.nn import GRU, LSTM as Layer\nclass Mine(nn.LSTMCell):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = block(lambda: importlib.import_module("somebodys_model"))
    del sys.modules["somebodys_model"]
    assert len(found) == 1
    for name in ("somebodys_model.Mine", "somebodys_model.GRU", "somebodys_model.Layer"):
        assert name in found[0][1], found
    assert "import such modules before the block" in found[0][1]


def test_what_convert_and_parametrize_make_is_not_named() -> None:
    keep = []

    def build() -> None:
        keep.append(nn.utils.parametrizations.weight_norm(nn.GRU(2, 3), "weight_hh_l0"))
        keep.append(fused_rnn.convert(given, subclasses=True))
        keep.append(nn.utils.parametrizations.weight_norm(keep[1], "weight_hh_l0"))

    given = Before(2, 3)
    assert block(build) == [] and isinstance(given, fused_rnn.LSTM)
