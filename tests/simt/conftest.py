"""The simulator's libraries, built once per run of the tests."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import builder
import pytest
from simulator import Simulator

SMALL = [Path(__file__).parent / "kernels" / "small.cu"]
SM75: dict[str, Any] = {"older": ["kernels_fp16"]}


@pytest.fixture(scope="session")
def sim(request: pytest.FixtureRequest) -> Simulator:
    """The CUDA backend as compiled for sm_90."""
    library = builder.build()
    if request.session.testscollected > 300:
        threading.Thread(target=_build_the_rest, daemon=True).start()
    return Simulator(library)


def _build_the_rest() -> None:
    """What later tests ask for, on the core that the tests leave idle; they report what does not compile."""
    others = [{"kernels": SMALL, "sanitize": name} for name in ("plain", "asan", "ubsan", "ucontext")]
    for options in (SM75, *others):
        with contextlib.suppress(builder.BuildError):
            builder.build(**options, jobs=1)


@pytest.fixture(scope="session")
def sim_sm75() -> Simulator:
    """The same with the fp16 kernels as compiled for sm_75: no asynchronous copies, smaller tensor-core shapes."""
    return Simulator(builder.build(**SM75))


@pytest.fixture(scope="session")
def small() -> Simulator:
    """Little kernels with known answers."""
    return Simulator(builder.build(SMALL))
