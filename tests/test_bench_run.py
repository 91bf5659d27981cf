"""benchmarks/run.py: a case that ends the process costs the benchmark one case."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from fused_rnn import bench
from fused_rnn.__main__ import parser
from fused_rnn.bench import BenchCase, timing

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "run.py"
TINY = BenchCase("GRU", "fp32", "inference", 4, 2, 3, 5)


def load() -> Any:
    spec = importlib.util.spec_from_file_location("run", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_cases_from_one_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cases = [dataclasses.replace(TINY, T=steps) for steps in (4, 5, 6)]
    monkeypatch.setattr(bench, "cpu_cases", lambda: iter(cases))
    monkeypatch.setattr(timing, "MOST_ROUNDS", timing.FEWEST_ROUNDS)
    begun = tmp_path / "begun"
    options = ["bench", "--device", "cpu", "--no-memory", "--budget", "5", "--baseline", "torch.nn"]
    lines = bench.main(parser().parse_args([*options, "--first", "1", "--begun", str(begun)]))
    assert [line["T"] for line in lines] == [5, 6] and begun.read_text() == "end"


# Begins cases 0 to 5 and appends what it measured to a file; the process ends in cases 1 and 3.
ENDS = """
import argparse, os, pathlib
parser = argparse.ArgumentParser()
for name in ("measured", "--begun"):
    parser.add_argument(name, type=pathlib.Path)
parser.add_argument("--first", type=int)
parser.add_argument("--budget", type=float)
args = parser.parse_args()
assert 0 < args.budget <= 100
for case in range(args.first, 6):
    args.begun.write_text(str(case))
    if case in (1, 3):
        os._exit(7)
    with args.measured.open("a") as file:
        file.write(f"{case} ")
args.begun.write_text("end")
"""


def test_a_case_that_ends_the_process_does_not_stop_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    measured = tmp_path / "measured"
    assert load().measure_all([sys.executable, "-c", ENDS, str(measured)], 100) == 7
    assert measured.read_text() == "0 2 4 5 "
    assert "case 1 ended the process with status 7" in capfd.readouterr().out
    assert load().measure_all([sys.executable, "-c", "import sys; sys.exit(2)"], 100) == 2, "not even one begun"
