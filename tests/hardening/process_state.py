"""What tests here change of the process, each in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

import fused_rnn
from fused_rnn import _settings


def instruction_sets() -> list[str]:
    """Those of the CPU kernels that this machine can run."""
    return fused_rnn.build_info().get("cpu_instruction_sets", [])


@contextlib.contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """The CPU kernels of this instruction set serve every call inside the block."""
    with _settings.use("FUSED_RNN_CPU", name):
        assert fused_rnn.build_info()["cpu_instruction_set"] == name
        yield


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    """At most so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
