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
from test_kernels import Simulated, run, run_wild_lengths, run_without_gradients

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
_INACTIVE = "saves the product of rows that take no part in the step: what they receive is not used"
_LAST = "saves stores: every active step writes the final state, and the last one is right"
_CHUNKS = "saves copies: beyond the last chunk zeros go into a stage that nobody reads"
EQUIVALENT: dict[str, str] = {
    "matmul.cuh `if (i < chunks_) fill_weights` -> `fill_weights`": _CHUNKS,
    "matmul.cuh `if (i < chunks) fill_states` -> `fill_states`": _CHUNKS,
    "matmul.cuh `if (next < chunks) {` -> `{`": _CHUNKS,
    "matmul.cuh `any_row ? chunks_ : 0` -> `chunks_`": "saves the product of states that are all zero",
    "forward.cuh `if (active && !(info.flags & kHasNext))` -> `if (active)`": _LAST,
    "forward.cuh `if (!(info.flags & kHasNext)) c_n` -> `c_n`": _LAST,
    "backward.cuh `C::kHasC && !(info.flags & kHasPrevious)` -> `C::kHasC`": _LAST,
    "forward.cuh `if (info.flags & kActive)` -> ``": _INACTIVE,
    "backward.cuh `if (info.flags & kActive)` -> `` #2": _INACTIVE,
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
            run_wild_lengths(sim, CASES[0])
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
    """A line of totals, then every mutant with what caught it, or why it means the same."""
    caught = sum(1 for answer in results.values() if answer)
    equivalent = sum(1 for name, answer in results.items() if not answer and name in EQUIVALENT)
    changed = len(results) - equivalent
    lines = [
        f"{len(results)} mutants: {equivalent} equivalent (they change speed only), {changed} others, of which {caught} caught"
        f" ({100 * caught / changed:.1f}%), {changed - caught} missed",
        "",
    ]
    for name, answer in results.items():
        verdict = "caught    " if answer else "equivalent" if name in EQUIVALENT else "MISSED    "
        lines.append(f"{verdict} {name}\n           {answer or EQUIVALENT.get(name, '')}")
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
