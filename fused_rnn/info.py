"""What is installed, what was built, which implementation serves which tensors, what is missing and how to mend it."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from typing import Any

import torch

import fused_rnn
from fused_rnn import _backend, _build


def serves(device_type: str) -> str:
    """Which backend serves tensors of this device type and why, as a clause."""
    reason = _backend.why_not_native(device_type)
    forced = _backend.forced_backend()
    if forced == "reference":
        return "the Python reference (forced)"
    if forced is not None and forced != device_type:
        return f"nothing: backend {forced} is forced"
    if reason is None:
        info = _backend.build_info()
        kind = info["cpu_instruction_set"] if device_type == "cpu" else "built for " + ";".join(info["cuda_architectures"])
        return f"{device_type} kernels ({kind})"
    if forced is not None:
        return f"nothing: backend {forced} is forced but {reason}"
    return f"the Python reference: {reason}"


def gpus() -> list[str]:
    """Name and compute capability of every visible GPU."""
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name} (compute capability {device.major}.{device.minor})" for device in devices]


def missing() -> list[tuple[str, str]]:
    """(what is missing, the commands that mend it, one a line)."""
    rebuild = _build.rebuild_command()
    record = _build.build_record()
    if not _backend.has_cpu_kernels():
        compiler = os.environ.get("CXX", "c++").split()[0]
        first = "" if shutil.which(compiler) else f"install a C++ compiler ({compiler}), e.g. apt-get install g++\n"
        return [(f"compiled kernels: {_backend.import_error}", first + rebuild)]
    if record and record["cuda_skipped"]:
        needed = "" if gpus() else " (only a GPU needs them)"
        return [(f"CUDA kernels{needed}: {record['cuda_skipped']}", f"{record['cuda_mend']}\nFUSED_RNN_CUDA=1 {rebuild}")]
    return []


def rows() -> list[tuple[str, str]]:
    """The table that `python -m fused_rnn info` prints."""
    info: dict[str, Any] = _backend.build_info()
    result = [
        ("fused_rnn", fused_rnn.__version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} CPU threads"),
        ("GPU", ", ".join(gpus()) or "none visible"),
    ]
    if info:
        result.append(("built against", f"torch {info['torch']}" + (f", nvcc {info['nvcc']}" if info["nvcc"] else "")))
        result.append(("CPU kernels", "this machine runs " + ", ".join(info["cpu_instruction_sets"])))
        built = "for " + ";".join(info["cuda_architectures"])
        result.append(("CUDA kernels", built if info["cuda"] else f"not built: {info['cuda_skipped']}"))
    else:
        result.append(("built", f"nothing that can be used: {_backend.import_error}"))
    if os.environ.get("FUSED_RNN_BACKEND"):
        result.append(("FUSED_RNN_BACKEND", os.environ["FUSED_RNN_BACKEND"]))
    result += [(f"{device.upper()} tensors", "served by " + serves(device)) for device in ("cpu", "cuda")]
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""


def main(_: argparse.Namespace) -> None:
    for name, value in rows():
        print(f"{name:18} {value}")
    for what, commands in missing():
        print(f"\nMissing: {what}. To mend it:\n  " + commands.replace("\n", "\n  "))
