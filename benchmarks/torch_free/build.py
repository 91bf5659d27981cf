"""Builds the torch-free program: ``benchmarks/torch_free/build.py [--output build/torch_free/first] [--arch sm_90a]``.

Needs nvcc but no GPU: the program is linked statically with CUDA's runtime, and carried to a machine with a GPU. Objects are
kept beside it by the hash of what goes into them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from check_ptxas import digest, find_nvcc  # noqa: E402


def sources() -> list[Path]:
    """The largest kernels first, so that none of them is compiled alone at the end."""
    kernels = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"), key=lambda path: (path.parent.name != "persistent", path))
    return [*kernels, FOLDER / "main.cu", FOLDER / "plain_product.cu", *sorted((ROOT / "csrc" / "plan").glob("*.cpp"))]


def compile_one(nvcc: str, includes: list[str], archs: list[str], source: Path, folder: Path) -> tuple[Path, float]:
    """(the object, seconds of its compilation); exits with nvcc's output if that fails."""
    codes = [f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}" for arch in archs]
    command = [nvcc, "-std=c++17", "-O3", *codes, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda' / 'device'}"]
    command += [f"-I{FOLDER}", *includes, str(source)]
    start = time.monotonic()
    target = folder / f"{source.stem}.{digest(command)}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        done = subprocess.run([*command, "-c", "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{source.name} does not compile:\n{done.stdout}{done.stderr}")
        partial.replace(target)
    return target, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "torch_free" / "first")
    parser.add_argument("--arch", nargs="+", default=["sm_90a"], help="as nvcc's -arch (sm_90a)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--sources", nargs="+", metavar="NAME", help="only these files, by their names; nothing is linked")
    args = parser.parse_args()
    nvcc, includes = find_nvcc()
    chosen = [path for path in sources() if not args.sources or path.name in args.sources]
    if unknown := set(args.sources or ()) - {path.name for path in chosen}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(compile_one, nvcc, includes, args.arch, path, args.output.parent) for path in chosen]
        objects = []
        for path, job in zip(chosen, jobs, strict=True):
            made, seconds = job.result()
            objects.append(made)
            print(f"{path.relative_to(ROOT)}: {seconds:.1f} s", flush=True)
    if args.sources:
        return
    command = [nvcc, "-cudart=static", *map(str, objects), "-o", str(args.output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"linking failed:\n{done.stdout}{done.stderr}")
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB for {', '.join(args.arch)}")


if __name__ == "__main__":
    main()
