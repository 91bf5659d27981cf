"""Builds harness/: the CPU kernels without torch, under sanitizers or as they are shipped.

Objects are kept in build/hardening/ by the hash of what goes into them; only what changed is compiled again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fused_rnn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "hardening"
CXX = os.environ.get("CXX", "g++")
COMMON = ["-std=c++17", "-g1", "-Wall", "-Wextra", "-fopenmp", f"-I{ROOT / 'csrc'}", f"-I{HERE / 'harness'}"]
# Flags of a variant, and those of its kernels and of everything else. Kernels are flattened functions of some hundred
# thousand instructions, which take minutes to compile where each access is checked inline. Without optimisation every access
# of the source is one of the program; "guarded" has the accesses that are shipped.
_CALLS = ["--param", "asan-instrumentation-with-call-threshold=0"]
VARIANTS = {
    "sanitized": (["-fsanitize=address,undefined", "-fno-sanitize-recover=all", *_CALLS], ["-O0"], ["-O1"]),
    "guarded": ([], ["-O3"], ["-O3"]),
    "threads": (["-fsanitize=thread"], ["-O0"], ["-O1"]),
}
# What a failed run prints of the environment would end a test that waits: settings of the sanitizers are the harness's own.
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}
LIBRARIES = {"sanitized": ("asan", "ubsan"), "guarded": (), "threads": ("tsan",)}
# Files of csrc/cpu that the harness has others for.
REPLACED = ("instruction_set", "processors")
# Files of csrc/cpu that are not for every machine, by instruction set.
KERNELS = {
    "avx2": ["kernels_avx2"],
    "avx512": ["kernels_avx512"],
    "avx512_bf16": ["kernels_avx512", "kernels_avx512_bf16", "parts_pack"],
    "amx": ["kernels_avx512", "kernels_amx", "parts_pack"],
}


def missing(variant: str) -> str | None:
    """What this machine lacks for a variant, or None."""
    if shutil.which(CXX) is None:
        return f"needs a C++ compiler ({CXX})"
    for name in LIBRARIES[variant]:
        found = subprocess.run([CXX, f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute():
            return f"needs the runtime of {CXX}'s sanitizer, lib{name}.so"
    return None


def _hash(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:20]


def _make(target: Path, command: Sequence[str]) -> Path:
    """Runs the command with "-o FILE" for a file that becomes `target` once it is whole."""
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{uuid.uuid4().hex}.tmp")
        result = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-8000:]
        partial.replace(target)
    return target


def sources(sets: Sequence[str]) -> Iterator[Path]:
    """Sources of csrc/cpu that the harness takes as they are, and its own."""
    conditional = {name for names in KERNELS.values() for name in names}
    wanted = {name for instruction_set in sets for name in KERNELS.get(instruction_set, [])}
    for source in sorted((ROOT / "csrc" / "cpu").rglob("*.cpp")):
        if source.stem not in REPLACED and (source.stem not in conditional or source.stem in wanted):
            yield source
    yield from sorted((HERE / "harness").glob("*.cpp"))


def build(variant: str, sets: Sequence[str] | None = None, jobs: int = 2) -> Path:
    """The harness's program with the kernels of `sets` (default: those that this machine can run), or skips."""
    reason = missing(variant)
    if reason:
        pytest.skip(reason)
    if sets is None:
        sets = fused_rnn.build_info().get("cpu_instruction_sets", [])
    flags, for_kernels, for_others = VARIANTS[variant]
    headers = [header for folder in ("core", "plan", "cpu") for header in sorted((ROOT / "csrc" / folder).rglob("*.h"))]
    headers += sorted((HERE / "harness").glob("*.h"))
    text = _hash(*(f.name.encode() + f.read_bytes() for f in headers))

    def compiled(source: Path) -> Path:
        kernel = source.stem.startswith("kernels_") or source.stem in ("parts", "parts_pack")
        command = [CXX, *COMMON, *flags, *(for_kernels if kernel else for_others), "-c", str(source)]
        shown = [part.replace(str(ROOT), ".") for part in command]
        return _make(CACHE / f"{source.stem}-{_hash(source.read_bytes(), text, *shown)}.o", command)

    # The large ones first.
    files = sorted(sources(sets), key=lambda f: not (f.stem.startswith("kernels_") or f.stem == "parts"))
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compiled, files))
    target = CACHE / f"{variant}-{_hash(*(o.name for o in objects))}"
    # Without -fopenmp: its functions are openmp.cpp's.
    return _make(target, [CXX, *map(str, objects), *flags, "-pthread"])


def run(program: Path, *arguments: object, limit: float = 600) -> str:
    """What the program prints; fails with its report where it does not end well, or reports."""
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [str(program), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=limit,
            cwd=folder,
            env={**os.environ, **ENVIRONMENT},
        )
    command = f"{program.name} {' '.join(map(str, arguments))}"
    report = f"{command}: status {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-12000:]}"
    assert result.returncode == 0 and "runtime error" not in result.stderr and "Sanitizer" not in result.stderr, report
    return result.stdout
