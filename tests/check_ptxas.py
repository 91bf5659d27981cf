"""Compiles every CUDA source alone, without torch, and demands that no kernel spills registers.

    python tests/check_ptxas.py [--arch sm_80 sm_90a] [--jobs 2] [--files csrc/cuda/step/kernels_fp16.cu ...] [--table FILE]

Prints a table of each kernel's registers, barriers, static shared memory, stack and spilled bytes for each architecture
(dynamic shared memory is the plan's: tests/test_plan.py). Host code is left to a build of the extension. --table writes the
table as Markdown; --logs keeps what ptxas said in a folder and compiles only what has changed since; --cubins keeps the
device code in a folder for tests/check_sass.py. --build-log reads instead what a build of the whole extension printed with
NVCC_APPEND_FLAGS="-Xptxas -v" for the one architecture of --arch, and compiles nothing. Families that an architecture lacks
(grid and block before sm_80, cluster before sm_90) are left out for it. nvcc is $NVCC, or the one on PATH, in $CUDA_HOME,
or in the nvidia-cuda-nvcc wheel of the running Python.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROLES = (
    *("forward", "forward_input", "project", "backward", "state_grad", "forward_modified", "backward_modified"),
    *("tangents", "project_tangents", "dual_backward", "dual_state_grad"),
)
# By number; without the package, which imports torch. The kernels of the three RNNs are one, compiled as the first of them.
KINDS = runpy.run_path(str(ROOT / "fused_rnn" / "_kinds.py"))["KINDS"]
CELLS = tuple("rnn" if kind.name == "rnn_tanh" else kind.name for kind in KINDS)
MATHS = ("fp64", "fp32", "tf32", "fp16", "bf16")
TILES = ("small", "medium", "large", "pointwise")
Table = dict[str, dict[str, tuple[int, ...]]]  # kernel -> architecture -> registers, barriers, static smem, stack, spills


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
    for name in ("zero_fill", "write_integers", "write_flags", "query"):
        if f"{name}_kernel" in mangled:
            return name
    if found := re.search(r"first_states_kernel.*?MathKindE(\d)", mangled):
        return f"first_states any {MATHS[int(found[1])]} pointwise"
    if found := re.search(r"previous_rows_kernelILi(\d+)E", mangled):
        return f"previous_rows {found[1]} bytes"
    found = re.search(r"KernelRoleE(\d+).*?CellKindE(\d).*?MathKindE(\d).*?TileSizeE(\d)", mangled)
    if not found:
        return persistent_kernel_name(mangled)
    role, cell, math, tile = (int(digit) for digit in found.groups())
    any_cell = ("project", "state_grad", "project_tangents", "dual_state_grad")
    shown = "any" if ROLES[role] in any_cell else CELLS[cell]
    return f"{ROLES[role]} {shown} {MATHS[math]} {TILES[tile]}"


def persistent_kernel_name(mangled: str) -> str:
    """The same for the families that hold the weights on the chip."""
    if found := re.search(r"BlockGeometry.*?CellKindE(\d)E.*?MathKindE(\d)ELb(\d)E", mangled):
        cell, math, backward = (int(digit) for digit in found.groups())
        return f"block {'backward' if backward else 'forward'} {CELLS[cell]} {MATHS[math]}"
    found = re.search(r"CellKindE(\d)E.*?MathKindE(\d)ELi(\d)ELb(\d)E.*?(Grid|Cluster)Exchange", mangled)
    if not found:
        return mangled
    cell, math, tiles, backward = (int(digit) for digit in found.groups()[:4])
    return f"{found[5].lower()} {'backward' if backward else 'forward'} {CELLS[cell]} {MATHS[math]} {16 * tiles} units"


def served(source: Path, arch: str) -> bool:
    """Whether the kernels of a source can run on an architecture; on others they compile to nothing."""
    number = int(re.sub(r"\D", "", arch))
    needed = {"cluster": 90, "grid": 80, "block": 80}
    return number >= (75 if source.stem.endswith("_launch") else needed.get(source.name.split("_")[0], 75))


def digest(command: list[str]) -> str:
    """Of the text of every file of the repository that a compilation reads, and of its options."""
    rule = subprocess.run([*command, "-M"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    paths = sorted({path for path in rule.split() if path.startswith(str(ROOT)) and Path(path).is_file()})
    options = [part.replace(str(ROOT), "") for part in command[1:]]
    return hashlib.sha256("\0".join([*options, *(Path(path).read_text() for path in paths)]).encode()).hexdigest()[:16]


def cubin_name(source: Path, arch: str) -> str:
    return f"{source.stem}.{arch}.cubin"


def compile_one(
    nvcc: str, includes: list[str], source: Path, arch: str, logs: Path | None, cubins: Path | None
) -> tuple[Path, str, float, int, str]:
    """(source, arch, seconds, exit status, what ptxas said); the latter from the folder `logs` if nothing has changed.

    The device code stays in the folder `cubins` if there is one.
    """
    command = [
        *(nvcc, "-std=c++17", "-O3", f"-arch={arch}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda' / 'device'}"),
        *(*includes, str(source)),
    ]
    start = time.monotonic()
    kept = logs / f"{source.stem}.{arch}.{digest(command)}.log" if logs else None
    if kept and kept.exists():
        return source, arch, 0.0, 0, kept.read_text()
    with tempfile.TemporaryDirectory() as folder:
        made = (cubins or Path(folder)) / cubin_name(source, arch)
        options = ["-cubin", "-Xptxas", "-v", "-o", str(made)]
        result = subprocess.run([*command, *options], capture_output=True, text=True)
    log = result.stdout + result.stderr
    if kept and result.returncode == 0:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(log)
    return source, arch, time.monotonic() - start, result.returncode, log


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


def parse_build(log: str, arch: str) -> list[tuple[str, int, int, int, int, int]]:
    """parse's rows of a build's log, which must have kernels of all families, and of no other architecture."""
    others = set(re.findall(r"Compiling entry function '\w+' for '(\w+)'", log)) - {arch}
    if others:
        sys.exit(f"the log has kernels for {', '.join(sorted(others))}: expected {arch} alone")
    rows = parse(log)
    families = ("grid", "cluster", "block")
    for family in ("forward", "backward", *(f"{name} {role}" for name in families for role in ("forward", "backward"))):
        if not any(name.startswith(family) for name, *_ in rows):
            sys.exit(f"the log has no kernel {family!r}: was it built with -Xptxas -v, and wholly?")
    if not any(name.endswith("pointwise") for name, *_ in rows):
        sys.exit("the log has no kernel of family gemm: was it built with -Xptxas -v, and wholly?")
    return rows


def group_of(kernel: str) -> str:
    """Its family or role, and its cell: what comes before the arithmetic, the tile and the like."""
    words = kernel.split()
    return " ".join(words[: next((i for i, word in enumerate(words) if word in MATHS or word.isdigit()), len(words))])


def markdown(table: Table, archs: list[str], nvcc: str) -> str:
    """A table for a file of results: of the kernels of each role and cell the most registers."""
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout.split("release ")[1]
    source = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain", "csrc"], capture_output=True, text=True, cwd=ROOT, check=False)
    commit = (source.stdout.strip() or "unknown") + (" with changes" if dirty.stdout.strip() else "")
    spilled = sum(numbers[-1] for columns in table.values() for numbers in columns.values())
    count = sum(len(columns) for columns in table.values())
    lines = [
        "# Registers of the CUDA kernels, as ptxas reports them\n",
        f"`tests/check_ptxas.py --table`, {datetime.date.today().isoformat()}, nvcc {release.split(',')[0]}, commit "
        f"{commit}: {len(table)} kernels, {count} compilations, {spilled} bytes spilled, "
        f"{max((n[0] for c in table.values() for n in c.values()), default=0)} registers at most. A row has the kernels of "
        "a role and a cell, or of a family, a pass and a cell, over all kinds of arithmetic and tiles: the most registers "
        "of any. [bytes] is the largest stack, `s` static shared memory, where there is any; dynamic shared memory is the "
        "plan's. `-`: there is no such family. The program prints every kernel.\n",
        "| kernels | number | " + " | ".join(archs) + " |",
        "|---" * (len(archs) + 2) + "|",
    ]
    groups: dict[str, list[dict[str, tuple[int, ...]]]] = {}
    for name, columns in sorted(table.items()):
        groups.setdefault(group_of(name), []).append(columns)
    for name, kernels in groups.items():
        cells = []
        for arch in archs:
            here = [columns[arch] for columns in kernels if arch in columns]
            registers, _, static, stack, spills = (max(numbers) for numbers in zip(*here, strict=True)) if here else [0] * 5
            text = f"{registers}" + f" [{stack}]" * (stack > 0) + f" s{static}" * (static > 0)
            cells.append(text + f" **spills {spills}**" * (spills > 0) if here else "-")
        lines.append(f"| {name} | {len(kernels)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def add_rows(table: Table, failures: list[str], rows: list[tuple[str, int, int, int, int, int]], arch: str) -> None:
    for name, *numbers in rows:
        table.setdefault(name, {})[arch] = tuple(numbers)
        if numbers[-1]:
            failures.append(f"{name} {arch}: {numbers[-1]} bytes spilled")


def report(table: Table, failures: list[str], archs: list[str]) -> int:
    """Prints the table and the failures; the exit status."""
    width = max(map(len, table), default=6)
    print("\nregisters / barriers / static shared memory / stack / spilled bytes")
    print(f"{'kernel':{width}}  " + "  ".join(f"{a:>14}" for a in archs))
    for name, columns in sorted(table.items()):
        cells = ("/".join(map(str, columns[a])) if a in columns else "-" for a in archs)
        print(f"{name:{width}}  " + "  ".join(f"{cell:>14}" for cell in cells))
    if not table:
        failures.append("no kernel was compiled")
    print(f"\n{len(table)} kernels, {len(archs)} architectures, {len(failures)} failures")
    print("\n".join(failures))
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90a"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--files", nargs="+", type=Path, default=sorted((ROOT / "csrc" / "cuda").rglob("*.cu")))
    parser.add_argument("--table", type=Path, help="write the table to this file, in Markdown")
    parser.add_argument("--logs", type=Path, help="folder for what ptxas said, to go on after an interruption")
    parser.add_argument("--cubins", type=Path, help="folder for the device code")
    parser.add_argument("--build-log", type=Path, help="what a build printed with -Xptxas -v, read in place of compiling")
    args = parser.parse_args()
    failures: list[str] = []
    table: Table = {}
    if args.build_log:
        if len(args.arch) != 1 or args.table:
            parser.error("--build-log goes with one --arch, and without --table")
        add_rows(table, failures, parse_build(args.build_log.read_text(errors="replace"), args.arch[0]), args.arch[0])
        return report(table, failures, args.arch)
    nvcc, includes = find_nvcc()
    if args.cubins:
        if args.logs:
            parser.error("--cubins: not with --logs, which leaves out what has been compiled before")
        args.cubins.mkdir(parents=True, exist_ok=True)
    jobs = [
        (source, arch, args.logs, args.cubins)
        for arch in args.arch
        for source in map(Path.resolve, args.files)
        if served(source, arch)
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        for source, arch, seconds, code, log in pool.map(lambda job: compile_one(nvcc, includes, *job), jobs):
            print(f"{source.name} {arch}: {seconds:.1f} s", flush=True)
            if code:
                failures.append(f"{source.name} {arch} does not compile:\n{log}")
                continue
            add_rows(table, failures, parse(log), arch)
    if args.table:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        args.table.write_text(markdown(table, args.arch, nvcc))
    return report(table, failures, args.arch)


if __name__ == "__main__":
    sys.exit(main())
