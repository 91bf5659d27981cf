"""The cases of a kernel family, run in a child process: `python -m fused_rnn.tuning.cases FAMILY DEVICE`.

Of every kernel that the planner takes of the family on this device, the smallest of some sizes, forward and backward,
compared with the reference in float64. What it prints: verification.py.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn import _settings, functional, use_backend
from fused_rnn._explain import planner
from fused_rnn._kinds import KINDS, Kind

HIDDEN = (17, 33, 66, 130, 256, 512, 640, 1026)
BATCH = (1, 9, 17, 130)
STEPS = {"single": 1}  # else 6
ARITHMETIC = (
    (torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.bfloat16, False), (torch.float64, False),
)  # fmt: skip
# (outputs, gradients): the largest error allowed, over the largest value, at least 1: some units in the last place. TF32 has
# float16's 10 bits.
ALLOWED = {
    torch.float64: (1e-13, 1e-12), torch.float32: (4e-6, 2e-5), torch.float16: (4e-3, 2e-2), torch.bfloat16: (3e-2, 1.2e-1),
}  # fmt: skip


SECOND_ORDER = (torch.float32, torch.float64)  # whose second derivatives are kernels of family step


class Case(NamedTuple):
    """One layer, with lengths and resets but for `single`."""

    kind: Kind
    dtype: torch.dtype
    tf32: bool
    T: int
    B: int
    I: int  # noqa: E741
    H: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind.name} T={self.T} B={self.B} I={self.I} H={self.H} {dtype}{' TF32' * self.tf32}"

    def plans(self, family: str, device: Mapping[str, int]) -> list[dict[str, Any]]:
        """Of forward and backward; ValueError with the reason where the family cannot serve the case."""
        problem = {
            "cell": self.kind.name, "dtype": str(self.dtype).removeprefix("torch."), "T": self.T, "B": self.B, "I": self.I,
            "H": self.H, "ragged": self.T > 1, "training": True, "allow_tf32": self.tf32, "device": dict(device),
        }  # fmt: skip
        return [planner().plan(**problem, backward=b, forced=family) for b in (False, True)]


def kernels(plan: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What differs in the code that runs."""
    if held := plan.get("persistent"):
        units = 0 if plan["family"] == "block" else held["units"]  # a block of that family takes any number
        return [(held["math"], units, held["row_tiles"] > 1, held["weight_bytes_in_smem"] > 0, held["launches"] > 1)]
    if plan["products"]:  # cuBLAS takes kernels by sizes and by how rows are aligned
        sizes = [(k["grid"][0] > 1, min(k["grid"][1] // 4, 2)) for k in plan["kernels"]]
        return [(k["name"], k["math"], *size) for k, size in zip(plan["kernels"], sizes, strict=True)]
    return [(k["name"], k["math"], k["tile"]) for k in plan["kernels"]]


def cases(family: str, device: Mapping[str, int]) -> Iterator[Case]:
    """The smallest case of each kernel; nothing where the family serves none on this device."""
    sizes = sorted(itertools.product(HIDDEN, BATCH), key=lambda size: size[0] * size[0] * size[1])
    for kind, (dtype, tf32) in itertools.product(KINDS, ARITHMETIC):
        seen: set[tuple[Any, ...]] = set()
        for hidden, batch in sizes:
            case = Case(kind, dtype, tf32, STEPS.get(family, 6), batch, 8, hidden)
            try:
                plans = case.plans(family, device)
            except ValueError:
                continue
            found = {(backward, kernel) for backward, plan in enumerate(plans) for kernel in kernels(plan)}
            if not found <= seen:
                seen |= found
                yield case


def error_of(case: Case, device: str, second: bool = False) -> float:
    """The largest error over the allowed one, of outputs, final states and all gradients, against float64.

    second: of the gradients' own derivatives too, whose products with the gradients' grads are scans of tangents and of dual
    numbers.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1).to(case.dtype).to(device)

    rows, scale = case.kind.gates * case.H, case.H**-0.5
    weights = [uniform(rows, width) * scale for width in (case.I, case.H)] + [uniform(rows) * scale for _ in range(2)]
    if case.kind.jumps:  # at 0: biases keep the arguments away from there
        weights = [*(w / 4 for w in weights[:2]), *(2 * b.sign() for b in weights[2:3]), weights[3]]
    tensors = [uniform(case.T, case.B, case.I), *weights]
    tensors += [uniform(1, case.B, case.H) for _ in range(1 + case.kind.has_c)]
    gradients = [uniform(case.T, case.B, case.H)] + [uniform(1, case.B, case.H) for _ in range(1 + case.kind.has_c)]
    lengths = resets = None
    if case.T > 1:
        lengths = torch.randint(1, case.T + 1, (case.B,), generator=generator).to(device)
        resets = (torch.rand((case.T, case.B), generator=generator) < 0.2).to(device)

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).detach().requires_grad_() for t in tensors]
        x, w, states = leaves[0], leaves[1:5], leaves[5:]
        options: dict[str, Any] = {"lengths": lengths, "resets": resets}
        last: tuple[Tensor, ...]
        if case.kind.has_c:
            y, last = functional.lstm(x, w, (states[0], states[1]), **options)
        elif case.kind.nonlinearity is None:
            y, h_n = functional.gru(x, w, states[0], **options)
            last = (h_n,)
        else:
            y, h_n = functional.rnn(x, w, states[0], nonlinearity=case.kind.nonlinearity, **options)
            last = (h_n,)
        results, given = [y, *last], [g.to(dtype).requires_grad_(second) for g in gradients]
        grads = torch.autograd.grad(results, leaves, given, create_graph=second)
        found = [t.detach() for t in (*results, *grads)]
        if not second:
            return found
        v = [t.to(dtype) for t in tensors]
        again = torch.autograd.grad(grads, (*leaves, *given), v, materialize_grads=True)
        return [*found, *again]

    with use_backend("reference"):
        expected = run(torch.float64)
    actual = run(case.dtype)
    of_dtype = torch.float16 if case.tf32 else case.dtype
    growth = max(1.0, math.sqrt(case.H / 32))  # the relative error of a sum of k roundings grows with sqrt(k)
    worst = 0.0
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        allowed = ALLOWED[of_dtype][index >= 2 + case.kind.has_c] * growth
        error = float((a.double() - e).abs().max() / e.abs().max().clamp(min=1)) / allowed
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst


def run_cases(family: str, device: str, described: Mapping[str, int]) -> None:
    """Runs the cases of a family and prints what verification.py reads.

    Args:
        family: its name.
        device: where the tensors lie.
        described: the device as the planner has it.
    """
    count = 0
    for case in cases(family, described):
        _print({"case": str(case)})
        try:
            with _settings.use("FUSED_RNN_PLAN", family), _tf32(case.tf32):
                error = error_of(case, device, second=family == "step" and case.dtype in SECOND_ORDER)
        except torch.OutOfMemoryError as error:
            return _print({"cannot": f"no memory for {case}: {error}"})
        except RuntimeError as error:
            return _print({"case": str(case), "raised": str(error)[:500]})
        _print({"case": str(case), "error": error})
        count += 1
    _print({"end": count})


class _tf32:
    """A block in which recurrent layers may use TF32, or may not."""

    def __init__(self, allow: bool) -> None:
        self._allow = allow

    def __enter__(self) -> None:
        self._before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = self._allow

    def __exit__(self, *_: object) -> None:
        torch.backends.cudnn.allow_tf32 = self._before


def _print(fields: Mapping[str, Any]) -> None:
    print(json.dumps(fields), flush=True)


def main(arguments: Sequence[str]) -> None:
    family, device = arguments
    if not torch.cuda.is_available():
        return _print({"cannot": "no GPU is visible"})
    torch.cuda.set_device(device)
    run_cases(family, device, planner().cuda_device(torch.cuda.current_device()))


if __name__ == "__main__":
    main(sys.argv[1:])
