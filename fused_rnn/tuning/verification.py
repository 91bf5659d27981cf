"""Stage 1: a family's cases in a child process, since a wrong kernel may hang or take its process along.

The child prints one JSON object a line:

    {"case": NAME, "features": [...]}                  the case begins; without features in what every call may be
    {"case": NAME, "error": E}                         it has ended: its error against float64, over the allowed one
    {"case": NAME, "raised": TEXT}                     it raised
    {"cannot": REASON}                                 this says nothing of the family: no GPU, no memory
    {"end": COUNT}                                     all cases have had their turn

A line has to follow the one before it within the time limit. Cases with features come last: one that fails excludes the
family from calls with its features alone. A child that does not survive such a case has a successor, which is told the
features that are left.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .record import Record, Verdict, take_lock

# What some calls have, and kernels have code of their own for: csrc/plan/features.h.
FEATURES = ("projection", "zoneout", "recurrent_dropout", "state_clip", "reset_state", "every_c", "second_order")
CASE_SECONDS = 20.0  # a case takes milliseconds, its process some seconds to start
NO_CASE = "no case of it can run here"
END_SECONDS = 5.0  # how long a killed child is waited for: one inside of a kernel may outlive its signal


class State(enum.Enum):
    """What is known of a family on this device."""

    VERIFIED = "verified"
    EXCLUDED = "excluded"
    RUNNING = "running"
    UNKNOWN = "unknown"  # not asked for yet
    IMPOSSIBLE = "impossible"  # the cases could not be run here


class Finding(NamedTuple):
    """What a child's output says of a family. verified: None where it says nothing of it."""

    verified: bool | None
    reason: str
    features: Mapping[str, str] = {}  # as of Verdict
    ended: bool = True  # else some cases with features have not run


class Verifier:
    """Verifies families, once for each driver and build, and keeps the verdicts in the record."""

    def __init__(
        self,
        record: Record,
        command: Callable[[str], Sequence[str]],
        seconds: float = CASE_SECONDS,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            record: where the verdicts are kept.
            command: of a family, the command line that runs its cases.
            seconds: the time limit from one line of the child to the next.
            environment: variables of the child beside this process's.
        """
        self._record, self._command, self._seconds = record, command, seconds
        self._environment = dict(environment or {})
        self._lock = threading.Lock()
        self._states: dict[str, State] = {}
        self._threads: dict[str, threading.Thread] = {}

    def state(self, family: str, features: Sequence[str] = ()) -> State:
        """What is known now of calls with these features; starts nothing."""
        with self._lock:
            verdict = self._record.verdict(family)
            if verdict is not None:
                return State.VERIFIED if verdict.serves(features) else State.EXCLUDED
            return self._states.get(family, State.UNKNOWN)

    def lacking(self, family: str) -> list[str]:
        """The features whose calls the family does not serve, as far as is known."""
        if self._record.verdict(family) is None:
            return []
        return [feature for feature in FEATURES if self.state(family, (feature,)) is State.EXCLUDED]

    def request(self, family: str) -> State:
        """Verifies a family in the background if that was not begun yet; returns its state now."""
        state = self.state(family)
        if state is not State.UNKNOWN:
            return state
        with self._lock:
            if self._states.get(family, State.UNKNOWN) is State.UNKNOWN:
                self._states[family] = State.RUNNING
                thread = threading.Thread(target=self._run, args=(family,), name=f"fused_rnn verify {family}", daemon=True)
                self._threads[family] = thread
                thread.start()
        return self.state(family)

    def verify(self, family: str) -> State:
        """Verifies a family that is not known yet; returns when its state is. After a second the terminal shows it."""
        self.request(family)
        with self._lock:
            thread = self._threads.get(family)
        if thread is not None:
            thread.join(1.0)
            if thread.is_alive() and sys.stderr.isatty():
                print(f"fused_rnn: verifying kernel family {family} on this device", file=sys.stderr, flush=True)
            thread.join()
        return self.state(family)

    def _run(self, family: str) -> None:
        try:
            with self._alone():
                self._record.reload()  # another process may have been faster
                if self._record.verdict(family) is None:
                    self._take(family, self._find(family))
        except OSError as error:
            self._take(family, Finding(None, f"its child process could not be started: {error}"))
        finally:
            with self._lock:
                if self._states[family] is State.RUNNING:
                    del self._states[family]  # the record has it

    def _find(self, family: str) -> Finding:
        """What a child shows of a family, and those that take over from it."""
        command = self._command(family)
        first = finding = run_child(command, self._seconds, self._environment)
        known = dict(first.features)
        while finding.verified and not finding.ended and (left := [f for f in FEATURES if f not in known]):
            finding = run_child([*command, *left], self._seconds, self._environment)
            if finding.verified is None and finding.reason != NO_CASE:
                _warn(f"kernel family {family} cannot be verified here for calls with {', '.join(left)}: {finding.reason}")
            if not set(finding.features) & set(left):
                break  # what is left stays unproven
            known.update((feature, finding.features[feature]) for feature in left if feature in finding.features)
        return first._replace(features=known)

    def _take(self, family: str, finding: Finding) -> None:
        if finding.verified is None:
            with self._lock:
                self._states[family] = State.IMPOSSIBLE
            _warn(
                f"kernel family {family} cannot be verified here, so it serves only where nothing else can: {finding.reason}"
            )
            return
        self._record.add(Verdict(family, finding.verified, finding.reason, finding.features))
        if not finding.verified:
            _warn(f"kernel family {family} is excluded on this device: {finding.reason}")
        for reason in dict.fromkeys(filter(None, finding.features.values())):
            features = ", ".join(feature for feature, text in finding.features.items() if text == reason)
            _warn(f"kernel family {family} is excluded on this device for calls with {features}: {reason}")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process of the machine verifies at a time, where the record's folder can be written."""
        try:
            self._record.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(f"{self._record.path}.verify.lock", "a")
        except OSError:  # the record warns of it
            yield
            return
        with file:
            take_lock(file, 10 * self._seconds)
            yield


def run_child(command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> Finding:
    """What the cases of a command show; the child has ended, or was killed, when this returns.

    Raises:
        OSError: the command cannot be started.
    """
    with tempfile.TemporaryFile("w+b") as output, tempfile.TemporaryFile("w+b") as errors:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        size, since = 0, time.monotonic()
        status: int | None = None
        try:
            while (status := child.poll()) is None and time.monotonic() - since < seconds:
                now = os.fstat(output.fileno()).st_size
                if now != size:
                    size, since = now, time.monotonic()
                time.sleep(0.02)
        finally:
            if status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(END_SECONDS)
        output.seek(0)
        errors.seek(0)
        return judge(output.read().decode(errors="replace"), status, seconds, errors.read().decode(errors="replace"))


def judge(output: str, status: int | None, seconds: float, errors: str = "") -> Finding:
    """What a child's output says.

    Args:
        output: what it printed.
        status: its exit status; None: it was killed after the time limit.
        seconds: the time limit.
        errors: what it printed as errors.
    """
    running, compared = "", 0
    features: Sequence[str] = ()  # of the case that runs
    found: dict[str, str] = {}

    def failed(reason: str) -> Finding:
        """In the case that runs; none has run after it."""
        if not features:
            return Finding(False, reason)
        failures = {feature: text for feature, text in found.items() if text}
        return Finding(True, "", {**failures, **dict.fromkeys(features, reason)}, ended=False)

    for fields in _lines(output):
        if "cannot" in fields:
            return Finding(None, str(fields["cannot"]))
        if "end" in fields and status == 0:
            return Finding(True, "", found) if compared else Finding(None, NO_CASE)
        case = str(fields.get("case", ""))
        if "raised" in fields:
            return failed(f"case {case} raised {fields['raised']}")
        if "error" in fields:
            running, compared = "", compared + 1
            wrong = not fields["error"] <= 1  # NaN too
            reason = f"case {case} is wrong: its error is {fields['error']:.3g} times the allowed one" if wrong else ""
            if wrong and not features:
                return Finding(False, reason)
            for feature in features:
                found[feature] = found.get(feature) or reason
        else:
            running, features = case, tuple(map(str, fields.get("features", ())))
    where = f"case {running}" if running else "no case"
    if status is None:
        text = f"hangs: no answer within {seconds:g} s in {where}"
        return failed(text) if running else Finding(None, text)
    ended = f"signal {-status}" if status < 0 else f"exit status {status}"
    text = f"its process ended with {ended} in {where}" + (f": {errors.strip()[-300:]}" if errors.strip() else "")
    return failed(text) if running else Finding(None, text)


def _lines(output: str) -> Iterator[dict[str, Any]]:
    """The child's lines among all that its process may have printed."""
    for line in output.split("\n"):
        with contextlib.suppress(ValueError):
            fields = json.loads(line)
            if isinstance(fields, dict):
                yield fields


def _warn(text: str) -> None:
    warnings.warn(f"fused_rnn: {text}", RuntimeWarning, stacklevel=2)
