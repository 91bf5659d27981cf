"""Compiled formulas on disk: a folder of libraries, written atomically, shared by processes, bounded in size."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MOST_BYTES = 256 << 20  # the oldest libraries go first
# Of libraries, for a CPU and a GPU, and of their sources.
SUFFIXES = {".so": ".cpp", ".kernels": ".cu"}


def cache_directory() -> Path:
    """Where compiled formulas lie: ``FUSED_RNN_CACHE``, else ``fused_rnn`` in the user's cache directory (XDG)."""
    chosen = os.environ.get("FUSED_RNN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(chosen) if chosen else Path(base) / "fused_rnn"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A library of the cache."""

    path: Path
    bytes: int
    used: float  # seconds since the epoch


def entries() -> list[Entry]:
    """The libraries in the cache, the one used last first."""
    found = []
    for path in (path for suffix in SUFFIXES for path in _files(suffix)):
        try:
            status = path.stat()
        except FileNotFoundError:  # another process has cleared it
            continue
        found.append(Entry(path, status.st_size, status.st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def _files(suffix: str) -> Iterator[Path]:
    try:
        yield from cache_directory().glob(f"*{suffix}")
    except OSError:
        return


def find(name: str, suffix: str = ".so") -> Path | None:
    """The library of this name, which counts as used now; None if there is none. Code of other users is not run: a library
    has to be the user's own or root's."""
    path = cache_directory() / f"{name}{suffix}"
    try:
        owner = path.stat().st_uid
    except OSError:
        return None
    if owner not in (os.geteuid(), 0):
        return None
    try:
        os.utime(path)
    except OSError:  # a cache that may only be read serves too
        pass
    return path


def work_directory() -> tempfile.TemporaryDirectory[str]:
    """A folder to compile in, on the cache's file system where that can be written, else a temporary one."""
    try:
        cache_directory().mkdir(mode=0o700, parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=".compile-", dir=cache_directory(), ignore_cleanup_errors=True)
    except OSError:
        return tempfile.TemporaryDirectory(prefix="fused_rnn-", ignore_cleanup_errors=True)


def keep(name: str, library: Path, source: Path) -> None:
    """Moves a library and its source into the cache, whole or not at all. Without a place to write to nothing is kept."""
    try:
        for path in (source, library):
            os.replace(path, cache_directory() / f"{name}{path.suffix}")
        _bound()
    except OSError:
        return


def _bound() -> None:
    total = 0
    for entry in entries():
        total += entry.bytes
        if total > MOST_BYTES:
            remove(entry.path)


def remove(library: Path) -> None:
    """Removes a library and its source; one that another process has removed is no error."""
    for path in (library, library.with_suffix(SUFFIXES[library.suffix])):
        path.unlink(missing_ok=True)


def clear() -> int:
    """Removes all libraries, and what compilers left that were killed more than an hour ago; returns the bytes freed."""
    found = entries()
    for entry in found:
        remove(entry.path)
    for folder in cache_directory().glob(".compile-*"):
        if time.time() - folder.stat().st_mtime > 3600:
            for path in folder.iterdir():
                path.unlink(missing_ok=True)
            folder.rmdir()
    return sum(entry.bytes for entry in found)
