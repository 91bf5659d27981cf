"""Compiles every CUDA source alone, without torch, and demands that no kernel spills registers.

    python tests/check_ptxas.py [--arch sm_80 sm_90a] [--jobs 2] [--files csrc/cuda/kernels_fp16.cu ...]

Prints a table of each kernel's registers, barriers, static shared memory, stack and spilled bytes for each architecture
(dynamic shared memory is the plan's: tests/test_plan.py). nvcc is $NVCC, or the one on PATH, in $CUDA_HOME, or in the
nvidia-cuda-nvcc wheel of the running Python.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROLES = ("forward", "forward_input", "project", "backward", "state_grad")
CELLS = ("rnn", "rnn_relu", "rnn_identity", "lstm", "gru")
MATHS = ("fp64", "fp32", "tf32", "fp16", "bf16")
TILES = ("small", "medium", "large")


def find_nvcc() -> tuple[str, list[str]]:
    """nvcc and the include folders it lacks."""
    candidates = [os.environ.get("NVCC"), shutil.which("nvcc")]
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(f"{home}/bin/nvcc")
    for candidate in candidates:
        if candidate and Path(candidate).is_file():
            return candidate, []
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    # Wheels of CUDA 13 share one folder, older ones have a folder each.
    for nvcc in sorted([*site.glob("cu*/bin/nvcc"), *site.glob("cuda_nvcc/bin/nvcc")], reverse=True):
        includes = [f"-I{folder}" for folder in sorted(site.glob("*/include"))]
        return str(nvcc), includes
    wheels = "nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm"
    sys.exit(f"no nvcc: set NVCC or CUDA_HOME, or run: pip install {wheels}")


def kernel_name(mangled: str) -> str:
    """Readable name of an instantiation."""
    found = re.search(r"KernelRoleE(\d).*?CellKindE(\d).*?MathKindE(\d).*?TileSizeE(\d)", mangled)
    if not found:
        return persistent_kernel_name(mangled)
    role, cell, math, tile = (int(digit) for digit in found.groups())
    shown = "any" if ROLES[role] in ("project", "state_grad") else CELLS[cell]
    return f"{ROLES[role]} {shown} {MATHS[math]} {TILES[tile]}"


def persistent_kernel_name(mangled: str) -> str:
    """The same for the families that hold the weights on the chip."""
    found = re.search(r"CellKindE(\d)E.*?MathKindE(\d)ELi(\d)ELb(\d)E.*?(Grid|Cluster)Exchange", mangled)
    if not found:
        return mangled
    cell, math, tiles, backward = (int(digit) for digit in found.groups()[:4])
    return f"{found[5].lower()} {'backward' if backward else 'forward'} {CELLS[cell]} {MATHS[math]} {16 * tiles} units"


def compile_one(nvcc: str, includes: list[str], source: Path, arch: str) -> tuple[Path, str, float, int, str]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(nvcc, "-std=c++17", "-O3", "-c", f"-arch={arch}", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"),
            *(f"-I{ROOT / 'csrc' / 'cuda'}", *includes, str(source), "-o", f"{folder}/out.o"),
        ]
        start = time.monotonic()
        result = subprocess.run(command, capture_output=True, text=True)
        return source, arch, time.monotonic() - start, result.returncode, result.stdout + result.stderr


def parse(log: str) -> list[tuple[str, int, int, int, int, int]]:
    """(kernel, registers, barriers, static shared memory, stack bytes, spilled bytes) of every kernel in the log."""
    rows = []
    for block in log.split("Compiling entry function '")[1:]:
        name = kernel_name(block.split("'", 1)[0])
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        used = re.search(r"Used (\d+) registers", block)
        if not frame or not used:
            sys.exit(f"ptxas said nothing about {name}:\n{block[:400]}")
        barriers, shared = re.search(r"used (\d+) barriers", block), re.search(r"(\d+) bytes smem", block)
        stack, stores, loads = (int(n) for n in frame.groups())
        barrier_count, static = (int(m[1]) if m else 0 for m in (barriers, shared))
        rows.append((name, int(used[1]), barrier_count, static, stack, stores + loads))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90a"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--files", nargs="+", type=Path, default=sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
    args = parser.parse_args()
    nvcc, includes = find_nvcc()
    failures, table = [], {}
    jobs = [(source, arch) for arch in args.arch for source in args.files]
    with ThreadPoolExecutor(args.jobs) as pool:
        for source, arch, seconds, code, log in pool.map(lambda job: compile_one(nvcc, includes, *job), jobs):
            print(f"{source.name} {arch}: {seconds:.1f} s", flush=True)
            if code:
                failures.append(f"{source.name} {arch} does not compile:\n{log}")
                continue
            for name, *numbers in parse(log):
                table.setdefault(name, {})[arch] = numbers
                spilled = numbers[-1]
                if spilled:
                    failures.append(f"{name} {arch}: {spilled} bytes spilled")
    width = max(map(len, table), default=6)
    print("\nregisters / barriers / static shared memory / stack / spilled bytes")
    print(f"{'kernel':{width}}  " + "  ".join(f"{a:>14}" for a in args.arch))
    for name, columns in sorted(table.items()):
        cells = ("/".join(map(str, columns[a])) if a in columns else "-" for a in args.arch)
        print(f"{name:{width}}  " + "  ".join(f"{cell:>14}" for cell in cells))
    if not table:
        failures.append("no kernel was compiled")
    print(f"\n{len(table)} kernels, {len(args.arch)} architectures, {len(failures)} failures")
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
