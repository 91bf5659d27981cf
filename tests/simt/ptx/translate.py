"""A kernel's PTX as a C++ function that the simulator runs."""

from __future__ import annotations

import re
from collections import defaultdict

from . import arithmetic, collective, memory
from .operands import TYPES, Operands
from .source import Instruction, Kernel, Label, PtxError

RULES = [*arithmetic.RULES, *memory.RULES, *collective.RULES]

HEAD = """// Made from PTX by tests/simt/ptx.
#include <algorithm>
#include <cmath>
#include "runtime/translated.h"
"""
# What a register holds before it is written: what a test would notice.
_UNSET = {
    **{kind: f"{kind}(-1)" for kind in TYPES.values()},
    "bool": "true",
    "float": "simt_ptx::kUnset32",
    "double": "simt_ptx::kUnset64",
}


def label(name: str) -> str:
    return name.replace("$", "L_")


def _branch(o: Operands) -> str | None:
    if o.instruction.opcode in ("bra", "bra.uni"):
        o.expect(1)
        return f"goto {label(o[0])};"
    if o.instruction.opcode in ("ret", "exit"):
        o.expect(0)
        return "return;"
    return None


def statement(kernel: Kernel, instruction: Instruction, number: int) -> str:
    """One instruction in C++. Raises PtxError, which names the instruction, where no rule knows it."""
    o = Operands(kernel, instruction, number)
    for rule in (*RULES, _branch):
        if (code := rule(o)) is not None:
            break
    else:
        raise o.error(f"the instruction {instruction.opcode} is unknown to the translator (tests/simt/ptx)")
    if not instruction.guard:
        return f"{{ {code} }}"
    name = instruction.guard.lstrip("!")
    if o.type_of(name) != "pred":
        raise o.error(f"{name} is not a predicate")
    return f"if ({'!' * instruction.guard.startswith('!')}{o.variable(name)}) {{ {code} }}"


def function(kernel: Kernel, index: int = 0) -> str:
    """The kernel as the C++ function `simt_translated_INDEX(params, pc)`; its instruction i has the number pc + i."""
    lines, number = [], 0
    for part in kernel.body:
        if isinstance(part, Label):
            lines.append(f"{label(part.name)}:;")
        else:
            lines.append("  " + statement(kernel, part, number))
            number += 1
    used = set(re.findall(r"\br_[\w$]+", "\n".join(lines)))
    variables = defaultdict(list)
    for register, kind in kernel.registers.items():
        if Operands.variable(register) in used:
            variables[TYPES[kind]].append(Operands.variable(register))
    declared = [f"  {kind} {', '.join(f'{name} = {_UNSET[kind]}' for name in names)};" for kind, names in variables.items()]
    arrays = [f"  alignas(16) unsigned char {Operands.array(name)}[{size}];" for name, size in kernel.local.items()]
    if len(arrays) > 1:
        raise PtxError(f"{kernel.name}: more than one array of local memory")
    local = f"{Operands.array(next(iter(kernel.local)))}, {next(iter(kernel.local.values()))}" if arrays else "nullptr, 0"
    text = "\n".join(
        [*arrays, f"  const simt_ptx::Params params{{data, {kernel.param_bytes}, {local}}};", *declared, *lines]
    )
    return (
        f"// {kernel.name}\n"
        f'extern "C" void simt_translated_{index}(const unsigned char* data, uintptr_t pc) {{\n'
        f"  bool arrived = false;\n{text}\n}}\n"
    )
