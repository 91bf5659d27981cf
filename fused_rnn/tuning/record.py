"""What is known of the kernel families on one device: a text file that several processes read and write.

One JSON object a line. Each line holds for one device, driver and build of the kernels; a process ignores the others.

    {"device": ..., "driver": ..., "build": ..., "family": "grid", "verified": true, "reason": ""}   of a family as a whole
    {"device": ..., "driver": ..., "build": ..., "problem": "lstm float16 ...", "family": "grid", "us": {...},
     "excluded": {...}}

A line that is damaged is dropped, with one warning. That is safe: a family without its line of verification is verified
again, and a problem without its line is tried again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

MOST_LINES = 10_000  # beyond them the oldest are dropped
LOCK_SECONDS = 2.0  # how long a write waits for another process before it is put off to the next write


@dataclasses.dataclass(frozen=True)
class Scope:
    """What a record depends on beside the problem."""

    device: str  # its name
    driver: str
    build: str  # of the kernels


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a family passed its cases on the device."""

    family: str
    verified: bool
    reason: str = ""  # of a family that failed: the case and what was wrong


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the calls of one problem have shown."""

    problem: str
    family: str | None  # the fastest correct one; None: only exclusions are known yet
    us: Mapping[str, float] = dataclasses.field(default_factory=dict)  # per step of a call, of each family that was timed
    excluded: Mapping[str, str] = dataclasses.field(default_factory=dict)  # families that were wrong here, with the case


Entry = Verdict | Choice
SCOPE = tuple(field.name for field in dataclasses.fields(Scope))


def cache_folder() -> Path:
    """Where records lie: one file for each device."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")) / "fused_rnn"


def default_path(device: str) -> Path:
    """The record's file in the user's cache directory.

    Args:
        device: the device's name, as the driver has it.
    """
    return cache_folder() / (re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-") + ".txt")


def entries_of(path: Path) -> list[tuple[Scope, Entry]]:
    """All that a file holds, of every device, driver and build; damaged lines are left out.

    Raises:
        OSError: the file cannot be read.
    """
    result = []
    for line in filter(str.strip, path.read_bytes().decode(errors="replace").split("\n")):
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
            fields = json.loads(line)
            result.append((_scope(fields), _entry(fields)))
    return result


def lines_of_entry(entry: Entry) -> list[str]:
    """An entry as text."""
    if not isinstance(entry, Choice):
        return [f"{entry.family} {'verified' if entry.verified else f'excluded: {entry.reason}'}"]
    times = ", ".join(f"{family} {us:g}" for family, us in sorted(entry.us.items(), key=lambda item: item[1]))
    lines = [f"{entry.problem}: {entry.family or 'not chosen yet'}" + (f" (us a step: {times})" if times else "")]
    return lines + [f"  not {family}: {reason}" for family, reason in entry.excluded.items()]


class Record:
    """The file's lines of one scope. Threads may share an object, and processes the file.

    A file that cannot be read or written costs one warning; what is learnt is then kept in memory.
    """

    def __init__(self, path: Path, scope: Scope, families: Sequence[str]) -> None:
        """
        Args:
            path: the file; it and its folder need not exist.
            scope: the device, the driver and the build in use.
            families: the names of all families: a line that names another one is damaged.
        """
        self.path, self.scope, self.families = path, scope, frozenset(families)
        self._lock = threading.RLock()
        self._verdicts: dict[str, Verdict] = {}
        self._choices: dict[str, Choice] = {}
        self._unsaved: list[Entry] = []
        self._warned: set[str] = set()
        self._stamp: tuple[int, int, int] | None = None
        self.reload()

    def verdict(self, family: str) -> Verdict | None:
        with self._lock:
            return self._verdicts.get(family)

    def choice(self, problem: str) -> Choice | None:
        with self._lock:
            return self._choices.get(problem)

    def entries(self) -> list[Entry]:
        with self._lock:
            return [*self._verdicts.values(), *self._choices.values()]

    def reload(self) -> None:
        """Takes over what other processes have written since the last reading."""
        with self._lock:
            if self._stamp is None or self._stamp != self._file_stamp():
                self._take_over(self._read())

    def add(self, *entries: Entry) -> None:
        """Keeps the entries, here and in the file."""
        with self._lock:
            for entry in entries:
                known = self._verdicts if isinstance(entry, Verdict) else self._choices
                old = known.get(_key(entry)[1])
                self._keep(entry if old is None else _merged(old, entry))
            self._unsaved += entries
            try:
                with self._locked() as locked:
                    if locked:
                        self._write()
            except OSError as error:
                self._warn("write", f"{self.path} cannot be written ({error}): what is learnt lasts for this process")

    def _write(self) -> None:
        lines = self._read()
        self._take_over(lines)
        if not self._unsaved:
            return
        for entry in dict.fromkeys(map(_key, self._unsaved)):
            merged = self._kept(entry)
            line = {**dataclasses.asdict(self.scope), **dataclasses.asdict(merged)}
            lines = [other for other in lines if not (self._is_ours(other) and _key(_entry(other)) == entry)] + [line]
        text = "".join(json.dumps(line) + "\n" for line in lines[-MOST_LINES:])
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        self._unsaved.clear()
        self._stamp = self._file_stamp()

    def _read(self) -> list[dict[str, Any]]:
        """The lines of all scopes; damaged ones are left out."""
        self._stamp = self._file_stamp()
        try:
            text = self.path.read_bytes().decode(errors="replace")
        except FileNotFoundError:
            return []
        except OSError as error:
            self._warn("read", f"{self.path} cannot be read ({error}): nothing is known of the device")
            return []
        lines, damaged = [], 0
        for line in filter(str.strip, text.split("\n")):
            try:
                fields = json.loads(line)
                self._check(fields)
                lines.append(fields)
            except (ValueError, RecursionError):
                damaged += 1
        if damaged:
            self._warn("damaged", f"{self.path}: {damaged} damaged lines are ignored, and dropped at the next write")
        return lines

    def _check(self, fields: Any) -> None:
        """Raises ValueError for what is no line of a record."""
        if not isinstance(fields, dict) or not all(isinstance(fields.get(key), str) for key in SCOPE):
            raise ValueError("no record")
        if self._is_ours(fields):  # another build may have other families
            entry = _entry(fields)
            named = {entry.family} - {None} if isinstance(entry, Verdict) else {entry.family, *entry.us, *entry.excluded}
            if not named - {None} <= self.families:
                raise ValueError("unknown family")

    def _is_ours(self, fields: Mapping[str, Any]) -> bool:
        return _scope(fields) == self.scope

    def _take_over(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Adds what the file knows; what is not saved yet stays."""
        unsaved = set(map(_key, self._unsaved))
        for line in filter(self._is_ours, lines):
            entry = _entry(line)
            self._keep(_merged(entry, self._kept(_key(entry))) if _key(entry) in unsaved else entry)

    def _keep(self, entry: Entry) -> None:
        if isinstance(entry, Verdict):
            self._verdicts[entry.family] = entry
        else:
            self._choices[entry.problem] = entry

    def _kept(self, key: tuple[type, str]) -> Any:
        return self._verdicts[key[1]] if key[0] is Verdict else self._choices[key[1]]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """The file's lock; False if another process kept it too long. A process that ends gives its lock back."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{self.path}.lock", "a") as file:
            yield take_lock(file, LOCK_SECONDS)

    def _file_stamp(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"fused_rnn: {text}", RuntimeWarning, stacklevel=2)


def take_lock(file: IO[str], seconds: float) -> bool:
    """Whether this process could lock an open file within so many seconds. Closing it gives the lock back."""
    import fcntl  # of POSIX

    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.005)


def _scope(fields: Mapping[str, Any]) -> Scope:
    return Scope(*(fields[name] for name in SCOPE))


def _key(entry: Entry) -> tuple[type, str]:
    return type(entry), entry.family if isinstance(entry, Verdict) else entry.problem


def _merged(old: Any, new: Any) -> Any:
    """Of two processes' entries of one thing. A failure that either has seen stays."""
    if isinstance(new, Verdict):
        return new if old.verified else old
    excluded = {**old.excluded, **new.excluded}
    family = next((f for f in (new.family, old.family) if f is not None and f not in excluded), None)
    us = {name: time for name, time in {**old.us, **new.us}.items() if name not in excluded}
    return Choice(new.problem, family, us, excluded)


def _entry(fields: Mapping[str, Any]) -> Entry:
    """Of a line; raises ValueError if a field is missing or of another type."""
    if "problem" in fields:
        family, us, excluded = fields.get("family"), fields.get("us", {}), fields.get("excluded", {})
        good = isinstance(fields["problem"], str) and (family is None or isinstance(family, str))
        good = good and isinstance(us, dict) and all(_is_time(value) for value in us.values())
        good = good and isinstance(excluded, dict) and all(isinstance(value, str) for value in excluded.values())
        if not good or family in excluded:
            raise ValueError("damaged")
        return Choice(fields["problem"], family, us, excluded)
    family, verified, reason = fields.get("family"), fields.get("verified"), fields.get("reason")
    if not (isinstance(family, str) and isinstance(verified, bool) and isinstance(reason, str)):
        raise ValueError("damaged")
    return Verdict(family, verified, reason)


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
