"""The simulator notices what is wrong: persistent kernels with one line broken fail."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import builder
import pytest
import test_persistent  # its devices
import torch
from cases import Case
from simulator import Fault, Simulator
from test_kernels import DEVICES, Simulated, run

FORWARD, BACKWARD, PRODUCT = "persistent_forward.cuh", "persistent_backward.cuh", "persistent_product.cuh"
GRID, CLUSTER, LAUNCH = "exchange_grid.cuh", "exchange_cluster.cuh", "persistent_launch.cu"
WEIGHTS = "multiply(sums, now[i], weights_[first"
# What is broken: family, file, text, its replacement. The cluster barrier at the end of a kernel has no mutant: a block
# awaits every push that is sent to it, so none ends before they have come, and the barrier is a precaution.
MUTANTS = {
    "no barrier before the sums are read": ("grid", FORWARD, "      simt::sync_block();\n", ""),
    "no barrier before the sums are read, backward": ("grid", BACKWARD, "        simt::sync_block();\n", ""),
    "one buffer of sums": ("grid", FORWARD, "buffer ^= 1;", ""),
    "one buffer of states": ("grid", GRID, "static_cast<int64_t>(step & 1)", "static_cast<int64_t>(0)"),
    "tags are not awaited": ("grid", GRID, "while (simt::ballot(missing()))", "if (simt::ballot(missing()))"),
    "stale tags of the launch before": ("grid", LAUNCH, "if (!cluster) zero_exchange", "if (row == 0) zero_exchange"),
    "no cluster barrier at the start": ("cluster", CLUSTER, "    }\n    simt::sync_cluster();", "    }"),
    "one phase too early": ("cluster", CLUSTER, "<int>(step >> 1 & 1)", "<int>(~(step >> 1) & 1)"),
    "too few bytes awaited": ("cluster", CLUSTER, "return chunks * 256;", "return chunks * 240;"),
    "one buffer of pushed states": ("cluster", CLUSTER, "states + ((static_cast<int>(step & 1) *", "states + ((0 *"),
    "reset forgotten": ("grid", FORWARD, "h_state = c_state = 0.0f;", "h_state += 0.0f;"),
    "carry of a reset kept": ("grid", BACKWARD, "dh = from_zero ? 0.0f : bypass;", "dh = bypass;"),
    "weights of another chunk": ("grid", PRODUCT, WEIGHTS + " + i]", WEIGHTS + "]"),
}


def build_mutant(folder: Path, family: str, file: str, old: str, new: str) -> Path:
    csrc = folder / "csrc"
    shutil.copytree(builder.ROOT / "csrc", csrc)
    text = (csrc / "cuda" / file).read_text()
    assert old in text, f"{file} has no {old!r}"
    (csrc / "cuda" / file).write_text(text.replace(old, new))
    stems = ("persistent_launch", f"{family}_fp16")
    return builder.build(replace={stem: [(csrc / "cuda" / f"{stem}.cu", csrc)] for stem in stems})


def cases(family: str) -> list[Simulated]:
    options = {"ragged": "lengths", "resets": True, "dtype": torch.float16}
    small = Simulated(Case("GRU", steps=6, batch=9, hidden=150 if family == "grid" else 40, **options), 3, family)
    # Two launches over one workspace.
    large = Simulated(Case("RNN_TANH", steps=2, batch=75, hidden=20, bidirectional=True, **options), 1, "grid", "FOUR")
    return [small, *([large] if family == "grid" else [])]


def outcome(library: Path, family: str) -> str:
    """What the simulator says; "" when all is well. In a process of its own: a mutant may crash it."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        try:
            sim = Simulator(library)
            for case in cases(family):
                run(sim, case)
            send.send("")
        except (Fault, AssertionError, RuntimeError) as error:
            send.send(f"{type(error).__name__}: {error}"[:200])

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    send.close()
    try:
        return receive.recv() if receive.poll(300) else "no end after 300 s"
    except EOFError:
        return "crash"
    finally:
        process.kill()
        process.join()


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(tmp_path: Path, name: str) -> None:
    said = outcome(build_mutant(tmp_path, *MUTANTS[name]), MUTANTS[name][0])
    print(f"{name}: {said}")
    assert said


@pytest.mark.slow
@pytest.mark.parametrize("family", test_persistent.FAMILIES)
def test_unbroken_passes(tmp_path: Path, family: str) -> None:
    assert "FOUR" in DEVICES
    assert outcome(build_mutant(tmp_path, family, "persistent.h", "#pragma once", "#pragma once"), family) == ""
