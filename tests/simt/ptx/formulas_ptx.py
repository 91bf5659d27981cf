"""Cells that are formulas, of which nvcc's PTX runs in the place of what g++ makes of them. Needs nvcc."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import formulas
import torch
from simulator import A100, H100, T4, DeviceInfo

from fused_rnn.formula import Cell
from fused_rnn.formula.cuda import translation_unit
from fused_rnn.formula.plan import make_plan

from . import build
from .loader import PtxSimulator
from .source import Kernel, PtxFile

DEVICES: dict[str, DeviceInfo] = {"sm_75": T4, "sm_80": A100, "sm_90a": H100}
FAMILIES = {
    "sm_75": ("step", "single"),
    "sm_80": ("step", "single", "grid"),
    "sm_90a": ("step", "single", "grid", "cluster"),
}


@cache
def file_of(cell: type[Cell], dtype: torch.dtype, arch: str) -> PtxFile:
    """The PTX of the kernels that an architecture has of a cell."""
    source = build.CACHE / "formulas" / f"{cell.__name__}-{str(dtype).removeprefix('torch.')}-{arch}.cu"
    text = translation_unit(make_plan(cell()), dtype, FAMILIES[arch])
    source.parent.mkdir(parents=True, exist_ok=True)
    if not source.exists() or source.read_text() != text:
        source.write_text(text)
    return PtxFile(build.ptx_of(source, arch))


def finder(cell: type[Cell], dtype: torch.dtype, arch: str) -> Callable[[str], Kernel]:
    def find(symbol: str) -> Kernel:
        file = file_of(cell, dtype, arch)
        for name in file.names:
            if build.canonical(name) == symbol:
                return file.kernel(name)
        raise LookupError(f"no PTX of {cell.__name__} for {arch} has the kernel {symbol}")

    return find


@cache
def kernels(cell: type[Cell], dtype: torch.dtype, arch: str) -> formulas.Kernels:
    def simulator(library: Path) -> PtxSimulator:
        return PtxSimulator(library, finder(cell, dtype, arch))

    return formulas.Kernels(cell(), dtype, simulator=simulator)
