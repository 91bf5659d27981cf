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

# The GPU's kernel families (csrc/plan/family.h), in the order of their numbers. Without the extension there are none.
FAMILIES: tuple[str, ...] = () if extension is None else tuple(extension.families)

_NATIVE = ("FUSED_RNN_CPU", "FUSED_RNN_WEIGHT_CACHE", "FUSED_RNN_PLAN", "FUSED_RNN_OVERLAP")
# Those that only Python reads, with their values; None: any text.
_PYTHON: dict[str, tuple[str, ...] | None] = {"FUSED_RNN_TUNE": ("", "off", "use", "first"), "FUSED_RNN_TUNE_FILE": None}

_values: dict[str, str] = {}


def value(name: str) -> str:
    """The setting now, as text; empty: the default."""
    return _values[name]


def _set(name: str, text: str) -> None:
    if name in _PYTHON:
        values = _PYTHON[name]
        if values is not None and text not in values:
            raise ValueError(f"{name}: expected one of {', '.join(filter(None, values))}, got {text!r}")
    elif extension is not None:
        extension.set_setting(name, text)  # refuses what is no value of it
    _values[name] = text
    if name in _PYTHON and extension is not None and hasattr(extension, "forget_choices"):
        extension.forget_choices()  # what was decided under the value before


@contextlib.contextmanager
def use(name: str, text: str) -> Iterator[None]:
    """A setting inside a ``with`` block, for the whole process.

    Args:
        name: ``"FUSED_RNN_CPU"``, ``"FUSED_RNN_WEIGHT_CACHE"``, ``"FUSED_RNN_PLAN"``, ``"FUSED_RNN_OVERLAP"``,
            ``"FUSED_RNN_TUNE"`` or ``"FUSED_RNN_TUNE_FILE"``.
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


for _name in (*_NATIVE, *_PYTHON):
    _set(_name, os.environ.get(_name, ""))
