"""A cell as CUDA kernels, family ``step``: what is compiled, by nvcc or NVRTC, and what the host must know of it.

The text is the cell's struct, the same as for a CPU, and a line for each kernel; csrc/cuda/formula has the kernels.
"""

from __future__ import annotations

import torch

from fused_rnn.formula.plan import Plan
from fused_rnn.formula.writer import PHASE_KINDS, source_of_plan, struct_name

# csrc/plan/math_kind.h's MathKind. Products in float32 are not rounded to TF32.
MATHS = {torch.float64: "kFp64", torch.float32: "kFp32", torch.float16: "kFp16", torch.bfloat16: "kBf16"}


def kernel_names(phases: int) -> list[tuple[int, int, str]]:
    """(role, segment, name) of every kernel; each has one of the small and one of the medium tile, <name>_small and
    <name>_medium. role: csrc/cuda/formula/formula_params.h's FormulaRole."""
    segments = range(phases + 1)
    return [*((0, k, f"forward_{k}") for k in segments), *((1, k, f"backward_{k}") for k in segments), (2, 0, "initial")]


def translation_unit(plan: Plan, dtype: torch.dtype) -> str:
    """The CUDA C++ of a planned cell's kernels for a dtype."""
    cell, math = f"fused_rnn::formula::{struct_name(plan.cell)}", MATHS[dtype]
    segments = range(len(plan.phases) + 1)
    return "\n".join(
        [
            '#include "cuda/formula/formula_kernels.cuh"',
            "",
            "namespace fused_rnn::formula {",
            "",
            source_of_plan(plan),
            "}  // namespace fused_rnn::formula",
            "",
            *(f"FUSED_RNN_FORMULA_FORWARD({cell}, {math}, {k})" for k in segments),
            *(f"FUSED_RNN_FORMULA_BACKWARD({cell}, {math}, {k})" for k in segments),
            f"FUSED_RNN_FORMULA_INITIAL({cell}, {math})",
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
    }
