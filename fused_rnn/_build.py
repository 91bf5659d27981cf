"""Loads the compiled extension and tells what it was built from."""

from __future__ import annotations

import importlib
import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def build_record() -> dict[str, Any] | None:
    """What setup.py wrote beside the extension (torch, nvcc, architectures…), or None if nothing was built."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    path = Path(__file__).parent / ("_C" + suffix[: -len(".so")] + ".json")
    return json.loads(path.read_text()) if path.exists() else None


def runs_on(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs code of one of the architectures.

    Args:
        architectures: as TORCH_CUDA_ARCH_LIST has them: "8.0" (that and later minor versions), "8.0+PTX" (and all later
            ones), "9.0a" (that alone), "10.0f" (as "10.0").
        capability: (major, minor).
    """
    for name in architectures:
        number, _, ptx = name.partition("+")
        exact = number.endswith("a")
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        if exact:
            fits = capability == (major, minor)
        else:
            fits = (bool(ptx) or capability[0] == major) and capability >= (major, minor)
        if fits:
            return True
    return False


def load_extension() -> tuple[ModuleType | None, str | None]:
    """(fused_rnn._C, None), or (None, the reason why it cannot be used as a clause).

    torch's C++ interface changes between releases. An extension that was built against another release is not loaded: at
    best it would fail with an undefined symbol.
    """
    record = build_record()
    if record is None:
        return None, "the extension was never compiled"
    if record["torch"] != torch.__version__:
        return None, f"the extension was compiled for torch {record['torch']} and this is torch {torch.__version__}"
    try:
        return importlib.import_module("fused_rnn._C"), None
    except ImportError as error:
        return None, f"the extension could not be imported ({error})"


def rebuild_command() -> str:
    """The command that compiles the extension for the installed torch, from this source tree if the package lies in one."""
    root = Path(__file__).parent.parent
    if (root / "setup.py").exists() and (root / "csrc").is_dir():
        return f"pip install -e {root}"
    return "pip install --no-deps --force-reinstall . (in the source tree of fused_rnn)"
