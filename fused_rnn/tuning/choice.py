"""Stage 2: which family serves a problem. On its first calls the families take turns; the fastest correct one is kept.

A call takes a Turn, which names the family that serves it, forward and backward. Every family of ours is compared once: the
call is served by the reference, and the family runs beside it. Afterwards no call runs twice. Times and errors are read when
they are there, at a later call, so nothing waits for the device.
"""

from __future__ import annotations

import dataclasses
import statistics
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from .record import Choice, Record
from .verification import State, Verifier

EXACT = "exact"  # serves a call that only families of ours could serve, and one of them is compared: float64 without kernels
MODES = ("off", "use", "first")
ROUNDS = 5  # timed calls of each family, beside a first one that is not counted
HOPELESS = 2.0  # a family that takes so many times as long as the best has no further turns
MARGIN = 0.98  # of the time of the preferred family, which another one has to beat
# Calls after which a turn whose backward was not called is given up; so many of them end the timing. A prime number: where
# every third call has a backward, a comparison that begins anew after so many calls meets one.
PATIENCE = 31


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a choice is made for. Letters: csrc/core/params.h."""

    cell: str
    dtype: str
    tf32: bool
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int
    layers: int
    directions: int
    training: bool
    rows: str = "dense"  # "lengths", "packed", "cell" for a cell's call, with "+resets", "+dropout", "+wide c"

    @property
    def key(self) -> str:
        """One line of text. Numbers of steps share it up to the next power of two."""
        steps = 1 << max(self.T - 1, 0).bit_length()
        sizes = f"T{steps} B{self.B} I{self.I} H{self.H} P{self.P} L{self.layers} D{self.directions}"
        mode = "training" if self.training else "inference"
        return f"{self.cell} {self.dtype}{' tf32' * self.tf32} {sizes} {self.rows} {mode}"


@dataclasses.dataclass(frozen=True)
class Offer:
    """The families that can serve a call."""

    reference: str | None  # not ours and trusted: cudnn
    ours: tuple[str, ...]  # the first one serves where nothing else may


@dataclasses.dataclass(frozen=True)
class Circumstances:
    """What a call forbids."""

    may_time: bool = True  # not while a graph is captured or compiled
    deterministic: bool = False  # bitwise repeatable: no reference that is not ours, no change of family from call to call


@dataclasses.dataclass(eq=False)
class Turn:
    """One call: the family that serves it, and what is to be reported of it. Handles are the caller's, read later."""

    family: str
    beside: str | None = None  # this family runs too, and is compared with the one that serves
    timed: bool = False
    lasting: bool = False  # the family serves all such calls of this process: nobody need ask again
    steps: int = 1
    number: int = 0  # of the problem's call
    forward: Any = None  # handle of a time
    backward: Any = None
    errors: list[Any] = dataclasses.field(default_factory=list)  # handles: error over allowed error, of forward and backward


@dataclasses.dataclass
class _Trial:
    """The calls of one problem so far."""

    offer: Offer
    training: bool
    comparing: Turn | None = None
    correct: list[str] = dataclasses.field(default_factory=list)  # have been compared
    wrong: dict[str, str] = dataclasses.field(default_factory=dict)
    open: list[Turn] = dataclasses.field(default_factory=list)
    times: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # us per step
    calls: int = 0
    given_up: int = 0  # turns since the latest time or error came

    def is_reported(self, turn: Turn) -> bool:
        """Whether all of a call was made, though the device may not have come so far."""
        if turn.beside is not None:
            return len(turn.errors) > self.training
        return turn.forward is not None and (turn.backward is not None or not self.training)

    def is_stale(self, turn: Turn) -> bool:
        return self.calls - turn.number >= PATIENCE and not self.is_reported(turn)


class Tuner:
    """Chooses a family for each call. Threads may share an object."""

    def __init__(
        self,
        record: Record,
        verifier: Verifier,
        read_time: Callable[[Any], float | None],
        read_error: Callable[[Any], float | None],
        mode: str = "first",
    ) -> None:
        """
        Args:
            record: what is known of the device.
            verifier: of the families that have not served on it yet.
            read_time: of a handle, microseconds; None: the device has not come so far.
            read_error: of a handle, the error over the allowed one; None likewise.
            mode: ``"off"``: a rule that knows no record; ``"use"``: what is recorded; ``"first"``: time what is not.

        Raises:
            ValueError: another mode.
        """
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        self._record, self._verifier, self.mode = record, verifier, mode
        self._read_time, self._read_error = read_time, read_error
        self._lock = threading.Lock()
        self._trials: dict[str, _Trial] = {}
        self._decided: dict[tuple[str, Offer], str] = {}

    def turn(self, problem: Problem, offer: Offer, now: Circumstances = Circumstances()) -> Turn:
        """The turn of a call that is about to be made.

        Raises:
            ValueError: no family is offered.
        """
        if offer.reference is None and not offer.ours:
            raise ValueError("offer: expected at least one family, got none")
        key = problem.key
        if self.mode == "off":
            return Turn(self._rule(key, offer, now, recorded=False), lasting=True)
        if self.mode == "first" and (offer.reference is None or now.deterministic):
            self._prove(offer)
        with self._lock:
            decided = self._decided.get((key, offer))
            if decided is not None and not now.deterministic:
                return Turn(decided, lasting=True)
            if self.mode == "use" or not now.may_time or now.deterministic:
                lasting = self.mode == "use" or now.deterministic
                self._record.reload()
                return Turn(self._rule(key, offer, now, recorded=True), lasting=lasting)
            return self._next(key, problem, offer)

    def family_now(self, problem: Problem, offer: Offer, now: Circumstances = Circumstances()) -> str:
        """The family that would serve a call for which nothing is timed or compared; nothing is begun."""
        with self._lock:
            decided = self._decided.get((problem.key, offer))
            if decided is not None and not now.deterministic:
                return decided
            return self._rule(problem.key, offer, now, recorded=self.mode != "off")

    def _prove(self, offer: Offer) -> None:
        """Where nothing trusted can serve: waits until one family is verified, once for each driver and build."""
        for family in offer.ours:
            state = self._verifier.state(family)
            if state in (State.UNKNOWN, State.RUNNING):
                state = self._verifier.verify(family)
            if state is State.VERIFIED:
                return

    def is_settled(self, offer: Offer) -> bool:
        """Whether no verification of a family is still to come."""
        return all(self._verifier.state(family) not in (State.UNKNOWN, State.RUNNING) for family in offer.ours)

    def _rule(self, key: str, offer: Offer, now: Circumstances, recorded: bool) -> str:
        """A family without timing: the recorded one, the trusted one, a verified one, the last resort."""
        choice = self._record.choice(key) if recorded else None
        wrong = choice.excluded if choice else {}
        good = [f for f in offer.ours if f not in wrong and self._verifier.state(f) is State.VERIFIED]
        if choice is not None and not now.deterministic and choice.family in (*good, offer.reference):
            assert choice.family is not None
            return choice.family
        if offer.reference is not None and not now.deterministic:
            return offer.reference
        if choice is not None and (timed := [f for f in good if f in choice.us]):
            return min(timed, key=lambda family: choice.us[family])
        if good and recorded:
            return good[0]
        for family in offer.ours:
            if family not in wrong and self._verifier.state(family) is not State.EXCLUDED:
                return family
        return EXACT

    def _next(self, key: str, problem: Problem, offer: Offer) -> Turn:
        trial = self._trials.get(key)
        if trial is None or trial.offer != offer:
            trial = self._trials[key] = self._begin(key, problem, offer)
        trial.calls += 1
        self._read(key, trial)
        waiting = False  # for a verification
        candidates = [] if offer.reference is None else [offer.reference]
        for family in (f for f in offer.ours if f not in trial.wrong):
            state = self._verifier.request(family)
            waiting = waiting or state is State.RUNNING
            if state is State.VERIFIED:
                candidates.append(family)
        to_compare = [f for f in candidates if f != offer.reference and f not in trial.correct]
        if trial.comparing is None and to_compare and trial.given_up < PATIENCE:
            trial.comparing = Turn(offer.reference or EXACT, beside=to_compare[0], number=trial.calls)
            return trial.comparing
        ready = [f for f in candidates if f not in to_compare]
        if trial.comparing is None and not waiting and all(self._is_timed(trial, ready, f) for f in ready):
            return Turn(self._decide(key, trial, ready), lasting=True)
        if trial.given_up >= PATIENCE:
            family = self._rule(key, offer, Circumstances(), recorded=True)
            self._decided[key, offer] = family
            _warn(f"{PATIENCE} calls had no backward, so {family} serves {key} untimed in this process")
            return Turn(family, lasting=True)
        return self._timed_turn(key, trial, ready, problem.T)

    def _begin(self, key: str, problem: Problem, offer: Offer) -> _Trial:
        """A trial that goes on from what is recorded."""
        self._record.reload()
        trial = _Trial(offer, problem.training)
        known = self._record.choice(key)
        if known is not None:
            offered = {*offer.ours, offer.reference}
            trial.wrong = {f: reason for f, reason in known.excluded.items() if f in offered}
            trial.times = {f: [us] * (ROUNDS + 1) for f, us in known.us.items() if f in offered}
            trial.correct = [f for f in trial.times if f != offer.reference]
        return trial

    def _timed_turn(self, key: str, trial: _Trial, ready: Sequence[str], steps: int) -> Turn:
        """The next call of the family that has had the fewest."""
        turns = {f: len(trial.times.get(f, [])) + sum(turn.family == f for turn in trial.open) for f in ready}
        wanted = [f for f in ready if not self._is_timed(trial, ready, f) and turns[f] <= ROUNDS]
        if not wanted:  # calls that go on until a time, a comparison or a verification has come
            timed = [f for f in ready if f in trial.times]
            untimed = self._rule(key, trial.offer, Circumstances(), recorded=True)
            return Turn(min(timed, key=lambda f: self._us(trial, f), default=untimed))
        turn = Turn(min(wanted, key=lambda f: turns[f]), timed=True, steps=steps, number=trial.calls)
        trial.open.append(turn)
        return turn

    def _read(self, key: str, trial: _Trial) -> None:
        """Takes over the times and errors that have come since the last call."""
        still_open = []
        for turn in trial.open:
            times = [None if t is None else self._read_time(t) for t in (turn.forward, turn.backward)[: 1 + trial.training]]
            if trial.is_stale(turn):
                trial.given_up += 1
            elif None in times:
                still_open.append(turn)
            else:
                trial.times.setdefault(turn.family, []).append(sum(t for t in times if t is not None) / max(turn.steps, 1))
                trial.given_up = 0
        trial.open = still_open
        turn_beside = trial.comparing
        if turn_beside is None or turn_beside.beside is None:
            return
        errors = [self._read_error(handle) for handle in turn_beside.errors]
        error = next((e for e in errors if e is not None and not e <= 1), None)  # NaN too
        if error is not None:
            reason = f"{key}: error {error:.3g} times the allowed one"
            trial.wrong[turn_beside.beside] = reason
            self._record.add(Choice(key, None, {}, {turn_beside.beside: reason}))
            _warn(f"kernel family {turn_beside.beside} is wrong and does not serve {reason}")
        elif len(errors) > trial.training and None not in errors:
            trial.correct.append(turn_beside.beside)
        elif trial.is_stale(turn_beside):
            trial.given_up += PATIENCE // 8
        else:
            return
        trial.comparing = None

    def _is_timed(self, trial: _Trial, ready: Sequence[str], family: str) -> bool:
        """Whether a family needs no further turn."""
        samples = trial.times.get(family, [])
        if len(samples) > ROUNDS:
            return True
        best = min((self._us(trial, other) for other in ready), default=float("inf"))
        return len(samples) > 1 and min(samples[1:]) > HOPELESS * best

    def _us(self, trial: _Trial, family: str) -> float:
        """The median of a family's times but the first."""
        samples = trial.times.get(family, [])[1:]
        return statistics.median(samples) if samples else float("inf")

    def _decide(self, key: str, trial: _Trial, ready: Sequence[str]) -> str:
        preferred = ready[0] if ready else self._rule(key, trial.offer, Circumstances(), recorded=True)
        family = min(ready, key=lambda f: self._us(trial, f), default=preferred)
        if not self._us(trial, family) < MARGIN * self._us(trial, preferred):
            family = preferred
        us = {f: round(self._us(trial, f), 4) for f in ready if f in trial.times}
        known = self._record.choice(key)
        if us and (known is None or known.family != family or set(us) - set(known.us)):
            self._record.add(Choice(key, family, us, trial.wrong))
        self._decided[key, trial.offer] = family
        del self._trials[key]
        return family


def _warn(text: str) -> None:
    warnings.warn(f"fused_rnn: {text}", RuntimeWarning, stacklevel=3)
