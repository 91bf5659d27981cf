"""The compiler's PTX on the simulated device. Needs nvcc."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from functools import cache

import builder
import pytest
import test_previous_rows as previous
import torch
from cases import Case
from simulator import Simulator
from test_kernels import Simulated, run
from test_options import Optional
from test_options import run as run_modified
from test_persistent import run_cut

from . import build, cases, primitives
from .loader import PtxSimulator, Recorder, finder
from .source import Kernel
from .translate import function

pytestmark = pytest.mark.skipif(build.nvcc() is None, reason=build.NO_NVCC)


@cache
def primitive_simulators(arch: str) -> tuple[Simulator, PtxSimulator]:
    """The little kernels as compiled by g++, and as PTX."""
    library = primitives.library(arch)
    return Simulator(library), PtxSimulator(library, finder_of_primitives(arch))


@cache
def finder_of_primitives(arch: str) -> Callable[[str], Kernel]:
    file = build.file_of(primitives.SOURCE, arch)
    names = {build.canonical(name): name for name in file.names}
    return lambda symbol: file.kernel(names[symbol])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "name"), [(arch, name) for arch in build.ARCHITECTURES for name in primitives.SERVED[arch]]
)
def test_primitives_give_the_bits_of_their_twins(arch: str, name: str) -> None:
    source, ptx = primitive_simulators(arch)
    device = primitives.DEVICES[arch]
    want = primitives.run(source, name, device)
    assert want.any()
    before = ptx.launched.total()
    for seed in primitives.SEEDS:
        found = primitives.run(ptx, name, device, seed)
        assert torch.equal(found, want), f"seed {seed}: {(found != want).nonzero().flatten()[:8].tolist()}"
    assert ptx.launched.total() - before == len(primitives.SEEDS) * (2 if name == "dependent" else 1)


@cache
def simulator(arch: str) -> PtxSimulator:
    """The CUDA backend with the PTX of an architecture for kernels."""
    return PtxSimulator(builder.build(), finder(arch))


def check_case(arch: str, simulated: Simulated) -> None:
    sim = simulator(arch)
    before = sim.launched.total()
    run(sim, simulated)
    assert sim.launched.total() > before


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "simulated"), [*cases.representative(short=True)], ids=str)
def test_each_family_and_arithmetic(arch: str, simulated: Simulated) -> None:
    """The part that .ci/run has."""
    check_case(arch, simulated)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "simulated"), [*cases.representative(short=False)], ids=str)
def test_other_architectures(arch: str, simulated: Simulated) -> None:
    check_case(arch, simulated)


@pytest.mark.slow
@pytest.mark.parametrize("arch", build.ARCHITECTURES)
def test_every_kernel_is_translated(arch: str) -> None:
    """Every instruction of every kernel of csrc/cuda is known; what does not run below is at least read."""
    count = 0
    for source in build.sources(arch):
        file = build.file_of(source, arch)
        for name in file.names:
            function(file.kernel(name))
            count += 1
    assert count >= {"sm_75": 100, "sm_80": 120, "sm_90a": 180}[arch]


@pytest.mark.slow
@pytest.mark.parametrize("arch", build.ARCHITECTURES)
def test_integers_and_flags(arch: str) -> None:
    sim = simulator(arch)
    sim.reset(device=primitives.DEVICES[arch])
    values = torch.arange(700) - 300
    place = sim.out("integers", values.nbytes)
    sim.check(sim.lib.simt_write_integers(c_void_p(place), c_void_p(values.data_ptr()), c_int64(len(values))))
    assert torch.equal(sim.get(place, (700,), torch.int64), values)
    flags = torch.arange(5000) % 3 == 0
    place = sim.out("flags", flags.nbytes)
    sim.check(sim.lib.simt_write_flags(c_void_p(place), c_void_p(flags.data_ptr()), c_int64(len(flags))))
    assert torch.equal(sim.get(place, (5000,), torch.bool), flags)


cpu = previous.cpu  # a fixture


@pytest.mark.slow
@pytest.mark.parametrize("arch", build.ARCHITECTURES)
@pytest.mark.parametrize(("case", "shift"), [*previous.cases()][::5], ids=str)
def test_previous_rows(cpu: ctypes.CDLL, arch: str, case: Case, shift: int) -> None:
    previous.test_previous_rows(simulator(arch), cpu, case, shift)


SWEEP = [(arch, s) for arch in build.ARCHITECTURES for s in cases.everything(arch)]
MODIFIED = [(arch, s) for arch in build.ARCHITECTURES for s in cases.modified(arch)]
CUT = [(arch, s) for arch in build.ARCHITECTURES for s in cases.cut(arch)]
asked_for = pytest.mark.skipif(not os.environ.get("FUSED_RNN_PTX_SWEEP"), reason="hours: FUSED_RNN_PTX_SWEEP=1 asks for it")


@pytest.mark.slow
@asked_for
@pytest.mark.parametrize(("arch", "simulated"), SWEEP, ids=str)
def test_sweep(arch: str, simulated: Simulated) -> None:
    check_case(arch, simulated)


@pytest.mark.slow
@asked_for
@pytest.mark.parametrize(("arch", "optional"), MODIFIED, ids=str)
def test_sweep_of_modified_steps(arch: str, optional: Optional) -> None:
    sim = simulator(arch)
    before = sim.launched.total()
    run_modified(sim, optional)
    assert sim.launched.total() > before


@pytest.mark.slow
@asked_for
@pytest.mark.parametrize(("arch", "simulated"), CUT, ids=str)
def test_sweep_of_cut_launches(arch: str, simulated: Simulated) -> None:
    run_cut(simulator(arch), simulated)


@pytest.mark.slow
@asked_for
@pytest.mark.parametrize("arch", build.ARCHITECTURES)
def test_sweep_launches_every_kernel(arch: str) -> None:
    """Nothing that nvcc makes of csrc/cuda is left out by the tests above: what they launch, found with g++'s kernels."""
    sim = Recorder(builder.build())
    for simulated in cases.everything(arch):
        run(sim, dataclasses.replace(simulated, seeds=1))
    for optional in cases.modified(arch):
        run_modified(sim, dataclasses.replace(optional, seeds=1))
    every = {build.canonical(name) for source in build.sources(arch) for name in build.file_of(source, arch).names}
    others = "previous_rows|write_integers|write_flags|query"  # tests above, and what asks a device
    if arch == "sm_75":
        others += "|zero_fill|MathKindE2"  # of grid and cluster, and of TF32: no plan for this architecture has them
    of_others = re.compile(others)
    assert not {name for name in every - sim.launched if not of_others.search(name)}
