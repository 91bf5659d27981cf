"""Arguments that lie, to every op and binding (hostile.py): an exception or the right result, no signal, no garbage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fused_rnn._backend import has_cpu_kernels

pytestmark = [
    pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
]

# By the first word of a call's name.
GROUPS = {
    "layer": ("layer",),
    "backward": ("backward",),
    "offsets": ("offsets",),
    "other numbers": ("cell", "c0", "a", "lengths", "resets", "B=0,", "B=3,", "no"),
    "ops": ("ops.rnn", "ops.cell"),
    "bindings": ("_C.rnn", "_C.cell", "_C.call_module", "_C.watch_modules()", "_C.watch_modules(1,)", "_C.watch_modules"),
    "layers": ("LSTM", "GRU", "RNN"),
    "cells": ("LSTMCell", "GRUCell", "RNNCell"),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What is wrong with each call; "" for nothing."""
    script = Path(__file__).with_name("hostile.py")
    paths = os.pathsep.join([str(script.parents[2]), os.environ.get("PYTHONPATH", "")])
    # Freed and new memory of glibc holds other numbers than zeros: what is read of it shows.
    env = {**os.environ, "PYTHONPATH": paths, "GLIBC_TUNABLES": "glibc.malloc.perturb=165"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, env=env, timeout=600
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return dict(json.loads(line) for line in result.stdout.splitlines())


@pytest.mark.parametrize("group", GROUPS)
def test_calls(group: str, outcomes: dict[str, str]) -> None:
    mine = {name: text for name, text in outcomes.items() if name.split()[0].split("(")[0] in GROUPS[group]}
    assert len(mine) > 20, sorted(mine)
    wrong = [f"{name}: {text}" for name, text in mine.items() if text]
    report = "\n".join(wrong[:40])
    assert not wrong, f"{len(wrong)} of {len(mine)} calls; python tests/hardening/hostile.py NAME runs one\n{report}"


def test_every_call_is_in_a_group(outcomes: dict[str, str]) -> None:
    known = {word for words in GROUPS.values() for word in words}
    assert {name.split()[0].split("(")[0] for name in outcomes} <= known
    assert len(outcomes) > 2000
