"""Libraries of formulas: what a user sees where they cannot be made, and what is kept on disk."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import formula_cells as cells
import pytest
import torch

import fused_rnn
from fused_rnn import _backend
from fused_rnn.formula import Cell, Layer, build, serve, store, verify

pytestmark = pytest.mark.skipif(not _backend.has_cpu_kernels(), reason="needs the compiled extension")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and nothing known of any cell."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FUSED_RNN_CACHE", str(folder))
    monkeypatch.setattr(serve, "_ready", set())
    monkeypatch.setattr(serve, "_reasons", {})
    monkeypatch.setattr(_backend, "_warned", set())
    yield folder


class Odd(Cell):
    """A cell of its own for each number, so that nothing of it is loaded yet."""

    gates = ("a",)

    def __init__(self, number: float) -> None:
        self.number = number

    def step(self, x: Any, r: Any, h: Any) -> Any:
        return torch.tanh(x.a + r.a + self.number)


NUMBERS = itertools.count(1)


def new_layer() -> Layer:
    return Layer(Odd(next(NUMBERS) / 1024), 2, 3)


def test_without_a_compiler_step_serves(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = new_layer(), torch.rand(2, 2, 2)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match="no C.. compiler was found .CXX=no-such-compiler"):
        y, _ = layer(x)
    with fused_rnn.use_backend("reference"):
        assert torch.equal(y, layer(x)[0])
    layer(x)  # the warning comes once
    with fused_rnn.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' is forced but Odd could not be compiled"):
        layer(x)


def test_a_broken_compiler_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.warns(RuntimeWarning, match="the C.. compiler failed with status 1"):
        new_layer()(torch.rand(2, 2, 2))
    assert list(fresh.iterdir()) == []


def test_a_killed_compiler_leaves_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "slow-compiler"
    script.write_text('#!/bin/sh\nfor last; do :; done\nprintf half > "$last"\nexec sleep 60\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(build, "SECONDS", 1)
    with pytest.warns(RuntimeWarning, match="took more than 1 s"):
        new_layer()(torch.rand(2, 2, 2))
    assert list(fresh.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="needs a user who may not write everywhere")
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("FUSED_RNN_CACHE", str(blocked / "cache"))
    layer = new_layer()
    with fused_rnn.use_backend("cpu"):
        layer(torch.rand(2, 2, 2))  # compiled all the same, for this process
    assert store.entries() == []


def test_a_damaged_library_is_made_again(fresh: Path) -> None:
    number = next(NUMBERS) / 1024
    Layer(Odd(number), 2, 3)(torch.rand(2, 2, 2))
    (library,) = fresh.glob("*.so")
    library.unlink()  # this process has mapped the file
    library.write_bytes(b"no library")
    script = f"import torch, test_formula_cache as t\nt.Layer(t.Odd({number}), 2, 3)(torch.rand(2, 2, 2))"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert library.stat().st_size > 1000


def test_libraries_of_other_users_are_not_loaded(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_layer()(torch.rand(2, 2, 2))
    (library,) = fresh.glob("*.so")
    assert store.find(library.stem) == library
    monkeypatch.setattr(Path, "stat", lambda path: os.stat_result((0o100644, 0, 0, 1, 4242, 0, 1, 0, 0, 0)))
    assert store.find(library.stem) is None


def test_a_forced_backend_that_has_no_kernels() -> None:
    layer = Layer(cells.Rnn(), 2, 3)
    with fused_rnn.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' is forced but the input is on 'cpu'"):
        layer(torch.rand(2, 2, 2))


def test_what_makes_the_code_is_in_the_name(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of another version of the generator, of the headers or of torch is another library."""
    layer, command = new_layer(), ["c++"]
    name = build.library_name(layer.cell, torch.float32, "portable", command)
    for maker in ("_headers_digest", "generator_digest", "_compiler_identity"):
        with monkeypatch.context() as patch:
            patch.setattr(build, maker, lambda *_: "another")
            assert build.library_name(layer.cell, torch.float32, "portable", command) != name
    assert build.library_name(new_layer().cell, torch.float32, "portable", command) != name
    assert build.library_name(layer.cell, torch.float64, "portable", command) != name
    assert build.library_name(layer.cell, torch.float32, "portable", command) == name


def test_two_processes_at_once(fresh: Path) -> None:
    script = "import torch, test_formula_cache as t\nt.Layer(t.Odd(0.75), 2, 3)(torch.rand(2, 2, 2))"
    command = [sys.executable, "-W", "error", "-c", script]
    running = [subprocess.Popen(command, cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert all(process.communicate(timeout=120)[1] == "" and process.returncode == 0 for process in running)
    assert len(list(fresh.glob("*.so"))) == 1 and not list(fresh.glob(".compile-*"))


def test_the_cache_is_found_again_without_tracing(fresh: Path) -> None:
    number = next(NUMBERS) / 1024
    Layer(Odd(number), 2, 3)(torch.rand(2, 2, 2))
    script = textwrap.dedent(f"""
        import sys, torch, test_formula_cache as t
        t.Layer(t.Odd({number}), 2, 3)(torch.rand(2, 2, 2))
        assert "networkx" not in sys.modules and "fused_rnn.formula.trace" not in sys.modules
    """)
    run = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_cache_is_bounded(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MOST_BYTES", 1)
    first = new_layer()
    first(torch.rand(2, 2, 2))
    assert store.entries() == []  # not even one fits
    monkeypatch.setattr(store, "MOST_BYTES", 40_000)
    for _ in range(3):
        new_layer()(torch.rand(2, 2, 2))
    assert 1 <= len(store.entries()) <= 2
    assert store.clear() > 0 and store.entries() == [] and not list(fresh.glob("*.cpp"))


def test_kernels_that_disagree_do_not_serve(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = build.translation_unit
    monkeypatch.setattr(build, "translation_unit", lambda *args: right(*args).replace("tanh(", "sigmoid("))
    layer = new_layer()
    with pytest.raises(
        RuntimeError, match=r"Odd: the compiled kernels for torch.float32 disagree with step: output has \S+ where"
    ):
        layer(torch.rand(2, 2, 2))
    assert store.entries() == []
    monkeypatch.undo()
    layer(torch.rand(2, 2, 2))


def test_backward_that_disagrees_does_not_serve(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = build.translation_unit
    monkeypatch.setattr(build, "translation_unit", lambda *args: right(*args).replace("V(1) - h", "V(1) + h"))
    with pytest.raises(RuntimeError, match="gradient of input has"):
        new_layer()(torch.rand(2, 2, 2))


def test_a_small_gradient_that_is_wrong_is_found(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 0.1 that is an eighth too large, in float16; and a result that is compared where others are infinite."""
    cell = cells.Rnn()
    right = torch.tensor([0.1, -0.02, torch.inf, torch.nan], dtype=torch.float64)
    verify.compare(cell, torch.float16, "gradient", right, right)
    with pytest.raises(RuntimeError, match="gradient has 0.11"):
        verify.compare(cell, torch.float16, "gradient", right * 1.125, right)
    with pytest.raises(RuntimeError, match="gradient has nan where step has -0.02"):
        verify.compare(cell, torch.float16, "gradient", torch.where(right < 0, torch.nan, right), right)


def test_more_states_than_kernels_have() -> None:
    class Many(Cell):
        gates = ("a",)
        states = tuple(f"s{i}" for i in range(9))

        def step(self, x: Any, r: Any, *states: Any) -> Any:
            return tuple(0.5 * state + torch.tanh(x.a + r.a) for state in states)

    with pytest.warns(RuntimeWarning, match="Many has more than 8 states"):
        Layer(Many(), 2, 3)(torch.rand(2, 2, 2))


def test_headers_of_a_package_suffice(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """setup.py puts these two folders, and those for a GPU (test_formula_cuda.py), into an installed package."""
    root = Path(__file__).parent.parent
    text = (root / "setup.py").read_text()
    assert 'HEADERS = ("core", "cpu/isa", ' in text
    for folder in ("core", "cpu/isa"):
        (tmp_path / folder).mkdir(parents=True)
        for path in (root / "csrc" / folder).glob("*.h"):
            shutil.copyfile(path, tmp_path / folder / path.name)
    monkeypatch.setattr(build, "headers_directory", lambda: tmp_path)
    with fused_rnn.use_backend("cpu"):
        new_layer()(torch.rand(2, 2, 2))


def test_without_headers_step_serves(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "headers_directory", lambda: tmp_path)
    with pytest.warns(RuntimeWarning, match="the headers of the kernels are missing"):
        new_layer()(torch.rand(2, 2, 2))


def test_cache_command(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fused_rnn.__main__ import main

    new_layer()(torch.rand(2, 2, 2))
    main(["cache"])
    assert "1 compiled formulas" in capsys.readouterr().out
    main(["cache", "--clear"])
    assert "bytes freed" in capsys.readouterr().out and store.entries() == []
