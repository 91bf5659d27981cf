"""csrc/cuda/previous_rows.cu on the simulated device: bit by bit what the CPU's loop and a loop in Python give."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import byref, c_void_p
from pathlib import Path

import builder
import pytest
import torch
from cases import Case, make_data
from layers import _PARTS, Layer, Modifier, Sequence, structure
from simulator import Simulator
from torch import Tensor

PreviousParams = structure("PreviousParams", "core/previous.h", **_PARTS)
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CPU's previous_rows, without torch."""
    cpu = builder.ROOT / "csrc" / "cpu"
    sources = [cpu / "scan" / "previous.cpp", cpu / "threads.cpp", cpu / "processors.cpp"]
    library = tmp_path_factory.mktemp("cpu") / "previous_rows.so"
    command = [builder.CXX, "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{builder.ROOT / 'csrc'}"]
    builder._make(library, [*command, str(HERE / "kernels" / "cpu_previous_rows.cpp"), *map(str, sources)])
    return ctypes.CDLL(str(library))


def by_hand(layer: Layer, y: Tensor, h0: Tensor | None, d: int) -> Tensor:
    """The same by the definition: y [N, P] and h0 [B, P] of direction d."""
    before = layer.row_before(d)
    start = torch.zeros(layer.case.batch, y.shape[1], dtype=y.dtype) if h0 is None else h0
    result = torch.where((before >= 0)[:, None], y[before.clamp(min=0)], start[layer.batch_of_row])
    result[~layer.active] = 0
    if layer.data.resets is not None:
        result[layer.data.resets.flatten()] = 0
    return result


def cases() -> Iterator[tuple[Case, int]]:
    """Every kind of batch, with resets or not, in pieces of 16, 4 and 2 bytes; and by how many bytes y is misaligned."""
    for ragged in ("dense", "lengths", "packed"):
        for resets, states in ((False, True), (True, True), (True, False)):
            options = {"ragged": ragged, "resets": resets, "states": states, "bidirectional": True}
            yield Case("GRU", 5, 9, 4, 24, dtype=torch.float16, **options), 0
            yield Case("GRU", 4, 3, 4, 6, dtype=torch.bfloat16, **options), 0
            yield Case("GRU", 4, 3, 4, 7, dtype=torch.bfloat16, **options), 0
            yield Case("GRU", 3, 3, 4, 8, dtype=torch.float32, **options), 4
            yield Case("GRU", 3, 17, 4, 5, dtype=torch.float64, **options), 0
            yield Case("GRU", 3, 2, 4, 200, dtype=torch.float16, **options), 2
    yield Case("LSTM", 1, 1, 4, 1, dtype=torch.float16, resets=True), 0


@pytest.mark.parametrize(("case", "shift"), [*cases()], ids=str)
def test_previous_rows(sim: Simulator, cpu: ctypes.CDLL, case: Case, shift: int) -> None:
    layer = Layer.of(case, make_data(case))
    data, rows, size = layer.data, layer.rows, case.dtype.itemsize
    y = torch.randn(rows, case.directions, case.output, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    bytes_ = torch.cat([torch.zeros(shift, dtype=torch.uint8), y.flatten().view(torch.uint8)])
    for d in range(case.directions):
        offset = shift + d * case.output * size
        h0 = None if data.h0 is None else data.h0[d].contiguous()
        want = by_hand(layer, y[:, d], h0, d)
        params = PreviousParams(reverse=d == 1, row_bytes=case.output * size, y_stride=case.directions * case.output * size)

        out = torch.full((rows, case.output), float("nan"), dtype=case.dtype)
        arrays = [data.lengths, layer.offsets, data.resets, h0]
        lengths, offsets, resets, start = (None if t is None else t.data_ptr() for t in arrays)
        params.seq = Sequence(case.steps, case.batch, rows, lengths, offsets)
        params.modifier = Modifier(resets)
        params.y, params.h0, params.out = bytes_.data_ptr() + offset, start, out.data_ptr()
        cpu.cpu_previous_rows(byref(params))
        assert torch.equal(out, want)

        for seed in range(2):
            sim.reset(seed)
            names = ("lengths", "offsets", "resets", "h0")
            lengths, offsets, resets, start = (sim.put(name, t) for name, t in zip(names, arrays, strict=True))
            params.seq = Sequence(case.steps, case.batch, rows, lengths, offsets)
            params.modifier = Modifier(resets)
            place = sim.out("out", rows * case.output * size)
            params.y, params.h0, params.out = sim.put("y", bytes_) + offset, start, place
            sim.check(sim.lib.simt_previous_rows(c_void_p(ctypes.addressof(params))))
            found = sim.get(place, (rows, case.output), case.dtype)
            sim.check_output("out", place, found)
            assert torch.equal(found, want)


def test_nothing_to_do(sim: Simulator) -> None:
    """No rows: no launch."""
    sim.reset()
    params = PreviousParams(row_bytes=4, y_stride=4)
    params.seq = Sequence(3, 0, 0, None, None)
    sim.check(sim.lib.simt_previous_rows(byref(params)))
    assert sim.stats().grids == 0
