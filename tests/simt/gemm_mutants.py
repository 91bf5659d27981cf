"""Mutants of family gemm: each barrier and mask of its kernels taken away in turn, and what its host code tells products."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from builder import CACHE, ROOT
from mutants import CUDA, Mutant, mutants_of, source_of

FILES = ("pointwise_forward.cuh", "pointwise_backward.cuh", "gemm_launch.cu")

SYNCHRONISATION = [(r"(?<!void )\bsimt::sync_block\(\);", ";", "no sync_block")]

MASKS = [
    # What a block and a thread have.
    (r"if \(simt::thread_x\(\) < G::kBatch\)", "if (true)"),
    (r"unit >= p\.P \|\| ", ""),
    (r" \|\| !\(info\.flags & kExists\)", ""),
    (r"at\.unit\(\) >= p\.P \|\| ", ""),
    (r" \|\| at\.row\(\) >= p\.seq\.B", ""),
    # Sums that may not be there.
    (r"if \(!table\[batch\]\.source\[0\]\) return Acc\(0\);", ""),
    (r"if \(!table\[at\.row_in_tile\]\.source\[0\]\) return Acc\(0\);", ""),
    (r"info\.source\[0\] \? (static_cast<const Acc\*>\(s\.sums\)\[place\]) : Acc\(0\)", r"\1"),
    (r"p\.d_h \? p\.d_h : ", ""),
    # The state that the next step multiplies.
    (r"if \(is_active\(p\.seq, t, b\)\) \{", "{"),
    (r"if \(is_reset\(p\.modifier, .*\) \{", "if (false) {"),
    (r"if \(row\) next = ", "next = "),
    (r"\} else if \(info\.flags & kActive\) \{", "} else if (false) {"),
    (r"\} else if \(p\.h0\) \{", "} else {"),
    (r"if \(p\.modifier\.product\) \{", "if (false) {"),
    (r"if \(s\.states\) store_next_state", "store_next_state"),
    # The gradients that the step before multiplies.
    (r"if \(!s\.d_gates\) return;", ""),
    (r"step\.step != p\.seq\.T - 1 \|\| ", ""),
    (r"!elements\.exists\(0\) \|\| ", ""),
    (r" \|\| table\[at\.row_in_tile\]\.flags & kActive\) return;", ") return;"),
    (r"C::kSlots - C::kGates \+ g", "g"),
    (r"if \(s\.d_h\) static_cast", "static_cast"),
    # The host code.
    (r"if \(!rows\.data\) return;", ""),
    (r"d \* rows\.direction", "0 * rows.direction"),
    (r"d \* batch \* columns", "0 * batch * columns"),
    (r"return seq\.offsets \|\| ", "return "),
    (r"\(seq\.lengths && directions > 1\)", "false"),
    (r"if \(rows_lie_apart\(p\.seq, p\.D\) \|\| ", "if ("),
    (r" \|\| puts_states\(p\.modifier\)", ""),
    (r" \|\| p\.modifier\.product\)", ")"),
    (r"\(last_of_reverse - last\) \* p\.D \* p\.P", "0"),
    (r"if \(rows_lie_apart\(p\.seq, p\.D\)\) step\.d_gates = .*", ""),
    (r"if \(projected && p\.seq\.offsets\) step\.d_h = .*", ""),
    (r"t_of_reverse - t\)", "0)"),
    (r"slots, slots - gates\)", "slots, 0)"),
    (r"if \(s \+ 1 < p\.seq\.T\) multiply_gates", "multiply_gates"),
    (r"multiply_gates\(0\);", ""),
]


def all_mutants() -> list[Mutant]:
    return mutants_of(FILES, SYNCHRONISATION, MASKS)


def replacement(mutant: Mutant | None) -> dict[str, list[tuple[Path, Path]]]:
    """The mutant as builder.build(replace=...) wants it; None: unchanged."""
    folder = CACHE / "mutants" / (re.sub(r"\W+", "_", mutant.name)[:120] if mutant else "unchanged_gemm")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder, ignore=shutil.ignore_patterns("cpu", "torch", "*.cpp"))
    stem = "gemm_fp16"
    if mutant:
        (folder / source_of(mutant.file).relative_to(ROOT / "csrc")).write_text(mutant.text)
        if mutant.file == "gemm_launch.cu":
            stem = "gemm_launch"
    return {stem: [(folder / source_of(f"{stem}.cu").relative_to(CUDA.parent), folder)]}
