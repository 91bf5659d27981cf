"""Compiles the zoo's generated CUDA kernels with nvcc and writes what ptxas says of them; no GPU needed.

python benchmarks/zoo_ptxas.py --cells LiGRU SLSTM                     # a table of these
python benchmarks/zoo_ptxas.py --markdown results/zoo_ptxas.md         # of all cells, for benchmarks/results

Of each cell, dtype and architecture: kernels, the most registers of a thread, spilled bytes. Beside it the launches of a
step, forward and backward. --families: of these kernels alone. --plans adds the planner's microseconds of a step on an H100,
by each family.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import fused_rnn
from fused_rnn import _settings
from fused_rnn.formula import cuda, cuda_compiler
from fused_rnn.formula.plan import Plan, make_plan

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from check_ptxas import find_nvcc, parse
from zoo import cells

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
# Cell, H, B, dtype: what is planned for an H100.
PLANNED = (
    (fused_rnn.zoo.SLSTM(heads=6), 6 * 128, 16, torch.bfloat16),
    (fused_rnn.zoo.BlockGRU(heads=8), 512, 16, torch.bfloat16),
    (fused_rnn.zoo.DreamerGRU(heads=8), 512, 16, torch.bfloat16),
    (fused_rnn.zoo.LayerNormLSTM(), 512, 16, torch.bfloat16),
    (fused_rnn.zoo.LSTM(), 1024, 64, torch.bfloat16),
    (fused_rnn.zoo.LiGRU(), 1024, 16, torch.float32),
)


def compiled(plan: Plan, dtype: torch.dtype, arch: str, families: list[str]) -> str:
    """ "kernels: most registers, spilled bytes"."""
    nvcc, includes = find_nvcc()
    folders = [part for folder in cuda_compiler.include_directories(rtc=False) for part in ("-I", str(folder))]
    kernels = cuda.kernels_of(plan, families)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "cell.cu"
        source.write_text(cuda.translation_unit(plan, dtype, families))
        command = [nvcc, "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v", *includes, *folders, str(source)]
        done = subprocess.run([*command, "-o", f"{folder}/cell.cubin"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr[-3000:])
    rows = parse(done.stdout + done.stderr)
    assert sorted(row[0] for row in rows) == sorted(kernel.name for kernel in kernels)
    return f"{len(rows)}: {max(row[1] for row in rows)}, {sum(row[-1] for row in rows)}"


def planned() -> list[str]:
    """Microseconds of a step on an H100 by the planner, of each family."""
    heads = ["cell", "dtype", "H", "B", "step: us/step", "launches"]
    for family in cuda.PERSISTENT:
        heads += [f"{family}: us/step", "blocks of a team", "shared memory"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for cell, hidden, batch, dtype in PLANNED:
        layer = fused_rnn.Layer(cell, hidden, hidden, dtype=dtype)
        x = torch.empty(100, batch, hidden, device="meta", dtype=dtype)
        columns = [f"{type(cell).__name__}, {cell.declaration.heads} heads", str(dtype).removeprefix("torch.")]
        columns += [str(hidden), str(batch)]
        for family in ("step", *cuda.PERSISTENT):
            with _settings.use("FUSED_RNN_PLAN", family):
                found = fused_rnn.explain(layer, x, device="H100", show=False).layers[0]
            passes = [plan for plan in (found.forward, found.backward) if plan is not None and plan.family == family]
            columns.append(" + ".join(f"{plan.us_per_step:.2f}" for plan in passes) or "does not fit")
            if family == "step":
                columns.append(" + ".join(str((plan.launches or 0) // 100) for plan in passes))
                continue
            for what in (r"of (\d+) blocks? of", r"(\d+) bytes of shared"):
                columns.append(" + ".join(re.findall(what, plan.text)[0] for plan in passes))
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", nargs="*", help="names; all by default")
    parser.add_argument("--arch", nargs="*", default=["sm_80", "sm_90a"])
    parser.add_argument("--dtypes", nargs="*", default=["fp16", "fp32"], choices=DTYPES)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--families", nargs="*", default=cuda.FAMILIES, choices=cuda.FAMILIES, help="all by default")
    parser.add_argument("--plans", action="store_true", help="also the planner's microseconds of a step")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    columns = [(arch, dtype) for arch in options.arch for dtype in options.dtypes]
    names = ["cell", "launches", *(f"{arch} {dtype}" for arch, dtype in columns)]
    lines = [
        "# Registers of the zoo's generated kernels",
        "",
        f"`benchmarks/zoo_ptxas.py`, {time.strftime('%Y-%m-%d')}. Launches of a step, forward and backward; kernels "
        "of the cell, most registers of a thread, spilled bytes.",
        "",
        f"| {' | '.join(names)} |",
        "|---" * len(names) + "|",
    ]
    print("\n".join(lines), flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, cell in cells().items():
            if options.cells and name not in options.cells:
                continue
            plan = make_plan(cell)
            launches = [max(levels, default=-1) + 2 for levels in (plan.forward_levels, plan.backward_levels)]
            texts = pool.map(
                lambda column, plan=plan: compiled(plan, DTYPES[column[1]], column[0], options.families), columns
            )
            lines.append(f"| {name} | {launches[0]} + {launches[1]} | {' | '.join(texts)} |")
            print(lines[-1], flush=True)
    if options.plans:
        lines += ["", "## Planned for an H100", "", *planned()]
        print("\n".join(lines[-2 - len(PLANNED) :]))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
