"""The cases of a kernel family, run in a child process: `python -m fused_rnn.tuning.cases FAMILY DEVICE [FEATURE...]`.

Of every kernel that the planner takes of the family on this device, the smallest of some sizes, forward and backward,
compared with the reference in float64; then those of what only some calls have, or of the features that are named alone.
What it prints: verification.py.
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
from fused_rnn._recipe import Recipe, Rows, StepOptions
from fused_rnn.tuning.verification import FEATURES

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
STEPS_OPTIONS = ("zoneout", "recurrent_dropout", "state_clip", "reset_state", "every_c")  # of FEATURES


class Case(NamedTuple):
    """One layer, with lengths and resets but for `single`."""

    kind: Kind
    dtype: torch.dtype
    tf32: bool
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int = 0  # of a projection
    packed: bool = False  # and in both directions
    options: tuple[str, ...] = ()  # of STEPS_OPTIONS
    second: bool = False  # derivatives of the gradients too

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        more = f" P={self.P}" * bool(self.P) + " packed in both directions" * self.packed
        more += "".join(f" {option}" for option in self.options) + " second derivatives" * self.second
        return f"{self.kind.name} T={self.T} B={self.B} I={self.I} H={self.H} {dtype}{' TF32' * self.tf32}{more}"

    @property
    def features(self) -> tuple[str, ...]:
        """Of FEATURES: what the family does not serve where the case fails."""
        return ("second_order",) if self.second else ("projection",) * bool(self.P) + self.options

    @property
    def rounds(self) -> bool:
        """Whether products are rounded to 16 bits or nearly so: much may then change where a derivative jumps."""
        return self.tf32 or self.dtype.itemsize == 2

    def may_have(self, option: str) -> bool:
        if option == "every_c":
            return self.kind.has_c
        return not (self.rounds and (option == "state_clip" or self.kind.jumps))

    def plans(self, family: str, device: Mapping[str, int]) -> list[dict[str, Any]]:
        """Of forward and backward; ValueError with the reason where the family cannot serve the case."""
        problem = {
            "cell": self.kind.name, "dtype": str(self.dtype).removeprefix("torch."), "T": self.T, "B": self.B, "I": self.I,
            "H": self.H, "P": self.P or self.H, "D": 1 + self.packed, "ragged": self.T > 1, "training": True,
            "allow_tf32": self.tf32, "device": dict(device),
        }  # fmt: skip
        if self.second:
            return [planner().plan(**problem, backward=b, forced=family, dual=True) for b in (False, True)]
        steps, every = bool({*self.options} - {"every_c"}), "every_c" in self.options  # the latter's gradients alone
        return [planner().plan(**problem, backward=b, forced=family, modified=steps or (every and b)) for b in (False, True)]


def kernels(plan: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What differs in the code that runs."""
    if held := plan.get("persistent"):
        units = 0 if plan["family"] == "block" else held["units"]  # a block of that family takes any number
        return [(held["math"], units, held["row_tiles"] > 1, held["weight_bytes_in_smem"] > 0, held["launches"] > 1)]
    if plan["products"]:  # cuBLAS takes kernels by sizes and by how rows are aligned
        sizes = [(k["grid"][0] > 1, min(k["grid"][1] // 4, 2)) for k in plan["kernels"]]
        return [(k["name"], k["math"], *size) for k, size in zip(plan["kernels"], sizes, strict=True)]
    return [(k["name"], k["math"], k["tile"]) for k in plan["kernels"]]


def cases(family: str, device: Mapping[str, int], features: Sequence[str] | None = None) -> Iterator[Case]:
    """The smallest case of each kernel; nothing where the family serves none on this device.

    Args:
        features: those that are left of FEATURES, whose cases alone follow; None: first the cases without one, then all.
    """
    steps, most = STEPS.get(family, 6), 2 if family == "gemm" else None  # whose kernels are the same for all sizes
    arithmetic = [(kind, *types) for kind, types in itertools.product(KINDS, ARITHMETIC)]
    plain = [Case(*one, steps, 0, 8, 0) for one in arithmetic]
    some = [case for case in plain if case.dtype in (torch.float32, torch.float16) and not case.tf32]
    if features is None:
        for case in plain:
            yield from _smallest(case, family, device)
        for case in some if steps > 1 else ():
            yield from _smallest(case._replace(packed=True), family, device, most=1)
    left = FEATURES if features is None else features
    if "projection" in left:
        for case in plain:
            if case.kind.may_project:
                yield from _smallest(case._replace(P=1), family, device, most)
    options = tuple(option for option in STEPS_OPTIONS if option in left)
    for option, case in itertools.product(options, some if steps > 1 else ()):
        if case.may_have(option):
            yield from _smallest(case._replace(options=(option,)), family, device, most=1)
    for case in plain if steps > 1 else ():
        if together := tuple(option for option in options if case.may_have(option)):
            yield from _smallest(case._replace(options=together), family, device, most)
    if "second_order" in left and family == "step":
        for case in plain:
            if case.dtype in SECOND_ORDER:
                yield from _smallest(case._replace(second=True), family, device)
                yield from _smallest(case._replace(second=True, options=("reset_state",)), family, device, most=1)
                if case.kind.may_project:
                    yield from _smallest(case._replace(second=True, P=1), family, device)


def _smallest(like: Case, family: str, device: Mapping[str, int], most: int | None = None) -> Iterator[Case]:
    """Cases like this one, of the sizes that are the smallest of each kernel; at most so many of them."""
    sizes = sorted(itertools.product(HIDDEN, BATCH), key=lambda size: size[0] * size[0] * size[1])
    seen: set[tuple[Any, ...]] = set()
    for hidden, batch in sizes:
        case = like._replace(B=batch, H=hidden, P=hidden // 2 if like.P else 0)
        if most is not None and batch == 1:
            continue  # rows that differ
        try:
            plans = case.plans(family, device)
        except ValueError:
            continue
        found = {(backward, kernel) for backward, plan in enumerate(plans) for kernel in kernels(plan)}
        if not found <= seen:
            seen |= found
            yield case
            if most is not None:
                most -= 1
                if not most:
                    return


class _Data(NamedTuple):
    """Of a case, in its dtype. Gradients are of the results that differentiate."""

    leaves: list[Tensor]  # x, then the weights of each direction, the states and what resets put in their place
    rows: Rows  # without what resets put
    batch_sizes: Tensor | None
    gradients: list[Tensor]
    products: list[Tensor]  # with the gradients, whose derivatives are taken


def _data(case: Case, device: str) -> _Data:
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1).to(case.dtype).to(device)

    def flags(*shape: int, share: float) -> Tensor:
        return (torch.rand(shape, generator=generator) < share).to(device)

    kind, directions, out = case.kind, 1 + case.packed, case.P or case.H
    of_states = [out, case.H][: kind.states]
    lengths = torch.randint(1, case.T + 1, (case.B,), generator=generator)
    lengths[0] = case.T
    batch_sizes = (lengths[:, None] > torch.arange(case.T)).sum(0) if case.packed else None
    count = case.T * case.B if batch_sizes is None else int(batch_sizes.sum())
    memory = (case.T, case.B) if batch_sizes is None else (count,)
    leaves = [uniform(*memory, case.I)]
    scale = case.H**-0.5
    for _ in range(directions):
        weights = [uniform(kind.gates * case.H, width) * scale for width in (case.I, out)]
        weights += [uniform(kind.gates * case.H) * scale for _ in range(2)]
        if kind.jumps:  # at 0: biases keep the arguments away from there
            weights = [*(w / 4 for w in weights[:2]), *(2 * b.sign() for b in weights[2:3]), weights[3]]
        leaves += weights + [uniform(out, case.H) * scale for _ in range(bool(case.P))]
    leaves += [uniform(directions, case.B, size) for size in of_states]
    resets = None
    if case.T > 1:
        resets = flags(*memory, share=0.2)
    if "reset_state" in case.options:
        leaves += [uniform(directions, 1, size) for size in of_states]
    options = StepOptions()
    if "zoneout" in case.options:
        of_c = 0.25 if kind.has_c else None  # a share of the unit's value, where h keeps it or not
        options = options._replace(zoneout_h=flags(directions, count, case.H, share=0.3), zoneout_c=of_c)
    if "recurrent_dropout" in case.options:
        factors = [2.0 * flags(directions, case.B, size, share=0.5) for size in (out, case.H)]
        of_candidate = factors[1].to(case.dtype) if kind.has_gates else None
        options = options._replace(product=factors[0].to(case.dtype), candidate=of_candidate)
    if "state_clip" in case.options:
        options = options._replace(clip=0.4)
    dense = lengths.to(device) if case.T > 1 and batch_sizes is None else None
    gradients = [uniform(*memory, directions * out)] + [uniform(directions, case.B, size) for size in of_states]
    if "every_c" in case.options:
        gradients += [uniform(case.T, directions, case.B, size) for size in of_states]
    products = [uniform(*t.shape) for t in (*leaves, *gradients)] if case.second else []
    return _Data(leaves, Rows(dense, None, resets, (), options), batch_sizes, gradients, products)


def error_of(case: Case, device: str) -> float:
    """The largest error over the allowed one, of outputs, final states and all gradients, against float64.

    Of case.second also of the gradients' own derivatives, whose products with the gradients' grads are scans of tangents and
    of dual numbers.
    """
    data, kind, directions = _data(case, device), case.kind, 1 + case.packed
    recipe = Recipe(KINDS.index(kind), 1, True, bool(case.packed), all_states="every_c" in case.options)
    count = (4 + bool(case.P)) * directions

    def run(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [t.to(dtype).detach().requires_grad_() for t in data.leaves]
        x, weights, others = leaves[0], leaves[1 : 1 + count], leaves[1 + count :]
        put, masks = tuple(others[kind.states :]), data.rows.options
        factors = [t if t is None else t.to(dtype) for t in (masks.product, masks.candidate)]
        masks = masks._replace(product=factors[0], candidate=factors[1])
        rows = data.rows._replace(reset_states=put, options=masks)
        y, last = functional.run_rnn(recipe, x, others[: kind.states], weights, data.batch_sizes, rows)
        results, given = [y, *last], [g.to(dtype).requires_grad_(case.second) for g in data.gradients]
        grads = torch.autograd.grad(results, leaves, given, create_graph=case.second)
        found = [t.detach() for t in results], [t.detach() for t in grads]
        if case.second:
            wanted = [t.to(dtype) for t in data.products[: len(grads)]]
            found[1].extend(torch.autograd.grad(grads, (*leaves, *given), wanted, materialize_grads=True))
        return found

    with use_backend("reference"):
        expected = run(torch.float64)
    actual = run(case.dtype)
    of_dtype = torch.float16 if case.tf32 else case.dtype
    growth = max(1.0, math.sqrt(case.H / 32))  # the relative error of a sum of k roundings grows with sqrt(k)
    worst = 0.0
    for allowed, found, wanted in zip(ALLOWED[of_dtype], actual, expected, strict=True):
        for a, e in zip(found, wanted, strict=True):
            error = float((a.double() - e).abs().max() / e.abs().max().clamp(min=1)) / (allowed * growth)
            if math.isnan(error):
                return error
            worst = max(worst, error)
    return worst


def run_cases(family: str, device: str, described: Mapping[str, int], features: Sequence[str] | None = None) -> None:
    """Runs the cases of a family and prints what verification.py reads.

    Args:
        family: its name.
        device: where the tensors lie.
        described: the device as the planner has it.
        features: as of ``cases``.
    """
    count = 0
    for case in cases(family, described, features):
        named = {"case": str(case), **({"features": case.features} if case.features else {})}
        _print(named)
        try:
            with _settings.use("FUSED_RNN_PLAN", family), _tf32(case.tf32):
                error = error_of(case, device)
        except torch.OutOfMemoryError as error:
            return _print({"cannot": f"no memory for {case}: {error}"})
        except RuntimeError as error:
            return _print({**named, "raised": str(error)[:500]})
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
    family, device, *left = arguments
    if not torch.cuda.is_available():
        return _print({"cannot": "no GPU is visible"})
    torch.cuda.set_device(device)
    run_cases(family, device, planner().cuda_device(torch.cuda.current_device()), left or None)


if __name__ == "__main__":
    main(sys.argv[1:])
