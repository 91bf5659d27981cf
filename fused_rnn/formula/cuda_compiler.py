"""The compiler of a formula's CUDA kernels: nvcc where it is, else NVRTC, which torch's CUDA wheels bring."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from fused_rnn.formula.build import BuildError, headers_directory, run_compiler

# What the compilers of both kinds are given, beside the architecture.
_FLAGS = ("-std=c++17",)


def include_directories(rtc: bool) -> list[Path]:
    """Of the kernels. NVRTC has no headers of the C++ library: what they use of these lies in cuda/formula/rtc."""
    base = headers_directory()
    folders = [base, base / "cuda" / "device"]
    return [base / "cuda" / "formula" / "rtc", *folders] if rtc else folders


class Nvcc:
    """The compiler of a CUDA toolkit."""

    def __init__(self, path: str) -> None:
        self.path = os.path.realpath(path)

    @property
    def identity(self) -> str:
        """Another one for another compiler."""
        status = os.stat(self.path)
        return f"{self.path} {status.st_size} {status.st_mtime_ns} {_FLAGS}"

    def compile(self, source: Path, capability: int, code: Path, what: str) -> None:
        """Machine code of the source for devices of this compute capability (90 of 9.0).

        Raises:
            BuildError: the compiler fails.
        """
        includes = [part for folder in include_directories(rtc=False) for part in ("-I", str(folder))]
        command = [self.path, *_FLAGS, "-O3", f"-arch=sm_{capability}", "-cubin", *includes, str(source), "-o", str(code)]
        run_compiler(command, what, "nvcc")


class Nvrtc:
    """The library of CUDA's compiler."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    @property
    def identity(self) -> str:
        """Another one for another compiler."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        return f"NVRTC {major.value}.{minor.value} of torch {torch.__version__} {_FLAGS}"

    def compile(self, source: Path, capability: int, code: Path, what: str) -> None:
        """As Nvcc.compile."""
        options = [*_FLAGS, "-default-device", f"--gpu-architecture=sm_{capability}"]
        options += [f"-I{folder}" for folder in include_directories(rtc=True)]
        program = ctypes.c_void_p()
        created = self.library.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), b"cell.cu", 0, None, None)
        self._check(created, "nvrtcCreateProgram")
        try:
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if self.library.nvrtcCompileProgram(program, len(options), array) != 0:
                log = self._bytes(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode()
                first = next((line for line in log.splitlines() if "error" in line), log.strip()[:200])
                raise BuildError(f"NVRTC failed to compile {what}: {first}")
            code.write_bytes(self._bytes(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN"))
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, program: ctypes.c_void_p, size_function: str, function: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self.library, size_function)(program, ctypes.byref(size)), size_function)
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, function)(program, buffer), function)
        return buffer.raw

    def _check(self, status: int, what: str) -> None:
        if status != 0:
            raise BuildError(f"NVRTC failed: {what} returned {status}")


def find_compiler() -> Nvcc | Nvrtc:
    """NVCC, or nvcc on PATH or in CUDA_HOME if it is of the major version of torch's CUDA; else NVRTC.

    Raises:
        BuildError: there is none.
    """
    chosen = os.environ.get("NVCC")
    if chosen:
        path = shutil.which(chosen)
        if path is None:
            raise BuildError(f"no nvcc was found (NVCC={chosen})")
        return Nvcc(path)
    home = os.environ.get("CUDA_HOME")
    for candidate in [shutil.which("nvcc"), home and shutil.which("nvcc", path=os.path.join(home, "bin"))]:
        if candidate and _major_of(candidate) == _major_of_torch():
            return Nvcc(candidate)
    return Nvrtc(_load_nvrtc())


def _major_of_torch() -> str:
    return (torch.version.cuda or "").partition(".")[0]


def _major_of(nvcc: str) -> str | None:
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+)\.", said)
    return found[1] if found else None


def _load_nvrtc() -> ctypes.CDLL:
    """The library that torch has, which torch.cuda._utils loads by the same names."""
    names: Sequence[str] = (f"libnvrtc.so.{_major_of_torch()}", "libnvrtc.so")
    folders = sorted(Path(torch.__file__).parent.parent.glob("nvidia/*/lib"))
    for name in [*names, *(str(folder / name) for folder in folders for name in names)]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BuildError("neither nvcc nor NVRTC (libnvrtc) was found")
