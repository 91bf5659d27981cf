"""Show, fill or forget what is known of the kernel families on GPUs: which passed, which is fastest for which problem."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fused_rnn import _backend
from fused_rnn._kinds import KINDS, number_of_torch_layer
from fused_rnn.bench.cases import DTYPES, PRESETS, BenchCase
from fused_rnn.bench.sides import module_run
from fused_rnn.tuning import here
from fused_rnn.tuning.choice import Problem
from fused_rnn.tuning.record import Choice, Record, entries_of, lines_of_entry
from fused_rnn.tuning.verification import State

SECONDS = 3.0  # for one case


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the tune command."""
    options = parser.add_mutually_exclusive_group(required=True)
    options.add_argument("--list", action="store_true", help="print the records of all devices, drivers and builds")
    options.add_argument("--forget", action="store_true", help="remove them")
    text = (
        "verify the families and choose one for each of the 40 cases of the bench's preset first, on the GPU that is there"
    )
    options.add_argument("--first", action="store_true", help=text)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for all cases of --first (120)")


def main(args: argparse.Namespace) -> None:
    """Prints what is known.

    Raises:
        SystemExit: --first without a GPU, or without kernels for one.
    """
    if args.first:
        return tune_first(args.budget)
    files = here.files()
    if not files:
        print("nothing is recorded")
    for path in files:
        if args.forget:
            path.unlink()
            print(f"removed {path}")
        else:
            print("\n".join(lines_of(path)))


def lines_of(path: Path) -> list[str]:
    """A record as text."""
    lines, scope_before = [str(path)], None
    for scope, entry in sorted(entries_of(path), key=lambda both: (str(both[0]), isinstance(both[1], Choice))):
        if scope != scope_before:
            lines.append(f"  {scope.device}, driver {scope.driver}, build {scope.build}")
            scope_before = scope
        lines += [f"    {line}" for line in lines_of_entry(entry)]
    return lines


def tune_first(budget: float) -> None:
    """Calls the cases until a family is chosen for each, as a user's first calls would."""
    if not torch.cuda.is_available():
        raise SystemExit("tune: --first needs a GPU, and torch sees none here (torch.cuda.is_available() is False)")
    if not _backend.has_cuda_kernels():
        raise SystemExit(f"tune: {_backend.why_not_native('cuda')}; python -m fused_rnn info says how to mend it")
    index, deadline = torch.cuda.current_device(), time.monotonic() + budget
    record = here.record_of(index)
    verifier = here.verifier_of(record, index)
    for family in here.FAMILIES:
        if family != "cudnn" and verifier.verify(family) is State.EXCLUDED:
            print(f"{family} is excluded", flush=True)
    for case in PRESETS["first"].cases():
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"{case!s:58} not tuned: the budget of {budget:g} s was spent", flush=True)
            continue
        module, _ = case.modules("cuda")
        call = module_run(module, case.inputs("cuda"), case.mode)

        def one_call(call: Callable[[], None] = call) -> None:
            call()
            torch.cuda.synchronize()  # its times are there at the next call

        with torch.set_grad_enabled(case.mode != "inference"):
            print(f"{case!s:58} {tuned(one_call, record, problem_of(case).key, min(left, SECONDS))}", flush=True)


def tuned(call: Callable[[], None], record: Record, key: str, seconds: float) -> str:
    """Calls until the record has a choice for the problem; the choice as text, or that there is none after so long."""
    start, calls = time.monotonic(), 0
    while True:
        record.reload()
        choice = record.choice(key)
        took = f"{calls} calls, {time.monotonic() - start:.2f} s"
        if choice is not None and choice.family is not None:
            times = ", ".join(f"{family} {us:g}" for family, us in sorted(choice.us.items(), key=lambda item: item[1]))
            wrong = "".join(f"; not {family}: {reason}" for family, reason in choice.excluded.items())
            return f"{choice.family} ({took}; us a step: {times}{wrong})"
        if time.monotonic() - start >= seconds:
            return f"not chosen yet ({took})"
        call()
        calls += 1


def problem_of(case: BenchCase) -> Problem:
    """What the calls of a case are to the tuner."""
    kind = KINDS[number_of_torch_layer(case.cell)]
    switch: str = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return Problem(
        cell=kind.name, dtype=str(DTYPES[case.dtype]).removeprefix("torch."), tf32=case.dtype == "fp32" and switch == "tf32",
        T=case.T, B=case.B, I=case.I, H=case.H, P=case.H, layers=case.layers, directions=case.directions,
        training=case.mode != "inference", rows="packed" if case.lengths == "ragged" else "dense",
    )  # fmt: skip
