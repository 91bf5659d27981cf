"""Mutants of the inline PTX of csrc/cuda/device/simt.cuh: operands swapped, qualifiers and counts wrong, instructions gone.

The compiler passes inline PTX on as it stands, so that an instruction in its output is changed as the wrapper would be.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from .source import Instruction, Kernel, Label


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str  # kernel of primitives.cu, instruction, change
    symbol: str
    kernel: Kernel


# Part of an opcode, and what takes its place.
QUALIFIERS: list[tuple[str, str]] = [
    (r"\.cg\.", ".ca."),
    (r"\.ca\.", ".cg."),
    (r"\.relaxed\.gpu\.global", ".global"),
    (r"\.(release|acquire)\.gpu\.global", ".global"),
    (r"\.(release|acquire)\.gpu", ".relaxed.gpu"),
    (r"^st\.relaxed", "st.release"),
    (r"^ld\.relaxed", "ld.acquire"),
    (r"\.gpu\.", ".cta."),
    (r"\.gpu\.", ".cluster."),
    (r"\.gpu\.", ".sys."),
    (r"\.b64$", ".b32"),
    (r"\.u32$", ".u16"),
    (r"\.v2\.b64", ".v4.b32"),
    (r"\.v4\.b32", ".v2.b32"),
    (r"\.v2\.b32", ".v4.b32"),
    (r"complete_tx::bytes\.b32", "complete_tx::bytes.v2.b32"),
    (r"\.L2$", ".L1"),
    (r"\.x1\.", ".x2."),
    (r"\.x2\.", ".x1."),
    (r"\.x2\.", ".x4."),
    (r"\.x4\.", ".x2."),
    (r"\.trans\.", "."),
    (r"(\.x\d)\.shared", r"\1.trans.shared"),
    (r"m16n8k16", "m16n8k8"),
    (r"m16n8k8", "m16n8k16"),
    (r"\.f16\.f16\.", ".bf16.bf16."),
    (r"\.bf16\.bf16\.", ".f16.f16."),
    (r"\.tf32\.tf32\.", ".bf16.bf16."),
    (r"\.row\.col", ".col.row"),
    (r"\.row\.col", ".row.row"),
    (r"cvt\.rn\.f16", "cvt.rn.bf16"),
    (r"cvt\.rn\.bf16", "cvt.rn.f16"),
    (r"cvt\.rn\.(b?f16)", r"cvt.rz.\1"),
    (r"cvt\.f32\.f16", "cvt.f32.bf16"),
    (r"cvt\.rna\.tf32", "cvt.rn.tf32"),
    (r"cvt\.rna\.tf32", "cvt.rz.tf32"),
    (r"^ex2\.", "lg2."),
    (r"^rcp\.", "rsqrt."),
    (r"\.approx\.ftz", ".approx"),
    (r"\.wait$", ".launch_dependents"),
    (r"\.launch_dependents$", ".wait"),
    (r"arrive\.release", "arrive.relaxed"),
    (r"arrive\.expect_tx", "arrive"),
    (r"mapa\.shared::cluster", "mapa"),
    (r"\.parity\.", "."),
    (r"try_wait", "test_wait"),
    (r"\.relaxed\.cluster", ".acquire.cluster"),
    (r"\.relaxed\.cluster", ".acquire.cta"),
    (r"fence\.mbarrier_init\.release\.cluster", "fence.acq_rel.cta"),
    (r"sync_restrict::shared::cluster\.cluster", "sync_restrict::shared::cta.cta"),
    (r"fence\.acquire", "fence.release"),
    (r"commit_group", "wait_all"),
    (r"wait_group", "commit_group"),
    (r"bar\.sync", "bar.arrive"),
    (r"barrier\.cluster\.wait\.acquire", "barrier.cluster.arrive.release"),
    (r"%cluster_ctarank", "%cluster_nctarank"),
]
# Opcode, operand and what is added to it: counts that are too small or too large.
COUNTS: list[tuple[str, int, int]] = [
    (r"cp\.async\.c[ag]\..*", 2, -4),
    (r"cp\.async\.c[ag]\..*", 2, 4),
    (r"cp\.async\.c[ag]\..*", 2, -8),
    (r"cp\.async\.wait_group", 0, 1),
    (r"cp\.async\.wait_group", 0, -1),
]


def _swapped(instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
    """Two neighbouring operands in each other's place: brackets and braces stay where they are."""
    tokens = re.findall(r"[%\w:.+$-]+|.", ", ".join(instruction.operands))
    places = [i for i, token in enumerate(tokens) if re.match(r"[%\w]", token) and token != "_"]
    for number, (first, second) in enumerate(zip(places, places[1:], strict=False)):
        if tokens[first] == tokens[second]:
            continue
        mixed = list(tokens)
        mixed[first], mixed[second] = tokens[second], tokens[first]
        text = "".join(mixed)
        operands = tuple(re.findall(r"[{\[(][^}\])]*[}\])]|[^,\s]+", text))
        yield f"operands {number} and {number + 1} swapped", dataclasses.replace(instruction, operands=operands)


def _changes(instruction: Instruction) -> Iterator[tuple[str, Instruction | None]]:
    yield "left out", None
    yield from _swapped(instruction)
    for pattern, replacement in QUALIFIERS:
        if re.search(pattern, instruction.opcode):
            opcode = re.sub(pattern, replacement, instruction.opcode, count=1)
            if opcode != instruction.opcode:
                yield f"becomes {opcode}", dataclasses.replace(instruction, opcode=opcode)
        for index, operand in enumerate(instruction.operands):
            if operand.startswith("%cluster") and re.fullmatch(pattern, operand):
                operands = [*instruction.operands]
                operands[index] = replacement
                yield f"reads {replacement}", dataclasses.replace(instruction, operands=tuple(operands))
    for pattern, index, more in COUNTS:
        if re.fullmatch(pattern, instruction.opcode) and re.fullmatch(r"\d+", instruction.operands[index]):
            operands = [*instruction.operands]
            operands[index] = str(int(operands[index]) + more)
            yield f"{more:+d} for its count", dataclasses.replace(instruction, operands=tuple(operands))


def _kind(part: Instruction | Label) -> str | None:
    """What tells one asm statement from others: the opcode, and the size of a copy. None: not inline PTX."""
    if not isinstance(part, Instruction) or not part.inline:
        return None
    sized = re.fullmatch(r"cp\.async\.c[ag]\..*", part.opcode)
    return f"{part.opcode} of {part.operands[2]} bytes" if sized else part.opcode


def mutants_of(name: str, kernel: Kernel) -> Iterator[Mutant]:
    """Each kind of inline instruction changed in each way, everywhere in the kernel at once, as a wrapper would be."""
    for kind in sorted({kind for part in kernel.body if (kind := _kind(part))}):
        first = next(part for part in kernel.instructions if _kind(part) == kind)
        for change, _ in _changes(first):
            body: list[Instruction | Label] = []
            for part in kernel.body:
                if not isinstance(part, Instruction) or _kind(part) != kind:
                    body.append(part)
                elif (changed := dict(_changes(part)).get(change, part)) is not None:
                    body.append(changed)
            yield Mutant(f"{name} {kind}: {change}", kernel.name, dataclasses.replace(kernel, body=body))
