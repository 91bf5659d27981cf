"""Mutants of the kernels of the families single and step: each barrier, wait and mask taken away in turn."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from builder import CACHE, ROOT

CUDA = ROOT / "csrc" / "cuda"
FILES = ("matmul.cuh", "rows.cuh", "forward.cuh", "backward.cuh", "modified.cuh", "fragments.cuh")  # unique in csrc


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str  # file, what was done, and a number if that can be done in several places
    file: str
    line: int
    text: str  # the whole file, changed


# Barriers and waits, wherever they are called: what stays in their place.
SYNCHRONISATION = [
    (r"(?<!void )\bsimt::sync_block\(\);", ";", "no sync_block"),
    (r"\bsimt::sync_block_or\((\w+)\);", r"\1;", "no sync_block_or"),
    (r"(?<!void )\bsimt::sync_warp\(\);", ";", "no sync_warp"),
    (r"(?<!void )\bsimt::sync_named\([^;]*\);", ";", "no sync_named"),
    (r"(?<!void )\bsync_team\(\);", ";", "no sync_team"),
    (r"(?<!void )\bsimt::cp_async_wait<\d>\(\);\n    simt::sync", "simt::sync", "no cp_async_wait"),
    *(
        (rf"(?<=simt::cp_async_wait<){n}(?=>\(\)( :|;\n  \}}))", str(n + 1), f"wait<{n}> waits for one group less")
        for n in (0, 1, 2, 4, 6)
    ),
    (r"(?<!void )\bsimt::cp_async_commit\(\);", ";", "no cp_async_commit"),
    (r"(?<!void )\bwait_pending\(stages_ - 2\);", ";", "no wait_pending"),
    (r"(?<!void )\bsimt::pdl_wait\(\);", ";", "no pdl_wait"),
]

# Of modified steps: what is done to states and gradients, each left out in turn.
MODIFIED = [
    (r"return v \* V\(mask\);", "return v;"),
    (r"x > clip \? clip : ", ""),
    (r"x < -clip \? -clip : ", ""),
    (r"raw > clip \|\| raw < -clip \? V\(0\) : d", "d"),
    (r"share \* before \+ \(Acc\(1\) - share\) \* after;", "after;"),
    (r"share == Acc\(0\) \? Acc\(0\) : share == Acc\(1\) \? d : share \* d;", "Acc(0);"),
    (r"share == Acc\(1\) \? Acc\(0\) : \(Acc\(1\) - share\) \* d;", "d;"),
    (r"zoneout\.keep \? Acc\(.*?\) : Acc\(zoneout\.share\)", "Acc(zoneout.share)"),
    (r"m\.candidate \? (Acc\(.*\)) : Acc\(1\)", r"\1"),
    (r"m\.clip != 0 \? Acc\(m\.clip\) : ", ""),
    (r"return static_cast<const Storage\*>\(reset_row\(p\.modifier\.h, .*", "return nullptr;"),
    (r"if \(info\.flags & kReset\) c_prev\[e\] = reset_c\(e\);", ""),
    (r"if \(!\(info\.flags & kActive\)\) return;", ""),
    (r"info\.source\[0\] != nullptr && k < operand\.k", "k < operand.k"),
    (r"info\.source\[0\] != nullptr && k < operand\.k", "info.source[0] != nullptr"),
    (r"if \(s\.p\.modifier\.product\) matmul\.multiply_states\(\);", ""),
    (r"h = zoneout_unit<Acc>\(m\.zoneout_h, flags\)\.after\(h_prev\[e\], h\);", ""),
    (r"if constexpr \(C::kHasC\) c = zoneout_unit<Acc>\(m\.zoneout_c, flags\)\.after\(c_prev\[e\], c\);", ""),
    (r"if \(info\.flags & kReset\) load_reset_state\(e, x\);", ""),
    (r"if \(row\) x\.([hc])_prev", r"x.\1_prev"),
    (r"if \(!s\.p\.d_h\) sum \*= factor_of_product\(e\);", ""),
    (r"s\.carry_h && info\.flags & kHasNext", "s.carry_h"),
    (r"!C::kReadsH && s\.carry_h", "false"),
    (r"if \(C::kHasC && s\.p\.d_cs\) dc \+= .*", ""),
    (r"if \(modifies_steps\(options\)\) \{", "if (false) {"),
    (r"bypass \+ zoneout_h\.to_before\(dh\)", "bypass"),
    (r"dc \+= dc_kept;", ""),
    (r"if \(reset\) bypass = dc = Acc\(0\);", ""),
    (r"if \(reset && s\.p\.d_reset_[hc]\) static_cast.*", ""),
    (r"if \(s\.p\.modifier\.product\) dh \*= .*", ""),
    (r"\} else if \(s\.carry_h\) \{", "} else if (false) {"),
]

# Masks: conditions that keep a thread from what it must not touch or add. Every occurrence is a mutant of its own.
MASKS = [
    (r"valid \? kBytes : 0", "kBytes"),
    (r"k >= operand\.k \? 0 : ", ""),
    (r"return skip < units;", "return true;"),
    (r"return skip < left_k && ", "return "),
    (r"skip < left_k && .* < left_units;", "skip < left_k;"),
    (r"state != nullptr && k < operand\.k", "k < operand.k"),
    (r"state != nullptr && k < operand\.k", "state != nullptr"),
    (r"if \(next < chunks\) \{", "{"),
    (r"any_row \? chunks_ : 0", "chunks_"),
    (r"if \(simt::thread_x\(\) < G::kBatch\)", "if (true)"),
    (r"if \(b >= seq\.B\) return info;", ""),
    (r"if \(!is_active\(seq, t, b\)\) return info;", ""),
    (r"if \(is_active\(seq, next, b\)\)", "if (true)"),
    (r"if \(is_active\(seq, previous, b\)\)", "if (true)"),
    (r"if \(is_reset\(modifier, info\.row\)\) info", "info"),
    (r"if \(!is_active\(seq, 0, b\)\) info", "info"),
    (r"if \(info\.flags & kReset\) (return nullptr|continue);", ""),
    (r"batch_of\(e\) < G::kBatch && first_unit", "first_unit"),
    (r"first_unit \+ unit_of\(e\) < s\.p\.H && ", ""),
    (r"s\.p\.H && table\[batch_of\(e\)\]\.flags & kExists", "s.p.H"),
    (r"if \(!exists\(e\)\) (continue|return|return Acc\(0\));", ""),
    (r"if \(!exists\(e\) \|\| !\(table\[batch_of\(e\)\]\.flags & kActive\)\)", "if (!exists(e))"),
    (r"if \(!exists\(e\) \|\| !\(table\[batch_of\(e\)\]\.flags & kActive\)\)", "if (!(table[batch_of(e)].flags & kActive))"),
    (r"batch >= G::kBatch \|\| ", ""),
    (r"first_unit \+ unit >= s\.p\.P \|\| ", ""),
    (r" \|\| !\(table\[batch\]\.flags & kExists\)", ""),
    (r"active \|\| !(s\.)?p\.seq\.offsets", "true"),
    (r"info\.flags & kActive \|\| !s\.p\.seq\.offsets", "true"),
    (r"active \? (h|c|dh|a\[e\]\[slot\]) : Acc\(0\)", r"\1"),
    (r"if \(active && !\(info\.flags & kHasNext\)\)", "if (active)"),
    (r"if \(active && !\(info\.flags & kHasNext\)\)", "if (!(info.flags & kHasNext))"),
    (r"if \(!\(info\.flags & kHasNext\)\) (store_c_n|x\.dh)", r"\1"),
    (r"if \(!active\) return;", ""),
    (r"if \(info\.flags & kActive\) ", ""),
    (r"if \(info\.flags & kHasPrevious\)", "if (true)"),
    (r"if \(!\(info\.flags & kActive\) && s\.p\.seq\.offsets\) return;", ""),
    (r"if \(!start_is_zero\) ", ""),
    (r"info\.flags & kHasPrevious \? output\(s\.p\.y", "true ? output(s.p.y"),
    (r"info\.flags & kHasPrevious \? Acc", "true ? Acc"),
    (r"info\.flags & kReset \? Acc\(0\) : ", ""),
    (r"C::kHasC && !\(info\.flags & kHasPrevious\)", "C::kHasC"),
    (r"if \(table\[batch_of\(e\)\]\.flags & kHasNext\) return static_cast", "return static_cast"),
    (r"!\(info\.flags & kHasNext\) \|\| next_reset", "!(info.flags & kHasNext)"),
    (r"!\(info\.flags & kHasNext\) \|\| next_reset", "next_reset"),
    (r"if \(s\.step < 0\) \{", "{"),
    (r"if \(s\.p\.(dy|dh_n)\) ", ""),
    (r"if \(active && s\.p\.dy\)", "if (s.p.dy)"),
    (r"if \(state\) h_prev", "h_prev"),
    (r"if \(b_[ih]h\) ", ""),
    (r"if \(active\) info\.source", "info.source"),
    (r"return p\.h0 \? (static_cast.*) : nullptr;", r"return \1;"),
    (
        r"(?:s\.)?p\.[hc]0 \? (static_cast<const Storage\*>\([s.]*p\.[hc]0\)\[state\]) : simt::from_float<Storage>\(.*0\)\)",
        r"\1",
    ),
    (r"s\.p\.c0 \? (load_c0<Storage>\(s\.p, state\)) : Acc\(0\)", r"\1"),
    (r"else if \(s\.p\.c0\) \{", "else {"),
    (r"return tensor \? (Acc\(.*\)) : Acc\(0\);", r"return \1;"),
    (r"if \(info\.flags & kNever\)", "if (true)"),
    (r"if \(s\.p\.training && ", "if ("),
    (r"if \(!s\.p\.d_h\) \{", "{"),
    *MODIFIED,
    (r"if \(piece\(first \+ i, source, targets\[i\]\)\) ", "piece(first + i, source, targets[i]); "),
]


def source_of(file: str) -> Path:
    (path,) = [*CUDA.rglob(file), *(ROOT / "csrc" / "core").glob(file)]
    return path


def mutants_of(
    files: Sequence[str], synchronisation: Sequence[tuple[str, str, str]], masks: Sequence[tuple[str, str]]
) -> list[Mutant]:
    """One mutant for each place where a pattern occurs; rules: (pattern, replacement, what is said of it)."""
    mutants: list[Mutant] = []
    rules = [*synchronisation, *((old, new, None) for old, new in masks)]
    for file in files:
        source = source_of(file).read_text()
        for pattern, replacement, what in rules:
            for count, match in enumerate(re.finditer(pattern, source), 1):
                changed = match.expand(replacement)
                line = source.count("\n", 0, match.start()) + 1
                said = what or f"`{match[0].strip()}` -> `{changed.strip()}`"
                text = source[: match.start()] + changed + source[match.end() :]
                mutants.append(Mutant(f"{file} {said}" + f" #{count}" * (count > 1), file, line, text))
    unused = [rule[0] for rule in rules if not any(re.search(rule[0], source_of(f).read_text()) for f in files)]
    assert not unused, f"no place has {unused}: the kernels have changed, and the rules of their mutants must follow"
    return mutants


def all_mutants() -> list[Mutant]:
    return mutants_of(FILES, SYNCHRONISATION, MASKS)


# The kernels that the mutants are compiled in: a few instances of each role in place of all, forward and backward apart.
HEAD = """
#include <stdexcept>
#include "cuda/step/HEADER"
#include "cuda/step/kernels.h"
namespace fused_rnn::cuda {
template <KernelRole kRole, CellKind kCell, TileSize kSize>
using G = Geometry<kRole, kCell, MathKind::kFp16, kSize>;
constexpr auto kRnn = CellKind::kRnnTanh, kLstm = CellKind::kLstm, kGru = CellKind::kGru;
constexpr auto kSmall = TileSize::kSmall, kLarge = TileSize::kLarge;
"""
FORWARD = """
template <>
ForwardKernel Kernels<MathKind::kFp16>::forward(KernelRole role, CellKind cell, TileSize size) {
  const CellKind kind = kernel_cell(cell);
  const bool small = size == kSmall;
  if (role == KernelRole::kProject) {
    return small ? &project_kernel<G<KernelRole::kProject, kLstm, kSmall>>
                 : &project_kernel<G<KernelRole::kProject, kLstm, kLarge>>;
  }
  if (role == KernelRole::kForwardInput && small) {
    return kind == kGru ? &forward_kernel<G<KernelRole::kForwardInput, kGru, kSmall>>
                        : &forward_kernel<G<KernelRole::kForwardInput, kLstm, kSmall>>;
  }
  if (role == KernelRole::kForward && small) {
    return kind == kGru ? &forward_kernel<G<KernelRole::kForward, kGru, kSmall>>
           : kind == kLstm ? &forward_kernel<G<KernelRole::kForward, kLstm, kSmall>>
                           : &forward_kernel<G<KernelRole::kForward, kRnn, kSmall>>;
  }
  if (role == KernelRole::kForwardModified && small) {
    return kind == kGru ? &forward_kernel<G<KernelRole::kForwardModified, kGru, kSmall>>
           : kind == kLstm ? &forward_kernel<G<KernelRole::kForwardModified, kLstm, kSmall>>
                           : &forward_kernel<G<KernelRole::kForwardModified, kRnn, kSmall>>;
  }
  if (role == KernelRole::kForward && kind == kLstm) return &forward_kernel<G<KernelRole::kForward, kLstm, kLarge>>;
  throw std::invalid_argument("this kernel is not among the mutants");
}
}  // namespace fused_rnn::cuda
"""
BACKWARD = """
template <>
BackwardKernel Kernels<MathKind::kFp16>::backward(KernelRole role, CellKind cell, TileSize size) {
  const CellKind kind = kernel_cell(cell);
  const bool small = size == kSmall;
  if (role == KernelRole::kStateGrad) {
    return small ? &state_grad_kernel<G<KernelRole::kStateGrad, kLstm, kSmall>>
                 : &state_grad_kernel<G<KernelRole::kStateGrad, kLstm, kLarge>>;
  }
  if (role == KernelRole::kBackwardModified && small) {
    return kind == kGru ? &backward_kernel<G<KernelRole::kBackwardModified, kGru, kSmall>>
           : kind == kLstm ? &backward_kernel<G<KernelRole::kBackwardModified, kLstm, kSmall>>
                           : &backward_kernel<G<KernelRole::kBackwardModified, kRnn, kSmall>>;
  }
  if (small) {
    return kind == kGru ? &backward_kernel<G<KernelRole::kBackward, kGru, kSmall>>
           : kind == kLstm ? &backward_kernel<G<KernelRole::kBackward, kLstm, kSmall>>
                           : &backward_kernel<G<KernelRole::kBackward, kRnn, kSmall>>;
  }
  if (kind == kLstm) return &backward_kernel<G<KernelRole::kBackward, kLstm, kLarge>>;
  throw std::invalid_argument("this kernel is not among the mutants");
}
}  // namespace fused_rnn::cuda
"""


# Other kinds of arithmetic have no kernels here.
STUBS = """
#include <stdexcept>
#include "cuda/step/kernels.h"
namespace fused_rnn::cuda {
HERE
}  // namespace fused_rnn::cuda
"""
STUB = """
template <>
ForwardKernel Kernels<MathKind::MATH>::forward(KernelRole, CellKind, TileSize) {
  throw std::invalid_argument("not among the mutants");
}
template <>
BackwardKernel Kernels<MathKind::MATH>::backward(KernelRole, CellKind, TileSize) {
  throw std::invalid_argument("not among the mutants");
}
"""


def _write_if_changed(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _folder(mutant: Mutant | None) -> Path:
    """A copy of the headers with the mutant among them."""
    folder = CACHE / "mutants" / re.sub(r"\W+", "_", mutant.name if mutant else "unchanged")[:120]
    for place in ("core", "plan", "cuda"):
        for source in (ROOT / "csrc" / place).rglob("*.*h"):
            text = mutant.text if mutant and source == source_of(mutant.file) else source.read_text()
            _write_if_changed(folder / source.relative_to(ROOT / "csrc"), text)
    for name, body in (("forward", FORWARD), ("backward", BACKWARD)):
        _write_if_changed(folder / f"{name}_instances.cu", HEAD.replace("HEADER", f"{name}.cuh") + body)
    stubs = "".join(STUB.replace("MATH", math) for math in ("kFp64", "kFp32", "kTf32", "kBf16"))
    _write_if_changed(folder / "stubs.cu", STUBS.replace("HERE", stubs))
    return folder


def replacement(mutant: Mutant | None) -> dict[str, list[tuple[Path, Path]]]:
    """The mutant as builder.build(replace=...) wants it; None: unchanged. Only what the mutant touches is compiled again."""
    folder, unchanged = _folder(mutant), _folder(None)
    parts = []
    for name in ("forward", "backward"):
        other = {"forward": "backward.cuh", "backward": "forward.cuh"}[name]
        place = unchanged if mutant and mutant.file == other else folder
        parts.append((place / f"{name}_instances.cu", place))
    empty: dict[str, list[tuple[Path, Path]]] = {f"kernels_{math}": [] for math in ("fp64", "fp32", "tf32", "bf16")}
    return {**empty, "kernels_fp16": [*parts, (unchanged / "stubs.cu", unchanged)]}
