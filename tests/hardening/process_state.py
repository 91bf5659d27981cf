"""What tests here change of the process, each in one place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

import fused_rnn

try:
    from fused_rnn import _settings
except ImportError:  # read from the environment at every call
    _settings = None


def instruction_sets() -> list[str]:
    """Those of the CPU kernels that this machine can run."""
    return fused_rnn.build_info().get("cpu_instruction_sets", [])


@contextlib.contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """The CPU kernels of this instruction set serve every call inside the block."""
    with _setting("FUSED_RNN_CPU", name):
        assert fused_rnn.build_info()["cpu_instruction_set"] == name
        yield


@contextlib.contextmanager
def _setting(name: str, value: str) -> Iterator[None]:
    if _settings is not None:
        with _settings.use(name, value):
            yield
        return
    before = os.environ.get(name, "")
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ[name] = before


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    """At most so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
