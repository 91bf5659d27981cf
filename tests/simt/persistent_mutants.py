"""Mutants of the kernels of the families grid and cluster: each barrier, wait and mask taken away in turn."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from builder import CACHE, ROOT
from mutants import CUDA, Mutant, mutants_of

FILES = tuple(sorted(f.name for f in [*CUDA.glob("persistent_*.cuh"), *CUDA.glob("exchange_*.cuh")])) + (
    "persistent_launch.cu",
)

# Barriers, waits and what keeps one use of memory from the next: pattern, what stays in its place, what is said of it.
SYNCHRONISATION = [
    (r"(?<!void )\bsimt::sync_block\(\);", ";", "no sync_block"),
    (r"(?<!void )\bsimt::sync_warp\(\);", ";", "no sync_warp"),
    (r"(?<!void )\bsimt::sync_cluster\(\);", ";", "no sync_cluster"),
    (r"\bsimt::mbarrier_init\([^;]*\);", ";", "no mbarrier_init"),
    (r"\bsimt::mbarrier_expect\([^;]*\);", ";", "no mbarrier_expect"),
    (r"\bsimt::mbarrier_arrive\([^;]*\);", ";", "no mbarrier_arrive"),
    (r"\bsimt::mbarrier_wait\([^;]*\);", ";", "no mbarrier_wait"),
    (r"\bwhile \(simt::ballot\(missing\(\)\)\)", "if (simt::ballot(missing()))", "tags are looked at once"),
    (r"\bexchange\.await\([^;]*\);", ";", "no await"),
    (r"\b(?:product\.)?exchange\.begin\([^;]*\);", ";", "no begin of an exchange"),
    (r"\bproduct\.exchange\.start\(\);", ";", "no start of the exchange"),
    (r"if \(!cluster\) zero_exchange\([^;]*\);", ";", "tags of the launch before"),
    (r"\bbuffer \^= 1;", ";", "one buffer of sums"),
    (r"static_cast<int(?:64_t)?>\(step & 1\)", "0", "one buffer of an exchange"),
    (r"static_cast<int>\(step >> 1 & 1\)", "static_cast<int>(~(step >> 1) & 1)", "one phase too early"),
    (r"static_cast<uint32_t>\(step\) \+ 1", "static_cast<uint32_t>(step & 1) + 1", "tags come again"),
    (r"\bchunks \* 256\b", "chunks * 240", "too few bytes awaited"),
    (r"\bscatter_floats\(shape, l\.slices\) \* 4\b", "scatter_floats(shape, l.slices) * 4 - 16", "too few sums awaited"),
]

# Conditions that keep a thread from what it must not touch, add or send.
MASKS = [
    (r"packet\.word\[0\]\.tag != tag\(step\) \|\| ", ""),
    (r" \|\| packet\.word\[1\]\.tag != tag\(step\)", ""),
    (r"if \(missing\(\)\) request", "request"),
    (r"if \(kPairs && unit % 2\) return;", ""),
    (r"if \(m_tile >= all_tiles_\) return;", ""),
    (r"if \(ranks % 2\) ", ""),
    (r"if \(alone\(\)\)", "if (false)"),
    (r"if \(simt::thread_x\(\) == 0\)", "if (true)"),
    (r"if \(piece < fill\.pieces\) ", ""),
    (r"tiles < l\.tiles \? static_cast<int>\(tiles\) : l\.tiles", "l.tiles"),
    (r"tiles < l\.tiles \? static_cast<int>\(tiles\) : l\.tiles", "static_cast<int>(tiles)"),
    (r"if \((?:tile_of\(j\)|i) < (?:all_tiles_|chunks_)\) load_fragment", "load_fragment"),
    (r"if \(first >= chunks_\) break;", ""),
    (r"if \(first \+ i >= chunks_\) break;", ""),
    (r"if \(first \+ i < chunks_\) multiply", "multiply"),
    (r"if \((?:first \+ )?i < chunks_\) exchange\.request", "exchange.request"),
    (r"valid = (other|unit) < H && column < H;", "valid = column < H;"),
    (r"valid = (other|unit) < H && column < H;", r"valid = \1 < H;"),
    (r"if \(b >= seq\.B\) return 0;", ""),
    (r"seq\.lengths\[b\] < seq\.T \? seq\.lengths\[b\] : seq\.T;", "seq.lengths[b];"),
    (r"return e\.mine && ", "return "),
    (r"unit_of\(e\) < H && ", ""),
    (r" && row_of_batch\(e, tile\) < seq\.B", ""),
    (r"return t >= 0 && ", "return "),
    (r"% 8 == 0 && active\(e, tile, t\);", "% 8 == 0;"),
    (r"if \(Base::hints\(e, tile, later\(t\)\)\) \{", "{"),
    (r"if \(!exists\(e, tile\) \|\| !Base::hints", "if (!Base::hints"),
    (r"return tensor \? (simt::to_float\(.*\)) : 0\.0f;", r"return \1;"),
    (r"if \(e\.mine\) (product|keep|\{)", r"\1"),
    (r"if \(!e\.mine\) continue;", ""),
    (r"p\.seq\.resets && active\(e, tile, t\) && ", "active(e, tile, t) && "),
    (r"p\.seq\.resets && active\(e, tile, t\) && ", "p.seq.resets && "),
    (r"if \(exists\(e, tile\) && !reset\(e, tile, time\(0\)\)\)", "if (!reset(e, tile, time(0)))"),
    (r"if \(exists\(e, tile\) && !reset\(e, tile, time\(0\)\)\)", "if (exists(e, tile))"),
    (r"if \(exists\(e, tile\) && reset\(e, tile, time\(step \+ 1\)\)\)", "if (reset(e, tile, time(step + 1)))"),
    (r"if \(exists\(e, tile\) && reset\(e, tile, time\(step \+ 1\)\)\)", "if (exists(e, tile))"),
    (r"if \(exists\(e, tile\) && reset\(e, tile, time\(step \+ 1\)\)\).*;", ""),
    (r"if \(step \+ 1 < l\.steps\) \{", "{"),
    (r"if \(!exists\(e, tile\) \|\| !active\(e, tile, t\)\) return;", "if (!active(e, tile, t)) return;"),
    (r"if \(!exists\(e, tile\) \|\| !active\(e, tile, t\)\) return;", "if (!exists(e, tile)) return;"),
    (r"if \(!exists\(e, tile\)\) (return|continue);", ""),
    (r"if \(exists\(e, tile\)\) \{", "{"),
    (r"if \(!exists\(e, tile\) \|\| \(!was_active && p\.seq\.offsets\)\) return;", "if (!exists(e, tile)) return;"),
    (
        r"if \(!exists\(e, tile\) \|\| \(!was_active && p\.seq\.offsets\)\) return;",
        "if (!was_active && p.seq.offsets) return;",
    ),
    (r"if \(was_active\) \{", "{"),
    (r"if \(was_active \|\| !p\.seq\.offsets\) ", ""),
    (r"was_active \? (h_stored|simt::from_float<Storage>\(\w+(?:\[slot\])?\)) : zero", r"\1"),
    (r"if \(!p\.training\) return;", ""),
    (r"if \((b_hh|p\.dy)\) ", ""),
    (r"if \(!from_zero\)", "if (true)"),
    (r"from_row \? (output|simt)", r"true ? \1"),
    (r"from_zero = was_active && ", "from_zero = "),
    (r"from_zero \? 0\.0f : ", ""),
    (r"if \(k > 0\) ", ""),
    (r"if \(!last\) (\{\n +backward\.load)", r"\1"),
    (r"if \(!last && (backward\.has_exchange\(k\))\) \{", r"if (\1) {"),
    (r"if \(!last && (backward\.has_exchange\(k\))\) \{", "if (!last) {"),
    (r"if \(k > 0 && (backward\.has_exchange\(k - 1\))\) ", r"if (\1) "),
    (r"if \(k > 0 && (backward\.has_exchange\(k - 1\))\) ", "if (k > 0) "),
    (r"if \(!has_exchange\(k\)\) break;", ""),
    # Launches of some of the steps.
    (r" - l\.first_step", ""),
    (r"l\.first_step \+ (step|k)", r"\1"),
    (r"l\.first_step > 0 \? ", "false ? "),
    (r"l\.first_step > 0 \? ", "true ? "),
    (r"l\.first_step \+ l\.steps < p\.seq\.T", "false"),
    (r"l\.first_step \+ l\.steps < p\.seq\.T", "true"),
    (r"which \* p\.D \* p\.seq\.B \* p\.H \+ ", ""),
    (r"!is_last_launch\(\) \|\| ", ""),
    (r"goes_on = !is_last_launch\(\)", "goes_on = false"),
    (r"goes_on = !is_last_launch\(\)", "goes_on = true"),
    (r"if \(goes_on \|\| p\.d_h0\) \{", "if (p.d_h0) {"),
    (r"if \(goes_on \|\| p\.d_h0\) \{", "{"),
]


def all_mutants() -> list[Mutant]:
    return mutants_of(FILES, SYNCHRONISATION, MASKS)


# Sources whose kernels a changed file is compiled into; other files go into those of both families.
ONLY = {
    "exchange_grid.cuh": ["grid_fp16"],
    "exchange_cluster.cuh": ["cluster_fp16"],
    "persistent_scatter.cuh": ["cluster_fp16"],
    "persistent_launch.cu": ["persistent_launch"],
    "persistent_product.cuh": ["grid_fp16", "grid_fp32", "cluster_fp16"],
    "persistent_math.cuh": ["grid_fp16", "grid_fp32", "cluster_fp16", "cluster_fp32"],
}

# Kernels of family cluster that no case runs are left out: those of 32 units a block, and all of 48 but LSTM's.
LEFT_OUT = [
    (r"\n    case 2: .*", ""),
    (
        r"(kGru: |default: )(return f\(.*;)",
        r'\1if constexpr (decltype(tiles)::value == 1) \2 else throw std::invalid_argument("not among the mutants");',
    ),
]


def replacement(mutant: Mutant | None) -> dict[str, list[tuple[Path, Path]]]:
    """The mutant as builder.build(replace=...) wants it; None: unchanged."""
    folder = CACHE / "mutants" / (re.sub(r"\W+", "_", mutant.name)[:120] if mutant else "unchanged_persistent")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder, ignore=shutil.ignore_patterns("cpu", "*.cpp"))
    instances = folder / "cuda" / "cluster_instantiate.cuh"
    for pattern, shorter in LEFT_OUT:
        text, count = re.subn(pattern, shorter, instances.read_text())
        assert count > 0
        instances.write_text(text)
    stems = ["grid_fp16", "cluster_fp16"]
    if mutant:
        (folder / "cuda" / mutant.file).write_text(mutant.text)
        stems = ONLY.get(mutant.file, stems)
    return {stem: [(folder / "cuda" / f"{stem}.cu", folder)] for stem in stems}
