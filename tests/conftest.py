"""Fixtures shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch

from fused_rnn._backend import has_cpu_kernels, has_cuda_kernels

# One thread: the cases are tiny, and two test processes on two cores must not wait for each other.
torch.set_num_threads(int(os.environ.get("FUSED_RNN_TEST_THREADS", "1")))
# Tolerances of fp32 are those of fp32: TF32, which torch allows recurrent layers on a GPU, has tests of its own. Before
# anything imports torch.testing._internal, which reads it.
torch.backends.cudnn.allow_tf32 = False


BACKENDS = (
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")),
    pytest.param("cuda", marks=pytest.mark.gpu),
)
DEVICES = BACKENDS[1:]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that asks for a `backend` (or, for tests of the ops, a `device`) runs on each of them."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = None
    if not torch.cuda.is_available():
        missing = "needs an NVIDIA GPU that torch can use"
    elif not has_cuda_kernels():
        missing = "needs fused_rnn built with CUDA kernels"
    for item in items:
        if missing and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=missing))
