"""benchmarks/gpu.sh without a GPU: its stages, with stand-ins for the programs that it calls."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"

# What stands in for python, by its arguments; $FAILS names one that fails.
PYTHON = r"""
echo "python $*" >>"$CALLS"
[ -n "$FAILS" ] && [[ "$*" == *"$FAILS"* ]] && { echo "stand-in: failed"; exit 1; }
if [ -n "$REHEARSAL" ]; then
  [[ "$*" == *"fused_rnn verify" ]] && { echo "verify: needs a GPU"; exit 1; }
  [[ "$*" == *"tune --first"* ]] && { echo "tune: --first needs a GPU"; exit 1; }
fi
case "$*" in
  "-c import xdist"|"-c import matplotlib") exit 1 ;;
  "-c import json"*) echo '{"device": "Stand-in", "date": "2030-01-02", "commit": "abc", "torch": "2.0", "cudnn": 9}' ;;
  "-m pytest"*) echo "3 passed in 1 s" ;;
  "-m fused_rnn tune --first"*) echo "LSTM: cluster (9 calls, 0.1 s)" ;;
  *run.py*--output*) while [ "$1" != --output ]; do shift; done; echo '{}' >>"$2"; echo "geometric mean 2.00" ;;
esac
"""
FIRST = r"""
echo "first $*" >>"$CALLS"
[ -n "$FAILS" ] && [[ "first $*" == *"$FAILS"* ]] && { echo "WRONG y: error 7"; exit 1; }
[ "$1" = time ] && echo "{\"case\": \"$2\"}" || echo "ok lstm"
"""
SANITIZER = r"""
echo "compute-sanitizer $*" >>"$CALLS"
while [[ "$1" != */first ]]; do shift; done
"$@"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "programs").mkdir()
    for path, text in (
        ("bin/python", PYTHON), ("bin/nvidia-smi", 'echo "GPU 0: Stand-in"'), ("bin/compute-sanitizer", SANITIZER),
        ("programs/first", FIRST),
    ):  # fmt: skip
        file = tmp_path / path
        file.write_text("#!/usr/bin/env bash\n" + text)
        file.chmod(0o755)
    return tmp_path


def run(place: Path, number: int, **settings: str) -> tuple[int, list[str], list[str]]:
    """(exit status, what it printed, the calls of the stand-ins)."""
    places = {"PYTHON": place / "bin" / "python", "PROGRAMS": place / "programs", "OUT": place / "out"}
    environment = {
        **os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "CALLS": str(place / "calls"), "FAILS": "",
        "REHEARSAL": "", **{name: str(path) for name, path in places.items()}, **settings,
    }  # fmt: skip
    (place / "calls").unlink(missing_ok=True)
    done = subprocess.run(["bash", str(SCRIPT), str(number)], env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout.splitlines(), (place / "calls").read_text().splitlines()


def stages(lines: list[str]) -> list[str]:
    """Names of the stages that were right, in their order."""
    return [found[1] for line in lines if (found := re.match(r"\[\d+ s\] (\S+): ok, \d+ s$", line))]


FAMILY_CHECKS = [f"check-{family}" for family in ("single", "step", "block", "cluster", "grid", "gemm")]
LARGE_CHECKS = [f"check-{family}-large" for family in ("cluster", "grid", "step")]


def test_first_run(place: Path) -> None:
    status, lines, calls = run(place, 1)
    assert status == 0 and lines[-1].endswith("all stages passed"), lines
    assert stages(lines) == [
        "hardware", "pdl", *FAMILY_CHECKS, "clusters", *LARGE_CHECKS, "coop", "meet", "built", "constants",
        "time-step", "time-block", "time-cluster", "time-grid", "memcheck", "racecheck", "info", "about", "tests", "bench",
    ]  # fmt: skip
    out = place / "out"
    assert json.loads((out / "about.json").read_text())["device"] == "Stand-in"
    assert [json.loads(line)["case"] for line in (out / "time.jsonl").read_text().splitlines()] == [
        "step",
        "block",
        "cluster",
        "grid",
    ]
    assert "GPU 0: Stand-in" in (out / "run.log").read_text() and (out / "bench.jsonl").read_text() == "{}\n"
    assert any("setup.py build_ext --inplace" in call for call in calls[:3]), "the extension compiles meanwhile"
    (bench,) = [call for call in calls if "benchmarks/run.py" in call]
    assert "--device cuda --preset first" in bench and "--plan" not in bench, "as a user's calls are served"
    watched = [call for call in calls if call.startswith("compute-sanitizer")]
    assert [re.findall(r"--tool (\w+)|check (\w+)", call) for call in watched] == [
        *([("memcheck", ""), ("", family)] for family in ("cluster", "grid", "step", "block")),
        [("racecheck", ""), ("", "cluster")],
    ]  # fmt: skip


def test_second_run(place: Path) -> None:
    status, lines, calls = run(place, 2)
    assert status == 0, lines
    assert stages(lines) == ["hardware", "build", "info", "about", "verify", "tests", "tune", "record", "bench", "plots"]
    assert (place / "out" / "tune.txt").read_text() == "LSTM: cluster (9 calls, 0.1 s)\n"
    (tests,) = [call for call in calls if "-m pytest" in call]
    assert "tests/test_families.py" in tests and "tests/test_overlap.py" in tests and "-m gpu" in tests


def test_a_stage_that_fails_does_not_stop_the_others(place: Path) -> None:
    status, lines, _ = run(place, 1, FAILS="first check grid small 0")
    assert status == 1 and lines[-1].endswith("failed: memcheck") and "bench" in stages(lines)
    status, lines, _ = run(place, 1, FAILS="first check grid small")
    assert status == 1 and lines[-1].endswith("failed: check-grid memcheck")
    assert "WRONG y: error 7" in lines, "the end of what it said is shown"


def test_a_build_that_fails_stops_what_needs_it(place: Path) -> None:
    status, lines, calls = run(place, 1, FAILS="setup.py")
    assert status == 1 and lines[-1].endswith("failed: build") and "stand-in: failed" in lines
    assert stages(lines)[-1] == "racecheck" and not any("-m pytest" in call for call in calls)
    status, lines, calls = run(place, 2, FAILS="setup.py")
    assert status == 1 and not any("verify" in call for call in calls)


def test_a_stage_ends_with_its_time(place: Path) -> None:
    (place / "bin" / "nvidia-smi").write_text("#!/usr/bin/env bash\nsleep 60\n")
    status, lines, _ = run(place, 2, TOTAL="6", STAGES="hardware info")
    assert status == 1 and any("hardware: FAILED with status 124 (out of time)" in line for line in lines)
    assert any("info: no time left" in line for line in lines)


def test_no_gpu(place: Path) -> None:
    """A sanitizer that starts nothing, and a missing GPU, are failures."""
    (place / "bin" / "nvidia-smi").write_text("#!/usr/bin/env bash\necho no devices; exit 9\n")
    (place / "bin" / "compute-sanitizer").write_text("#!/usr/bin/env bash\nexit 0\n")
    status, lines, _ = run(place, 1, STAGES="hardware memcheck")
    assert status == 1 and lines[-1].endswith("failed: hardware memcheck")


def test_usage() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "3"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: benchmarks/gpu.sh 1 or benchmarks/gpu.sh 2, got '3'" in done.stderr


def test_rehearsal(place: Path) -> None:
    """Without a GPU the stages that need one have to say so."""
    (place / "programs" / "first").write_text("#!/usr/bin/env bash\necho 'ERROR no device'; exit 2\n")
    (place / "bin" / "nvidia-smi").unlink()
    for number in (1, 2):
        status, lines, calls = run(place, number, REHEARSAL="1")
        assert status == 0 and lines[-1].endswith("all stages passed"), lines
        assert not any("-m gpu" in call for call in calls) and any("--device cpu" in call for call in calls)
        simulated = [call.split()[-1] for call in calls if "tests/simt/test_torch_free.py" in call]
        assert simulated == (["single", "step", "block", "cluster", "grid", "gemm"] if number == 1 else [])
    (place / "programs" / "first").write_text("#!/usr/bin/env bash\necho ok\n")
    status, lines, _ = run(place, 1, REHEARSAL="1", STAGES="pdl")
    assert status == 1 and "expected: ERROR" in "\n".join(lines)
    (place / "programs" / "first").unlink()
    status, lines, _ = run(place, 1, REHEARSAL="1", STAGES="pdl clusters")
    assert status == 0 and not stages(lines) and sum("not rehearsed, it needs a GPU" in line for line in lines) == 2
