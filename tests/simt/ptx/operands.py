"""PTX types and operands as C++: what a rule for an instruction reads and writes."""

from __future__ import annotations

import re

from .source import Instruction, Kernel, PtxError, split

# PTX type: C++ type.
TYPES = {
    "pred": "bool",
    **{f"{sign}{bits}": f"uint{bits}_t" for sign in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
}
SPECIAL = {
    "%tid.x": "simt_host::context.thread_x",
    "%ntid.x": "simt_host::context.block_dim_x",
    "%ctaid.x": "simt_host::context.block.x",
    "%ctaid.y": "simt_host::context.block.y",
    "%ctaid.z": "simt_host::context.block.z",
    "%laneid": "(simt_host::context.thread_x % 32)",
    "%cluster_ctarank": "simt_host::cluster_rank()",
}
_FLOAT32 = re.compile(r"0[fF]([0-9a-fA-F]{8})")
_FLOAT64 = re.compile(r"0[dD]([0-9a-fA-F]{16})")
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")
_ADDRESS = re.compile(r"\[\s*(%?[\w$]+)\s*(?:\+\s*(-?\d+))?\s*(-\d+)?\s*\]")


def size_of(kind: str) -> int:
    """Bytes of a PTX type."""
    return int(kind[1:]) // 8


def is_float(kind: str) -> bool:
    return kind[0] == "f"


class Operands:
    """The operands of one instruction of a kernel, in C++."""

    def __init__(self, kernel: Kernel, instruction: Instruction, number: int) -> None:
        self.kernel, self.instruction = kernel, instruction
        self.pc = f"pc + {number}"

    def __len__(self) -> int:
        return len(self.instruction.operands)

    def __getitem__(self, index: int) -> str:
        if index >= len(self):
            raise self.error("too few operands")
        return self.instruction.operands[index]

    def error(self, why: str) -> PtxError:
        where = f" ({self.instruction.place})" if self.instruction.place else ""
        return PtxError(f"{self.kernel.name}: {self.instruction}{where}: {why}")

    def expect(self, count: int) -> None:
        if len(self) != count:
            raise self.error(f"{count} operands expected, {len(self)} found")

    @staticmethod
    def variable(register: str) -> str:
        """The C++ variable of a register."""
        return "r_" + register.lstrip("%")

    @staticmethod
    def array(local: str) -> str:
        """The C++ array of a name of local memory."""
        return "local_" + local

    def type_of(self, register: str) -> str:
        kind = self.kernel.registers.get(register)
        if kind is None:
            raise self.error(f"{register} is not a register")
        return kind

    def constant(self, index: int) -> int:
        """An operand that has to be a number."""
        text = self[index]
        if not _INTEGER.fullmatch(text):
            raise self.error(f"{text} should be a constant")
        return int(text.rstrip("U"), 0)

    def read(self, text: str, kind: str) -> str:
        """A C++ expression of the type of `kind`."""
        wanted = TYPES[kind]
        if text in self.kernel.registers:
            have = self.kernel.registers[text]
            return self.convert(self.variable(text), have, kind)
        if found := _FLOAT32.fullmatch(text):
            return self.convert(f"simt_ptx::bits<float>(0x{found[1]}u)", "f32", kind)
        if found := _FLOAT64.fullmatch(text):
            return self.convert(f"simt_ptx::bits<double>(uint64_t(0x{found[1]}ull))", "f64", kind)
        if _INTEGER.fullmatch(text):
            value = int(text.rstrip("U"), 0)
            if kind == "pred":
                return "true" if value else "false"
            if is_float(kind):
                raise self.error(f"{text} where a .{kind} is expected")
            return f"{wanted}({value & (1 << 8 * size_of(kind)) - 1:#x}ull)"
        if text in SPECIAL:
            return f"{wanted}({SPECIAL[text]})"
        if text == self.kernel.param:
            return f"{wanted}(reinterpret_cast<uintptr_t>(params.data))"
        if text in self.kernel.local:
            return f"{wanted}(reinterpret_cast<uintptr_t>({self.array(text)}))"
        if text in self.kernel.shared:
            return f"{wanted}(0)"
        raise self.error(f"operand {text} is unknown")

    def convert(self, expression: str, have: str, kind: str) -> str:
        """Of a register's type `have` as the type of an instruction, which may be narrower."""
        if TYPES[have] == TYPES[kind]:
            return expression
        if "pred" in (have, kind):
            raise self.error(f"a .{have} where a .{kind} is expected")
        if is_float(have) or is_float(kind):
            if size_of(have) != size_of(kind):
                raise self.error(f"a .{have} where a .{kind} is expected")
            return f"simt_ptx::bits<{TYPES[kind]}>({expression})"
        if size_of(have) < size_of(kind):
            raise self.error(f"a .{have} where a .{kind} is expected")
        return f"{TYPES[kind]}({expression})"

    def source(self, index: int, kind: str) -> str:
        return self.read(self[index], kind)

    def write(self, text: str, kind: str, expression: str) -> str:
        """A statement that gives a register a value of the type of `kind`, extended by its sign if the register is wider."""
        if text == "_":
            return f"(void)({expression});"
        have, name = self.type_of(text), self.variable(text)
        if TYPES[have] == TYPES[kind]:
            return f"{name} = {expression};"
        if "pred" in (have, kind):
            raise self.error(f"a .{kind} for a .{have}")
        if is_float(have) or is_float(kind):
            if size_of(have) != size_of(kind):
                raise self.error(f"a .{kind} for a .{have}")
            return f"{name} = simt_ptx::bits<{TYPES[have]}>({TYPES[kind]}({expression}));"
        if size_of(have) < size_of(kind):
            raise self.error(f"a .{kind} for a .{have}")
        return f"{name} = {TYPES[have]}({TYPES[kind]}({expression}));"

    def target(self, kind: str, expression: str) -> str:
        """The first operand gets the value."""
        return self.write(self[0], kind, expression)

    def vector(self, index: int, count: int | None = None) -> list[str]:
        """The names in {..}, or the one register."""
        text = self[index]
        names = split(text[1:-1]) if text.startswith("{") else [text]
        if count is not None and len(names) != count:
            raise self.error(f"{count} registers expected in {text}")
        return names

    def base_and_offset(self, index: int) -> tuple[str, int]:
        """Of [register+bytes]."""
        found = _ADDRESS.fullmatch(self[index])
        if not found:
            raise self.error(f"{self[index]} should be an address")
        return found[1], int(found[2] or found[3] or 0)

    def address(self, index: int, kind: str) -> str:
        """The number in [..]: u32 for shared memory, u64 for others."""
        base, offset = self.base_and_offset(index)
        value = self.read(base, kind)
        return f"{value} + {TYPES[kind]}({offset}ll)" if offset else value
