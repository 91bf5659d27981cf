"""Tensor subclasses and TorchFunctionMode: seen wherever in a call they are, as by torch.nn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from module_pairs import CELLS, CLASSES, LAYERS, assert_close, device_of, flatten, make_pair
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fused_rnn import functional, use_backend


class Tagged(Tensor):
    """Results of operations on it are Tagged."""


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def arguments(name: str, device: str) -> dict[str, Tensor]:
    """Input and states of a module, by name."""
    cell = name in CELLS
    shapes = {"input": (3, 4) if cell else (5, 3, 4), "h": (3, 6) if cell else (1, 3, 6)}
    if name.startswith("LSTM"):
        shapes["c"] = shapes["h"]
    g = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=g, dtype=torch.float64).to(device) for key, shape in shapes.items()}


def call(module: Any, given: dict[str, Tensor]) -> Any:
    hx = (given["h"], given["c"]) if "c" in given else given["h"]
    return module(given["input"], hx)


def places(name: str, device: str) -> Iterator[tuple[str, nn.Module, nn.Module, dict[str, Tensor]]]:
    """(place, ours, torch.nn's, arguments) with one Tagged tensor in turn in every place of a call."""
    for key, tensor in arguments(name, device).items():
        pair = make_pair(name, 4, 6, dtype=torch.float64, device=device)
        yield key, *pair, arguments(name, device) | {key: tensor.as_subclass(Tagged)}
    for key, _ in make_pair(name, 4, 6)[0].named_parameters():
        pair = make_pair(name, 4, 6, dtype=torch.float64, device=device)
        for module in pair:
            setattr(module, key, nn.Parameter(getattr(module, key).detach().as_subclass(Tagged)))
        yield key, *pair, arguments(name, device)


@pytest.mark.parametrize("grad", (True, False), ids=("grad", "no_grad"))
@pytest.mark.parametrize("name", CLASSES)
def test_subclass_in_each_place(backend: str, name: str, grad: bool) -> None:
    with use_backend(backend), torch.set_grad_enabled(grad):
        for place, ours, theirs, given in places(name, device_of(backend)):
            results = [flatten(call(module, given)) for module in (ours, theirs)]
            if backend != "reference":
                assert [type(t) for t in results[0]] == [type(t) for t in results[1]] == [Tagged] * len(results[0]), place
            # The reference is made of torch's operations: the last state of a layer may be none of a Tagged tensor's.
            assert type(results[0][0]) is Tagged, place
            assert_close(*results, place)
            if grad:
                gradients = [torch.autograd.grad(sum(t.sum() for t in result), list(module.parameters()))
                             for module, result in zip((ours, theirs), results, strict=True)]  # fmt: skip
                assert_close(*gradients, place)


@pytest.mark.parametrize("name", LAYERS)
def test_subclass_in_packed_input(backend: str, name: str) -> None:
    device = device_of(backend)
    with use_backend(backend):
        ours, theirs = make_pair(name, 4, 6, dtype=torch.float64, device=device)
        data = torch.randn(6, 4, dtype=torch.float64, device=device).as_subclass(Tagged)
        packed = nn.utils.rnn.PackedSequence(data, torch.tensor([3, 2, 1]))
        result = ours(packed)
        assert type(result[0].data) is Tagged
        assert_close(result, theirs(packed))


@pytest.mark.parametrize("name", CLASSES)
def test_subclass_in_functional(backend: str, name: str) -> None:
    device = device_of(backend)
    function = getattr(functional, name.lower().replace("cell", "_cell"))
    module, _ = make_pair(name, 4, 6, dtype=torch.float64, device=device)
    given, weights = arguments(name, device), [w.detach() for w in module.parameters()]
    everything = [*given.values(), *weights]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        x, *rest = tensors
        states, params = rest[: len(given) - 1], rest[len(given) - 1 :]
        hx = tuple(states) if len(states) == 2 else states[0]
        return flatten(function(x, hx, *params) if name in CELLS else function(x, params, hx))

    with use_backend(backend):
        expected = run(everything)
        for index, tensor in enumerate(everything):
            result = run([*everything[:index], tensor.as_subclass(Tagged), *everything[index + 1 :]])
            assert type(result[0]) is Tagged, index
            assert_close(result, expected)


@pytest.mark.parametrize("grad", (True, False), ids=("grad", "no_grad"))
@pytest.mark.parametrize("name", CLASSES)
def test_modes_see_the_call(backend: str, name: str, grad: bool) -> None:
    """torch.nn's call is one function of torch; ours is one op, or the reference's operations."""
    device = device_of(backend)
    op = "cell" if name in CELLS else "rnn"
    with use_backend(None if backend == device else backend), torch.set_grad_enabled(grad):
        ours, theirs = make_pair(name, 4, 6, dtype=torch.float64, device=device)
        given = arguments(name, device)
        expected = call(ours, given)
        for module, wanted in (
            (theirs, name.lower()[:3]),
            (ours, "linear" if backend == "reference" else f"fused_rnn.{op}"),
        ):
            with Seen() as seen:
                result = call(module, given)
            assert any(wanted in text for text in seen.names), seen.names
            assert_close(result, expected)
        with Seen() as seen, torch._C.DisableTorchFunction():
            call(ours, given)
        assert seen.names == []


def doubled(result: Any) -> Any:
    return 2 * result if isinstance(result, Tensor) else type(result)(map(doubled, result))


class Doubling(TorchFunctionMode):
    """Changes what the op returns."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if "fused_rnn" in str(function):
            return doubled(result)
        return result


@pytest.mark.parametrize("name", CLASSES)
def test_a_mode_decides_the_result(name: str, device: str) -> None:
    ours, _ = make_pair(name, 4, 6, dtype=torch.float64, device=device)
    given = arguments(name, device)
    with torch.no_grad():
        expected = flatten(call(ours, given))
        with Doubling():
            result = flatten(call(ours, given))
    assert_close(result, [2 * t for t in expected])


def test_a_default_device_is_such_a_mode(backend: str) -> None:
    """torch.set_default_device and `with torch.device` run calls through a mode that changes nothing here."""
    device = device_of(backend)
    with use_backend(backend):
        ours, theirs = make_pair("GRU", 4, 6, dtype=torch.float64, device=device)
        given = arguments("GRU", device)
        with torch.device(device):
            assert_close(call(ours, given), call(theirs, given))
