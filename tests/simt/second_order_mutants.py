"""Mutants of the kernels of tangents and of dual numbers: a wait, a mask or a term taken away."""

from __future__ import annotations

import re
from pathlib import Path

from builder import CACHE, ROOT
from mutants import Mutant, _write_if_changed, mutants_of, source_of

FILES = ("tangents.cuh", "dual_backward.cuh")
SYNCHRONISATION = [
    (r"\bsimt::sync_block_or\(nonzero\);", "nonzero;", "no sync_block_or"),
    (r"\bsimt::pdl_wait\(\);", ";", "no pdl_wait"),
]
MASKS = [
    (r"if \(info\.flags & kHasPrevious\) row = after;", "row = after;"),
    (r"if \(info\.flags & kReset\) row = reset_row.*", ""),
    (r"if \(source\) a\[slot\]\.tangent = .*", ""),
    (r"if \(b_hh\) recurrent = .*", ""),
    (r"C::tangents\(p\.cell, a\);", ""),
    (r"return source \? sum \+ source\[.*\] : sum;", "return sum;"),
    (r"info\.source\[0\] = value;", ""),
    (r"wants_values \? value : nullptr", "value"),
    (r"tangent \? k : 0", "k"),
    (r"dh = dh \+ both\(value\.dh_n, tangent\.dh_n, state\);", ""),
    (r"dh = dh \+ both\(s\.carry\[kValue\], s\.carry\[kTangent\], state\);", ""),
    (r"if \(value\.d_h\) dh\.value = .*", ""),
    (r"dc = dc \+ both\(value\.d_cs, tangent\.d_cs, .*", ""),
    (r"out = Dual<Acc>\(0\);", ""),
    (r"if \(of_reset\) static_cast<Acc\*>\(of_reset\)\[place\] = out\.tangent;", ""),
    (r"if \(info\.flags & kNever\) store_d_c0\(.*", ""),
    (r"if \(p\.dh_n\) dh \+= .*", ""),
    (r"if \(active && p\.dy\) dh \+= .*", ""),
    (r"if \(!active && value\.seq\.offsets\) return;", "if (!active) return;"),
    (r"if \(!active && p\.seq\.offsets\) return;", "if (!active) return;"),
]


def all_mutants() -> list[Mutant]:
    return mutants_of(FILES, SYNCHRONISATION, MASKS)


def replacement(mutant: Mutant | None) -> dict[str, list[tuple[Path, Path]]]:
    """As builder.build(replace=...) wants it: the kernels of fp64, in a copy of the headers with the mutant among them."""
    folder = CACHE / "mutants" / re.sub(r"\W+", "_", f"second order {mutant.name if mutant else 'unchanged'}")[:120]
    for place in ("core", "plan", "cuda"):
        for source in (ROOT / "csrc" / place).rglob("*.*h"):
            text = mutant.text if mutant and source == source_of(mutant.file) else source.read_text()
            _write_if_changed(folder / source.relative_to(ROOT / "csrc"), text)
    return {"second_order_fp64": [(ROOT / "csrc" / "cuda" / "step" / "second_order_fp64.cu", folder)]}
