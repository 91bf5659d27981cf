"""Fixtures shared by all tests."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from settings import setting as setting

from fused_rnn._backend import has_cpu_kernels, has_cuda_kernels

# One thread: the cases are tiny, and two test processes on two cores must not wait for each other.
torch.set_num_threads(int(os.environ.get("FUSED_RNN_TEST_THREADS", "1")))
# Tolerances of fp32 are those of fp32: TF32, which torch allows recurrent layers on a GPU, has tests of its own. Before
# anything imports torch.testing._internal, which reads it.
torch.backends.cudnn.allow_tf32 = False

# Compiled formulas are kept beside pytest's own cache: the next run finds what has not changed.
os.environ.setdefault("FUSED_RNN_CACHE", str(Path(__file__).parent.parent / ".pytest_cache" / "formula"))

BACKENDS = (
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")),
    pytest.param("cuda", marks=pytest.mark.gpu),
)
DEVICES = BACKENDS[1:]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that asks for a `backend` (or, for tests of the ops, a `device`) runs on each of them."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run where there is -m, timings where -m names them. GPU tests are skipped where there is none."""
    expression = config.getoption("markexpr")
    left_out = [name for name in ("slow", "timing") if name not in expression and (name == "timing" or not expression)]
    deselected = [item for item in items if any(map(item.get_closest_marker, left_out))]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not any(map(item.get_closest_marker, left_out))]
    missing = None
    if not torch.cuda.is_available():
        missing = "needs an NVIDIA GPU that torch can use"
    elif not has_cuda_kernels():
        missing = "needs fused_rnn built with CUDA kernels"
    for item in items:
        if missing and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=missing))
    items.sort(key=_blocks_wait)


def _blocks_wait(item: pytest.Item) -> int:
    """Tests on a GPU of kernels whose blocks wait for each other come last: where these hang, the others have run."""
    call = getattr(item, "callspec", None)
    waiting = (None, "grid", "cluster")
    family = call.params.get("family") if call and item.get_closest_marker("gpu") else None
    return waiting.index(family) if family in waiting else 0


# Seconds after which a test, and with it its process, is ended: a kernel that hangs ends no other way. 0: never.
LIMIT = float(os.environ.get("FUSED_RNN_TEST_LIMIT", "0"))
STACKS = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keeps what is standard error now: while a test runs, pytest captures it, and a process that is ended loses that."""
    config.stash[STACKS] = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """What a kernel does wrong is an error of the test that launched it, not of the next one that waits for the GPU."""
    if LIMIT:
        faulthandler.dump_traceback_later(LIMIT, exit=True, file=item.config.stash[STACKS])
    try:
        result = yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return result
    finally:
        if LIMIT:
            faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logfinish() -> None:
    """Some errors of a kernel end the CUDA context: whatever the process asks of the GPU fails from then on.

    Under pytest-xdist the process ends, and another one goes on with the tests after this; else all tests end here.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the CUDA context is lost: {error}", returncode=1)
