"""Random calls of every layer and cell against a loop in float64 (oracle.py, fuzz.py).

FUSED_RNN_FUZZ=SEED[:FIRST[:LENGTH]] chooses the cases; LENGTH is a number of them or a time. By hand: FUSED_RNN_FUZZ=7:0:3h.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import fuzz
import fuzz_cases
import pytest
import torch

from fused_rnn._backend import has_cpu_kernels

pytestmark = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")


def test_random_calls() -> None:
    """In a process of its own: one that dies is a failure of the case that it printed last."""
    text = os.environ.get("FUSED_RNN_FUZZ", "0:0:20s")
    _, _, count, seconds = fuzz.parse(text)
    limit = 300 + 2 * (seconds or 0) + (count or 0)
    with tempfile.TemporaryFile("w+") as output:
        program = [sys.executable, "-X", "faulthandler", str(Path(fuzz.__file__))]
        paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        result = subprocess.run(
            program,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            timeout=limit,
            env={**os.environ, "FUSED_RNN_FUZZ": text, "PYTHONPATH": paths},
        )
        output.seek(0)
        last = output.read().splitlines()[-1]
    assert result.returncode == 0, f"status {result.returncode}, last line: {last}\n{result.stderr[-8000:]}"
    assert last.endswith("cases, 0 failures"), last
    assert int(last.split()[0]) > 0, last


def test_cases_depend_on_seed_and_number_alone() -> None:
    def drawn(seed: int, number: int) -> str:
        r = fuzz.generator_of(seed, number)
        arguments = fuzz.draw_arguments(case := fuzz.draw_case(r), r)
        return f"{case} {arguments.x.double().sum()} {r.random()}"

    assert drawn(3, 14) == drawn(3, 14)
    assert len({drawn(seed, number) for seed in (3, 4) for number in (14, 15)}) == 4


def test_every_kind_of_case_is_drawn() -> None:
    """Each value of each choice within some hundred cases."""
    cases = [fuzz.draw_case(fuzz.generator_of(0, number)) for number in range(600)]
    for field, values in {
        "kind": fuzz_cases.CELLS,
        "form": fuzz_cases.FORMS,
        "dtype": fuzz_cases.DTYPES,
        "rows": fuzz_cases.ROWS,
        "mode": fuzz_cases.MODES,
        "steps": fuzz_cases.STEPS,
    }.items():
        assert {getattr(case, field) for case in cases} == set(values), field
    for flag in ("bidirectional", "has_biases", "batch_first", "unbatched", "lengths", "resets", "states", "edits", "tied"):
        assert {getattr(case, flag) for case in cases} == {False, True}, flag


@pytest.mark.parametrize("layout", sorted(set(fuzz.LAYOUTS)))
def test_layouts_keep_the_values(layout: str) -> None:
    values = torch.randn(3, 4, 5)
    placed = fuzz.place(values, layout, fuzz.generator_of(0, 0))
    assert placed.shape == values.shape
    if layout != "expanded":
        assert torch.equal(placed, values)


def test_parse() -> None:
    assert fuzz.parse("") == (0, 0, 1000, None)
    assert fuzz.parse("7:12:1") == (7, 12, 1, None)
    assert fuzz.parse("7:0:3h") == (7, 0, None, 3 * 3600)
