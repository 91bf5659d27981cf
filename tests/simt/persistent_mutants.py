"""Mutants of the kernels of the families grid and cluster: each barrier, wait and mask taken away in turn."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from builder import CACHE, ROOT
from mutants import CUDA, Mutant, mutants_of, source_of

PERSISTENT = CUDA / "persistent"
FILES = (
    *sorted(f.name for f in [*PERSISTENT.glob("persistent_*.cuh"), *PERSISTENT.glob("exchange_*.cuh")]),
    "persistent_launch.cu",
    "active.h",
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
    (r"if \(!p\.cluster\) zero_exchange\([^;]*\);", ";", "tags of the launch before"),
    (r"\bbuffer \^= 1;", ";", "one buffer of sums"),
    (r"static_cast<int(?:64_t)?>\(step & 1\)", "0", "one buffer of an exchange"),
    (r"static_cast<int>\(step >> 1 & 1\)", "static_cast<int>(~(step >> 1) & 1)", "one phase too early"),
    (r"\breturn step \+ 1;", "return (step & 1) + 1;", "tags come again"),
    (r"\breturn step \+ 1;", "return step;", "the first tag is that of cleared memory"),
    (r"rank_bytes = chunk_count\(shape, 1\) \* 256;", "rank_bytes = chunk_count(shape, 1) * 240;", "too few bytes awaited"),
    (
        r"rank_bytes = scatter_floats\(shape, 1\) \* 4;",
        "rank_bytes = scatter_floats(shape, 1) * 4 - 16;",
        "too few sums awaited",
    ),
    (r"alone\(\) \? 1 \+ rank_bytes / 16 : 1\b", "1", "one arrival for all that a block alone stores"),
    (r"alone\(\) \? 1 \+ rank_bytes / 16 : 1\b", "1 + rank_bytes / 16", "arrivals of a block alone where blocks push"),
    (r"alone\(\) \? 0 : ", "", "a block alone awaits bytes"),
    (r"if \(!next\.same_step\) rows\.advance", "rows.advance", "rows of memory go on with every row tile"),
]

# Conditions that keep a thread from what it must not touch, add or send.
MASKS = [
    # Exchanges.
    (r"packet\.word\[0\]\.tag != tag\(step\) \|\| ", ""),
    (r" \|\| packet\.word\[1\]\.tag != tag\(step\)", ""),
    (r"if \(missing\(\)\) request", "request"),
    (r"if \(kPairs && unit % 2\) return;", ""),
    (r"if \(alone\(\)\) \{", "if (false) {"),
    (r"if \(alone\(\)\) \{", "{"),
    (r"\balone\(\) \? keep", "false ? keep"),
    (r"\balone\(\) \? keep", "true ? keep"),
    (r"if \(lane % kLanes == 0\) keep", "keep"),
    (r"if \(rank < ranks\) send", "send"),
    (r"first \+ i < ranks \? (from.*) : 0\.0f;", r"\1;"),
    (r"ranks > 8 \? ", "false ? "),
    (r"ranks > 4 \? ", "false ? "),
    (r"if \(m_tile >= all_tiles\(\)\) return;", ""),
    (r"if \(simt::thread_x\(\) == 0\)", "if (true)"),
    (r"if \(piece < fill\.pieces\) ", ""),
    (r"if \(p\.cluster && p\.slices > 8\) simt::allow_large_clusters\(.*\);", ""),
    # Products.
    (r"if \((?:tile_of\(j\)|i) < (?:all_tiles\(\)|chunks_)\) load_fragment", "load_fragment"),
    (r"if \(first >= chunks_\) break;", ""),
    (r"if \(first \+ i >= chunks_\) break;", ""),
    (r"if \(first \+ i < chunks_\) multiply", "multiply"),
    (r"if \((?:first \+ )?i < chunks_\) exchange\.request", "exchange.request"),
    (r"if \(first \+ kBatch <= smem_chunks_\) \{", "if (true) {"),
    (r"if \(kCount < kRegisterTiles \+ smem_tiles_of_warp\(\)\) return", "return"),
    (r"if \(kCount < kRegisterTiles \+ smem_tiles_of_warp\(\)\) return", "if (false) return"),
    (r"valid = (other|unit) < H && column < H;", "valid = column < H;"),
    (r"valid = (other|unit) < H && column < H;", r"valid = \1 < H;"),
    # What a block and a thread have.
    (r"rows < most \? rows : most", "rows"),
    (r"rows < most \? rows : most", "most"),
    (r"mine = kHalf \? .* : ", "mine = kHalf ? true : "),
    (r": index < kElements;", ": true;"),
    (r"return e\.mine && ", "return "),
    (r"unit_of\(e\) < H && ", ""),
    (r" && row_tile \* kTileRows \+ e\.b < block\.rows", ""),
    (r"if \(!e\.mine\) (continue|return);", ""),
    (r"if \(row_tile == 0\) return first_row_tile", "return first_row_tile"),
    (r"if \(kInRegisters > 0 && row_tile == 0\)", "if (kInRegisters > 0)"),
    (r"block\.dir \? (static_cast<unsigned>\(seq\.[BN]\)) : 0u", "0u"),
    # Lengths, rows of memory and resets.
    (r"b < seq\.B \? (active_steps<int>\(seq, b\)) : 0", r"\1"),
    (r"length < 0 \? 0 : ", ""),
    (r"length < T \? static_cast<Index>\(length\) : T;", "static_cast<Index>(length);"),
    (r"return time >= 0 && ", "return "),
    (r" && time < static_cast<int>\(seq\.T\) \?", " ?"),
    (r"static_cast<unsigned>\(t\) < static_cast<unsigned>\(length\)", "t < length"),
    (r"if \(!modifier\.resets \|\| !active\(t, length\)\)", "if (!modifier.resets)"),
    (r"if \(!modifier\.resets \|\| !active\(t, length\)\)", "if (!active(t, length))"),
    (r"return tensor \? (.*) : Storage\{\};", r"return \1;"),
    (r"return e\.unit % 8 == 0 && ", "return "),
    (r" && row < static_cast<int>\(seq\.N\)", ""),
    # Forward.
    (
        r"if \(exists\(e, row_tile\) && !reset\(e, row_tile, time\(0\), row, length\(e, row_tile\)\)\)",
        "if (exists(e, row_tile))",
    ),
    (r"if \(exists\(e, row_tile\) && (!reset\(e, row_tile, time\(0\), row, length\(e, row_tile\)\))\)", r"if (\1)"),
    (r"if \(!exists\(e, row_tile\)\) (return|continue);", ""),
    (r"if \(exists\(e, row_tile\)\) \{", "{"),
    (r"if \(!active\(time\((?:step|k)\), steps_of_row\)\) return;", ""),
    (r"if \(!active\(time\(step \+ kPrefetchSteps\), steps_of_row\) \|\| ", "if ("),
    (r" \|\| !Base::hints\(e, row \+ ahead\)", ""),
    (r"result\.active = Base::takes_part\(.*;", "result.active = true;"),
    (r"return unit_of\(e\) < H && active\(t, .*;", "return unit_of(e) < H;"),
    (r"if \(result\.active\) \{", "if (true) {"),
    (r"if \(step \+ 1 < steps\) \{", "{"),
    (r"if \(x\.reset\) ", ""),
    (r"if \(x\.reset\) [^;]*;", ""),
    (
        r"if \(!exists\(e, row_tile\) \|\| \(!result\.active && p\.seq\.offsets\)\) return;",
        "if (!exists(e, row_tile)) return;",
    ),
    (
        r"if \(!exists\(e, row_tile\) \|\| \(!result\.active && p\.seq\.offsets\)\) return;",
        "if (!result.active && p.seq.offsets) return;",
    ),
    (r"result\.active \? (result\.[\w\[\]]+) : zero", r"\1"),
    (r"if \(!p\.training\) return;", ""),
    (r"has_bias = b_hh && ", "has_bias = "),
    (r"has_bias = b_hh && unit < H", "has_bias = b_hh"),
    (r"exists\(same_step \|\| step \+ 1 < steps\)", "exists(true)"),
    (r"exists\(same_step \|\| ", "exists("),
    # Halves of the threads that take turns.
    (r"if \(const Place e\(buffer, 0\); e\.mine\)", "if (const Place e(buffer, 0); true)"),
    (r"load_elements\((forward|backward), x, buffer \^ 1, next", r"load_elements(\1, x, buffer, next"),
    (r"next\.same_step \? rows : rows\.following\(\)", "rows"),
    (r"end\(row_tile, buffer \+ block\.row_tiles", "end(row_tile, buffer"),
    (r"store\(Place\(buffer, 0\), ", "store(Place(buffer ^ 1, 0), "),
    # Backward.
    (r"if \(p\.dy\) ", ""),
    (r"from_row \? element", "true ? element"),
    (r"if \(active\(time\(k \+ kPrefetchSteps\), steps_of_row\) && ", "if ("),
    (r" && Base::hints\(e, ahead\)", ""),
    (r"x\.from_zero \? 0\.0f : ", ""),
    (r"if \(x\.from_zero\) ", ""),
    (r"if \(x\.from_zero\) [^;]*;", ""),
    (r"if \(k > 0 && (\(result\.active \|\| has_exchange\(k\)\))\) ", r"if \1 "),
    (r"k > 0 && \(result\.active \|\| has_exchange\(k\)\)", "k > 0 && result.active"),
    (r"k > 0 && \(result\.active \|\| has_exchange\(k\)\)", "k > 0 && has_exchange(k)"),
    (r"return k \+ 1 < steps \|\| ", "return "),
    (r"!is_last_launch\(\) \|\| ", ""),
    (r" \|\| p\.d_h0;", ";"),
    (r"if \(!has_exchange\(k\)\) break;", ""),
    (r"if \(!is_over\) load", "load"),
    (r"if \(k > 0 && (backward\.has_exchange\(k - 1\))\) ", r"if (\1) "),
    (r"if \(k > 0 && (backward\.has_exchange\(k - 1\))\) ", "if (k > 0) "),
    (r"if \(backward\.has_exchange\(k\)\) \{", "{"),
    # Launches of some of the steps.
    (r" - first_step(?= - )", ""),
    (r"\bfirst_step \+ (step|k)\b", r"\1"),
    (r"\bfirst_step > 0 \? ", "false ? "),
    (r"\bfirst_step > 0 \? ", "true ? "),
    (r"\bfirst_step \+ steps < p\.seq\.T", "false"),
    (r"\bfirst_step \+ steps < p\.seq\.T", "true"),
    (r"which \* p\.D \* p\.seq\.B \* p\.H \+ ", ""),
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
    "persistent_scatter.cuh": ["cluster_fp16", "cluster_tf32"],
    "persistent_launch.cu": ["persistent_launch"],
    "persistent_product.cuh": ["grid_fp16", "grid_fp32", "cluster_fp16", "cluster_tf32"],
    "persistent_math.cuh": ["grid_fp16", "grid_fp32", "cluster_fp16", "cluster_fp32"],
}

# Kernels of family cluster that no case runs are left out: of 32 units a block all but RNN's, of 48 all but LSTM's and
# RNN's. Place by place: what is found, what it becomes.
_LEFT_OUT = 'throw std::invalid_argument("not among the mutants");'
LEFT_OUT = [
    (
        "return dispatch_kernel_cell(cell, [&](auto kind) { return f(kind, tiles); });",
        """return dispatch_kernel_cell(cell, [&](auto kind) -> decltype(f(kind, tiles)) {
      constexpr CellKind kCell = decltype(kind)::value;
      constexpr int kTiles = decltype(tiles)::value;
      if constexpr (kTiles == 1 || kCell == CellKind::kRnnTanh || (kTiles == 3 && kCell == CellKind::kLstm)) {
        return f(kind, tiles);
      } else {
        """
        + _LEFT_OUT
        + """
      }
    });""",
    ),
]


def replacement(mutant: Mutant | None) -> dict[str, list[tuple[Path, Path]]]:
    """The mutant as builder.build(replace=...) wants it; None: unchanged."""
    folder = CACHE / "mutants" / (re.sub(r"\W+", "_", mutant.name)[:120] if mutant else "unchanged_persistent")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder, ignore=shutil.ignore_patterns("cpu", "torch", "*.cpp"))
    kernels = folder / PERSISTENT.relative_to(ROOT / "csrc")
    instances = kernels / "cluster_instantiate.cuh"
    for place, shorter in LEFT_OUT:
        text = instances.read_text()
        assert text.count(place) == 1, f"{instances.name} has changed: what LEFT_OUT replaces must follow"
        instances.write_text(text.replace(place, shorter))
    stems = ["grid_fp16", "cluster_fp16"]
    if mutant:
        (folder / source_of(mutant.file).relative_to(ROOT / "csrc")).write_text(mutant.text)
        stems = ONLY.get(mutant.file, stems)
    return {stem: [(folder / source_of(f"{stem}.cu").relative_to(ROOT / "csrc"), folder)] for stem in stems}
