"""The compiler's PTX on the simulated device. Needs nvcc."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from simulator import Simulator

from . import build, primitives
from .loader import PtxSimulator
from .source import Kernel

pytestmark = pytest.mark.skipif(
    build.nvcc() is None, reason="no nvcc on PATH, in NVCC, CUDA_HOME or the wheels of this Python"
)


@cache
def primitive_simulators(arch: str) -> tuple[Simulator, PtxSimulator]:
    """The little kernels as compiled by g++, and as PTX."""
    library = primitives.library(arch)
    return Simulator(library), PtxSimulator(library, finder_of_primitives(arch))


@cache
def finder_of_primitives(arch: str) -> Callable[[str], Kernel]:
    file = build.file_of(primitives.SOURCE, arch)
    names = {build.canonical(name): name for name in file.names}
    return lambda symbol: file.kernel(names[symbol])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "name"), [(arch, name) for arch in build.ARCHITECTURES for name in primitives.SERVED[arch]]
)
def test_primitives_give_the_bits_of_their_twins(arch: str, name: str) -> None:
    source, ptx = primitive_simulators(arch)
    device = primitives.DEVICES[arch]
    want = primitives.run(source, name, device)
    assert want.any()
    before = ptx.launched.total()
    for seed in primitives.SEEDS:
        found = primitives.run(ptx, name, device, seed)
        assert torch.equal(found, want), f"seed {seed}: {(found != want).nonzero().flatten()[:8].tolist()}"
    assert ptx.launched.total() - before == len(primitives.SEEDS) * (2 if name == "dependent" else 1)
