"""A cell as CUDA kernels, families ``single``, ``step``, ``cluster`` and ``grid``: what is compiled, and what the host must
know of it.

The text is the cell's struct, the same as for a CPU, and a line for each kernel; csrc/cuda/formula has the kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fused_rnn.formula.cuda_build import PERSISTENT
from fused_rnn.formula.ops import dtype_number
from fused_rnn.formula.plan import Plan
from fused_rnn.formula.writer import PHASE_KINDS, source_of_plan, struct_name

# csrc/plan/math_kind.h's MathKind. Products in float32 are not rounded to TF32.
MATHS = {torch.float64: "kFp64", torch.float32: "kFp32", torch.float16: "kFp16", torch.bfloat16: "kBf16"}


FILE_VERSION = 5  # csrc/cuda/formula/module.cpp
ROLES = (
    "forward",
    "backward",
    "initial",
    "cluster_forward",
    "cluster_backward",
    "grid_forward",
    "grid_backward",
    "single_forward",
)  # csrc/cuda/formula/formula_params.h's FormulaRole
FAMILIES = ("step", "single", *PERSISTENT)
MOST_MEDIUM_SLOTS = 6  # csrc/core/formula.h's kMostMediumSlots
TILES = ("kSmall", "kMedium")  # csrc/plan/step_geometry.h's TileSize


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of csrc/cuda/formula/formula_kernels.cuh."""

    role: int
    segment: int
    tile: int

    @property
    def name(self) -> str:
        return f"{ROLES[self.role]}_{self.segment}_{TILES[self.tile]}"

    @property
    def family(self) -> str:
        """Which family it belongs to."""
        first = ROLES[self.role].split("_")[0]
        return first if first in FAMILIES else "step"


def kernels_of(plan: Plan, families: Sequence[str] = FAMILIES) -> list[Kernel]:
    """The kernels of a cell among those of ``families``.

    Of family ``step`` a segment that makes a product has one of each tile, any other one of the small tile. A persistent
    family has two. ``single`` has one of each tile, or of the small one alone; cells with values of gates have none.
    """
    recurs = bool(plan.cell.declaration.recurrent_gates)
    products = [phase.kind == "product" for phase in plan.cell.phases]

    def segments_of(levels: Sequence[int]) -> list[tuple[int, bool]]:
        """(segment, whether it makes a product): the recurrent product's, then one of each level of phases."""
        of_levels = [
            any(product for product, own in zip(products, levels, strict=True) if own == level)
            for level in range(max(levels, default=-1) + 1)
        ]
        return [*enumerate([recurs, *of_levels])]

    segments = segments_of(plan.forward_levels), segments_of(plan.backward_levels), [(0, recurs)]
    kernels = [
        Kernel(role, segment, tile)
        for role, of_role in enumerate(segments)
        for segment, product in of_role
        for tile in range(1 + product)
    ]
    kernels += [Kernel(role, 0, 0) for role, name in enumerate(ROLES) if name.split("_")[0] in PERSISTENT]
    if not plan.cell.declaration.given_gates:
        tiles = 1 + (len(plan.accumulators) <= MOST_MEDIUM_SLOTS)
        kernels += [Kernel(ROLES.index("single_forward"), 0, tile) for tile in range(tiles)]
    return [kernel for kernel in kernels if kernel.family in families]


def translation_unit(plan: Plan, dtype: torch.dtype, families: Sequence[str] = FAMILIES) -> str:
    """The CUDA C++ of a planned cell's kernels for a dtype."""
    cell, math = f"fused_rnn::formula::{struct_name(plan.cell)}", MATHS[dtype]
    lines = []
    for kernel in kernels_of(plan, families):
        role = ROLES[kernel.role]
        arguments = [cell, math]
        if kernel.family not in PERSISTENT:
            arguments += [str(kernel.segment)] * (role in ("forward", "backward")) + [TILES[kernel.tile]]
        lines.append(f"FUSED_RNN_FORMULA_{role.upper()}({', '.join(arguments)})")
    return "\n".join(
        [
            '#include "cuda/formula/formula_kernels.cuh"',
            "",
            "namespace fused_rnn::formula {",
            "",
            source_of_plan(plan),
            "}  // namespace fused_rnn::formula",
            "",
            *lines,
            "",
        ]
    )


def traits_of(plan: Plan) -> dict[str, int | list[int]]:
    """The fields of csrc/core/formula.h's FormulaTraits, in its order."""
    says = plan.cell.declaration
    return {
        "states": len(says.states),
        "output": says.output,
        "recurrent": says.recurrent,
        "input_gates": len(says.input_gates),
        "recurrent_gates": len(says.recurrent_gates),
        "gradients": len(plan.accumulators),
        "saved": len(plan.saved),
        "parameters": len(plan.parameters),
        "phases": len(plan.phases),
        "input_gradients": list(plan.input_gradients),
        "reads_series": [int(reads) for reads in plan.series],
        "phase_kinds": [PHASE_KINDS[phase.kind] for phase in plan.cell.phases],
        "forward_levels": list(plan.forward_levels),
        "backward_levels": list(plan.backward_levels),
    }


def flat_traits(plan: Plan) -> list[int]:
    """The same as a list, lists at their places."""
    numbers: list[int] = []
    for fact in traits_of(plan).values():
        numbers += fact if isinstance(fact, list) else [fact]
    return numbers


def header_of(plan: Plan, dtype: torch.dtype, capability: int, families: Sequence[str] = FAMILIES) -> bytes:
    """The first line of a file of compiled kernels (csrc/cuda/formula/driver.h): integers; behind it comes the code."""
    numbers: list[int] = [FILE_VERSION, dtype_number(dtype), capability]
    numbers += flat_traits(plan)
    kernels = kernels_of(plan, families)
    numbers.append(len(kernels))
    for kernel in kernels:
        numbers += [kernel.role, kernel.segment, kernel.tile]
    return (" ".join(map(str, numbers)) + "\n").encode()
