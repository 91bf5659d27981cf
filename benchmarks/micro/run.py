"""Compiles and runs the microbenchmarks: ``python benchmarks/micro/run.py [--output FILE] [NAME ...]``.

Each program prints lines of JSON: what was measured, the value with its unit, and the constant of the cost model
(csrc/plan) that it stands for. --build-only --arch sm_80 sm_90a compiles and runs nothing, without a GPU. nvcc is found
as tests/check_ptxas.py finds it. --programs FOLDER keeps the programs there, and runs those that are there: built
for one --arch on a machine without a GPU, they can be carried to one without nvcc.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from check_ptxas import find_nvcc  # noqa: E402

NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.cu")))
TIMEOUT = 15  # seconds for one program: each takes a few


def build(name: str, arch: str, target: Path, link: bool) -> None:
    """Compiles one program; exits with nvcc's output if that fails."""
    nvcc, includes = find_nvcc()
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        f"-arch={arch}",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'csrc' / 'cuda' / 'device'}",
        f"-I{FOLDER}",
        *includes,
    ]
    command += [] if link else ["-c"]
    done = subprocess.run([*command, str(FOLDER / f"{name}.cu"), "-o", str(target)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}.cu does not compile for {arch}:\n{done.stdout}{done.stderr}")


def run(program: Path) -> tuple[list[dict], str]:
    """(the lines that a program printed, why there are none or no more)."""
    try:
        done = subprocess.run([str(program)], capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as expired:
        out = expired.stdout or b""
        text = out.decode() if isinstance(out, bytes) else out
        return [json.loads(line) for line in text.splitlines()], f"did not end in {TIMEOUT} s"
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr.strip() if done.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--arch", nargs="+", default=["native"], help="as nvcc's -arch (native)")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--output", type=Path, help="append the lines to this file")
    parser.add_argument("--programs", type=Path, help="a folder that keeps the programs, of one --arch")
    args = parser.parse_args()
    if args.programs and len(args.arch) > 1:
        parser.error(f"--programs keeps those of one --arch, got {' '.join(args.arch)}")
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(NAMES)}")
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        place = args.programs or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        for name in args.names or NAMES:
            for arch in args.arch:
                if not (args.programs and (place / name).exists()):
                    build(name, arch, place / name, link=not args.build_only or args.programs is not None)
            if args.build_only:
                print(f"{name}: compiles for {', '.join(args.arch)}", flush=True)
                continue
            lines, error = run(place / name)
            for line in lines:
                rest = ", ".join(f"{k} {v}" for k, v in line.items() if k not in ("benchmark", "value", "unit", "device"))
                print(f"{line['benchmark']:18} {line['value']:10.4g} {line['unit']:32} {rest}", flush=True)
            if error:
                print(f"{name}: {error}", flush=True)
                failed.append(name)
            if args.output and lines:
                with args.output.open("a") as file:
                    file.writelines(json.dumps({"date": datetime.date.today().isoformat()} | x) + "\n" for x in lines)
    if failed:
        print("failed: " + ", ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
