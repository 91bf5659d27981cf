"""What the planner says of the benchmark's grid, as Markdown: ``python benchmarks/plans.py [--device H100 A100]``.

Needs no GPU. For every case forward / backward: each family that could serve it, with its blocks, shared memory of a block,
registers of a thread that hold weights, and the microseconds per step of the cost model, which is made of published figures
and no measurement.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fused_rnn
from fused_rnn._explain import DEVICES
from fused_rnn.bench.cases import CELLS, DTYPES, GPU_SIZES
from fused_rnn.bench.sides import forced_plan

FAMILIES = ("block", "cluster", "grid", "step", "gemm")


def planned(cell: str, dtype: str, batch: int, hidden: int, device: str, family: str) -> tuple[str, float | None]:
    """(a table cell, microseconds of both passes); why not, and None, where the family cannot serve the case."""
    module = getattr(fused_rnn, cell)(hidden, hidden, device="meta", dtype=DTYPES[dtype])
    x = torch.empty(256, batch, hidden, device="meta", dtype=DTYPES[dtype])
    try:
        with forced_plan(family):
            layer = fused_rnn.explain(module, x, device=device, training=True, show=False).layers[0]
    except ValueError as reason:
        return str(reason).split(f"{family} ", 2)[-1], None
    plans = [plan for plan in (layer.forward, layer.backward) if plan is not None]
    us = " / ".join(f"{plan.us_per_step:.2f}" for plan in plans)
    total = sum(plan.us or 0.0 for plan in plans)
    if family in ("step", "gemm"):
        return us, total
    held = [plan.kernels[-1] for plan in plans]
    blocks = " / ".join(f"{kernel.grid[0]}x{kernel.grid[1]}" for kernel in held)
    smem = " / ".join(f"{kernel.smem_bytes / 1024:.0f}" for kernel in held)
    registers = " / ".join(str(kernel.weight_registers) for kernel in held)
    return f"{us} us; {blocks} blocks; {smem} KiB; {registers} registers", total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", nargs="+", choices=tuple(DEVICES), default=["H100", "A100"])
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "fp16", "bf16"), default=["fp16", "fp32"])
    options = parser.parse_args()
    print("# Plans of the benchmark's grid\n")
    print("`python benchmarks/plans.py`: T=256, I=H, one layer, forward / backward. Times are the cost model's and not")
    print("measured. Blocks: of a group x groups. KiB: shared memory of a block. Registers: of a thread, that hold weights.")
    for device in options.device:
        print(f"\n## {device}\n\n| case | " + " | ".join(FAMILIES) + " (us) | cheapest |")
        print("|---" * (len(FAMILIES) + 2) + "|")
        for cell, dtype, (batch, hidden) in itertools.product(options.cell, options.dtype, GPU_SIZES):
            made = {family: planned(cell, dtype, batch, hidden, device, family) for family in FAMILIES}
            possible = {family: us for family, (_, us) in made.items() if us is not None}
            texts = [text if family in possible else f"no: {text}" for family, (text, _) in made.items()]
            best = min(possible, key=possible.__getitem__)
            print(f"| {cell} {dtype} B={batch} H={hidden} | " + " | ".join(texts) + f" | {best} |")


if __name__ == "__main__":
    main()
