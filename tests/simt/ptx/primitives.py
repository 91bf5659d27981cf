"""Runs the kernels of ../kernels/primitives.cu: every primitive of simt.cuh, as its host twin or as PTX."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import builder
import torch
from simulator import A100, H100, T4, DeviceInfo, Simulator
from torch import Tensor

SOURCE = Path(builder.HERE) / "kernels" / "primitives.cu"
KERNELS = ("convert", "conditional", "copy", "matrix", "barrier", "hand_over", "cluster", "dependent")
# By architecture: the device, and the kernels that use what it has. The host twins know sm_75 and sm_90 only, and overlap
# grids as the latter does.
DEVICES: dict[str, DeviceInfo] = {"sm_75": T4, "sm_80": A100, "sm_90a": H100}
SERVED = {
    "sm_75": ("convert", "conditional", "copy", "matrix", "barrier", "hand_over", "dependent"),
    "sm_80": ("convert", "conditional", "copy", "matrix", "barrier", "hand_over"),
    "sm_90a": KERNELS,
}
SEEDS = range(6)


def library(arch: str) -> Path:
    return builder.build([SOURCE], older=["primitives"] if arch == "sm_75" else [])


@cache
def words() -> Tensor:
    """Floats of all sizes, ties between the numbers of 16 bits, infinities; as words."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(-40, 40, (2048,), generator=generator)
    floats = torch.randn(2048, generator=generator) * 2.0**sizes
    bits = floats.view(torch.int32).clone()
    bits[:256] = torch.randn(512, generator=generator).to(torch.float16).view(torch.int32)  # two numbers of 16 bits each
    bits[256:768] = torch.randn(1024, generator=generator).to(torch.float16).view(torch.int32)
    ties = bits[1024:1280]
    bits[1024:1280] = ties & ~0x1FFF | 0x1000
    bits[1280:1536] = bits[1280:1536] & ~0xFFFF | 0x8000
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65504.0, 65520.0, 6e-8, 1e-45, 3e38, 127.5, -127.5])
    bits[1600 : 1600 + len(special)] = special.view(torch.int32)
    return torch.cat([bits, bits.flip(0)])


def run(sim: Simulator, name: str, device: DeviceInfo, seed: int = 0) -> Tensor:
    """The words that a kernel has written, zeros elsewhere."""
    sim.reset(seed, device)
    zeros = torch.zeros(4096, dtype=torch.int32)
    source, out, scratch = sim.put("in", words()), sim.inout("out", zeros), sim.inout("scratch", zeros[:1024])
    sim.check(sim.lib.simt_run_primitive(name.encode(), *map(ctypes.c_void_p, (source, out, scratch))))
    return sim.get(out, (4096,), torch.int32)
