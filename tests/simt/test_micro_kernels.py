"""The exchanging kernels of benchmarks/micro under many interleavings: they end, and without a race."""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path

import builder
import pytest
import torch
from simulator import Simulator

HERE = Path(__file__).parent
MICRO = HERE.parents[1] / "benchmarks" / "micro"
WORDS = 64


@pytest.fixture(scope="module")
def micro() -> Simulator:
    """The kernels, compiled again whenever their headers change, which the builder does not know."""
    kernels = HERE / "kernels" / "micro.cu"
    contents = b"".join(path.read_bytes() for path in (kernels, *sorted(MICRO.glob("*_kernels.cuh"))))
    digest = hashlib.sha256(contents).hexdigest()[:12]
    builder.CACHE.mkdir(parents=True, exist_ok=True)
    source = builder.CACHE / f"micro_{digest}.cu"
    source.write_text(f'#include "{kernels}"\n')
    return Simulator(builder.build([source]))


def run(sim: Simulator, name: str, blocks: int, iterations: int, peer: int, seed: int) -> torch.Tensor:
    sim.reset(seed)
    zeros = [
        torch.zeros(count, dtype=torch.int32)
        for count in (4 * 2 * blocks * WORDS, 2 * blocks * WORDS + 64, 32 * blocks + 64)
    ]
    tagged, data, flags = (sim.inout(n, t) for n, t in zip(("tagged", "data", "flags"), zeros, strict=True))
    ticks = sim.out("ticks", 16)
    memory = (ctypes.c_void_p * 4)(tagged, data, flags, ticks)
    shape = (ctypes.c_int * 3)(blocks, iterations, peer)
    sim.check(sim.lib.simt_run_micro(name.encode(), shape, memory))
    result = sim.get(ticks, (2,), torch.int64)
    assert result.tolist() == [1, 1], "the block that measures has come to its end"
    return sim.get(tagged, (4 * blocks * WORDS,), torch.int32)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("name", "blocks"), [("push_one_way", 2), ("push_one_way", 16), ("push_exchange", 4), ("push_exchange", 16)]
)
def test_pushes(micro: Simulator, name: str, blocks: int, seed: int) -> None:
    run(micro, name, blocks, 5, 0, seed)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["one_way_tagged", "one_way_flag", "exchange_tagged", "exchange_flag"])
@pytest.mark.parametrize(("blocks", "peer"), [(3, 1), (5, 4)])
def test_hand_offs(micro: Simulator, name: str, blocks: int, peer: int, seed: int) -> None:
    run(micro, name, blocks, 4, peer, seed)
