"""torch.jit.trace: no needless warning, and a traced call on other sizes is right or raises."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from module_pairs import CELLS, LAYERS, assert_close, device_of, raised
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from fused_rnn import functional, use_backend

INPUT, HIDDEN = 4, 6
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True, "bias": False},
    "stack": {"num_layers": 2, "bidirectional": True},
    "proj": {"proj_size": 3, "num_layers": 2},
}
NAMED = [(name, key) for name in LAYERS for key in OPTIONS if key != "proj" or name == "LSTM"]


def module_of(name: str, device: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(fused_rnn, name)(INPUT, HIDDEN, **options, dtype=torch.float64, device=device).requires_grad_(False)


def randn(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device)


def traced(function: Any, args: tuple[Any, ...]) -> Any:
    """torch.jit.trace with every warning an error, but the one that it is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*torch.jit.trace", DeprecationWarning)
        return torch.jit.trace(function, args)


def layer_args(module: Any, steps: int, batch: int, with_state: bool, device: str) -> tuple[Any, ...]:
    x = randn(*((batch, steps) if module.batch_first else (steps, batch)), INPUT, device=device)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h, c = randn(rows, batch, module.proj_size or HIDDEN, device=device), randn(rows, batch, HIDDEN, device=device)
    return (x,) if not with_state else (x, (h, c)) if isinstance(module, nn.LSTM) else (x, h)


@pytest.mark.parametrize("with_state", (False, True), ids=("zeros", "hx"))
@pytest.mark.parametrize(("name", "options"), NAMED)
def test_layers(backend: str, name: str, options: str, with_state: bool) -> None:
    device = device_of(backend)
    with use_backend(backend):
        module = module_of(name, device, **OPTIONS[options])
        graph = traced(module, layer_args(module, 5, 2, with_state, device))
        for steps, batch in ((5, 2), (5, 3), (5, 1), (1, 2), (8, 3)):
            args = layer_args(module, steps, batch, with_state, device)
            if backend == "reference" and steps != 5:  # its loop over time is unrolled
                assert raised(lambda a=args: graph(*a))[0] is RuntimeError
            else:
                assert_close(graph(*args), module(*args))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_refuse_what_does_not_fit(backend: str, name: str) -> None:
    """The recorded graph checks shapes: nothing is broadcast, read past its end or left out."""
    device = device_of(backend)
    with use_backend(backend):
        module = module_of(name, device, num_layers=2)
        for with_state in (False, True):
            args = layer_args(module, 5, 3, with_state, device)
            graph = traced(module, args)
            assert_close(graph(*args), module(*args))
            for x in (args[0][..., :3], args[0][0], args[0][:0]):
                assert raised(lambda x=x, a=args[1:], g=graph: g(x, *a))[0] is RuntimeError, x.shape
        states = args[1] if name == "LSTM" else (args[1],)
        for index in range(len(states)):
            for wrong in (
                (2, 1, HIDDEN),
                (3, 3, HIDDEN),
                (1, 3, HIDDEN),
                (2, 3, 1),
                (2, 3, HIDDEN - 1),
                (3, 2, HIDDEN),
                (3, HIDDEN),
            ):
                hx = [*states]
                hx[index] = randn(*wrong, device=device)
                got = raised(lambda h=hx: graph(args[0], tuple(h) if name == "LSTM" else h[0]))
                assert got[0] is RuntimeError, (wrong, got)


@pytest.mark.parametrize("name", LAYERS)
def test_unbatched(backend: str, name: str) -> None:
    device = device_of(backend)
    with use_backend(backend):
        module = module_of(name, device)
        x, y = randn(5, INPUT, device=device), randn(7, INPUT, device=device)
        graph = traced(module, (x,))
        assert_close(graph(x), module(x))
        if backend == "reference":
            assert raised(lambda: graph(y))[0] is RuntimeError
        else:
            assert_close(graph(y), module(y))
        assert raised(lambda: graph(x.unsqueeze(1)))[0] is RuntimeError


@pytest.mark.parametrize("with_state", (False, True), ids=("zeros", "hx"))
@pytest.mark.parametrize("name", CELLS)
def test_cells(backend: str, name: str, with_state: bool) -> None:
    device = device_of(backend)
    with use_backend(backend):
        module = module_of(name, device)

        def args_of(*batch: int) -> tuple[Any, ...]:
            x, h, c = (randn(*batch, size, device=device) for size in (INPUT, HIDDEN, HIDDEN))
            return (x,) if not with_state else (x, (h, c)) if name == "LSTMCell" else (x, h)

        graph = traced(module, args_of(3))
        for batch in (3, 1, 5):
            args = args_of(batch)
            assert_close(graph(*args), module(*args))
        assert raised(lambda: graph(args_of(3)[0][:, :2], *args_of(3)[1:]))[0] is RuntimeError
        assert raised(lambda: graph(*args_of()))[0] is RuntimeError
        if with_state:
            for wrong in (1, 2):
                assert raised(lambda n=wrong: graph(args_of(3)[0], args_of(n)[1]))[0] is RuntimeError
        alone = traced(module, args_of())
        args = args_of()
        assert_close(alone(*args), module(*args))


class Packed(nn.Module):
    """A module on a PackedSequence that is made inside it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, data: Tensor, batch_sizes: Tensor, hx: Any = None) -> Any:
        y, state = self.module(PackedSequence(data, batch_sizes), hx)
        return y.data, state


class Padded(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        y, state = self.module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return y.data, state


SIZES = ([3, 2, 2, 1], [3, 3, 2], [4, 4], [8], [1] * 8, [2, 2, 2, 2], [2, 1], [5, 4, 4, 1])


@pytest.mark.parametrize("with_state", (False, True), ids=("zeros", "hx"))
@pytest.mark.parametrize(("name", "options"), [case for case in NAMED if case[1] != "batch_first"])
def test_packed(backend: str, name: str, options: str, with_state: bool) -> None:
    """Other batch sizes of the same sum and of another one, a greater and a smaller batch."""
    device = device_of(backend)
    with use_backend(backend):
        module = Packed(module_of(name, device, **OPTIONS[options]))

        def args_of(sizes: list[int]) -> tuple[Any, ...]:
            _, *hx = layer_args(module.module, 1, sizes[0], with_state, device)
            return (randn(sum(sizes), INPUT, device=device), torch.tensor(sizes), *hx)

        if backend == "reference":
            with pytest.raises(RuntimeError, match="torch.jit.trace cannot record packed input.*fused_rnn.revert"):
                torch.jit.trace(module, args_of(SIZES[0]))
            return
        graph = traced(module, args_of(SIZES[0]))
        for sizes in SIZES:
            args = args_of(sizes)
            assert_close(graph(*args), module(*args), str(sizes))


@pytest.mark.parametrize("name", LAYERS)
def test_unsorted_lengths(name: str, device: str) -> None:
    with use_backend(device):
        module = Padded(module_of(name, device, bidirectional=True))
        graph = torch.jit.trace(module, (randn(5, 3, INPUT, device=device), torch.tensor([2, 5, 3])))
        for lengths in ([2, 5, 3], [5, 1, 4], [1, 5, 5, 2], [5]):
            args = (randn(5, len(lengths), INPUT, device=device), torch.tensor(lengths))
            assert_close(graph(*args), module(*args))


@pytest.mark.parametrize("name", ("lstm", "gru", "rnn"))
def test_functional(backend: str, name: str) -> None:
    """lengths and resets are inputs of the graph, not its constants."""
    device = device_of(backend)
    weights = [w.detach() for w in module_of(name.upper(), device).parameters()]

    def call(x: Tensor, lengths: Tensor, resets: Tensor) -> Any:
        return getattr(functional, name)(x, weights, lengths=lengths, resets=resets)

    def args_of(lengths: list[int]) -> tuple[Tensor, ...]:
        batch = len(lengths)
        resets = torch.rand(5, batch).to(device) < 0.5
        return randn(5, batch, INPUT, device=device), torch.tensor(lengths, device=device), resets

    with use_backend(backend):
        graph = traced(call, args_of([5, 2, 3]))
        for lengths in ([5, 2, 3], [1, 5, 0], [4, 4], [0, 5, 1, 2]):
            args = args_of(lengths)
            assert_close(graph(*args), call(*args))
        x, lengths, resets = args_of([5, 2, 3])
        assert raised(lambda: graph(x, lengths[:1], resets))[0] is RuntimeError
        assert raised(lambda: graph(x, lengths, resets[:, :1]))[0] is RuntimeError
        assert raised(lambda: graph(x, lengths, resets[:1]))[0] is RuntimeError


@pytest.mark.parametrize("name", ("lstm_cell", "gru_cell", "rnn_cell"))
def test_functional_cells(backend: str, name: str) -> None:
    device = device_of(backend)
    weights = [w.detach() for w in module_of(CELLS[("rnn_cell", "lstm_cell", "gru_cell").index(name)], device).parameters()]

    def call(x: Tensor) -> Any:
        return getattr(functional, name)(x, None, *weights)

    with use_backend(backend):
        graph = traced(call, (randn(3, INPUT, device=device),))
        for batch in (3, 1, 7):
            x = randn(batch, INPUT, device=device)
            assert_close(graph(x), call(x))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_tracing_checks_its_arguments(backend: str, name: str) -> None:
    """What eager mode refuses is refused while it is traced, with the same error."""
    device = device_of(backend)
    with use_backend(backend):
        module = module_of(name, device)
        shape = (3,) if name in CELLS else (5, 3)
        x, h = randn(*shape, INPUT, device=device), randn(*(() if name in CELLS else (1,)), 1, HIDDEN, device=device)
        for args in ((x[..., 1:],), (x.float(),), (x, (h, h) if name.startswith("LSTM") else h)):
            expected = raised(lambda a=args: module(*a))
            assert expected[0] is not None
            assert raised(lambda a=args: torch.jit.trace(module, a)) == expected
