"""The worked examples run and give the numbers they promise."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    here = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'load("{path.stem}")' in here, f"{path.name} has no test"


def test_srn() -> None:
    results = load("srn").main()
    assert len(results) == 6
    for (nonlinearity, network), outputs in results.items():
        expected = {"identity": [4.0, 12.0, 32.0], "tanh": [1.9281, 1.9985, 2.0000]}[nonlinearity]
        assert [round(y, 4) for y in outputs] == expected, network


def test_hello() -> None:
    losses, predicted = load("hello").main()
    assert len(losses) == 15
    assert losses[0] == pytest.approx(7, abs=0.5)
    assert losses[-1] < 2.5
    assert predicted == "ohlol"


def test_translate() -> None:
    loss, translations = load("translate").main()
    assert loss < 0.002
    assert translations == {"hello": "hola", "cat": "gato", "good": "bueno"}


def test_lstm_gates() -> None:
    results = load("lstm_gates").main()
    assert [round(c, 1) for c in results["c"]] == [0.2, 0.3, 0.3, 0.3, 0.0]
    assert [round(h, 1) for h in results["h"]] == [0.0, 0.0, 0.0, 0.3, 0.0]
    assert results["layer_h"] == pytest.approx(results["h"], abs=1e-6)
    assert results["layer_c"] == pytest.approx(results["c"][-1], abs=1e-6)


def test_numpy_rnn() -> None:
    results = load("numpy_rnn").main()
    assert results["output"] == (20, 3, 7)
    assert results["last"] == (3, 3, 7)
    assert results["difference"] < 1e-6


def test_time_machine() -> None:
    perplexities, sample = load("time_machine").main(steps=100)
    assert len(perplexities) == 2
    assert 3 < perplexities[1] < perplexities[0] < 27
    assert sample.startswith("time traveller ") and len(sample) == len("time traveller ") + 50


def test_time_machine_reads_a_file(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("To be, or not to be: that is the question.\n" * 60)
    perplexities, _ = load("time_machine").main(path=book, steps=20)
    assert perplexities[-1] < 27


def test_own_cell(tmp_path: Path) -> None:
    results = load("own_cell").main(updates=60, steps=12, hidden=32, plot=str(tmp_path / "loss.png"))
    assert sum(results["losses"][-10:]) < 0.8 * sum(results["losses"][:10])
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert len(results["seconds"]) == 2


def test_distributed(tmp_path: Path) -> None:
    """One process, in two runs: the second goes on where the first one stopped. torchrun: tests/test_torchrun.py."""
    example = load("distributed")
    whole = example.main(tmp_path / "whole", steps=60, rows=32, save_every=60)
    assert list(whole) == list(range(1, 61))
    assert sum(list(whole.values())[-10:]) < 0.5 * sum(list(whole.values())[:10])
    first = example.main(tmp_path / "parts", steps=20, rows=32, save_every=10)
    second = example.main(tmp_path / "parts", steps=25, rows=32, save_every=10)
    assert list(second) == list(range(21, 26))
    assert {**first, **second} == {step: whole[step] for step in range(1, 26)}
