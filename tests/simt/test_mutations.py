"""Proof that the simulated tests find faults: every mutant of the kernels is reported, or gives a wrong result.

The table of all mutants is written to build/simt/mutants.txt.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import builder
import pytest
import torch
from cases import Case
from mutants import Mutant, all_mutants, replacement
from simulator import Simulator
from test_kernels import Simulated, run, run_without_gradients

F16 = torch.float16
SMALL, LARGE = (0, 3), (2, 2)
BOTH = {"resets": True, "bidirectional": True, "dtype": F16}
CASES = [
    Simulated(Case("LSTM", 3, 11, 5, 37, ragged="lengths", **BOTH), 3, "step", tile=SMALL),
    Simulated(Case("GRU", 3, 11, 5, 37, ragged="packed", **BOTH), 3, "step", tile=SMALL),
    Simulated(Case("RNN_TANH", 3, 11, 5, 136, ragged="lengths", dtype=F16), 2, "step", tile=(0, 2)),
    *(Simulated(Case("RNN_TANH", 2, 3, 5, 40, dtype=F16), 1, "step", tile=(0, stages)) for stages in (4, 6, 8)),
    Simulated(Case("LSTM", 2, 11, 37, 37, ragged="lengths", proj=18, dtype=F16), 2, "step", tile=SMALL),
    Simulated(Case("LSTM", 2, 67, 5, 72, ragged="packed", proj=40, resets=True, dtype=F16), 2, "step", tile=LARGE),
    Simulated(Case("LSTM", 1, 11, 37, 140, ragged="lengths", dtype=F16), 3, "cell", tile=SMALL),
    Simulated(Case("GRU", 1, 11, 37, 37, has_biases=False, states=False, resets=True, dtype=F16), 2, "cell", tile=SMALL),
    Simulated(Case("LSTM", 2, 67, 5, 72, ragged="lengths", dtype=F16), 1, "step", tile=LARGE),
    Simulated(Case("LSTM", 2, 3, 5, 40, states=False, has_biases=False, dtype=F16), 1, "step", tile=(0, 2)),
]

# Mutants that no test can catch, because the program means the same without the line, and why.
_UNUSED = "what an inactive row starts from or receives is computed and not used"
_LAST = "saves stores only: every active step writes the final state, and the last one is right"
_ZERO = "an inactive row's operands are all zero, and every cell makes zero states of them"
_SPEED = "saves work only: beyond the last chunk zeros are copied into a stage that nobody reads"
_ACTIVE_LOAD = "`if (!exists(e) || !(table[batch_of(e)].flags & kActive))` -> `if (!exists(e))`"
_NEVER = "`if (step == 0 && !is_active(seq, 0, b)) info` -> `if (!is_active(seq, 0, b)) info`"
EQUIVALENT: dict[str, str] = {
    "matmul.cuh `if (i < chunks_) fill_weights` -> `fill_weights`": _SPEED,
    "matmul.cuh `if (i < chunks) fill_states` -> `fill_states`": _SPEED,
    "matmul.cuh `if (next < chunks) {` -> `{`": _SPEED,
    "matmul.cuh `any_row ? chunks_ : 0` -> `chunks_`": "saves the product of states that are all zero",
    "matmul.cuh `left < G::kUnits ? static_cast<int>(left) : G::kUnits` -> `static_cast<int>(left)`": (
        "skip is always below kUnits; the bound only keeps the number small enough for an int"
    ),
    "forward.cuh `!(info.flags & kActive) || info.flags & kReset` -> `info.flags & kReset`": _UNUSED,
    "forward.cuh `!(info.flags & kActive) || info.flags & kReset` -> `info.flags & kReset` #2": _UNUSED,
    f"forward.cuh {_NEVER}": "later steps write the same initial state again",
    f"backward.cuh {_NEVER}": "later steps write the same gradient again",
    "forward.cuh `batch_of(e) < G::kBatch && first_unit` -> `first_unit`": (
        "the elements of a forward tile divide evenly among its threads, so no thread is beyond the tile"
    ),
    "forward.cuh `if (active && !(info.flags & kHasNext))` -> `if (active)`": _LAST,
    "forward.cuh `if (!(info.flags & kHasNext)) c_n` -> `c_n`": _LAST,
    "forward.cuh `active ? h : Acc(0)` -> `h`": _ZERO,
    "forward.cuh `active ? c : Acc(0)` -> `c` #3": _ZERO,
    "backward.cuh `C::kHasC && !(info.flags & kHasPrevious)` -> `C::kHasC`": _LAST,
    "forward.cuh `if (info.flags & kActive)` -> ``": _UNUSED,
    "forward.cuh `if (info.flags & kActive)` -> `` #2": _UNUSED,
    f"backward.cuh {_ACTIVE_LOAD} #2": _UNUSED,
    "backward.cuh `if (info.flags & kActive)` -> `` #2": _UNUSED,
    "backward.cuh `if (s.step < 0 || info.flags & kActive)` -> `if (true)`": _UNUSED,
}


def outcome(library: Path) -> str:
    """What the simulator says of the library; "" when all is well. In a process of its own: a mutant may crash it."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        try:
            sim = Simulator(library)
            for case in CASES:
                run(sim, case)
            run_without_gradients(sim, CASES[0])
            send.send("")
        except (AssertionError, RuntimeError) as error:
            send.send(f"{type(error).__name__}: {error}".splitlines()[0][:200])

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    send.close()
    try:
        answer = receive.recv() if receive.poll(300) else "hang: no end after 300 s"
    except EOFError:
        process.join()
        answer = f"crash: exit code {process.exitcode}"
    process.kill()
    process.join()
    return answer


def survey(mutants: list[Mutant]) -> dict[str, str]:
    """Name of each mutant and its outcome."""

    def one(mutant: Mutant) -> tuple[str, str]:
        try:
            answer = outcome(builder.build(replace=replacement(mutant), jobs=1))
        except builder.BuildError as error:
            answer = "does not compile: " + str(error).splitlines()[0]
        with (builder.CACHE / "mutants-progress.txt").open("a") as progress:
            progress.write(f"{mutant.name}: {answer or 'SURVIVED'}\n")
        return mutant.name, answer

    with ThreadPoolExecutor(int(os.environ.get("FUSED_RNN_TEST_JOBS", "2"))) as pool:
        return dict(pool.map(one, mutants))


def table(results: dict[str, str]) -> str:
    caught = sum(1 for answer in results.values() if answer)
    unexplained = sum(1 for name, answer in results.items() if not answer and name not in EQUIVALENT)
    lines = [
        f"{len(results)} mutants: {caught} caught, {len(results) - caught - unexplained} equivalent, {unexplained} missed",
        "",
    ]
    for name, answer in results.items():
        verdict = "caught  " if answer else "SURVIVED"
        lines.append(f"{verdict} {name}\n         {answer or EQUIVALENT.get(name, 'unexplained')}")
    return "\n".join(lines) + "\n"


def test_unchanged_kernels_pass() -> None:
    assert outcome(builder.build(replace=replacement(None))) == ""


@pytest.mark.slow
def test_mutants_are_caught() -> None:
    results = survey(all_mutants())
    text = table(results)
    (builder.CACHE / "mutants.txt").write_text(text)
    survivors = {name for name, answer in results.items() if not answer}
    assert survivors <= set(EQUIVALENT), text
