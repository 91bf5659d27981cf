"""Sizes around those of tiles, and sizes of 0, on every instruction set: forward and backward against fp64 and torch.nn."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import CELLS, DTYPES, GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Case, make_data
from settings import Setting
from test_cpu import AVAILABLE
from test_layers import assert_near, call, results_and_gradients
from torch import Tensor, nn

import fused_rnn
from fused_rnn import _settings, use_backend
from fused_rnn._backend import has_cpu_kernels

pytestmark = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")
HERE = Path(__file__).parent

# Around 4, 8 and 16 units of a vector, 8 and 16 rows of a tile, 32 k of a tile of parts, panels of 16 to 64 columns.
FEATURES = (0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33)
UNITS = (*FEATURES[1:], 63, 64, 65)
BATCHES = (0, 1, 2, 5, 7, 8, 9, 15, 16, 17, 33)
STEPS = (1, 2, 3)
SMOOTH = [cell for cell in CELLS if cell != "RNN_RELU"]  # in 16 bits relu's derivative jumps


def check(case: Case) -> None:
    """Training and inference of a case on every instruction set of this machine."""
    data = make_data(case)
    with use_backend("reference"):
        expected, expected_grads = results_and_gradients(case, data.to(torch.float64))
    for name in AVAILABLE:
        with _settings.use("FUSED_RNN_CPU", name), use_backend("cpu"):
            results, grads = results_and_gradients(case, data)
            with torch.no_grad():
                again = call(case, data)
        for i, (actual, inferred, want) in enumerate(zip(results, again, expected, strict=True)):
            assert_near(f"{case}, {name}: result {i}", actual, want, 1.5 * OUTPUT_TOLERANCE[case.dtype])
            assert_near(f"{case}, {name}: inference {i}", inferred, want, 1.5 * OUTPUT_TOLERANCE[case.dtype])
        for i, (actual, want) in enumerate(zip(grads, expected_grads, strict=True)):
            assert_near(f"{case}, {name}: gradient {i}", actual, want, 1.5 * GRADIENT_TOLERANCE[case.dtype])


def projections(hidden: int) -> tuple[int, ...]:
    return tuple(sorted({p for p in (0, 1, hidden // 2, hidden - 1) if p < hidden}))


def pairs() -> Iterator[Case]:
    """Every input size with every hidden size; the other dimensions, cells and dtypes in turn."""
    for i, (features, hidden) in enumerate(itertools.product(FEATURES, UNITS)):
        cell, dtype = SMOOTH[i % 4], DTYPES[i // 4 % 4]
        proj = projections(hidden)[i // 16 % len(projections(hidden))] if cell == "LSTM" else 0
        batch, steps = BATCHES[i % len(BATCHES)], STEPS[i // 2 % 3]
        yield Case(cell, steps, batch, features, hidden, proj, dtype=dtype, bidirectional=i % 5 == 0)


def rows() -> Iterator[Case]:
    """Every number of rows and steps with every cell and dtype; sizes of units and features in turn."""
    for i, (cell, dtype, batch) in enumerate(itertools.product(SMOOTH, DTYPES, BATCHES)):
        yield Case(cell, STEPS[i % 3], batch, FEATURES[i * 5 % 14], UNITS[i * 7 % 16], dtype=dtype)


CASES = [*pairs(), *rows()]


@pytest.mark.parametrize("part", range(8))
def test_sizes_around_tiles(part: int) -> None:
    for case in CASES[part::8]:
        check(case)


@pytest.mark.parametrize("cell", SMOOTH)
def test_rows_with_deep_weights(cell: str) -> None:
    """Around the numbers of rows that read weights of this depth as they lie: all, 2 and 1 beside full tiles of rows."""
    for steps, batch, dtype in (
        (1, 17, torch.float32),
        (1, 32, torch.bfloat16),
        (2, 16, torch.float16),
        (1, 19, torch.float64),
    ):
        check(Case(cell, steps, batch, 257, 258, dtype=dtype))


@pytest.mark.parametrize(
    ("instruction_set", "steps", "batch", "hidden", "form"),
    [
        ("avx2", 1, 16, 128, "as they lie"),
        ("avx2", 1, 17, 128, "packed into panels"),
        ("avx2", 1, 32, 256, "as they lie"),
        ("avx2", 1, 33, 256, "packed into panels"),
        ("avx2", 4, 8, 256, "as they lie"),
        ("avx2", 8, 4, 256, "packed into panels"),
        ("avx512", 1, 17, 256, "packed into panels"),
    ],
)
def test_which_rows_read_weights_as_they_lie(
    instruction_set: str, steps: int, batch: int, hidden: int, form: str, setting: Setting
) -> None:
    if instruction_set not in AVAILABLE:
        pytest.skip(f"needs a CPU with {instruction_set}")
    setting("FUSED_RNN_CPU", instruction_set)
    module, x = fused_rnn.LSTM(hidden, hidden), torch.randn(steps, batch, hidden)
    explanation = fused_rnn.explain(module, x, training=False, show=False)
    assert explanation.layers[0].forward is not None and explanation.layers[0].forward.weights == form
    if form == "as they lie" and steps == 1:  # then a row is what it is alone, bit for bit
        with torch.no_grad():
            alone = torch.cat([module(x[:, i : i + 1])[0] for i in range(batch)], 1)
            assert torch.equal(module(x)[0], alone)


def test_a_deep_gru_packs_its_weights(setting: Setting) -> None:
    if "avx2" not in AVAILABLE:
        pytest.skip("needs a CPU with avx2")
    setting("FUSED_RNN_CPU", "avx2")
    for hidden, form in ((256, "as they lie"), (512, "packed into panels")):
        explanation = fused_rnn.explain(
            fused_rnn.GRU(hidden, hidden), torch.randn(1, 24, hidden), training=False, show=False
        )
        assert explanation.layers[0].forward is not None and explanation.layers[0].forward.weights == form


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", SMOOTH)
def test_every_size_with_every_other(cell: str, dtype: torch.dtype, batch: int) -> None:
    for i, (features, hidden) in enumerate(itertools.product(FEATURES, UNITS)):
        for proj in projections(hidden) if cell == "LSTM" and i % 3 == 0 else (0,):
            check(Case(cell, STEPS[i % 3], batch, features, hidden, proj, dtype=dtype))


@pytest.mark.parametrize("batch", (0, 1, 17))
@pytest.mark.parametrize("kind", ("RNNCell", "LSTMCell", "GRUCell"))
def test_cells_without_features_as_torch_nn(kind: str, batch: int, backend: str) -> None:
    """input_size 0, and no rows: the results and gradients of torch.nn's."""
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(0, 8)
    ours = getattr(fused_rnn, kind)(0, 8)
    ours.load_state_dict(theirs.state_dict())
    device = "cuda" if backend == "cuda" else "cpu"

    def results(cell: nn.Module) -> list[Tensor]:
        cell.to(device)
        x = torch.zeros((batch, 0), device=device, requires_grad=True)
        out = cell(x)
        h = out if isinstance(out, Tensor) else out[0]
        inputs = [x, *cell.parameters()]
        return [h, *torch.autograd.grad(h.square().sum(), inputs, allow_unused=True, materialize_grads=True)]

    with use_backend(backend):
        found = results(ours)
    for actual, want in zip(found, results(theirs), strict=True):
        torch.testing.assert_close(actual, want)


@pytest.mark.parametrize("kind", ("RNN", "LSTM", "GRU"))
def test_layers_without_features_or_steps_as_torch_nn(kind: str, backend: str) -> None:
    for module in (getattr(nn, kind), getattr(fused_rnn, kind)):
        with pytest.raises(ValueError, match="input_size must be greater than zero"):
            module(0, 8)
    device = "cuda" if backend == "cuda" else "cpu"
    empty = torch.zeros(0, 2, 3, device=device)
    with pytest.raises(RuntimeError):
        getattr(nn, kind)(3, 4).to(device)(empty)
    with use_backend(backend), pytest.raises(RuntimeError, match="sequence length to be larger than 0|at least 1 time step"):
        getattr(fused_rnn, kind)(3, 4).to(device)(empty)


def test_explain_of_no_features() -> None:
    for device in (None, "H100", "T4"):
        for dtype in (torch.float32, torch.bfloat16):
            fused_rnn.explain(
                fused_rnn.GRUCell(0, 8, dtype=dtype), torch.zeros(17, 0, dtype=dtype), device=device, show=False
            )


def test_forms_of_matrices_of_any_size(tmp_path: Path) -> None:
    """Also for instruction sets with products of parts, which this machine may lack."""
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip("needs a C++ compiler")
    sources = [str(HERE / "cpu_forms" / "main.cpp"), str(HERE.parent / "csrc" / "cpu" / "matrix_form.cpp")]
    command = [*compiler, "-std=c++17", f"-I{HERE.parent / 'csrc'}", *sources, "-o", str(tmp_path / "program")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([str(tmp_path / "program")], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    in_parts, as_they_lie, others = map(int, done.stdout.split())
    assert in_parts > 1000 and as_they_lie > 1000 and others > 100
