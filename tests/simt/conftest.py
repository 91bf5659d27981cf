"""The simulator's libraries, built once per run of the tests."""

from __future__ import annotations

from pathlib import Path

import builder
import pytest
from simulator import Simulator


@pytest.fixture(scope="session")
def sim() -> Simulator:
    """The CUDA backend as compiled for sm_90."""
    return Simulator(builder.build())


@pytest.fixture(scope="session")
def sim_sm75() -> Simulator:
    """The same with the fp16 kernels as compiled for sm_75: no asynchronous copies, smaller tensor-core shapes."""
    return Simulator(builder.build(older=["kernels_fp16"]))


@pytest.fixture(scope="session")
def small() -> Simulator:
    """Little kernels with known answers."""
    return Simulator(builder.build([Path(__file__).parent / "kernels" / "small.cu"]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The slow tests here take an hour and more: they run only when -m asks for them."""
    if config.getoption("markexpr"):
        return
    here = Path(__file__).parent
    slow = [item for item in items if item.get_closest_marker("slow") and here in item.path.parents]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]
