"""Fixtures shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch

from fused_rnn._backend import has_cpu_kernels, has_cuda_kernels

# One thread: the cases are tiny, and two test processes on two cores must not wait for each other.
torch.set_num_threads(int(os.environ.get("FUSED_RNN_TEST_THREADS", "1")))


def available_backends() -> list[str]:
    """Backends that can run here; every case runs on each of them."""
    names = ["reference"]
    if has_cpu_kernels():
        names.append("cpu")
    if has_cuda_kernels() and torch.cuda.is_available():
        names.append("cuda")
    return names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", available_backends())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = None
    if not torch.cuda.is_available():
        missing = "needs an NVIDIA GPU that torch can use"
    elif not has_cuda_kernels():
        missing = "needs fused_rnn built with CUDA kernels"
    for item in items:
        if missing and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=missing))
