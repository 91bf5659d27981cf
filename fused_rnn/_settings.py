"""Settings that environment variables choose: read once, when the package is imported.

A variable that changes later is not seen: calls run without Python's lock, where reading the environment beside a thread
that sets a variable ends the process. Tests and benchmarks change a setting with ``use``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from fused_rnn._build import load_extension

# The package works without its extension, on the reference; import_error then says why it is not there.
extension, import_error = load_extension()

_values: dict[str, str] = {}


def value(name: str) -> str:
    """The setting now, as text; empty: the default."""
    return _values[name]


def _set(name: str, text: str) -> None:
    if extension is not None:
        extension.set_setting(name, text)  # refuses what is no value of it
    _values[name] = text


@contextlib.contextmanager
def use(name: str, text: str) -> Iterator[None]:
    """A setting inside a ``with`` block, for the whole process.

    Args:
        name: ``"FUSED_RNN_CPU"``, ``"FUSED_RNN_WEIGHT_CACHE"``, ``"FUSED_RNN_PLAN"`` or ``"FUSED_RNN_OVERLAP"``.
        text: the value, as the environment variable would have it; empty: the default.

    Raises:
        ValueError: the setting has no such value.
    """
    before = value(name)
    _set(name, text)
    try:
        yield
    finally:
        _set(name, before)


for _name in ("FUSED_RNN_CPU", "FUSED_RNN_WEIGHT_CACHE", "FUSED_RNN_PLAN", "FUSED_RNN_OVERLAP"):
    _set(_name, os.environ.get(_name, ""))
