"""The record and the verifier of a GPU of this machine."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch

from fused_rnn import _settings
from fused_rnn._settings import FAMILIES
from fused_rnn.tuning.record import Record, Scope, cache_folder, default_path
from fused_rnn.tuning.verification import Verifier


def record_of(index: int) -> Record:
    """Of a visible GPU, by its number. FUSED_RNN_TUNE_FILE is the file if it is set, else one of the cache directory."""
    device = torch.cuda.get_device_properties(index)
    name = f"{device.name} {device.multi_processor_count} SMs"  # a MIG slice has the whole device's name
    file = _settings.value("FUSED_RNN_TUNE_FILE")
    return Record(Path(file) if file else default_path(name), Scope(name, driver(), build()), FAMILIES)


def verifier_of(record: Record, index: int) -> Verifier:
    """Verifies on a visible GPU."""

    def command(family: str) -> list[str]:
        return [sys.executable, "-m", "fused_rnn.tuning.cases", family, f"cuda:{index}"]

    # The child forces each family in turn: what this process was told would be in its way.
    environment = dict.fromkeys(("FUSED_RNN_PLAN", "FUSED_RNN_OVERLAP", "FUSED_RNN_BACKEND"), "")
    return Verifier(record, command, environment={**environment, "FUSED_RNN_TUNE": "off"})


def files() -> list[Path]:
    """The records that are there."""
    file = _settings.value("FUSED_RNN_TUNE_FILE")
    found = [Path(file)] if file else sorted(cache_folder().glob("*.txt"))
    return [path for path in found if path.is_file()]


def driver() -> str:
    """The version of NVIDIA's driver; where it cannot be read, of the CUDA that it has."""
    version = Path("/proc/driver/nvidia/version")
    if version.exists():
        return version.read_text().split("\n")[0].removeprefix("NVRM version: ").strip()
    native: Any = torch._C  # of builds with CUDA
    return f"CUDA {native._cuda_getDriverVersion()}"


def build() -> str:
    """A hash of the compiled extension, and torch's version."""
    digest = hashlib.blake2b(digest_size=8)
    if _settings.extension is not None and _settings.extension.__file__ is not None:
        with open(_settings.extension.__file__, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"{digest.hexdigest()} torch {torch.__version__}"
