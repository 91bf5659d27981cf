"""Settings from the environment: read at import, refused where they are none, and never read again beside running calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from settings import Setting

import fused_rnn
from fused_rnn import _settings
from fused_rnn._backend import has_cpu_kernels

pytestmark = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")

WRONG = [
    ("FUSED_RNN_CPU", "mmx", "FUSED_RNN_CPU=mmx: expected one of the instruction sets available here: "),
    ("FUSED_RNN_WEIGHT_CACHE", "-1", "FUSED_RNN_WEIGHT_CACHE=-1: expected a number of MiB"),
    ("FUSED_RNN_WEIGHT_CACHE", "many", "FUSED_RNN_WEIGHT_CACHE=many: expected a number of MiB"),
    ("FUSED_RNN_WEIGHT_CACHE", "1.5", "FUSED_RNN_WEIGHT_CACHE=1.5: expected a number of MiB"),
    (
        "FUSED_RNN_PLAN",
        "fast",
        "FUSED_RNN_PLAN: unknown kernel family 'fast'; known are: single, step, grid, cluster, block, gemm, cudnn, and ",
    ),
    ("FUSED_RNN_OVERLAP", "-1", "FUSED_RNN_OVERLAP: expected 0 to 1024, got '-1'"),
    ("FUSED_RNN_OVERLAP", "many", "FUSED_RNN_OVERLAP: expected 0 to 1024, got 'many'"),
    ("FUSED_RNN_OVERLAP", "1025", "FUSED_RNN_OVERLAP: expected 0 to 1024, got '1025'"),
]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_value_that_is_none(name: str, value: str, message: str, setting: Setting) -> None:
    before = _settings.value(name)
    with pytest.raises(ValueError) as error:
        setting(name, value)
    assert str(error.value).startswith(message)
    assert _settings.value(name) == before


@pytest.mark.parametrize(("name", "value", "message"), WRONG[:1])
def test_refused_at_import(name: str, value: str, message: str) -> None:
    done = python("import fused_rnn", **{name: value})
    assert done.returncode == 1
    assert f"ValueError: {message}" in done.stderr


def test_read_at_import_alone() -> None:
    code = (
        "import os, fused_rnn; os.environ['FUSED_RNN_CPU'] = 'mmx'; os.environ['FUSED_RNN_PLAN'] = 'fast'\n"
        "import torch; fused_rnn.GRU(2, 3)(torch.zeros(2, 1, 2)); print(fused_rnn.build_info()['cpu_instruction_set'])"
    )
    done = python(code, FUSED_RNN_CPU="portable", FUSED_RNN_PLAN="step")
    assert (done.returncode, done.stdout.strip()) == (0, "portable"), done.stderr


def test_an_unknown_setting() -> None:
    assert _settings.extension is not None
    with pytest.raises(ValueError, match="unknown setting FUSED_RNN_GPU"):
        _settings.extension.set_setting("FUSED_RNN_GPU", "1")


def test_a_setting_ends_with_its_block() -> None:
    before = fused_rnn.build_info()["cpu_instruction_set"]
    with _settings.use("FUSED_RNN_CPU", "portable"):
        assert fused_rnn.build_info()["cpu_instruction_set"] == "portable"
    assert fused_rnn.build_info()["cpu_instruction_set"] == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs a module in ELF")
def test_the_extension_does_not_ask_the_environment() -> None:
    assert _settings.extension is not None and _settings.extension.__file__ is not None
    names = Path(_settings.extension.__file__).read_bytes().split(b"\0")
    assert b"pthread_atfork" in names or b"omp_get_max_threads" in names  # the names that it imports are there
    assert b"getenv" not in names and b"secure_getenv" not in names


BESIDE_NEW_VARIABLES = """
import os, threading, time, torch, fused_rnn
torch.set_num_threads(1)
end = time.monotonic() + {seconds}
def infer(module, x):
    with torch.no_grad():
        while time.monotonic() < end:
            for _ in range(200):
                module(x)
threads = [threading.Thread(target=infer, args=(fused_rnn.LSTM(4, 4), torch.zeros(1, 1, 4))) for _ in range(2)]
for thread in threads:
    thread.start()
i = 0
while time.monotonic() < end:
    for _ in range(50):  # the C library moves its list of variables when it grows, and frees the old one
        os.environ["A_NEW_VARIABLE_%d" % i] = "x" * 100
        i += 1
    time.sleep(0.001)
for thread in threads:
    thread.join()
print("alive")
"""


@pytest.mark.parametrize("seconds", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_calls_beside_a_thread_that_sets_variables(seconds: float) -> None:
    done = python(BESIDE_NEW_VARIABLES.format(seconds=seconds))
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr
