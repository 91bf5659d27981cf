"""fused_rnn.functional: forms of input, and an error by name for every argument that does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, make_data
from torch import Tensor

from fused_rnn import functional, use_backend

DATA = make_data(Case("LSTM", layers=2, bidirectional=True))


def lstm(**changes: Any) -> Any:
    """functional.lstm on good arguments, but for the changes."""
    arguments: dict[str, Any] = {
        "input": DATA.input,
        "weights": DATA.weights,
        "hx": (DATA.h0, DATA.c0),
        "num_layers": 2,
        "bidirectional": True,
    }
    return functional.lstm(**(arguments | changes))


BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": [1.0]}, TypeError, "input: expected a Tensor, got list"),
    (
        {"input": DATA.input.short()},
        ValueError,
        "input: expected dtype float64, float32, float16, bfloat16, complex64 or complex128, or int64 or int32 ids, got "
        "torch.int16",
    ),
    ({"input": DATA.input[0, 0]}, ValueError, "input: expected 2-D or 3-D, got 1-D"),
    ({"input": DATA.input[:0]}, ValueError, "input: expected at least 1 time step, got 0"),
    ({"input": DATA.input[..., 1:]}, ValueError, r"weights\[0\]: expected shape \[24, 3\], got \[24, 4\]"),
    ({"weights": DATA.weights[1:]}, ValueError, "weights: expected 16 or 20 tensors for num_layers=2, 2 direction.*got 15"),
    ({"weights": [None, *DATA.weights[1:]]}, TypeError, r"weights\[0\]: expected a Tensor, got NoneType"),
    (
        {"weights": [*DATA.weights[:-1], DATA.weights[-1].double()]},
        ValueError,
        r"weights\[15\]: expected dtype torch.float32",
    ),
    ({"weights": [*DATA.weights[:3], DATA.weights[3][1:], *DATA.weights[4:]]}, ValueError, r"weights\[3\]: expected shape"),
    ({"hx": DATA.h0}, TypeError, r"hx: expected a pair \(h0, c0\), got Tensor"),
    ({"hx": (DATA.h0[1:], DATA.c0)}, ValueError, r"h0: expected shape \[4, 3, 6\], got \[3, 3, 6\]"),
    ({"hx": (DATA.h0, DATA.c0[..., 1:])}, ValueError, r"c0: expected shape \[4, 3, 6\], got \[4, 3, 5\]"),
    ({"hx": (DATA.h0, DATA.c0.half())}, ValueError, "c0: expected dtype torch.float32"),
    ({"hx": (DATA.h0, DATA.c0.to("meta"))}, ValueError, "c0: expected device cpu"),
    ({"num_layers": 0}, ValueError, "num_layers: expected at least 1, got 0"),
    ({"dropout": 1.5}, ValueError, "dropout: expected a probability from 0 to 1, got 1.5"),
    ({"lengths": torch.tensor([1, 2])}, ValueError, r"lengths: expected shape \[3\], got \[2\]"),
    ({"lengths": torch.tensor([1.0, 2, 3])}, ValueError, "lengths: expected integers, got torch.float32"),
    ({"lengths": torch.tensor([1, 2, 6])}, ValueError, r"lengths: expected values from 0 to 5, got \[1, 2, 6\]"),
    ({"lengths": torch.tensor([1, -2, 3])}, ValueError, "lengths: expected values from 0 to 5"),
    ({"resets": torch.zeros(5, 3)}, ValueError, "resets: expected dtype torch.bool, got torch.float32"),
    ({"resets": torch.zeros(3, 5, dtype=torch.bool)}, ValueError, r"resets: expected shape \[5, 3\], got \[3, 5\]"),
    ({"batch_sizes": torch.tensor([3, 2])}, ValueError, "input: expected 2-D with batch_sizes, got 3-D"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    with use_backend(backend), pytest.raises(error, match=message):
        lstm(**changes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (torch.tensor([2, 3]), r"batch_sizes: expected positive, never growing numbers, got \[2, 3\]"),
        (torch.tensor([5, 0]), "batch_sizes: expected positive"),
        (torch.tensor([3, 1]), r"batch_sizes: expected a sum of 5 \(input's rows\), got 4"),
        (torch.tensor([3, 2], dtype=torch.int32), "batch_sizes: expected a 1-D int64 tensor on the CPU"),
        (torch.tensor([], dtype=torch.int64), "batch_sizes: expected positive"),
    ],
)
def test_bad_batch_sizes(sizes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lstm(input=DATA.input[:, 0], batch_sizes=sizes, hx=None)


def test_lengths_and_batch_sizes_exclude_each_other() -> None:
    sizes = torch.tensor([3, 2])
    with pytest.raises(ValueError, match="lengths: expected None with batch_sizes"):
        lstm(input=DATA.input[:, 0], batch_sizes=sizes, hx=None, lengths=torch.tensor([2, 2, 1]))
    with pytest.raises(ValueError, match="batch_first: expected False with batch_sizes"):
        lstm(input=DATA.input[:, 0], batch_sizes=sizes, hx=None, batch_first=True)


def test_bad_cells() -> None:
    w = DATA.weights[:4]
    x, h = DATA.input[0], DATA.h0[0]
    with pytest.raises(ValueError, match="nonlinearity: expected 'tanh', 'relu' or 'identity', got 'selu'"):
        functional.rnn(DATA.input, w, nonlinearity="selu")
    with pytest.raises(ValueError, match="b_ih, b_hh: expected both or neither, got one"):
        functional.lstm_cell(x, (h, h), *w[:3])
    with pytest.raises(ValueError, match="input: expected 1-D or 2-D, got 3-D"):
        functional.lstm_cell(DATA.input, None, *w)
    with pytest.raises(ValueError, match=r"h: expected shape \[3, 6\], got \[2, 6\]"):
        functional.lstm_cell(x, (h[1:], h), *w)
    with pytest.raises(TypeError, match="hx: expected a Tensor, got tuple"):
        functional.gru_cell(x, (h, h), *make_data(Case("GRU")).weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("cell", ["RNN_TANH", "RNN_RELU", "RNN_IDENTITY", "GRU", "LSTM"])
@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
def test_cells_are_one_step_of_a_layer(cell: str, given: bool, backend: str) -> None:
    data = make_data(Case(cell, steps=1, states=given, dtype=torch.float64), "cuda" if backend == "cuda" else "cpu")
    function: Any = {"LSTM": functional.lstm, "GRU": functional.gru}.get(cell, functional.rnn)
    step: Any = {"LSTM": functional.lstm_cell, "GRU": functional.gru_cell}.get(cell, functional.rnn_cell)
    options = {"nonlinearity": cell.removeprefix("RNN_").lower()} if cell.startswith("RNN") else {}
    lstm_states = given and cell == "LSTM"
    with use_backend(backend):
        y, state = function(data.input, data.weights, (data.h0, data.c0) if lstm_states else data.h0, **options)
        hx = None if not given else (data.h0[0], data.c0[0]) if lstm_states else data.h0[0]
        new = step(data.input[0], hx, *data.weights, **options)
        alone_hx = None if not given else tuple(s[0] for s in hx) if lstm_states else hx[0]
        alone = step(data.input[0, 0], alone_hx, *data.weights, **options)
    h = new[0] if cell == "LSTM" else new
    torch.testing.assert_close(h, y[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alone[0] if cell == "LSTM" else alone, y[0, 0], rtol=1e-12, atol=1e-12)
    if cell == "LSTM":
        torch.testing.assert_close(new[1], state[1][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(alone[1], state[1][0, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(batch_first: bool, backend: str) -> None:
    data = make_data(Case("LSTM", layers=2, bidirectional=True), "cuda" if backend == "cuda" else "cpu")
    options: Any = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    resets = torch.zeros(5, dtype=torch.bool, device=data.input.device)
    resets[2] = True
    with use_backend(backend):
        y, (h, c) = functional.lstm(data.input[:, 0], data.weights, (data.h0[:, 0], data.c0[:, 0]), resets=resets, **options)
        options["batch_first"] = False
        want, (want_h, want_c) = functional.lstm(
            data.input[:, :1], data.weights, (data.h0[:, :1], data.c0[:, :1]), resets=resets[:, None], **options
        )
    torch.testing.assert_close(y, want[:, 0])
    torch.testing.assert_close(h, want_h[:, 0])
    torch.testing.assert_close(c, want_c[:, 0])


def test_resets_start_new_episodes(backend: str) -> None:
    """A sequence with a reset is two sequences."""
    data = make_data(Case("GRU", dtype=torch.float64), "cuda" if backend == "cuda" else "cpu")
    resets = torch.zeros(5, 3, dtype=torch.bool, device=data.input.device)
    resets[2] = True
    with use_backend(backend):
        y, h_n = functional.gru(data.input, data.weights, data.h0, resets=resets)
        first, _ = functional.gru(data.input[:2], data.weights, data.h0)
        second, last = functional.gru(data.input[2:], data.weights)
    torch.testing.assert_close(y, torch.cat([first, second]))
    torch.testing.assert_close(h_n, last)


@pytest.mark.filterwarnings("ignore:fused_rnn runs on its slow Python reference")
def test_per_sample_gradients_by_vmap() -> None:
    data = make_data(Case("LSTM", dtype=torch.float64))

    def loss(weights: list[Tensor], x: Tensor) -> Tensor:
        return functional.lstm(x.unsqueeze(1), weights)[0].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 1))(data.weights, data.input)
    for row in range(data.input.shape[1]):
        weights = [w.clone().requires_grad_() for w in data.weights]
        expected = torch.autograd.grad(loss(weights, data.input[:, row]), weights)
        for actual, want in zip(per_sample, expected, strict=True):
            torch.testing.assert_close(actual[row], want)
