"""Stage 1: a family's cases in a child process, since a wrong kernel may hang or take its process along.

The child prints one JSON object a line:

    {"case": NAME}                                     the case begins
    {"case": NAME, "error": E}                         it has ended: its error against float64, over the allowed one
    {"case": NAME, "raised": TEXT}                     it raised
    {"cannot": REASON}                                 this says nothing of the family: no GPU, no memory
    {"end": COUNT}                                     all cases have had their turn

A line has to follow the one before it within the time limit.
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

CASE_SECONDS = 20.0  # a case takes milliseconds, its process some seconds to start
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

    def state(self, family: str) -> State:
        """What is known now; starts nothing."""
        with self._lock:
            verdict = self._record.verdict(family)
            if verdict is not None:
                return State.VERIFIED if verdict.verified else State.EXCLUDED
            return self._states.get(family, State.UNKNOWN)

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
                    finding = run_child(self._command(family), self._seconds, self._environment)
                    self._take(family, finding)
        except OSError as error:
            self._take(family, Finding(None, f"its child process could not be started: {error}"))
        finally:
            with self._lock:
                if self._states[family] is State.RUNNING:
                    del self._states[family]  # the record has it

    def _take(self, family: str, finding: Finding) -> None:
        if finding.verified is None:
            with self._lock:
                self._states[family] = State.IMPOSSIBLE
            _warn(
                f"kernel family {family} cannot be verified here, so it serves only where nothing else can: {finding.reason}"
            )
            return
        self._record.add(Verdict(family, finding.verified, finding.reason))
        if not finding.verified:
            _warn(f"kernel family {family} is excluded on this device: {finding.reason}")

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
    for fields in _lines(output):
        if "cannot" in fields:
            return Finding(None, str(fields["cannot"]))
        if "end" in fields and status == 0:
            return Finding(True, "") if compared else Finding(None, "no case of it can run here")
        case = str(fields.get("case", ""))
        if "raised" in fields:
            return Finding(False, f"case {case} raised {fields['raised']}")
        if "error" in fields:
            running, compared = "", compared + 1
            if not fields["error"] <= 1:  # NaN too
                return Finding(False, f"case {case} is wrong: its error is {fields['error']:.3g} times the allowed one")
        else:
            running = case
    where = f"case {running}" if running else "no case"
    if status is None:
        text = f"hangs: no answer within {seconds:g} s in {where}"
        return Finding(False, text) if running else Finding(None, text)
    ended = f"signal {-status}" if status < 0 else f"exit status {status}"
    text = f"its process ended with {ended} in {where}" + (f": {errors.strip()[-300:]}" if errors.strip() else "")
    return Finding(False, text) if running else Finding(None, text)


def _lines(output: str) -> Iterator[dict[str, Any]]:
    """The child's lines among all that its process may have printed."""
    for line in output.split("\n"):
        with contextlib.suppress(ValueError):
            fields = json.loads(line)
            if isinstance(fields, dict):
                yield fields


def _warn(text: str) -> None:
    warnings.warn(f"fused_rnn: {text}", RuntimeWarning, stacklevel=2)
