"""Builds mutants, runs the simulated cases on each, and says what caught it."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import builder
from mutants import Mutant
from simulator import Simulator

HERE = Path(__file__).parent
SUITE = sorted([*HERE.glob("*.py"), HERE.parent / "cases.py", builder.ROOT / "fused_rnn" / "reference.py"])
LIMIT = 900  # seconds of processor time, which other work on the machine does not eat up
Replacement = Callable[[Mutant | None], Mapping[str, Sequence[tuple[Path, Path]]]]


def outcome(library: Path, work: Callable[[Simulator], None], limit: int = LIMIT) -> str:
    """What the simulator says of the library; "" when all is well. In a process of its own: a mutant may crash it.

    limit: seconds of processor time.
    """
    return outcome_of(lambda: work(Simulator(library)), limit)


def outcome_of(run: Callable[[], None], limit: int = LIMIT) -> str:
    """What a run raises, in a process of its own; "" when all is well."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        try:
            run()
            send.send("")
        except (AssertionError, RuntimeError) as error:
            send.send(f"{type(error).__name__}: {error}".splitlines()[0][:200])

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    send.close()
    try:
        answer = receive.recv()
    except EOFError:
        process.join()
        # The simulator itself ends what gets no further; the limit is for a loop without any access to memory.
        out_of_time = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        answer = f"hang: no end after {limit} s" if out_of_time else f"crash: exit code {process.exitcode}"
    process.join()
    return answer


def survey(
    mutants: Sequence[Mutant], replacement: Replacement, work: Callable[[Simulator], None], log: str
) -> dict[str, str]:
    """Name of each mutant and its outcome, which is also added to build/simt/`log` as it comes.

    Outcomes are kept by the contents of the library and of the tests: one that was interrupted goes on where it stopped.
    """
    progress = builder.CACHE / log
    progress.unlink(missing_ok=True)
    outcomes = builder.CACHE / "outcomes"
    outcomes.mkdir(parents=True, exist_ok=True)
    suite = hashlib.sha256(b"".join(f.read_bytes() for f in SUITE)).hexdigest()[:12]
    unchanged = outcome(builder.build(replace=replacement(None)), work)
    assert unchanged == "", f"the kernels fail without any change: {unchanged}"

    def one(mutant: Mutant) -> tuple[str, str]:
        try:
            library = builder.build(replace=replacement(mutant), jobs=1)
        except builder.BuildError as error:
            raise AssertionError(f"{mutant.name} does not compile: {error}") from error
        known = outcomes / f"{library.stem}-{suite}.txt"
        if not known.exists():
            answer = outcome(library, work)
            known.write_text(answer)
        library.unlink()
        answer = known.read_text()
        with progress.open("a") as lines:
            lines.write(f"{mutant.name}: {answer or 'SURVIVED'}\n")
        return mutant.name, answer

    with ThreadPoolExecutor(int(os.environ.get("FUSED_RNN_TEST_JOBS", "2"))) as pool:
        return dict(pool.map(one, mutants))


def table(results: Mapping[str, str], equivalent: Mapping[str, str]) -> str:
    """A line of totals, then every mutant with what caught it, or why it means the same."""
    caught = sum(1 for answer in results.values() if answer)
    same = sum(1 for name, answer in results.items() if not answer and name in equivalent)
    others = len(results) - same
    lines = [
        f"{len(results)} mutants: {caught} caught ({100 * caught / len(results):.1f}%), {same} equivalent, "
        f"{others - caught} missed; {100 * caught / others:.1f}% of those that are not equivalent are caught",
        "",
    ]
    for name, answer in results.items():
        verdict = "caught    " if answer else "equivalent" if name in equivalent else "MISSED    "
        lines.append(f"{verdict} {name}\n           {answer or equivalent.get(name, '')}")
    return "\n".join(lines) + "\n"


def check(results: Mapping[str, str], equivalent: Mapping[str, str], file: str) -> None:
    """Writes the table to build/simt/`file`; every mutant must be caught or explained, and no explanation stale."""
    text = table(results, equivalent)
    (builder.CACHE / file).write_text(text)
    survivors = {name for name, answer in results.items() if not answer}
    assert survivors == set(equivalent), f"{survivors ^ set(equivalent)}\n{text}"
