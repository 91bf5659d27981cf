"""PackedSequence in, PackedSequence out: values, gradients and all four fields, against torch.nn."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from module_pairs import LAYERS, assert_close, compare, device_of, make_pair, raised, random_state
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from fused_rnn import use_backend

SORTED, UNSORTED = [5, 3, 3, 1], [2, 5, 1, 3]


def packed(lengths: list[int], device: str, seed: int = 0, size: int = 4) -> PackedSequence:
    g = torch.Generator().manual_seed(seed)
    padded = torch.randn(max(lengths), len(lengths), size, generator=g, dtype=torch.float64).to(device)
    return pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=lengths == sorted(lengths, reverse=True))


@pytest.mark.parametrize("lengths", [SORTED, UNSORTED, [4], [1, 1], [3, 3, 3]], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_forward(backend: str, name: str, lengths: list[int]) -> None:
    device, g = device_of(backend), torch.Generator().manual_seed(1)
    place = {"dtype": torch.float64, "device": device}
    options: list[dict[str, Any]] = [{}, {"num_layers": 3, "bidirectional": True}, {"bias": False, "batch_first": True}]
    if name == "LSTM":
        options.append({"num_layers": 2, "bidirectional": True, "proj_size": 3})
    with use_backend(backend):
        for kwargs, with_state in itertools.product(options, (False, True)):
            ours, theirs = make_pair(name, 4, 6, **place, **kwargs)
            hx = random_state(theirs, len(lengths), g, **place) if with_state else None
            compare(ours, theirs, packed(lengths, device), hx, f"{kwargs} hx={with_state}")


@pytest.mark.parametrize("name", LAYERS)
def test_fields_and_types(backend: str, name: str) -> None:
    device = device_of(backend)
    with use_backend(backend):
        for lengths in (SORTED, UNSORTED):
            ours, _ = make_pair(name, 4, 6, dtype=torch.float64, device=device)
            x = packed(lengths, device)
            y, _ = ours(x)
            assert type(y) is PackedSequence and y.batch_sizes is x.batch_sizes
            assert y.sorted_indices is x.sorted_indices and y.unsorted_indices is x.unsorted_indices
            assert (x.sorted_indices is None) == (lengths == SORTED)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_equal_each_sequence_alone(backend: str, name: str) -> None:
    """Last states come in the caller's order, from each row's own last step, for both directions."""
    device, g = device_of(backend), torch.Generator().manual_seed(2)
    with use_backend(backend):
        ours, _ = make_pair(name, 4, 6, 2, bidirectional=True, dtype=torch.float64, device=device)
        rows = [torch.randn(n, 4, generator=g, dtype=torch.float64).to(device) for n in UNSORTED]
        y, state = ours(pack_sequence(rows, enforce_sorted=False))
        padded, lengths = pad_packed_sequence(y)
        assert lengths.tolist() == UNSORTED
        for index, row in enumerate(rows):
            y_row, state_row = ours(row)
            assert_close(padded[: len(row), index], y_row)
            assert not padded[len(row) :, index].any()
            states = state if name == "LSTM" else (state,)
            for whole, alone in zip(states, state_row if name == "LSTM" else (state_row,), strict=True):
                assert_close(whole[:, index], alone)


@pytest.mark.parametrize("name", LAYERS)
def test_float32_autocast_and_16_bit(backend: str, name: str) -> None:
    device = device_of(backend)
    with use_backend(backend):
        x64 = packed(UNSORTED, device)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            ours, theirs = make_pair(name, 4, 6, dtype=dtype, device=device)
            theirs.double()
            y, _ = ours(x64.to(dtype))
            assert y.data.dtype == dtype
            assert_close(y.data, theirs(x64.to(dtype).to(torch.float64))[0].data.to(dtype))
        ours, _ = make_pair(name, 4, 6, device=device)
        with torch.autocast(device, dtype=torch.bfloat16):
            assert ours(x64.to(torch.float32))[0].data.dtype == torch.bfloat16


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_state(backend: str, name: str) -> None:
    """For every class, sorted or not. torch.nn.LSTM checks none of it, no class a batch too large before sorting."""
    device = device_of(backend)
    ours, theirs = make_pair(name, 4, 6, dtype=torch.float64, device=device)
    message = "Expected hidden[0] size (1, 4, 6), got " if name == "LSTM" else "Expected hidden size (1, 4, 6), got "
    shapes = ((1, 3, 6), (1, 5, 6), (2, 4, 6), (1, 4, 5), (4, 6))
    with use_backend(backend):
        for lengths, shape in itertools.product((SORTED, UNSORTED), shapes):
            state = torch.zeros(shape, dtype=torch.float64, device=device)
            hx = (state, state) if name == "LSTM" else state
            assert raised(lambda h=hx, n=lengths: ours(packed(n, device), h)) == (RuntimeError, message + str(list(shape)))
            if name != "LSTM" and lengths == SORTED:
                assert raised(lambda h=hx: theirs(packed(SORTED, device), h)) == (RuntimeError, message + str(list(shape)))
        if name == "LSTM":
            h, c = torch.zeros(1, 4, 6, dtype=torch.float64, device=device), torch.zeros(1, 4, 5, device=device).double()
            expected = (RuntimeError, "Expected hidden[1] size (1, 4, 6), got [1, 4, 5]")
            assert raised(lambda: ours(packed(SORTED, device), (h, c))) == expected
            assert raised(lambda: ours(packed(SORTED, device), (h,)))[0] is IndexError
            assert raised(lambda: ours(packed(SORTED, device), (h, h, h))) == (
                RuntimeError,
                "lstm expects two hidden states",
            )


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_input(backend: str, name: str) -> None:
    device = device_of(backend)
    ours, theirs = make_pair(name, 4, 6, dtype=torch.float64, device=device)
    with use_backend(backend):
        x = packed(SORTED, device, size=5)
        assert raised(lambda: ours(x)) == (RuntimeError, "input.size(-1) must be equal to input_size. Expected 4, got 5")
        single = packed(SORTED, device).to(torch.float32)
        expected = raised(lambda: nn.GRU(4, 6, dtype=torch.float64, device=device)(single))
        assert expected[0] is ValueError and raised(lambda: ours(single)) == expected


@pytest.mark.parametrize("name", LAYERS)
def test_malformed_batch_sizes(backend: str, name: str) -> None:
    """A PackedSequence built by hand: never a read past the data."""
    device = device_of(backend)
    ours, _ = make_pair(name, 4, 6, device=device)
    data = torch.zeros(5, 4, device=device)
    with use_backend(backend):
        for sizes in ([1, 2, 2], [2, 2, 2], [2, 2], [3, 2, 0], [4, 2, -1], []):
            bad = PackedSequence(data, torch.tensor(sizes, dtype=torch.int64))
            kind, text = raised(lambda x=bad: ours(x))
            assert kind is ValueError and text.startswith("batch_sizes: expected"), (sizes, kind, text)
