"""Random calls of layers and cells against oracle.py. test_fuzz.py runs this in a process of its own.

    FUSED_RNN_FUZZ=SEED[:FIRST[:LENGTH]] python tests/hardening/fuzz.py

runs cases FIRST, FIRST + 1 ... of a seed; LENGTH is their number (1000) or a time (90s, 10m, 3h). Each case depends on the
seed and on its own number alone, so that SEED:NUMBER:1 runs a failed one again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import oracle
import torch
from cases import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE
from fuzz_cases import LAYOUTS, Arguments, Case, Draw, draw_arguments, draw_case, place
from process_state import use_instruction_set, use_threads
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn import functional

MOST_FAILURES = 5


def call(case: Case, a: Arguments) -> list[Tensor]:
    """[y, h_n] or [y, h_n, c_n] of the library; of a cell [h] or [h, c]."""
    lstm = case.kind == "LSTM"
    hx: Any = None if a.h0 is None else (a.h0, a.c0) if lstm else a.h0
    name = case.kind if lstm or case.kind == "GRU" else "RNN"
    nonlinearity = {} if name != "RNN" else {"nonlinearity": case.kind.removeprefix("RNN_").lower()}
    if case.form == "cell function":
        result = getattr(functional, f"{name.lower()}_cell")(a.x, hx, *a.weights, **nonlinearity)
        return list(result) if lstm else [result]
    if case.is_module:
        module = make_module(case, a, name, nonlinearity)
        if case.is_cell:
            result = module(a.x, hx)
            return list(result) if lstm else [result]
        given: Any = a.x if a.batch_sizes is None else PackedSequence(a.x, a.batch_sizes)
        y, states = module(given, hx)
        y = y.data if isinstance(y, PackedSequence) else y
    else:
        y, states = getattr(functional, name.lower())(
            a.x,
            a.weights,
            hx,
            num_layers=case.layers,
            has_biases=case.has_biases,
            bidirectional=case.bidirectional,
            batch_first=case.batch_first,
            batch_sizes=a.batch_sizes,
            lengths=a.lengths if case.lengths else None,
            resets=a.resets,
            **nonlinearity,
        )
    return [y, *states] if lstm else [y, states]


def make_module(case: Case, a: Arguments, name: str, options: dict[str, Any]) -> nn.Module:
    """A module whose parameters are the given weights, in their layouts."""
    options = {**options, "bias": case.has_biases}
    if case.is_cell:
        module = getattr(fused_rnn, f"{name}Cell")(case.inputs, case.hidden, device="meta", **options)
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"][: len(a.weights)]
    else:
        options |= {"num_layers": case.layers, "bidirectional": case.bidirectional, "batch_first": case.batch_first}
        options |= {"proj_size": case.proj} if case.proj else {}
        module = getattr(fused_rnn, name)(case.inputs, case.hidden, device="meta", **options)
        names = list(module._flat_weights_names)
    for parameter, weight in zip(names, a.weights, strict=True):
        setattr(module, parameter, weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False))
    return module


def expect(case: Case, a: Arguments) -> tuple[list[Tensor], list[Tensor], float]:
    """What call returns and the leaves of a.tensors() that it depends on, in float64; how near a ReLU came to 0."""
    leaves = {id(t): t.detach().resolve_neg().double().requires_grad_() for t in a.tensors()}

    def exact(t: Tensor) -> Tensor:
        return leaves[id(t)]

    steps, rows, d = case.steps, case.rows, case.directions
    x, resets = exact(a.x), a.resets
    if a.batch_sizes is not None:
        place_of = torch.full((steps, rows), -1)
        count = 0
        for t, size in enumerate(a.batch_sizes.tolist()):
            place_of[t, :size] = torch.arange(count, count + size)
            count += size
        x = torch.where((place_of >= 0)[:, :, None], x[place_of.clamp_min(0)], 0)
        resets = None if resets is None else resets[place_of.clamp_min(0)]
    elif case.is_cell:
        x = x.reshape(1, rows, case.inputs)
    else:
        x = x.unsqueeze(0 if case.batch_first else 1) if case.unbatched else x
        x = x.transpose(0, 1) if case.batch_first else x
        if resets is not None:
            resets = resets.unsqueeze(0 if case.batch_first else 1) if case.unbatched else resets
            resets = resets.t() if case.batch_first else resets
    resets = torch.zeros(steps, rows, dtype=torch.bool) if resets is None else resets

    def state(given: Tensor | None, size: int) -> Tensor:
        if given is None:
            return torch.zeros(case.layers * d, rows, size, dtype=torch.float64)
        return exact(given).reshape(case.layers * d, rows, size)

    loop = oracle.Loop(case.kind, case.layers, case.bidirectional, case.has_biases)
    c0 = state(a.c0, case.hidden) if case.kind == "LSTM" else None
    out = loop(x, state(a.h0, case.output), c0, [exact(w) for w in a.weights], a.lengths, resets)
    y, h_n, c_n = out.y, out.h_n, out.c_n
    if a.batch_sizes is not None:
        y = torch.cat([y[t, :size] for t, size in enumerate(a.batch_sizes.tolist())])
    elif case.is_cell:
        y, h_n, c_n = y[0], h_n[0], None if c_n is None else c_n[0]
        if case.unbatched:
            h_n, c_n = h_n[0], None if c_n is None else c_n[0]
    else:
        y = y.transpose(0, 1) if case.batch_first else y
        if case.unbatched:
            y = y.squeeze(0 if case.batch_first else 1)
            h_n, c_n = h_n[:, 0], None if c_n is None else c_n[:, 0]
    results = [y, h_n, c_n] if not case.is_cell else [h_n, c_n]
    return [t for t in results if t is not None], [leaves[id(t)] for t in a.tensors()], out.nearest


def clear_first(t: Tensor) -> Tensor:
    t[:1] = 0
    return t


# Linear: a corner would let the last bit decide, and tolerances are relative to the largest value.
EDITS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("mul_", lambda t: t.mul_(0.5)),
    ("neg_", lambda t: t.neg_()),
    ("add_", lambda t: t.add_(1)),
    ("[:1] = 0", clear_first),
)


def tolerance_of(case: Case, table: dict[torch.dtype, float]) -> float:
    """That of tests/cases.py for a layer; a stack rounds as often again in every layer."""
    return table[case.dtype] * case.layers


def near(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if not found.numel():
        return
    assert bool(found.isfinite().all()), f"{what}: not finite"
    scale = max(1.0, expected.abs().max().item())
    error = (found.double() - expected).abs().max().item() / scale
    assert error <= tolerance, f"{what}: an error of {error:.3g} of the largest value, at most {tolerance:.3g} allowed"


@contextlib.contextmanager
def grad_mode(mode: str) -> Iterator[None]:
    with (
        torch.inference_mode() if mode == "inference" else torch.no_grad() if mode == "no_grad" else contextlib.nullcontext()
    ):
        yield


def run_case(case: Case, r: random.Random) -> None:
    arguments = draw_arguments(case, r)
    tensors = arguments.tensors()
    differentiable = [t for t in tensors if r.random() < 0.6] if case.mode == "grad" else []
    replaced = {id(t): t for t in tensors}
    for t in differentiable:
        is_weight = case.is_module and any(t is w for w in arguments.weights)
        replaced[id(t)] = nn.Parameter(t) if is_weight else t.detach().requires_grad_()
    arguments = dataclasses.replace(
        arguments,
        x=replaced[id(arguments.x)],
        h0=None if arguments.h0 is None else replaced[id(arguments.h0)],
        c0=None if arguments.c0 is None else replaced[id(arguments.c0)],
        weights=[replaced[id(w)] for w in arguments.weights],
    )
    differentiable = [replaced[id(t)] for t in differentiable]
    versions = [t.detach().clone() for t in arguments.tensors()]
    with grad_mode(case.mode):
        found = call(case, arguments)
    expected, leaves, nearest = expect(case, arguments)
    assert len(found) == len(expected), f"{len(found)} results, expected {len(expected)}"
    names = ["h", "c"] if case.is_cell else ["y", "h_n", "c_n"]
    for name, a, b in zip(names, found, expected, strict=False):
        assert a.dtype == case.dtype, f"{name}: dtype {a.dtype}"
        near(name, a.detach(), b.detach(), tolerance_of(case, OUTPUT_TOLERANCE))
    chosen = [i for i in range(len(found)) if r.random() < 0.6] or [r.randrange(len(found))]
    if case.edits:
        for i in chosen:
            name, edit = r.choice(EDITS)
            if r.random() < 0.7 and found[i].dim() and found[i].numel():
                with grad_mode(case.mode):
                    found[i] = edit(found[i])
                expected[i] = edit(expected[i] * 1)
                near(
                    f"{names[i]} after {name}", found[i].detach(), expected[i].detach(), tolerance_of(case, OUTPUT_TOLERANCE)
                )
    for before, after in zip(versions, arguments.tensors(), strict=True):
        assert torch.equal(before, after.detach()), "an argument was written to"
    if not differentiable or not any(found[i].requires_grad for i in chosen):
        return
    if case.kind == "RNN_RELU" and nearest < tolerance_of(case, OUTPUT_TOLERANCE):
        return  # the last bit decides whether a gradient passes
    draw = Draw(r, case.dtype)
    chosen = [i for i in chosen if found[i].requires_grad]
    grads = [place(draw.values(*found[i].shape), r.choice(LAYOUTS), r) for i in chosen]
    ours = torch.autograd.grad([found[i] for i in chosen], differentiable, grads, allow_unused=True)
    of = {id(t): leaf for t, leaf in zip(arguments.tensors(), leaves, strict=True)}
    wanted = [of[id(t)] for t in differentiable]
    exact_grads = [g.resolve_neg().double() for g in grads]
    theirs = torch.autograd.grad([expected[i] for i in chosen], wanted, exact_grads, allow_unused=True)
    for index, (t, a, b) in enumerate(zip(differentiable, ours, theirs, strict=True)):
        what = f"gradient of argument {index} {tuple(t.shape)}"
        a = torch.zeros_like(t) if a is None else a
        b = torch.zeros_like(wanted[index]) if b is None else b
        near(what, a, b, tolerance_of(case, GRADIENT_TOLERANCE))


def generator_of(seed: int, number: int) -> random.Random:
    return random.Random(f"{seed}:{number}")


def parse(text: str) -> tuple[int, int, int | None, float | None]:
    """(seed, first case, their number or None, seconds or None) of FUSED_RNN_FUZZ."""
    fields = (text or "0").split(":")
    length = fields[2] if len(fields) > 2 else "1000"
    units = {"s": 1, "m": 60, "h": 3600}
    seconds = float(length[:-1]) * units[length[-1]] if length[-1] in units else None
    return int(fields[0]), int(fields[1]) if len(fields) > 1 else 0, None if seconds else int(length), seconds


def main() -> int:
    """Prints a line before each case, for a process that dies in it, and the failures; returns their number."""
    seed, first, count, seconds = parse(os.environ.get("FUSED_RNN_FUZZ", ""))
    end = time.monotonic() + seconds if seconds else float("inf")
    failures = 0
    number = first
    for number in itertools.count(first):
        if time.monotonic() >= end or (count is not None and number >= first + count) or failures >= MOST_FAILURES:
            break
        r = generator_of(seed, number)
        case = draw_case(r)
        print(f"FUSED_RNN_FUZZ={seed}:{number}:1  {case}", flush=True)
        try:
            with use_instruction_set(case.instruction_set), use_threads(case.threads):
                run_case(case, r)
        except Exception as error:
            failures += 1
            print(f"FAILED FUSED_RNN_FUZZ={seed}:{number}:1  {case}", file=sys.stderr)
            if isinstance(error, AssertionError):
                print(f"  {error}", file=sys.stderr)
            else:
                traceback.print_exc(limit=-3)
    print(f"{number - first} cases, {failures} failures", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
