"""When other processes hold cores, fewer threads run: the rule of csrc/cpu/crowd.h, with a clock of the test's own."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "c++").split()
PROGRAM = """
#include "cpu/crowd.h"
fused_rnn::cpu::Crowd crowd;
extern "C" int limit(int threads, double now) { return crowd.limit(threads, now); }
extern "C" int limits() { return crowd.limits(); }
extern "C" void report(int threads, double seconds, double lacked, double now) {
  crowd.report(threads, seconds, lacked, now);
}
"""

pytestmark = pytest.mark.skipif(
    not (ROOT / "csrc").exists() or not shutil.which(COMPILER[0]), reason="needs csrc and a C++ compiler"
)


class Crowd:
    """One rule in its first state; `now` is the time that the test sets."""

    def __init__(self, library: Path) -> None:
        self.library, self.now = ctypes.CDLL(str(library)), 1000.0

    def limit(self, threads: int = 8) -> int:
        return self.library.limit(threads, ctypes.c_double(self.now))

    def limits(self) -> bool:
        return bool(self.library.limits())

    def report(self, threads: int, seconds: float, lacked: float) -> None:
        self.library.report(threads, *map(ctypes.c_double, (seconds, lacked, self.now)))


@pytest.fixture
def crowd(tmp_path: Path) -> Crowd:
    (tmp_path / "crowd.cpp").write_text(PROGRAM)
    options = ["-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*COMPILER, *options, "crowd.cpp", "-o", "crowd.so"], check=True, cwd=tmp_path)
    return Crowd(tmp_path / "crowd.so")


def test_regions_that_keep_their_cores_change_nothing(crowd: Crowd) -> None:
    for _ in range(10):
        crowd.report(8, seconds=0.010, lacked=0.005)  # half of its time, as a neighbour that takes its fair share costs
        crowd.report(8, seconds=0.0010, lacked=0.0009)  # below one time slice
    assert crowd.limit() == 8 and not crowd.limits()


def test_two_crowded_regions_in_a_row_halve_the_threads_for_a_while(crowd: Crowd) -> None:
    crowd.report(8, seconds=0.010, lacked=0.006)
    assert crowd.limit() == 8
    crowd.report(8, seconds=0.010, lacked=0.001)
    crowd.report(8, seconds=0.010, lacked=0.006)
    assert crowd.limit() == 8, "not in a row"
    crowd.report(8, seconds=0.010, lacked=0.006)
    assert crowd.limit() == 4 and crowd.limits()
    assert crowd.limit(2) == 2 and crowd.limit(1) == 1
    crowd.now += 0.19
    assert crowd.limit() == 4
    crowd.now += 0.02
    assert crowd.limit() == 8 and not crowd.limits()


def test_one_long_crowded_region_is_enough(crowd: Crowd) -> None:
    crowd.report(2, seconds=0.030, lacked=0.020)
    assert crowd.limit(2) == 1


def test_where_all_cores_are_held_the_limit_is_lifted(crowd: Crowd) -> None:
    crowd.report(8, seconds=0.030, lacked=0.020)
    assert crowd.limit() == 4
    crowd.report(1, seconds=0.100, lacked=0.030)
    assert crowd.limit() == 8, "one thread lacks its core as well"
    crowd.now += 1.9
    crowd.report(8, seconds=0.030, lacked=0.020)
    assert crowd.limit() == 8, "not lowered again at once"
    crowd.now += 0.2
    crowd.report(8, seconds=0.030, lacked=0.020)
    assert crowd.limit() == 4
