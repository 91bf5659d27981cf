"""Cases of the simulator's tests for the PTX of an architecture."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import test_block
import test_gemm
import test_kernels
import test_options
import test_persistent
import torch
from cases import Case
from simulator import DeviceInfo
from test_kernels import Simulated
from test_options import Optional

CAPABILITY = {"sm_75": 75, "sm_80": 80, "sm_90a": 90}
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def device_of(name: str, arch: str) -> str:
    """The device of that name, as if it were of another architecture: another entry of DEVICES."""
    device = test_kernels.DEVICES[name]
    capability = CAPABILITY[arch]
    if device.compute_capability == device.compiled_for == capability:
        return name
    fields = {field: getattr(device, field) for field, *_ in DeviceInfo._fields_}
    fields |= {"compute_capability": capability, "compiled_for": capability}
    if capability < 90:
        fields |= {"max_cluster": 1, "active_clusters": type(device.active_clusters)()}
    test_kernels.DEVICES[f"{name}_as_{arch}"] = DeviceInfo(*fields.values())
    return f"{name}_as_{arch}"


def families(arch: str) -> tuple[str, ...]:
    needed = {"single": 75, "step": 75, "grid": 80, "cluster": 90, "block": 80, "gemm": 75}
    return tuple(family for family, capability in needed.items() if CAPABILITY[arch] >= capability)


def on(arch: str, cases: Iterable[Simulated], seeds: int | None = None) -> Iterator[Simulated]:
    """Those cases that the architecture has kernels for, on a device of it."""
    for s in cases:
        if s.family is not None and s.family not in families(arch):
            continue
        if (s.tf32 or (s.family == "gemm" and s.case.dtype == BF16)) and CAPABILITY[arch] < 80:
            continue
        yield dataclasses.replace(s, device=device_of(s.device, arch), seeds=seeds or s.seeds)


# The architecture of each file of kernels in the short run, which compiles as few of them as cover all.
_SHORT = {
    **{("kernels", math): arch for math, arch in zip(range(5), ("sm_80", "sm_75", "sm_80", "sm_75", "sm_90a"), strict=True)},
    **{("grid", math): arch for math, arch in zip(range(1, 5), ("sm_80", "sm_90a", "sm_90a", "sm_80"), strict=True)},
    **{("cluster", math): "sm_90a" for math in range(1, 5)},
    **{("block", math): arch for math, arch in zip(range(1, 5), ("sm_90a", "sm_80", "sm_80", "sm_90a"), strict=True)},
    **{("gemm", math): arch for math, arch in zip(range(5), ("sm_75", "sm_90a", "sm_80", "sm_75", "sm_80"), strict=True)},
}


def representative(short: bool) -> Iterator[tuple[str, Simulated]]:
    """Each family and arithmetic on each architecture, with all options on; cells and kinds of batches take turns.

    short: each family and arithmetic on one architecture; else on the others.
    """
    arithmetic = [(F64, False), (F32, False), (F32, True), (F16, False), (BF16, False)]
    for arch, (math, (dtype, tf32)) in itertools.product(CAPABILITY, enumerate(arithmetic)):
        for number, family in enumerate(families(arch)):
            file = family if family in ("grid", "cluster", "block", "gemm") else "kernels"
            if (file, math) not in _SHORT or (_SHORT[file, math] == arch) != short:
                continue
            cell = ("LSTM", "GRU", "RNN_TANH")[(math + number) % 3]
            ragged = ("lengths", "packed")[number % 2]
            steps = 1 if family == "single" else 3
            case = Case(cell, steps, 3, 5, 22 if family == "block" else 21, ragged=ragged, resets=True, dtype=dtype)
            for simulated in on(arch, [Simulated(case, 3, family, tf32=tf32)]):
                yield arch, simulated


def everything(arch: str) -> Iterator[Simulated]:
    """Every kernel of plain steps: each cell, arithmetic and tile of `step` and `single`, each width of the blocks of `grid`
    and `cluster` with groups of one tile of rows and of several and with weights in shared memory, each cell and arithmetic
    of `block` with small and with the largest layers; and small cases under 20 seeds."""
    yield from on(arch, test_kernels.many_seeds())
    yield from on(arch, test_kernels.tiles())
    yield from on(arch, (s for s in test_kernels.DEFAULT if s.tile is None and s.seeds < 20))
    yield from on(arch, [*test_gemm.CASES, *test_gemm.PROJECTED])
    yield from on(arch, test_persistent.many_seeds())
    persistent = [*test_persistent.DEFAULT, *(s for s, _ in test_persistent.EVERY_KERNEL)]
    persistent += [s for s, _ in test_persistent.SHARED_WEIGHTS if s.case.hidden < 300]
    yield from on(arch, (s for s in persistent if s.seeds < 20))
    of_block = [dataclasses.replace(s, seeds=20) for s in test_block.OPTIONS if s.case.hidden < 50]
    yield from on(arch, [*of_block, *(s for s in test_block.OPTIONS if s.case.hidden >= 50), *test_block.LARGEST])


def modified(arch: str) -> Iterator[Optional]:
    """Every kernel of modified steps: each cell, arithmetic and tile with all options at once, the small tile under 20
    seeds; each option alone."""
    device = test_kernels.DEVICES[device_of("H100", arch)]
    for s in (*test_options.together(), *test_options.one_at_a_time(), *test_options.projected()):
        if s.tf32 and CAPABILITY[arch] < 80:
            continue
        yield dataclasses.replace(s, device=device, seeds=20 if s.tile is not None and s.tile[0] == 0 else s.seeds)


def cut(arch: str) -> Iterator[Simulated]:
    """Launches of some steps each, of the families that have them."""
    yield from on(arch, (*test_persistent.cut(), *test_block.CUT))
