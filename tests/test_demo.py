"""The demo trains, compares and generates; short runs of it."""

from __future__ import annotations

import math
import string
from typing import Any

import pytest
import torch

from fused_rnn import demo
from fused_rnn.__main__ import main, parser
from fused_rnn._kinds import TORCH_LAYERS

SMALL = ["--hidden", "24", "--embedding", "8", "--batch", "8", "--window", "16", "--sample", "20", "--device", "cpu"]


def run(*arguments: str) -> dict[str, Any]:
    return demo.main(parser().parse_args(["demo", *arguments]))


def test_shipped_text_is_english_ascii() -> None:
    text = demo.shipped_text()
    assert len(text) > 300_000
    assert text.isascii()
    assert sum(character in string.ascii_lowercase for character in text) > len(text) / 2
    assert text.count(" the ") > 1000


def test_windows_read_on_where_the_last_ended() -> None:
    encoded = torch.arange(101)
    parts = list(demo.windows(encoded, batch=4, steps=5))
    assert [is_first for is_first, _, _ in parts] == [True] + [False] * 4
    inputs = torch.cat([part[1] for part in parts])
    targets = torch.cat([part[2] for part in parts])
    assert inputs.shape == (25, 4)
    assert torch.equal(inputs, torch.arange(100).view(4, 25).t())
    assert torch.equal(targets, inputs + 1)


def test_windows_reject_a_short_text() -> None:
    with pytest.raises(ValueError, match="too short"):
        next(demo.windows(torch.arange(10), batch=4, steps=5))


@pytest.mark.parametrize("cell", TORCH_LAYERS)
def test_cells_train_and_agree_with_torch(cell: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = run(*SMALL, "--cell", cell.lower(), "--steps", "12", "--compare", "12", "--learning-rate", "0.02")
    assert len(results["losses"]) == 12
    assert results["losses"][0] == pytest.approx(math.log(97), abs=0.3)
    assert results["bits_after"] < results["bits_before"] - 0.5
    # Ten steps of Adam on equal batches in float32: rounding alone separates the two.
    assert results["largest_loss_difference"] < 1e-4
    assert results["fused_rnn_chars_per_second"] > 0 and results["torch_nn_chars_per_second"] > 0
    assert results["sample"].startswith(demo.PROMPT) and len(results["sample"]) == len(demo.PROMPT) + 20
    printed = capsys.readouterr()
    assert "bits per character" in printed.out and "characters per second" in printed.out
    assert "12/12" in printed.err  # the progress bar


@pytest.mark.parametrize("dtype", demo.DTYPES)
def test_dtypes(dtype: str) -> None:
    """A GRU: torch.nn's LSTM has no float16 training on a CPU."""
    results = run(*SMALL, "--cell", "gru", "--dtype", dtype, "--steps", "3", "--compare", "3")
    assert all(math.isfinite(loss) for loss in results["losses"])
    # Eight bits of mantissa in bfloat16, a rounding each for the scores and the recurrent state.
    assert results["largest_loss_difference"] < {"float64": 1e-9, "float32": 1e-4}.get(dtype, 0.05)


def test_float16_lstm_on_a_cpu_trains_without_a_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    results = run(*SMALL, "--dtype", "float16", "--steps", "12", "--learning-rate", "0.02")
    assert results["bits_after"] < results["bits_before"] - 0.5
    assert "largest_loss_difference" not in results
    assert "no comparison" in capsys.readouterr().out


def test_the_seed_decides_everything() -> None:
    runs = [run(*SMALL, "--steps", "3", "--compare", "0", "--seed", seed) for seed in ("1", "1", "2")]
    assert runs[0]["losses"] == runs[1]["losses"] != runs[2]["losses"]
    assert runs[0]["sample"] == runs[1]["sample"]
    assert "largest_loss_difference" not in runs[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", demo.DTYPES)
def test_on_a_gpu(dtype: str) -> None:
    results = run(*SMALL[:-1], "cuda", "--dtype", dtype, "--steps", "12", "--compare", "12", "--learning-rate", "0.02")
    assert results["bits_after"] < results["bits_before"] - 0.5


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", *SMALL, "--steps", "1", "--compare", "1"])
    assert "held-out text" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    listed = capsys.readouterr().out
    assert all(command in listed for command in ("info", "demo", "bench"))
    for wrong in (["nonsense"], [], ["demo", "--cell", "nonsense"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
