"""Mutants of the kernels of family block: each barrier and mask taken away in turn."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from builder import CACHE, ROOT
from mutants import CUDA, Mutant, mutants_of, source_of

FILES = ("block_elements.cuh", "block_kernels.cuh", "block_product.cuh", "block_math.cuh", "block_launch.cu")

SYNCHRONISATION = [
    (r"(?<!void )\bsimt::sync_block\(\);", ";", "no sync_block"),
    (r"product\.second\(\) - (from|to);", "0;", "one buffer of states"),
    (r"states\(offset\)", "states(0)", "the first buffer alone is read"),
]

MASKS = [
    # Products.
    (r"if \(first >= chunks_\) break;", ""),
    (r"valid = chunk < chunks_ && ", "valid = "),
    (r"other < H && column < H;", "column < H;"),
    (r"other < H && column < H;", "other < H;"),
    (r"valid = unit < H && column < H;", "valid = column < H;"),
    (r"valid = unit < H && column < H;", "valid = unit < H;"),
    (r"i < buffer_bytes_ / 2; i \+=", "i < 0; i +="),
    # What a block and a lane have.
    (r"rows < kBlockRows \? rows : kBlockRows", "kBlockRows"),
    (r"if \(i < kBlockRows\) product", "product"),
    (r"always = exists && !seq\.offsets", "always = exists"),
    (r"always = exists && !seq\.offsets", "always = !seq.offsets"),
    (r"length = exists \? (.*) : 0;", r"length = \1;"),
    (r"if \(!Base::exists\(e, 0\)\) continue;", ""),
    # Rows of memory and times.
    (r"seq\.offsets && static_cast<unsigned>\(time\)", "static_cast<unsigned>(time)"),
    (r"seq\.offsets && static_cast<unsigned>\(time\) < static_cast<unsigned>\(seq\.T\)", "seq.offsets != nullptr"),
    (r"made && modifier\.resets && active\(length, t\)", "modifier.resets && active(length, t)"),
    (r"made && modifier\.resets && active\(length, t\)", "made && active(length, t)"),
    (r"made && modifier\.resets && active\(length, t\)", "made && modifier.resets"),
    (r" && row \+ row_of_batch < static_cast<int>\(seq\.N\)", ""),
    (r"return active\(hint_length, t\) && ", "return "),
    (r"active = made && pair\.active\(pair\.length, rows\.t\)", "active = pair.active(pair.length, rows.t)"),
    (r"active = made && pair\.active\(pair\.length, rows\.t\)", "active = made"),
    (r"from_row = active && .*;", "from_row = active;"),
    (r"block\.dir \? -1 : 1", "1"),
    (r"block\.dir \? 1 : -1", "-1"),
    # What a step does.
    (r"result\.active = pair\.active\(pair\.length, t\);", "result.active = true;"),
    (r"h_state = result\.active \? h_state : h_prev;", ""),
    (r"c_state = result\.active \? c_state : c_prev;", ""),
    (r"x\.reset && step \+ 1 < Base::steps", "x.reset"),
    (r"x\.reset && step \+ 1 < Base::steps", "false"),
    (r"h_next\[i\] = resets \? 0\.0f : ", "h_next[i] = "),
    (r"resets \? 0\.0f : c_state", "c_state"),
    (r"stores = made && \(result\.active \|\| pair\.always\)", "stores = result.active || pair.always"),
    (r"stores = made && \(result\.active \|\| pair\.always\)", "stores = made && result.active"),
    (r"stores = made && \(result\.active \|\| pair\.always\)", "stores = made"),
    (r"saves = stores && training", "saves = stores"),
    (r"value\.v\[i\] = active \? value\.v\[i\] : zero;", ""),
    (r"active && has_dy", "active"),
    (r"hint && has_dy", "hint"),
    (r"from_zero \? 0\.0f : ", ""),
    (r"result\.active \? dh : carried", "dh"),
    (r"result\.active \? dc : dc_before", "dc"),
    (r"result\.active \? d\[slot\] : 0\.0f", "d[slot]"),
    (r"store\((step|k) > 0, ", "store(true, "),
    (r"step \+ 1 < forward\.steps, next", "true, next"),
    (r"k \+ 1 < backward\.steps, next", "true, next"),
    (r"if \(backward\.has_exchange\(backward\.steps - 1\)\) \{", "{"),
    (r"if \(backward\.has_exchange\(backward\.steps - 1\)\) \{", "if (false) {"),
]


def all_mutants() -> list[Mutant]:
    return mutants_of(FILES, SYNCHRONISATION, MASKS)


def replacement(mutant: Mutant | None) -> dict[str, list[tuple[Path, Path]]]:
    """The mutant as builder.build(replace=...) wants it; None: unchanged."""
    folder = CACHE / "mutants" / (re.sub(r"\W+", "_", mutant.name)[:120] if mutant else "unchanged_block")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder, ignore=shutil.ignore_patterns("cpu", "torch", "*.cpp"))
    stems = ["block_fp16", "block_fp32"]
    if mutant:
        (folder / source_of(mutant.file).relative_to(ROOT / "csrc")).write_text(mutant.text)
        if mutant.file == "block_launch.cu":
            stems = ["block_launch"]
        elif mutant.file not in ("block_math.cuh", "block_product.cuh"):  # of which fp32 has parts of its own
            stems = ["block_fp16"]
    return {stem: [(folder / source_of(f"{stem}.cu").relative_to(CUDA.parent), folder)] for stem in stems}
