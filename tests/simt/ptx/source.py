"""Reads the PTX that nvcc writes: kernels, their registers and their instructions."""

from __future__ import annotations

import dataclasses
import re


class PtxError(ValueError):
    """PTX that cannot be read or translated; the message has the kernel and the instruction."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[str, ...]
    guard: str = ""  # register of the predicate, with ! where it must not hold
    place: str = ""  # of the source: "file:line"
    inline: bool = False  # from an asm statement of the source, as it stands there

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".rstrip()


@dataclasses.dataclass(frozen=True)
class Label:
    name: str


@dataclasses.dataclass
class Kernel:
    name: str  # mangled
    param: str  # name of the one parameter, a struct
    param_bytes: int
    registers: dict[str, str] = dataclasses.field(default_factory=dict)  # name: type without the dot
    shared: frozenset[str] = frozenset()  # names of the block's dynamic shared memory
    local: dict[str, int] = dataclasses.field(default_factory=dict)  # arrays of each thread: bytes
    body: list[Instruction | Label] = dataclasses.field(default_factory=list)

    @property
    def instructions(self) -> list[Instruction]:
        return [part for part in self.body if isinstance(part, Instruction)]


def split(text: str) -> list[str]:
    """The parts between commas that are outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for at, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(\s*\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?\s*\)[^{]*\{")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+([^\n]*)(?:\n|$)")
_INLINED = re.compile(r"inlined_at\s+(\d+)\s+(\d+)\s+\d+")
_LABEL = re.compile(r"(\$?\w+):")
_OPCODE = re.compile(r"(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)(?:\s+(.*))?", re.DOTALL)
_LOCAL = re.compile(r"\.local\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d+)\]")
_SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}
# Wrappers of instructions: their callers are the places that matter.
_WRAPPERS = "simt.cuh"


def _end_of_braces(text: str, start: int) -> int:
    """The place after the brace that closes the one before `start`."""
    depth = 1
    for found in re.compile("[{}]").finditer(text, start):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return found.end()
    raise PtxError("a kernel without its closing brace")


class _Reader:
    """Fills one kernel from the text of its body."""

    def __init__(self, kernel: Kernel, files: dict[str, str]) -> None:
        self.kernel, self.files = kernel, files
        self.callers: dict[str, str] = {}  # place of a call that was inlined: place of the call around it
        self.place = ""
        self.inline = False

    def read(self, body: str) -> None:
        for chunk in body.split(";"):
            text = chunk.strip()
            while text:
                if text[0] in "{}":  # of inline PTX; those of vectors come after an opcode
                    text = text[1:].lstrip()
                elif found := _LOC.match(text):
                    self.location(found)
                    text = text[found.end() :].lstrip()
                elif found := _LABEL.match(text):
                    self.kernel.body.append(Label(found[1]))
                    text = text[found.end() :].lstrip()
                else:
                    self.statement(text)
                    break

    def location(self, found: re.Match[str]) -> None:
        place = f"{self.files.get(found[1], found[1])}:{found[2]}"
        if caller := _INLINED.search(found[3]):
            self.callers[place] = f"{self.files.get(caller[1], caller[1])}:{caller[2]}"
        while place.startswith(_WRAPPERS) and place in self.callers:
            place = self.callers[place]
        self.place = place

    def statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self.declare(text)
            return
        if text.startswith(".pragma"):
            return
        if text.startswith(".asm"):  # a mark of PtxFile
            self.inline = text.endswith("begin")
            return
        if found := _LOCAL.fullmatch(text):
            self.kernel.local[found[1]] = int(found[2])
            return
        found = _OPCODE.fullmatch(" ".join(text.split()))
        if not found:
            raise PtxError(f"{self.kernel.name}: cannot read {text[:100]!r}")
        operands = tuple(split(found[3] or ""))
        self.kernel.body.append(Instruction(found[2], operands, found[1] or "", self.place, self.inline))

    def declare(self, text: str) -> None:
        """.reg .TYPE %name, ... or %name<count>"""
        kind, names = text.split(None, 2)[1:]
        registers = self.kernel.registers
        for name in split(names):
            many = re.fullmatch(r"(%?\w+)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                # Blocks of inline PTX may use a name again.
                if registers.setdefault(one, kind[1:]) != kind[1:]:
                    raise PtxError(f"{self.kernel.name}: register {one} has two types, .{registers[one]} and {kind}")


class PtxFile:
    """A PTX file; each of its kernels is read when it is asked for."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//\s*(begin|end) inline asm", r".asm \1;", text)
        self._text = re.sub(r"//[^\n]*", "", text)
        files = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', self._text, re.M)
        self._files = {number: path.rsplit("/", 1)[-1] for number, path in files}
        self._shared = frozenset(re.findall(r"\.extern\s+\.shared[^;]*?(\w+)\[\]\s*;", self._text))
        self._entries = {found[1]: found for found in _ENTRY.finditer(self._text)}
        if len(self._entries) != len(re.findall(r"\.entry\b", self._text)):
            raise PtxError("a kernel whose parameters are not one struct by value")

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def kernel(self, name: str) -> Kernel:
        found = self._entries[name]
        _, kind, param, size = found.groups()
        kernel = Kernel(name, param, int(size or 1) * _SIZES.get(kind, 1), shared=self._shared)
        end = _end_of_braces(self._text, found.end()) - 1
        _Reader(kernel, self._files).read(self._text[found.end() : end])
        return kernel
