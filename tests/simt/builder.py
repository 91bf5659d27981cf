"""Builds the simulator: the CUDA sources, unchanged, by g++ against the host implementation of simt.cuh.

Objects are kept in build/simt/ by the hash of what goes into them; only what changed is compiled again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "simt"
CXX = os.environ.get("CXX", "g++")

# FUSED_RNN_SIMT_DEBUG=1: for stepping through a kernel in gdb.
DEBUG = bool(int(os.environ.get("FUSED_RNN_SIMT_DEBUG", "0")))
COMMON = [
    "-std=c++17",
    "-g" if DEBUG else "-g1",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wswitch-enum",
    "-Werror=switch",
    "-Werror=switch-enum",
]
# -fsanitize=thread only instruments memory accesses: runtime/hooks.cpp takes the place of libtsan.
KERNEL = [
    *("-x", "c++", "-O0" if DEBUG else "-O1", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"),
    *("-ffp-contract=off", "-Wno-unknown-pragmas"),
]
# Variants of the build, for `sanitize`; "ucontext" switches fibres as on machines other than x86-64.
SANITIZE = {
    "plain": [],
    "ucontext": [],
    "ubsan": ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"],
    "asan": ["-fsanitize=address", "-fno-omit-frame-pointer"],
}


class BuildError(RuntimeError):
    """The sources do not compile; the message says what to add for an unknown primitive."""


@dataclasses.dataclass(frozen=True)
class Unit:
    source: Path
    flags: tuple[str, ...]
    headers: str  # hash of those that it may include
    csrc: Path = ROOT / "csrc"


def _hash(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:20]


def _headers(*places: Path) -> str:
    """Hash of header files, and of those in folders."""
    files = [f for place in places for f in ([place] if place.is_file() else sorted(place.rglob("*")))]
    files = [f for f in files if f.suffix in (".h", ".cuh")]
    return _hash(*(f.name.encode() + f.read_bytes() for f in files))


def explain(errors: str) -> str:
    """The compiler's errors, and for each unknown primitive what to add and where."""
    hints = []
    known = (ROOT / "csrc" / "cuda" / "device" / "simt.cuh").read_text()
    names = re.findall(r"‘(\w+)’ is not a member of ‘fused_rnn::simt’", errors)
    for name in dict.fromkeys(names):
        where = (
            "It is in csrc/cuda/device/simt.cuh: add its host twin"
            if re.search(rf"\b{name}\b", known)
            else "Add its PTX wrapper to csrc/cuda/device/simt.cuh and its host twin"
        )
        hints.append(f"simt::{name} is unknown to the simulator. {where} to tests/simt/include/simt.cuh.")
    names = re.findall(
        r"‘((?!__shared__)__\w+|cuda\w+|atomic\w+|threadIdx|blockIdx|blockDim|gridDim)’ was not declared", errors
    )
    for name in dict.fromkeys(names):
        hints.append(
            f"{name} is a CUDA name: kernels reach the hardware only through csrc/cuda/device/simt.cuh. Add a named wrapper "
            "there and its host twin to tests/simt/include/simt.cuh."
        )
    if "‘__shared__’" in errors:
        hints.append("__shared__: kernels have dynamic shared memory only, which simt::dynamic_smem() gives.")
    for name in dict.fromkeys(re.findall(r"fatal error: (cuda\w*\.h|mma\.h|cooperative_groups\.h)", errors)):
        hints.append(f"{name}: kernel files include <simt.cuh> only; what it gives belongs into a wrapper there.")
    return "\n".join([*hints, errors])


def _make(target: Path, command: Sequence[str]) -> None:
    """Runs the command with "-o FILE" for a file that becomes `target` once it is whole.

    Threads and processes may make the same target at the same time.
    """
    partial = target.with_suffix(f".{uuid.uuid4().hex}.tmp")
    env = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        result = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, env=env)
        if result.returncode:
            raise BuildError(explain(result.stderr))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _compile(unit: Unit) -> Path:
    command = [CXX, *unit.flags, f"-I{HERE / 'include'}", f"-I{unit.csrc}", "-c", str(unit.source)]
    shown = [part.replace(str(ROOT), ".") for part in command]
    target = CACHE / f"{unit.source.stem}-{_hash(unit.source.read_bytes(), unit.headers, *shown)}.o"
    if not target.exists():
        _make(target, command)
    return target


def build(
    kernels: Sequence[Path] | None = None,
    older: Sequence[str] = (),
    replace: Mapping[str, Sequence[tuple[Path, Path]]] | None = None,
    sanitize: str = "plain",
    jobs: int = 2,
    host: Sequence[Path] = (),
    more: Sequence[Path] = (),
) -> Path:
    """The shared library of the runtime and `kernels` (default: the CUDA backend, host code included).

    Kernels are compiled as for sm_90, those of the files named in `older` as for sm_75. `replace` has, by the name of a
    kernel file, other files to take its place, each with the folder to be taken for csrc when it is compiled. `more`
    are kernels beside these, `host` further sources without kernels.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    csrc = ROOT / "csrc"
    internal = HERE / "runtime"
    device = [HERE / "include", HERE / "kernels", *(internal / name for name in ("api.h", "tensor.h", "capi.h"))]
    below = [csrc / folder for folder in ("core", "plan", "cuda")]
    for_kernels = _headers(*device, *below)
    for_runtime = _headers(internal, HERE / "include")
    for_host = _headers(internal, HERE / "include", *below)
    extra = SANITIZE[sanitize]
    host_flags = [*COMMON, "-O2", "-fno-semantic-interposition"]
    host_flags += {"asan": ["-fsanitize=address"], "ucontext": ["-DSIMT_UCONTEXT"]}.get(sanitize, [])
    # g++ does not combine -fsanitize=thread with address: that variant has no race detection.
    kernel_flags = [f for f in KERNEL if sanitize != "asan" or f != "-fsanitize=thread"]
    kernel_flags = [*COMMON, *kernel_flags, *extra]
    runtime = sorted(internal.glob("*.cpp"))
    backend = kernels is None
    if kernels is None:
        # The products of family gemm by a plain kernel, where csrc/torch has cuBLAS.
        kernels = [*sorted((csrc / "cuda").rglob("*.cu")), ROOT / "benchmarks" / "torch_free" / "plain_product.cu"]
    kernels = [*kernels, *more]
    units = []
    for source in kernels:
        flags = (*kernel_flags, f"-DSIMT_ARCH={750 if source.stem in older else 900}")
        for file, folder in (replace or {}).get(source.stem, [(source, csrc)]):
            headers = for_kernels if folder == csrc else _headers(*device, folder)
            units.append(Unit(file, flags, headers, folder))
    api = internal / "fused_rnn_capi.cpp"
    units += [Unit(f, tuple(host_flags), for_runtime) for f in runtime if f != api]
    if backend:
        units += [Unit(f, tuple(host_flags), for_host) for f in [api, *sorted((csrc / "plan").glob("*.cpp"))]]
    units += [Unit(f, tuple(host_flags), for_host) for f in host]
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(_compile, units))
    # Calls within the library are direct: the checks make one or more at every access.
    link = [CXX, "-shared", "-Wl,-Bsymbolic"]
    target = CACHE / f"simt-{_hash(sanitize, *link[1:], *(o.name for o in objects))}.so"
    if not target.exists():
        _make(target, [*link, *map(str, objects), *extra])
    return target
