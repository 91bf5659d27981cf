"""nvcc and g++ for translated kernels, and what they made before, kept by the hash of what went into it.

Each kernel is a shared object of its own: only those that a test launches are translated and compiled.
"""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import builder

from .source import Kernel, PtxFile
from .translate import HEAD, function

HERE = Path(__file__).resolve().parent
CACHE = builder.CACHE / "ptx"
NO_NVCC = "no nvcc on PATH, in NVCC, CUDA_HOME or the wheels of this Python"
ARCHITECTURES = ("sm_75", "sm_80", "sm_90a")


PLAIN_PRODUCT = builder.ROOT / "benchmarks" / "torch_free" / "plain_product.cu"

_CHECK = runpy.run_path(str(builder.ROOT / "tests" / "check_ptxas.py"))


@cache
def nvcc() -> tuple[str, list[str]] | None:
    """nvcc and the options with the include folders that it lacks; None where there is none."""
    try:
        return _CHECK["find_nvcc"]()
    except SystemExit:
        return None


def sources(arch: str) -> list[Path]:
    """The .cu files with kernels that an architecture runs; the others compile to nothing there."""
    return [s for s in sorted((builder.ROOT / "csrc" / "cuda").rglob("*.cu")) if _CHECK["served"](s, arch)]


def homes(symbol: str, arch: str) -> list[Path]:
    """The .cu files that may have a kernel, by the arithmetic and the family in its name."""
    families = ("grid", "cluster", "block", "gemm", "kernels")
    if "plain_product" in symbol:
        return [PLAIN_PRODUCT]
    if math := re.search(r"MathKindE(\d)", symbol):
        parts = {"GridExchange": "grid", "ClusterExchange": "cluster", "BlockGeometry": "block", "TileSizeE3": "gemm"}
        family = next((family for part, family in parts.items() if part in symbol), "kernels")
        return [s for s in sources(arch) if s.stem == f"{family}_{_CHECK['MATHS'][int(math[1])]}"]
    return [s for s in sources(arch) if s.stem.split("_")[0] not in families]


@cache
def _nvcc_version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout


def ptx_of(source: Path, arch: str, csrc: Path = builder.ROOT / "csrc", optimization: str = "-O3") -> str:
    """The PTX that nvcc makes of a .cu file, with the places in the source (-lineinfo)."""
    found = nvcc()
    if found is None:
        raise RuntimeError("no nvcc: set NVCC or CUDA_HOME")
    path, includes = found
    options = [
        *("-std=c++17", optimization, "-ptx", "-lineinfo", f"-arch={arch.replace('sm', 'compute')}"),
        *(f"-I{csrc}", f"-I{csrc / 'cuda' / 'device'}"),
    ]
    headers = builder._headers(*(csrc / part for part in ("core", "plan", "cuda")))
    shown = [part.replace(str(csrc), "csrc") for part in options]
    target = CACHE / f"{source.stem}-{arch}-{builder._hash(_nvcc_version(path), source.read_bytes(), headers, *shown)}.ptx"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        builder._make(target, [path, *options, *includes, str(source)])
    return target.read_text()


@cache
def file_of(source: Path, arch: str) -> PtxFile:
    return PtxFile(ptx_of(source, arch))


def canonical(symbol: str) -> str:
    """A mangled name as g++ writes it: nvcc gives anonymous namespaces names of their own."""
    while found := re.search(r"(\d+)_GLOBAL__N__", symbol):
        start = found.start() + len(found[1])
        symbol = f"{symbol[: found.start()]}12_GLOBAL__N_1{symbol[start + int(found[1]) :]}"
    return symbol


@cache
def _machine_flags() -> tuple[str, ...]:
    cpu = Path("/proc/cpuinfo")
    # Without it every fma is a call.
    has_fma = cpu.exists() and re.search(r"^flags.*\bfma\b", cpu.read_text(), re.M)
    return ("-mfma",) if has_fma else ()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A translated kernel in a shared object, the `index`-th there."""

    kernel: Kernel
    library: Path
    index: int


def compile_kernels(kernels: Sequence[Kernel], simulator: Path, optimization: str = "-O1") -> list[Compiled]:
    """The translated kernels in one shared object that calls the simulator in the library `simulator`."""
    text = HEAD + "\n".join(function(kernel, index) for index, kernel in enumerate(kernels))
    headers = builder._headers(*(builder.HERE / "runtime" / name for name in ("api.h", "tensor.h", "translated.h")))
    flags = ["-std=c++17", optimization, "-g0", "-w", "-fPIC", "-ffp-contract=off", *_machine_flags()]
    code = builder._hash(text, headers, *flags)
    CACHE.mkdir(parents=True, exist_ok=True)
    target, source = CACHE / f"kernel-{code}.o", CACHE / f"kernel-{code}.cpp"
    if not target.exists():
        source.write_text(text)
        builder._make(target, [builder.CXX, *flags, f"-I{builder.HERE}", "-c", str(source)])
    linked = CACHE / f"kernel-{code}-{builder._hash(str(simulator))}.so"
    if not linked.exists():
        builder._make(linked, [builder.CXX, "-shared", str(target), str(simulator)])
    return [Compiled(kernel, linked, index) for index, kernel in enumerate(kernels)]


def symbols(library: Path) -> dict[int, str]:
    """Where the functions of a library lie in it."""
    output = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True).stdout
    lines = (line.split() for line in output.splitlines())
    return {int(parts[0], 16): parts[2] for parts in lines if len(parts) == 3 and parts[1] in "tTwW"}


def jobs() -> int:
    return int(os.environ.get("FUSED_RNN_TEST_JOBS", "2"))
