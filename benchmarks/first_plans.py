"""What serves the 40 cases of the first minutes on a GPU, as Markdown: ``python benchmarks/first_plans.py [--device H100]``.

Needs no GPU. For every case of the bench's preset ``first``, under torch's default switches: cuDNN, which serves while no
family is verified on the device, with the algorithm that torch asks it for; and the family that the cost model expects to be
the fastest once all are verified. One family serves all layers and both passes of a call, as in fused_rnn/tuning.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fused_rnn
from fused_rnn._settings import FAMILIES
from fused_rnn.bench.cases import DTYPES, BenchCase, first_cases
from fused_rnn.bench.sides import forced_plan
from fused_rnn.explanation import LayerPlan, PassPlan


class Sheet(NamedTuple):
    """What a vendor says of a device, beside what the planner has of it."""

    sms: int
    clock_mhz: int  # boost
    l2_mb: int
    gb_per_s: int  # of the memory
    source: str


SHEETS = {
    "H100": Sheet(132, 1980, 50, 3350, "NVIDIA H100 data sheet and architecture white paper (SXM5); clock: nvidia-smi"),
    "H200": Sheet(132, 1980, 50, 4800, "NVIDIA H200 data sheet (SXM); SMs, clock and L2 are an H100's"),
    "A100": Sheet(108, 1410, 40, 2039, "NVIDIA A100 data sheet and architecture white paper (SXM4, 80 GB)"),
    "RTX 4090": Sheet(128, 2520, 72, 1008, "NVIDIA Ada GPU architecture white paper, appendix A"),
    "B200": Sheet(148, 1965, 126, 8000, "memory: NVIDIA DGX B200 data sheet; the rest: device queries of users"),
}


class Expected(NamedTuple):
    """A family's plan of a case."""

    family: str
    us: float  # of the call: all layers, both passes
    layers: tuple[LayerPlan, ...]


@contextlib.contextmanager
def default_switches() -> Iterator[None]:
    """torch's: TF32 in recurrent layers alone. Importing torch.testing may have frozen them."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        yield


def expected(case: BenchCase, device: str) -> tuple[list[Expected], dict[str, str]]:
    """(the families that can serve a case, the least time first; why the others cannot)."""
    options = {"num_layers": case.layers, "bidirectional": case.bidirectional, "device": "meta", "dtype": DTYPES[case.dtype]}
    module = getattr(fused_rnn, case.cell)(case.I, case.H, **options)
    x = torch.empty(case.T, case.B, case.I, dtype=DTYPES[case.dtype], device="meta")
    if case.lengths == "ragged":
        lengths = torch.linspace(case.T, 1, case.B).long()
        x = torch.nn.utils.rnn.pack_padded_sequence(torch.empty(case.T, case.B, case.I, dtype=DTYPES[case.dtype]), lengths)
    able, unable = [], {}
    for family in FAMILIES:
        try:
            with forced_plan(family), default_switches():
                layers = fused_rnn.explain(module, x, device=device, training=case.mode != "inference", show=False).layers
        except ValueError as reason:
            unable[family] = str(reason).split(f"{family} ", 2)[-1]
            continue
        able.append(Expected(family, sum(plan.us or 0.0 for layer in layers for plan in passes(layer)), layers))
    return sorted(able, key=lambda one: one.us), unable


def passes(layer: LayerPlan) -> list[PassPlan]:
    return [plan for plan in (layer.forward, layer.backward) if plan is not None]


def steps(one: Expected) -> str:
    """Microseconds of a step of the last layer, forward / backward."""
    return " / ".join(f"{plan.us_per_step:.2f}" for plan in passes(one.layers[-1]))


def algorithm(one: Expected) -> str:
    """What torch asks cuDNN for; both passes are told where they differ."""
    asked = [(plan.reason or "").split("torch asks cuDNN for its ")[-1].split("; ")[0] for plan in passes(one.layers[-1])]
    return "; backward: ".join(dict.fromkeys(text.replace(" algorithm:", ":") for text in asked))


def reason(able: list[Expected], unable: dict[str, str]) -> str:
    """Why the first of the families: how it lies on the chip, and what the others would take or lack."""
    first, *others = able
    held = passes(first.layers[-1])[0].kernels
    texts = []
    if held and held[-1].persistent:
        blocks, groups, _ = held[-1].grid
        kept = "registers and shared memory" if held[-1].weight_bytes_in_smem else "registers"
        texts.append(f"weights in the {kept} of {groups} x {blocks} block{'s' * (groups * blocks > 1)}")
    elif held:
        product = "a product by cuBLAS and " * (first.family == "gemm")
        texts.append(f"{product}a launch of {held[-1].blocks} blocks a step")
    texts += [f"{one.family} {one.us:.0f}" for one in others]
    texts += [f"no {family}: {why}" for family, why in unable.items() if family != "single"]
    return "; ".join(texts)


def row(case: BenchCase, device: str) -> str:
    able, unable = expected(case, device)
    default = next(one for one in able if one.family == "cudnn")
    best = able[0]
    columns = (str(case), algorithm(default), f"{steps(default)} ({default.us:.0f})", f"**{best.family}**")
    return "| " + " | ".join((*columns, f"{steps(best)} ({best.us:.0f})", reason(able, unable))) + " |"


HEAD = """# What serves the first 40 cases

`python benchmarks/first_plans.py`. Nothing here is measured. While no family is verified on the device, cuDNN serves every
case. `verified` is the family that the cost model expects to be the fastest once all are verified; the times of the user's
own calls then decide.

us: of a step, forward / backward; in brackets of the call, without the products after backward, alike for all families.
cuDNN's times are published for an H100 and taken for every device: 0.45 to 2.3 us a step for its small-H algorithm (between
them by the number of weights, a guess), 1.96 / 3.1 for the persistent one, 7 / 10 or more for the standard one.
The cost model takes all SMs to run at 1.7 GHz, and weights to lie in L2 or, where they do not fit there, to come from memory
(csrc/plan/machine.h). Blocks: groups x blocks of a group.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", nargs="+", choices=tuple(SHEETS), default=list(SHEETS))
    parser.add_argument("--limit", type=int, help="only so many of the cases")
    options = parser.parse_args()
    print(HEAD)
    print("| device | SMs | MHz | L2, MB | memory, GB/s | source |\n|---|---|---|---|---|---|")
    for device in options.device:
        sheet = SHEETS[device]
        print(f"| {device} | {' | '.join(map(str, sheet))} |")
    for device in options.device:
        print(f"\n## {device}\n\n| case | cuDNN's algorithm: why | us | verified | us | why, and the others' us |")
        print("|---" * 6 + "|")
        for case in list(first_cases())[: options.limit]:
            print(row(case, device))


if __name__ == "__main__":
    main()
