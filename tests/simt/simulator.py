"""The simulated device: its memory, its launches and its fault reports."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import subprocess
from ctypes import c_char_p, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


class DeviceInfo(ctypes.Structure):
    """csrc/plan/device_info.h."""

    _fields_ = [
        *((name, c_int) for name in ("compute_capability", "sm_count", "smem_per_block", "smem_per_sm")),
        *((name, c_int) for name in ("registers_per_sm", "threads_per_sm")),
        ("l2_bytes", c_int64),
        ("max_cluster", c_int),
        ("compiled_for", c_int),
        ("active_clusters", c_int * 17),
        ("resident_blocks", c_int),
        ("dram_gb_per_s", c_int),
    ]


KIB = 1024
H100 = DeviceInfo(90, 132, 227 * KIB, 228 * KIB, 65536, 2048, 50 << 20, 16, 90)
A100 = DeviceInfo(80, 108, 163 * KIB, 164 * KIB, 65536, 2048, 40 << 20, 1, 80)
T4 = DeviceInfo(75, 40, 64 * KIB, 64 * KIB, 65536, 1024, 4 << 20, 1, 75)
# A device that never was: one SM and little memory, so that small problems already meet its limits.
TINY = DeviceInfo(90, 2, 100 * KIB, 100 * KIB, 65536, 1024, 1 << 20, 2, 90)


class Fault(AssertionError):
    """What the simulator found wrong with a kernel."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text


@dataclasses.dataclass
class Stats:
    grids: int
    blocks: int
    threads: int
    switches: int
    accesses: int


class Simulator:
    """One library built by builder.build(), and the memory of its device. Not for use by two threads."""

    def __init__(self, library: Path) -> None:
        self.library = library
        self.loader: c_void_p | None = None  # of kernels in the place of the compiled ones, see ptx/loader.py
        self.lib = ctypes.CDLL(str(library))
        self.lib.simt_alloc.restype = c_void_p
        self.lib.simt_alloc.argtypes = [c_size_t, c_char_p, c_void_p]
        self.lib.simt_unwritten.restype = c_size_t
        self.lib.simt_unwritten.argtypes = [c_void_p, c_size_t]
        self.lib.simt_close.argtypes = [c_void_p, c_size_t]
        self.lib.simt_seed.argtypes = [c_uint64]
        self.lib.simt_set_loader.argtypes = [c_void_p]
        for name in ("simt_kind", "simt_message", "simt_poison_reads", "simt_meetings"):
            getattr(self.lib, name).restype = c_char_p
        self.inputs: list[tuple[str, int, Tensor]] = []
        self.outputs: list[tuple[str, int, Tensor]] = []

    def reset(self, seed: int = 0, device: DeviceInfo = H100) -> None:
        """Frees all memory and starts over."""
        self.lib.simt_reset()
        self.lib.simt_set_loader(self.loader)
        self.lib.simt_seed(seed)
        d = device
        limits = (d.compute_capability, d.sm_count, d.smem_per_block, d.smem_per_sm, d.registers_per_sm, d.threads_per_sm)
        self.lib.simt_device((c_int * 7)(*limits, d.max_cluster))
        self.inputs, self.outputs = [], []

    def unmap_stacks(self) -> None:
        """Gives the memory of idle threads' stacks back: a process has room for those of about twenty libraries."""
        self.lib.simt_unmap_stacks()

    def _alloc(self, name: str, bytes_: int, contents: int | None) -> int:
        address = self.lib.simt_alloc(max(bytes_, 1), name.encode(), contents if bytes_ else None)
        if not address:
            raise MemoryError(f"simulated device: no room for {name}, {bytes_} bytes")
        return address

    def put(self, name: str, tensor: Tensor | None) -> int | None:
        """A read-only copy of the tensor in device memory."""
        if tensor is None:
            return None
        tensor = tensor.detach().contiguous()
        address = self._alloc(name, tensor.nbytes, tensor.data_ptr())
        self.inputs.append((name, address, tensor))
        return address

    def inout(self, name: str, tensor: Tensor) -> int:
        """A copy that kernels may write."""
        tensor = tensor.detach().contiguous()
        return self._alloc(name, tensor.nbytes, tensor.data_ptr())

    def out(self, name: str, bytes_: int) -> int:
        """Uninitialised (poisoned) device memory."""
        return self._alloc(name, bytes_, None)

    def close(self, address: int, bytes_: int) -> None:
        """Until open_all(), an access by a kernel is a fault: another stream may be writing there."""
        self.lib.simt_close(address, bytes_)

    def open_all(self) -> None:
        self.lib.simt_open_all()

    def get(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A copy of device memory."""
        result = torch.empty(shape, dtype=dtype)
        if result.nbytes:
            ctypes.memmove(result.data_ptr(), address, result.nbytes)
        return result

    def unwritten(self, address: int, bytes_: int) -> int:
        return self.lib.simt_unwritten(address, bytes_)

    def text(self, name: str) -> str:
        return self.symbolize(getattr(self.lib, name)().decode())

    def stats(self) -> Stats:
        values = (c_uint64 * 5)()
        self.lib.simt_stats(values)
        return Stats(*values)

    def check(self, rc: int) -> None:
        """After a run: raises what it reported, and what only shows at the end."""
        if rc == 2:
            raise RuntimeError(self.text("simt_message"))
        if rc:
            raise Fault(self.text("simt_kind"), self.text("simt_message"))
        for line in self.lib.simt_meetings().decode().splitlines():
            first, second = (self.lines(pc)[0] for pc in re.findall(r"\{pc:(\w+)\}", line))
            if first != second:
                raise Fault("divergent barrier", self.symbolize(line))
        for name, address, tensor in self.inputs:
            now = self.get(address, tuple(tensor.shape), tensor.dtype)
            if tensor.numel() and not torch.equal(now.view(torch.uint8), tensor.view(torch.uint8)):
                raise Fault("input changed", name)

    def check_output(self, name: str, address: int, tensor: Tensor, finite: bool = True) -> None:
        """Demands that every element was written and, if `finite`, is a number."""
        good = torch.isfinite(tensor) if finite else torch.ones(tensor.shape, dtype=torch.bool)
        # A build without instrumentation of plain accesses (AddressSanitizer's) does not know what was written.
        unwritten = self.stats().accesses and self.unwritten(address, tensor.nbytes)
        if good.all() and not unwritten:
            return
        index = (~good).nonzero()[:1].flatten().tolist()
        reads = self.text("simt_poison_reads")
        where = f"poison was read by: {reads or 'none'}"
        raise Fault("poison in output", f"{name}{index} was not written or is not a number; {where}")

    @cache  # noqa: B019 (one simulator a library)
    def lines(self, pc: str) -> list[str]:
        """Source lines of an instruction, innermost inlined function first, without those of the simulator itself."""
        command = ["addr2line", "-e", str(self.library), "-f", "-C", "-i", "-p", pc]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        frames = [re.sub(r"^\s*\(inlined by\) ", "", line) for line in output]
        frames = [re.sub(r" \(discriminator \d+\)", "", line) for line in frames]
        places = [re.sub(r"^(.*) at (?:\S*/)?([^/]+:[\d?]+)$", r"\2", f) for f in frames if "/simt/include/" not in f]
        return places or [pc]

    def symbolize(self, text: str) -> str:
        return re.sub(r"\{pc:(\w+)\}", lambda m: " < ".join(self.lines(m[1])[:3]), text)
