"""tests/check_ptxas.py's table of registers."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_ptxas import group_of, markdown


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("backward gru fp16 small", "backward gru"), ("state_grad any fp64 medium", "state_grad any"),
        ("cluster backward rnn bf16 48 units", "cluster backward rnn"), ("block forward lstm tf32", "block forward lstm"),
        ("previous_rows 16 bytes", "previous_rows"), ("zero_fill", "zero_fill"),
    ],
)  # fmt: skip
def test_groups(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_table(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
    nvcc.chmod(0o755)
    table = {
        "cluster forward gru fp16 16 units": {"sm_90a": (100, 3, 0, 8, 0)},
        "forward gru fp16 small": {"sm_75": (40, 1, 0, 0, 0), "sm_90a": (41, 1, 0, 0, 0)},
        "forward gru fp32 small": {"sm_75": (90, 1, 0, 0, 4), "sm_90a": (39, 1, 16, 0, 0)},
    }
    text = markdown(table, ["sm_75", "sm_90a"], str(nvcc))
    assert "3 kernels, 5 compilations, 4 bytes spilled, 100 registers at most" in text and "nvcc 13.0" in text
    assert text.splitlines()[-4:] == [
        "| kernels | number | sm_75 | sm_90a |", "|---|---|---|---|",
        "| cluster forward gru | 1 | - | 100 [8] |", "| forward gru | 2 | 90 **spills 4** | 41 s16 |",
    ]  # fmt: skip
