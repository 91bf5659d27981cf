"""Serves the calls on a GPU for which no family is decided yet: asks the tuner, and makes calls that are timed or compared.

A watched call is made inside of one node of the graph, on leaves of its own, with events around its forward and its
backward, or with another family beside it. csrc/torch/choice_cuda.h asks here until an answer lasts; afterwards no call
comes here.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_rnn import _settings, reference
from fused_rnn._kinds import KIND_OF_NAME
from fused_rnn._recipe import ROWS, rows_of, unpacked
from fused_rnn.tuning import here
from fused_rnn.tuning.choice import EXACT, Circumstances, Offer, Problem, Tuner, Turn
from fused_rnn.tuning.record import Record, lines_of_entry
from fused_rnn.tuning.verification import State, Verifier

# (outputs, gradients): the largest difference allowed from the family that serves, over the largest value. Twice what
# cases.py allows a family against float64, as both round.
ALLOWED = {
    "float64": (2e-13, 2e-12), "float32": (8e-6, 4e-5), "float16": (8e-3, 4e-2), "bfloat16": (6e-2, 2.4e-1),
}  # fmt: skip
STEPS_OF_CASES = 6  # that ALLOWED holds for: the roundings of more steps add up

Results = tuple[Tensor, list[Tensor]]  # output, last states


class Clock(Protocol):
    """Times and numbers of a device, read without waiting for it."""

    def now(self) -> Any:
        """Where the device's current stream is now."""

    def us(self, first: Any, last: Any) -> float | None:
        """Microseconds between two of them; None: the device has not come so far."""

    def later(self, number: Tensor) -> Any:
        """A handle of a number on the device."""

    def read(self, handle: Any) -> float | None:
        """The number; None: the device has not come so far."""


class GpuClock:
    """By CUDA's events."""

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def us(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float | None:
        return first.elapsed_time(last) * 1e3 if last.query() else None

    def later(self, number: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        host = torch.empty((), dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
        return host, self.now()

    def read(self, handle: tuple[Tensor, torch.cuda.Event]) -> float | None:
        host, copied = handle
        return float(host) if copied.query() else None


class Site:
    """A device with its record, its verifier and its tuner."""

    def __init__(self, record: Record, verifier: Verifier, clock: Clock, mode: str) -> None:
        self.record, self.verifier, self.clock = record, verifier, clock
        self.tuner = Tuner(record, verifier, lambda handle: clock.us(*handle), clock.read, mode)
        self.without_cudnn: set[str] = set()  # keys of problems whose calls cuDNN has refused
        self._excluded: list[str] = []

    def exclude(self, device: int) -> None:
        """Tells the planner which families have failed."""
        failed = [f for f in here.FAMILIES if f != "cudnn" and self.verifier.state(f) is State.EXCLUDED]
        if failed != self._excluded:
            self._excluded = failed
            extension: Any = _settings.extension
            extension.exclude_families(failed, device)


_sites: dict[tuple[int, str, str], Site] = {}
_lock = threading.Lock()


def make_site(device: int, mode: str) -> Site:
    """The site of a visible GPU, by its number."""
    record = here.record_of(device)
    return Site(record, here.verifier_of(record, device), GpuClock(), mode)


def site_of(device: int) -> Site:
    """The site of a device under the settings of now."""
    mode = _settings.value("FUSED_RNN_TUNE") or "first"
    key = (device, mode, _settings.value("FUSED_RNN_TUNE_FILE"))
    with _lock:
        if key not in _sites:
            _sites[key] = make_site(device, mode)
        return _sites[key]


class Call(NamedTuple):
    """The arguments of fused_rnn::rnn, or of fused_rnn::cell."""

    one_step: bool
    rows: list[Tensor]
    recipe: int
    dropout: float
    states: int  # how many of the tensors
    tensors: list[Tensor]  # x, states, weights

    def on(self, tensors: Sequence[Tensor]) -> Call:
        return self._replace(tensors=list(tensors))

    def by(self, family: str | None) -> Results:
        """The call's results by a family, by the reference in float64, or by what the planner takes for each layer."""
        x, states, weights = self.tensors[0], self.tensors[1 : 1 + self.states], self.tensors[1 + self.states :]
        if family == EXACT:
            return self._exact(x, states, weights)
        extension: Any = _settings.extension
        number = 0 if family is None else 1 + extension.families.index(family)
        recipe = unpacked(self.recipe)._replace(family=number).packed
        recipe |= self.recipe & ROWS
        if self.one_step:
            last = extension.cell(x, states, weights, recipe)
            return last[0], last
        made: Results = extension.rnn(x, states, weights, self.rows, recipe, self.dropout)
        return made

    def _exact(self, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> Results:
        recipe = unpacked(self.recipe)._replace(dropout=self.dropout)
        exact = [t.double() for t in (x, *states, *weights)]
        count = 1 + len(states)
        if self.one_step:
            last = reference.cell(exact[0], exact[1:count], exact[count:], recipe)
            y = last[0]
        else:
            y, last = reference.rnn(exact[0], exact[1:count], exact[count:], rows_of(self.rows, self.recipe), recipe)
        dtypes = [states[i].dtype if i < len(states) else x.dtype for i in range(len(last))]
        last = [t.to(dtype) for t, dtype in zip(last, dtypes, strict=True)]
        return (last[0] if self.one_step else y.to(x.dtype)), last


def answer(question: Mapping[str, Any], arguments: tuple[Any, ...] | None) -> tuple[str | None, Results | None, bool]:
    """What csrc/torch/choice_cuda.h asks.

    Args:
        question: its fields.
        arguments: the op's (x, states, weights, rows, recipe, dropout); None: only a family is asked for.

    Returns:
        the family that serves, or None; the results, if the call was made here; whether the family serves all such calls.
    """
    site = site_of(question["device"])
    site.exclude(question["device"])
    problem = _problem(question)
    offer = _offer(site, question, problem)
    if offer.reference is None and not offer.ours:
        return None, None, False
    turn = site.tuner.turn(problem, offer, Circumstances(question["may_time"], question["deterministic"]))
    if arguments is None:  # one layer inside of a graph
        for family in offer.ours if site.tuner.mode == "first" else ():
            site.verifier.request(family)
        # What serves a training call now serves its backward too, and all such calls of the process.
        lasting = problem.training or turn.lasting or site.tuner.is_settled(offer)
        return (None if turn.family == EXACT else turn.family), None, lasting
    if not (turn.timed or turn.beside or turn.family == EXACT):
        return turn.family, None, turn.lasting
    x, states, weights, given, recipe, dropout = arguments
    call = Call(question["one_step"], given, recipe, dropout, len(states), [x, *states, *weights])
    try:
        return None, _watched(site, problem, turn, call), False
    except RuntimeError as error:
        if turn.family != "cudnn" or "cuDNN error" not in str(error):
            raise
        site.without_cudnn.add(problem.key)
        warnings.warn(f"fused_rnn: cuDNN refuses calls like {problem.key}: {error}", RuntimeWarning, stacklevel=2)
        return answer(question, arguments)


def prove_second_order(device: int) -> bool:
    """Whether the kernels' second derivatives serve on a GPU: family step has to be verified, which is waited for once."""
    site = site_of(device)
    state, mode = site.verifier.state("step"), site.tuner.mode
    if mode == "first" and state in (State.UNKNOWN, State.RUNNING):
        state = site.verifier.verify("step")
    site.exclude(device)
    proven = state is State.VERIFIED or (mode == "off" and state is not State.EXCLUDED)
    if proven:
        extension: Any = _settings.extension
        extension.second_order_is_proven(device)
    return proven


def explained(question: Mapping[str, Any]) -> tuple[str, str]:
    """What would serve a call: the family, and what is recorded of such calls, as a line. Nothing is begun.

    Args:
        question: as of ``answer``.
    """
    site = site_of(question["device"])
    problem = _problem(question)
    offer = _offer(site, question, problem)
    family = site.tuner.family_now(problem, offer, Circumstances(question["may_time"], question["deterministic"]))
    mode = _settings.value("FUSED_RNN_TUNE") or "first"
    if mode == "off":
        return family, "FUSED_RNN_TUNE=off: no record is read"
    choice = site.record.choice(problem.key)
    if choice is None:
        first = "the first calls try the verified families" if mode == "first" else "FUSED_RNN_TUNE=use"
        return family, f"nothing is recorded of {problem.key} ({first})"
    return family, f"{'; '.join(part.strip() for part in lines_of_entry(choice))} ({site.record.path})"


def _problem(question: Mapping[str, Any]) -> Problem:
    names = ("cell", "dtype", "tf32", "T", "B", "I", "H", "P", "layers", "directions", "training")
    rows = question["rows"].replace("dense", "cell") if question["one_step"] else question["rows"]
    return Problem(**{name: question[name] for name in names}, rows=rows)


def _offer(site: Site, question: Mapping[str, Any], problem: Problem) -> Offer:
    cudnn = question["cudnn"] and problem.key not in site.without_cudnn
    return Offer("cudnn" if cudnn else None, tuple(question["ours"]))


def _watched(site: Site, problem: Problem, turn: Turn, call: Call) -> Results:
    watch = _Comparison(site, problem, turn) if turn.beside else _Timing(site, turn)
    if not problem.training:
        return watch.forward(call).results
    y, *last = _Watched.apply(call, watch, _dropout_state(call), *call.tensors)
    return y, list(last)


class _Made(NamedTuple):
    """A forward whose backward can be made once."""

    leaves: list[Tensor]
    results: Results

    def backward(self, grads: Sequence[Tensor | None], create_graph: bool = False) -> list[Tensor | None]:
        """Of the leaves."""
        wanted = [t for t in self.leaves if t.requires_grad]
        results = _flat(self.results)
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
        if not pairs:
            return [None] * len(self.leaves)
        made = iter(
            torch.autograd.grad(
                [r for r, _ in pairs], wanted, [g for _, g in pairs], create_graph=create_graph, allow_unused=True
            )
        )
        return [next(made) if t.requires_grad else None for t in self.leaves]


class _Timing:
    """A call between events."""

    def __init__(self, site: Site, turn: Turn) -> None:
        self._clock, self._turn = site.clock, turn

    def forward(self, call: Call) -> _Made:
        family = self._turn.family
        first = self._clock.now()
        made = _Made(call.tensors, call.by(family))
        if family != EXACT:
            self._turn.forward = (first, self._clock.now())
        return made

    def backward(self, made: _Made, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        first = self._clock.now()
        result = made.backward(grads)
        self._turn.backward = (first, self._clock.now())
        return result


class _Comparison:
    """A call with another family beside it. Errors over the allowed ones are left in the turn."""

    def __init__(self, site: Site, problem: Problem, turn: Turn) -> None:
        self._site, self._turn, self._problem = site, turn, problem
        dtype = "float16" if problem.tf32 else problem.dtype
        growth = max(1.0, math.sqrt(max(problem.H, problem.I) / 32)) * max(1.0, math.sqrt(problem.T / STEPS_OF_CASES))
        self._allowed = [allowed * growth for allowed in ALLOWED[dtype]]
        self._beside: tuple[_Made, _Made] | None = None  # what is expected, and what the family makes

    def forward(self, call: Call) -> _Made:
        assert self._turn.beside is not None
        state = _dropout_state(call)
        served = _Made(call.tensors, call.by(self._turn.family))
        expected, after = served, _dropout_state(call)
        other = call.on(_leaves(call.tensors))
        if state is not None and self._turn.family == EXACT:  # masks depend on the dtype
            other = other._replace(dropout=0.0)
            expected = _Made(leaves := _leaves(call.tensors), other.on(leaves).by(EXACT))
        _set_dropout_state(call, state)
        made = _Made(other.tensors, other.by(self._turn.beside))
        _set_dropout_state(call, after)
        self._report(_flat(made.results), _flat(expected.results), self._allowed[0])
        self._beside = (expected, made)
        return served

    def backward(self, made: _Made, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        beside, self._beside = self._beside, None
        result = made.backward(grads)
        if beside is not None:
            expected, other = beside
            want = result if expected is made else expected.backward(grads)
            self._report(other.backward(grads), want, self._allowed[1])
        return result

    def _report(self, actual: Sequence[Tensor | None], expected: Sequence[Tensor | None], allowed: float) -> None:
        with torch.no_grad():
            pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if a is not None and e is not None]
            if pairs:
                error = torch.stack([_error(a, e, self._problem.cell) for a, e in pairs]).amax() / allowed
                self._turn.errors.append(self._site.clock.later(error))


class _Watched(torch.autograd.Function):
    """(y, last states) of a call that is made inside, on leaves of its own."""

    @staticmethod
    def forward(ctx: Any, call: Call, watch: _Timing | _Comparison, dropout_state: Tensor | None, *tensors: Tensor) -> Any:
        with torch.enable_grad():
            made = watch.forward(call.on(_leaves(tensors)))
        ctx.call, ctx.watch, ctx.made, ctx.dropout_state = call.on([]), watch, made, dropout_state
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in _flat(made.results))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        made, ctx.made = ctx.made, None
        batched = torch._C._functorch.peek_interpreter_stack() is not None
        if made is not None and not torch.is_grad_enabled() and not batched:
            return (None, None, None, *ctx.watch.backward(made, grads))
        # A graph that is used again, or whose gradients are to be differentiated: the call is made again.
        # Gradients in a batch are the layers': no stack's call has a part in vmap.
        family = None if batched else ctx.watch._turn.family
        call: Call = ctx.call.on(ctx.saved_tensors)
        now = _dropout_state(call)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            if not create_graph:
                call = call.on(_leaves(call.tensors))
            _set_dropout_state(call, ctx.dropout_state)
            again = _Made(call.tensors, call.by(family))
            _set_dropout_state(call, now)
        return (None, None, None, *again.backward(grads, create_graph=create_graph))


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_(t.requires_grad) for t in tensors]


def _flat(results: Results) -> list[Tensor]:
    return [results[0], *results[1]]


def _error(actual: Tensor, expected: Tensor, cell: str) -> Tensor:
    """The difference over the size of what is expected: of the largest values, for a relu's jumps of the norms.

    Where infinity or NaN is expected nothing is compared.
    """
    finite = expected.isfinite()
    wide = torch.float64 if expected.dtype == torch.float64 else torch.float32
    difference = torch.where(finite, actual.to(wide) - expected.to(wide), 0)
    size = torch.where(finite, expected.to(wide), 0)
    order = 2 if KIND_OF_NAME[cell].jumps else math.inf
    least = torch.finfo(expected.dtype).tiny
    if expected.numel() == 0:
        return difference.new_zeros((), dtype=torch.float64)
    norms = [torch.linalg.vector_norm(t, order).double() for t in (difference, size)]
    return norms[0] / norms[1].clamp(min=least)


def _dropout_state(call: Call) -> Tensor | None:
    """The state of the generator that masks are drawn from, if they are."""
    x = call.tensors[0]
    if call.dropout <= 0 or call.one_step:
        return None
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()


def _set_dropout_state(call: Call, state: Tensor | None) -> None:
    if state is None:
        return
    device = call.tensors[0].device
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
