"""The simulator notices what is wrong: persistent kernels with one line broken fail."""

from __future__ import annotations

import shutil
from pathlib import Path

import builder
import pytest
import test_persistent  # its devices
import torch
from cases import Case
from simulator import Fault, Simulator
from test_kernels import DEVICES, Simulated, run

# Definitions of the kernels that a mutant's library leaves out.
ABSENT = """#include "kernels.h"
#include "persistent.h"
#include <stdexcept>
namespace fused_rnn::cuda {
template <class T> T absent() { throw std::logic_error("left out of this library"); }
template <MathKind m> ForwardKernel Kernels<m>::forward(KernelRole, CellKind, TileSize) { return absent<ForwardKernel>(); }
template <MathKind m>
BackwardKernel Kernels<m>::backward(KernelRole, CellKind, TileSize) { return absent<BackwardKernel>(); }
using Forward = ForwardSequenceKernel;
using Backward = BackwardSequenceKernel;
template <MathKind m> Forward GridKernels<m>::forward(CellKind) { return absent<Forward>(); }
template <MathKind m> Backward GridKernels<m>::backward(CellKind) { return absent<Backward>(); }
template <MathKind m> Forward ClusterKernels<m>::forward(CellKind, int) { return absent<Forward>(); }
template <MathKind m> Backward ClusterKernels<m>::backward(CellKind, int) { return absent<Backward>(); }
"""
MATHS = ("Fp64", "Fp32", "Tf32", "Fp16", "Bf16")
PERSISTENT_MATHS = MATHS[1:]

FORWARD, BACKWARD, PRODUCT = "persistent_forward.cuh", "persistent_backward.cuh", "persistent_product.cuh"
GRID, CLUSTER, LAUNCH = "exchange_grid.cuh", "exchange_cluster.cuh", "persistent_launch.cu"
WEIGHTS = "multiply(sums, now[i], weights_[first"
# What is broken: family, file, text, its replacement.
MUTANTS = {
    "no barrier before the sums are read": ("grid", FORWARD, "      simt::sync_block();\n", ""),
    "no barrier before the sums are read, backward": ("grid", BACKWARD, "        simt::sync_block();\n", ""),
    "one buffer of sums": ("grid", FORWARD, "buffer ^= 1;", ""),
    "one buffer of states": ("grid", GRID, "static_cast<int64_t>(step & 1)", "static_cast<int64_t>(0)"),
    "tags are not awaited": ("grid", GRID, "while (simt::ballot(missing()))", "if (simt::ballot(missing()))"),
    "stale tags of the launch before": ("grid", LAUNCH, "if (!cluster) zero_exchange", "if (row == 0) zero_exchange"),
    "no cluster barrier at the start": ("cluster", CLUSTER, "    }\n    simt::sync_cluster();", "    }"),
    "no cluster barrier at the end": ("cluster", CLUSTER, "finish() { simt::sync_cluster(); }", "finish() {}"),
    "one phase too early": ("cluster", CLUSTER, "<int>(step >> 1 & 1)", "<int>(~(step >> 1) & 1)"),
    "too few bytes awaited": ("cluster", CLUSTER, "return chunks * 256;", "return chunks * 240;"),
    "one buffer of pushed states": ("cluster", CLUSTER, "states + ((static_cast<int>(step & 1) *", "states + ((0 *"),
    "reset forgotten": ("grid", FORWARD, "h_state = c_state = 0.0f;", "h_state += 0.0f;"),
    "carry of a reset kept": ("grid", BACKWARD, "dh = from_zero ? 0.0f : bypass;", "dh = bypass;"),
    "weights of another chunk": ("grid", PRODUCT, WEIGHTS + " + i]", WEIGHTS + "]"),
}


def build_mutant(folder: Path, family: str, file: str, old: str, new: str) -> Simulator:
    csrc = folder / "csrc"
    shutil.copytree(builder.ROOT / "csrc", csrc)
    text = (csrc / "cuda" / file).read_text()
    assert text.count(old) >= 1, f"{file} has no {old!r}"
    (csrc / "cuda" / file).write_text(text.replace(old, new))
    kept = {"cuda.cu", "persistent_launch.cu", f"{family}_fp16.cu"}
    for source in (csrc / "cuda").glob("*.cu"):
        if source.name not in kept:
            source.unlink()
    families = [("Kernels", m) for m in MATHS]
    families += [("GridKernels", m) for m in PERSISTENT_MATHS if family != "grid" or m != "Fp16"]
    families += [("ClusterKernels", m) for m in PERSISTENT_MATHS if family != "cluster" or m != "Fp16"]
    absent = ABSENT + "".join(f"template struct {name}<MathKind::k{m}>;\n" for name, m in families) + "}\n"
    (csrc / "cuda" / "absent.cu").write_text(absent)
    return Simulator(builder.build(csrc=csrc))


def cases(family: str) -> list[Simulated]:
    options = {"ragged": "lengths", "resets": True, "dtype": torch.float16}
    small = Simulated(Case("GRU", steps=6, batch=9, hidden=150 if family == "grid" else 40, **options), 3, family)
    # Two launches over one workspace.
    large = Simulated(Case("RNN_TANH", steps=2, batch=75, hidden=20, bidirectional=True, **options), 1, "grid", "FOUR")
    return [small, *([large] if family == "grid" else [])]


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(tmp_path: Path, name: str) -> None:
    sim = build_mutant(tmp_path, *MUTANTS[name])
    with pytest.raises((Fault, AssertionError, RuntimeError)):
        for case in cases(MUTANTS[name][0]):
            run(sim, case)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["grid", "cluster"])
def test_unbroken_passes(tmp_path: Path, family: str) -> None:
    sim = build_mutant(tmp_path, family, "persistent.h", "#pragma once", "#pragma once")
    assert test_persistent.FAMILIES and "FOUR" in DEVICES
    for case in cases(family):
        run(sim, case)
