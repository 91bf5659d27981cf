"""A Simulator whose kernels are the compiler's PTX, translated."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from ctypes import c_bool, c_uint64, c_void_p
from functools import cache
from pathlib import Path

from simulator import Simulator

from . import build
from .source import Kernel

# In the numbers of instructions that reports have, translated kernels come after all code of the library.
FIRST_PC = 1 << 31


class KernelCode(ctypes.Structure):
    """runtime/api.h."""

    _fields_ = [("run", c_void_p), ("pc", c_uint64)]


LOADER = ctypes.CFUNCTYPE(c_bool, c_uint64, ctypes.POINTER(KernelCode))


class PtxSimulator(Simulator):
    """Runs every kernel that the host code launches as its PTX; none as the source that g++ has compiled.

    `find` gives the kernel of a symbol, which is compiled if it has not been. What it raises ends the launch and is raised
    again by check().
    """

    def __init__(self, library: Path, find: Callable[[str], Kernel | build.Compiled], optimization: str = "-O1") -> None:
        super().__init__(library)
        self.optimization = optimization  # of g++ for translated kernels
        self.launched: Counter[str] = Counter()  # by symbol
        self._find = find
        self._symbols = build.symbols(library)
        self._code: dict[int, tuple[int, int, str]] = {}  # offset in the library: function, first number, symbol
        self._loaded: list[tuple[int, Kernel, ctypes.CDLL]] = []
        self._next_pc = FIRST_PC
        self._failure: BaseException | None = None
        self._base = self.lib.simt_base
        self._base.restype = c_uint64
        self._callback = LOADER(self._load)
        self.loader = ctypes.cast(self._callback, c_void_p)

    def _load(self, offset: int, code: ctypes._Pointer[KernelCode]) -> bool:
        try:
            if offset not in self._code:
                self._code[offset] = self._prepare(build.canonical(self._symbols[offset]))
            code[0].run, pc, symbol = self._code[offset]
            code[0].pc = self._base() + pc
            self.launched[symbol] += 1
            return True
        except BaseException as failure:
            self._failure = failure
            return False

    def _prepare(self, symbol: str) -> tuple[int, int, str]:
        found = self._find(symbol)
        if isinstance(found, Kernel):
            (found,) = build.compile_kernels([found], self.library, self.optimization)
        kernel, library = found.kernel, ctypes.CDLL(str(found.library))
        run = getattr(library, f"simt_translated_{found.index}")
        first = self._next_pc
        self._next_pc += len(kernel.instructions) + 1
        self._loaded.append((first, kernel, library))
        return ctypes.cast(run, c_void_p).value or 0, first, symbol

    def check(self, rc: int) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        super().check(rc)

    @cache  # noqa: B019 (one simulator a library)
    def lines(self, pc: str) -> list[str]:
        """The source lines of an instruction of a translated kernel, and its PTX."""
        number = int(pc, 16)
        if number < FIRST_PC:
            return super().lines(pc)
        for first, kernel, _ in reversed(self._loaded):
            if number >= first:
                instruction = kernel.instructions[min(number - first, len(kernel.instructions) - 1)]
                return [instruction.place or "?", f"`{instruction}`"]
        return [pc]


class Recorder(Simulator):
    """Runs the sources as g++ compiles them, and keeps the symbols of the kernels that were launched."""

    def __init__(self, library: Path) -> None:
        super().__init__(library)
        self.launched: set[str] = set()
        symbols = build.symbols(library)

        def record(offset: int, code: ctypes._Pointer[KernelCode]) -> bool:
            self.launched.add(build.canonical(symbols[offset]))
            return True  # without code in its place

        self._callback = LOADER(record)
        self.loader = ctypes.cast(self._callback, c_void_p)


def finder(arch: str) -> Callable[[str], Kernel]:
    """Looks a kernel up in the PTX of csrc/cuda for an architecture."""

    def find(symbol: str) -> Kernel:
        for source in build.homes(symbol, arch):
            for name in build.file_of(source, arch).names:
                if build.canonical(name) == symbol:
                    return build.file_of(source, arch).kernel(name)
        raise LookupError(f"no PTX for {arch} has the kernel {symbol}")

    return find
