"""Arguments that do not fit: an error that names the argument, the same on every backend; never a result."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, make_data
from module_pairs import CELLS, CLASSES, LAYERS, assert_close, device_of, flatten, make_pair, raised
from torch import Tensor, nn

import fused_rnn
from fused_rnn import functional, use_backend

# --- the public functions ---

LAYER_FUNCTIONS = ("lstm", "gru", "rnn")
KINDS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN_TANH"}

# (argument, value, error, message). Shapes: T 5, B 3, I 4, H 6, one layer.
LAYER_ARGUMENTS: list[tuple[str, Any, type[Exception], str]] = [
    ("num_layers", "2", TypeError, "num_layers: expected an int, got str"),
    ("num_layers", 1.0, TypeError, "num_layers: expected an int, got float"),
    ("num_layers", True, TypeError, "num_layers: expected an int, got bool"),
    ("num_layers", None, TypeError, "num_layers: expected an int, got NoneType"),
    ("num_layers", 0, ValueError, "num_layers: expected at least 1, got 0"),
    ("num_layers", -1, ValueError, "num_layers: expected at least 1, got -1"),
    ("dropout", "0.1", TypeError, "dropout: expected a number, got str"),
    ("dropout", True, TypeError, "dropout: expected a number, got bool"),
    ("dropout", None, TypeError, "dropout: expected a number, got NoneType"),
    ("dropout", float("nan"), ValueError, "dropout: expected a probability from 0 to 1, got nan"),
    ("dropout", -0.1, ValueError, "dropout: expected a probability from 0 to 1, got -0.1"),
    ("has_biases", "yes", TypeError, "has_biases: expected a bool, got str"),
    ("has_biases", 1, TypeError, "has_biases: expected a bool, got int"),
    ("bidirectional", "yes", TypeError, "bidirectional: expected a bool, got str"),
    ("bidirectional", None, TypeError, "bidirectional: expected a bool, got NoneType"),
    ("training", "no", TypeError, "training: expected a bool, got str"),
    ("batch_first", "no", TypeError, "batch_first: expected a bool, got str"),
    ("batch_first", 0, TypeError, "batch_first: expected a bool, got int"),
    ("weights", None, TypeError, "weights: expected a list of Tensors, got NoneType"),
    ("weights", "ab", TypeError, "weights: expected a list of Tensors, got str"),
    ("weights", torch.zeros(4, 3), TypeError, "weights: expected a list of Tensors, got Tensor"),
    ("weights", [None, None, None, None], TypeError, "weights[0]: expected a Tensor, got NoneType"),
    ("weights", {"a": 1}, TypeError, "weights: expected a list of Tensors, got dict"),
    ("lengths", "ab", TypeError, "lengths: expected a Tensor or a list of integers, got str"),
    ("lengths", ["a", "b", "c"], TypeError, "lengths: expected a Tensor or a list of integers, got list"),
    ("lengths", {}, TypeError, "lengths: expected a Tensor or a list of integers, got dict"),
    ("lengths", [1.0, 2.0, 3.0], ValueError, "lengths: expected integers, got torch.float32"),
    ("lengths", [True, True, False], ValueError, "lengths: expected integers, got torch.bool"),
    ("lengths", [1, 2], ValueError, "lengths: expected shape [3], got [2]"),
    ("lengths", 3, ValueError, "lengths: expected shape [3], got []"),
    ("lengths", [1, 2, 9], ValueError, "lengths: expected values from 0 to 5, got [1, 2, 9]"),
    ("resets", [True] * 5, TypeError, "resets: expected a bool Tensor, got list"),
    ("resets", "ab", TypeError, "resets: expected a bool Tensor, got str"),
    ("batch_sizes", [3, 2], TypeError, "batch_sizes: expected a Tensor, got list"),
    ("batch_sizes", "ab", TypeError, "batch_sizes: expected a Tensor, got str"),
    ("input", None, TypeError, "input: expected a Tensor, got NoneType"),
    ("input", [[1.0]], TypeError, "input: expected a Tensor, got list"),
    (
        "input",
        torch.zeros(5, 3, 4, dtype=torch.int16),
        ValueError,
        "input: expected dtype float64, float32, float16, bfloat16, complex64 or complex128, or int64 or int32 ids, got "
        "torch.int16",
    ),
]
# hx of a function with one state, and of an LSTM's.
ONE_STATE: list[tuple[Any, type[Exception], str]] = [
    (3, TypeError, "hx: expected a Tensor, got int"),
    ("ab", TypeError, "hx: expected a Tensor, got str"),
    ((torch.zeros(1),) * 2, TypeError, "hx: expected a Tensor, got tuple"),
]
TWO_STATES: list[tuple[Any, type[Exception], str]] = [
    (3, TypeError, "hx: expected a pair (h0, c0), got int"),
    ("ab", TypeError, "hx: expected a pair (h0, c0), got str"),
    (torch.zeros(2, 3), TypeError, "hx: expected a pair (h0, c0), got Tensor"),
    ((torch.zeros(1),), TypeError, "hx: expected a pair (h0, c0), got a tuple of 1"),
    ([torch.zeros(1)] * 3, TypeError, "hx: expected a pair (h0, c0), got a list of 3"),
]


def layer_call(name: str, device: str, **changes: Any) -> Callable[[], Any]:
    data = make_data(Case(KINDS[name]), device)
    arguments: dict[str, Any] = {"input": data.input, "weights": data.weights, "hx": None}
    if changes.get("batch_sizes") is not None:
        arguments["input"] = data.input[:, 0]
    return lambda: getattr(functional, name)(**(arguments | changes))


@pytest.mark.parametrize("name", LAYER_FUNCTIONS)
def test_arguments_of_layers(backend: str, name: str) -> None:
    with use_backend(backend):
        layer_call(name, device_of(backend))()
        for argument, value, error, message in LAYER_ARGUMENTS:
            got = raised(layer_call(name, device_of(backend), **{argument: value}))
            assert got == (error, message), (argument, value)
        for value, error, message in TWO_STATES if name == "lstm" else ONE_STATE:
            assert raised(layer_call(name, device_of(backend), hx=value)) == (error, message), value


def cell_call(name: str, device: str, **changes: Any) -> Callable[[], Any]:
    data = make_data(Case(KINDS[name.removesuffix("_cell")]), device)
    keys = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
    arguments = dict(zip(keys, (data.input[0], None, *data.weights), strict=True))
    return lambda: getattr(functional, name)(**(arguments | changes))


@pytest.mark.parametrize("name", [f"{name}_cell" for name in LAYER_FUNCTIONS])
def test_arguments_of_cells(backend: str, name: str) -> None:
    device = device_of(backend)
    gates = {"lstm_cell": 24, "gru_cell": 18, "rnn_cell": 6}[name]
    table: list[tuple[str, Any, type[Exception], str]] = [
        ("input", None, TypeError, "input: expected a Tensor, got NoneType"),
        ("input", torch.zeros(1, 2, 4, device=device), ValueError, "input: expected 1-D or 2-D, got 3-D"),
        ("input", torch.zeros(3, 5, device=device), ValueError, f"w_ih: expected shape [{gates}, 5], got [{gates}, 4]"),
        ("w_ih", None, TypeError, "w_ih: expected a Tensor, got NoneType"),
        ("w_hh", [1.0], TypeError, "w_hh: expected a Tensor, got list"),
        ("w_hh", torch.zeros(gates, 5, device=device), ValueError, f"w_hh: expected shape [{gates}, 6], got [{gates}, 5]"),
        ("b_ih", "ab", TypeError, "b_ih: expected a Tensor, got str"),
        ("b_hh", None, ValueError, "b_ih, b_hh: expected both or neither, got one"),
        ("b_hh", torch.zeros(1, device=device), ValueError, f"b_hh: expected shape [{gates}], got [1]"),
        (
            "b_hh",
            torch.zeros(gates, device=device, dtype=torch.float64),
            ValueError,
            "b_hh: expected dtype torch.float32 (input's), got torch.float64",
        ),
        (
            "w_hh",
            torch.zeros(gates, 6, device="meta"),
            ValueError,
            f"w_hh: expected device {torch.zeros(1, device=device).device} (input's), got meta",
        ),
    ]
    with use_backend(backend):
        cell_call(name, device)()
        for argument, value, error, message in table:
            assert raised(cell_call(name, device, **{argument: value})) == (error, message), (argument, value)
        for value, error, message in TWO_STATES if name == "lstm_cell" else ONE_STATE:
            assert raised(cell_call(name, device, hx=value)) == (error, message), value
    if name == "rnn_cell":
        for value in ("selu", None, 3, "TANH"):
            message = f"nonlinearity: expected 'tanh', 'relu' or 'identity', got {value!r}"
            assert raised(cell_call(name, device, nonlinearity=value)) == (ValueError, message)
            assert raised(layer_call("rnn", device, nonlinearity=value)) == (ValueError, message)


# --- layouts ---

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.sparse_csr": lambda t: t.to_sparse_csr(),
    "torch.sparse_csc": lambda t: t.to_sparse_csc(),
    "torch.sparse_coo": lambda t: t.to_sparse(),
    "torch._mkldnn": lambda t: t.to_mkldnn(),
}
REASON = (
    "expected a dense tensor (layout torch.strided: elements are read by strides), got layout {}; convert it with to_dense()"
)


def other_layouts(tensor: Tensor) -> list[tuple[str, Tensor]]:
    """(layout, the tensor in it), of those that there are for its rank."""
    wanted = [key for key in LAYOUTS if tensor.dim() == 2 or key in ("torch.sparse_coo", "torch._mkldnn")]
    wanted = [key for key in wanted if key != "torch._mkldnn" or not tensor.is_cuda]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: sparse CSR is in beta
        return [(key, LAYOUTS[key](tensor)) for key in wanted]


@pytest.mark.parametrize("name", CLASSES)
def test_layouts_of_modules(backend: str, name: str) -> None:
    device = device_of(backend)
    x = torch.zeros(3, 4, device=device) if name in CELLS else torch.zeros(5, 3, 4, device=device)
    h = torch.zeros(3, 6, device=device) if name in CELLS else torch.zeros(1, 3, 6, device=device)
    with use_backend(None if backend == device else backend):
        for key, parameter in make_pair(name, 4, 6, device=device)[0].named_parameters():
            for layout, tensor in other_layouts(parameter.detach()):
                module = getattr(fused_rnn, name)(4, 6, device=device)
                setattr(module, key, nn.Parameter(tensor))
                assert raised(lambda m=module: m(x)) == (RuntimeError, f"parameter {key}: {REASON.format(layout)}")
        module = getattr(fused_rnn, name)(4, 6, device=device)
        for layout, tensor in other_layouts(x):
            assert raised(lambda t=tensor: module(t)) == (RuntimeError, f"input: {REASON.format(layout)}")
        for layout, tensor in other_layouts(h):
            for hx in ((tensor, h), (h, tensor)) if name.startswith("LSTM") else (tensor,):
                assert raised(lambda hx=hx: module(x, hx)) == (RuntimeError, f"hidden: {REASON.format(layout)}")


@pytest.mark.parametrize("name", LAYERS)
def test_nested_input(backend: str, name: str) -> None:
    device = device_of(backend)
    module = getattr(fused_rnn, name)(4, 6, device=device)
    weights = [w.detach() for w in module.parameters()]
    rows = [torch.zeros(3, 4, device=device), torch.zeros(2, 4, device=device)]
    with use_backend(None if backend == device else backend):
        for layout in (torch.strided, torch.jagged):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch: nested tensors are a prototype
                nested = torch.nested.nested_tensor(rows, layout=layout)
            kind, text = raised(lambda x=nested: module(x))
            assert kind is RuntimeError and text.startswith("input: expected a dense tensor"), text
            kind, text = raised(lambda x=nested: getattr(functional, name.lower())(x, weights))
            assert kind is ValueError and text.startswith("input: expected a dense tensor"), text
            assert "to_padded_tensor()" in text


@pytest.mark.parametrize("name", LAYER_FUNCTIONS)
def test_layouts_in_functional(backend: str, name: str) -> None:
    device = device_of(backend)
    data = make_data(Case(KINDS[name]), device)
    with use_backend(backend):
        for index, weight in enumerate(data.weights):
            for layout, tensor in other_layouts(weight):
                changed = [*data.weights[:index], tensor, *data.weights[index + 1 :]]
                got = raised(layer_call(name, device, weights=changed))
                assert got == (ValueError, f"weights[{index}]: {REASON.format(layout)}")
                key = ("w_ih", "w_hh", "b_ih", "b_hh")[index]
                got = raised(cell_call(f"{name}_cell", device, **{key: tensor}))
                assert got == (ValueError, f"{key}: {REASON.format(layout)}")
        for layout, tensor in other_layouts(data.input):
            assert raised(layer_call(name, device, input=tensor)) == (ValueError, f"input: {REASON.format(layout)}")
        hx = (data.h0.to_sparse(), data.c0) if name == "lstm" else data.h0.to_sparse()
        got = raised(layer_call(name, device, hx=hx))
        assert got == (ValueError, f"h0: {REASON.format('torch.sparse_coo')}")
        resets = torch.zeros(5, 3, dtype=torch.bool, device=device).to_sparse()
        assert raised(layer_call(name, device, resets=resets))[1].startswith("resets: expected a dense tensor")
        lengths = torch.ones(3, dtype=torch.int64, device=device).to_sparse()
        assert raised(layer_call(name, device, lengths=lengths))[1].startswith("lengths: expected a dense tensor")


# --- weights of modules ---


def with_parameter(name: str, key: str, change: Callable[[Tensor], Tensor | None], device: str, **kwargs: Any) -> nn.Module:
    module = getattr(fused_rnn, name)(4, 6, device=device, **kwargs)
    changed = change(getattr(module, key).detach())
    setattr(module, key, None if changed is None else nn.Parameter(changed, requires_grad=False))
    return module


@pytest.mark.parametrize("grad", (True, False), ids=("grad", "no_grad"))
@pytest.mark.parametrize("name", CLASSES)
def test_each_weight_is_checked(backend: str, name: str, grad: bool) -> None:
    """A weight on another device or of another dtype: torch.nn's layers raise, and so do ours, by its name."""
    device = device_of(backend)
    options: dict[str, Any] = {} if name in CELLS else {"num_layers": 2, "bidirectional": True}
    options |= {"proj_size": 3} if name == "LSTM" else {}
    x = torch.zeros(3, 4, device=device) if name in CELLS else torch.zeros(5, 3, 4, device=device)
    packed = nn.utils.rnn.PackedSequence(torch.zeros(5, 4, device=device), torch.tensor([3, 2]))
    inputs: tuple[Any, ...] = (x, x[0]) if name in CELLS else (x, x[0], packed)
    keys = [key for key, _ in getattr(fused_rnn, name)(4, 6, **options).named_parameters()]
    with use_backend(None if backend == device else backend), torch.set_grad_enabled(grad):
        for key in keys:
            for input in inputs:
                module = with_parameter(name, key, lambda t: t.to("meta"), device, **options)
                kind, text = raised(lambda m=module, t=input: m(t))
                assert kind is RuntimeError and f"parameter {key} tensors are not at the same device" in text, (key, text)
                assert text.endswith(f"parameter {key} tensor at meta")
                for dtype, word in ((torch.float64, "Double"), (torch.float16, "Half"), (torch.int32, "Int")):
                    module = with_parameter(name, key, lambda t, d=dtype: t.to(d), device, **options)
                    kind, text = raised(lambda m=module, t=input: m(t))
                    first = key == keys[0] and name in LAYERS  # torch.nn compares input with it, in words of its own
                    assert kind is (ValueError if first else RuntimeError), (key, dtype, text)
                    assert first or text == (
                        f"Input and parameter {key} tensors are not the same dtype, found input tensor with Float "
                        f"and parameter {key} tensor with {word}"
                    )


@pytest.mark.parametrize("name", CLASSES)
def test_incomplete_checkpoint(backend: str, name: str) -> None:
    """A model made on meta, of which a checkpoint fills all but one weight."""
    device = device_of(backend)
    options: dict[str, Any] = {} if name in CELLS else {"num_layers": 2}
    complete = getattr(fused_rnn, name)(4, 6, device=device, **options)
    x = torch.zeros(3, 4, device=device) if name in CELLS else torch.zeros(5, 3, 4, device=device)
    with use_backend(None if backend == device else backend):
        for key in complete.state_dict():
            module = getattr(fused_rnn, name)(4, 6, device="meta", **options)
            state = {k: v for k, v in complete.state_dict().items() if k != key}
            module.load_state_dict(state, strict=False, assign=True)
            kind, text = raised(lambda m=module: m(x))
            assert kind is RuntimeError and f"parameter {key} tensor at meta" in text, text
        module.load_state_dict(complete.state_dict(), assign=True)
        assert_close(module(x), complete(x))


@pytest.mark.parametrize("name", LAYERS)
def test_missing_weight_of_a_layer(backend: str, name: str) -> None:
    """A weight set to None: a TypeError, torch.nn's too (an AttributeError for the first weight)."""
    device = device_of(backend)
    x = torch.zeros(5, 3, 4, device=device)
    with use_backend(None if backend == device else backend):
        for key in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            module = with_parameter(name, key, lambda t: None, device)
            assert raised(lambda m=module: m(x)) == (TypeError, f"expected Tensor as parameter {key}, but got NoneType")


@pytest.mark.parametrize("name", CELLS)
def test_missing_weight_of_a_cell(backend: str, name: str) -> None:
    """One bias that is None counts as zeros, both as none; a matrix is a TypeError: all as in torch.nn (on the CPU)."""
    device = device_of(backend)
    x = torch.randn(3, 4, device=device, dtype=torch.float64)
    with use_backend(None if backend == device else backend):
        for key in ("weight_ih", "weight_hh"):
            module = with_parameter(name, key, lambda t: None, device, dtype=torch.float64)
            assert raised(lambda m=module: m(x)) == (TypeError, f"expected Tensor as parameter {key}, but got NoneType")
        for keys in (("bias_ih",), ("bias_hh",), ("bias_ih", "bias_hh")):
            pair = make_pair(name, 4, 6, dtype=torch.float64)
            pair[0].to(device)
            results = []
            for module, input in zip(pair, (x, x.cpu()), strict=True):
                for key in keys:
                    setattr(module, key, None)
                outputs = flatten(module(input))
                results.append(
                    [t.cpu() for t in (*outputs, *torch.autograd.grad(outputs[0].sum(), list(module.parameters())))]
                )
            assert_close(*results)


@pytest.mark.parametrize("name", LAYERS)
def test_fields_changed_later(backend: str, name: str) -> None:
    """Fields of a layer that no longer fit it, or are of another type: torch.nn raises, and so do ours."""
    device = device_of(backend)
    x = torch.zeros(5, 3, 4, device=device)
    packed = nn.utils.rnn.PackedSequence(torch.zeros(5, 4, device=device), torch.tensor([3, 2]))
    table: list[tuple[str, Any, type[Exception], str]] = [
        ("num_layers", "2", TypeError, "num_layers: expected an int, got str"),
        ("num_layers", 1.0, TypeError, "num_layers: expected an int, got float"),
        ("num_layers", True, TypeError, "num_layers: expected an int, got bool"),
        ("num_layers", None, TypeError, "num_layers: expected an int, got NoneType"),
        ("num_layers", 0, ValueError, ""),
        ("num_layers", 1, ValueError, ""),
        ("num_layers", 4, ValueError, ""),
        ("bidirectional", "yes", TypeError, "bidirectional: expected a bool, got str"),
        ("bidirectional", True, ValueError, ""),
        ("bias", "yes", TypeError, "bias: expected a bool, got str"),
        ("bidirectional", 2, TypeError, "bidirectional: expected a bool, got int"),
        ("bias", False, ValueError, ""),
        ("batch_first", "no", TypeError, "batch_first: expected a bool, got str"),
        ("training", "no", TypeError, "training: expected a bool, got str"),
        ("dropout", "0.1", TypeError, ""),
        ("dropout", None, TypeError, ""),
    ]
    with use_backend(None if backend == device else backend):
        for (field, value, error, message), two in itertools.product(table, (False, True)):
            for input in (x, packed):
                if field == "bidirectional" and two and value is True:
                    continue
                ours, theirs = make_pair(name, 4, 6, 2, bidirectional=two, device=device)
                for module in (ours, theirs):
                    module.__dict__[field] = value
                kind, text = raised(lambda m=ours, t=input: m(t))
                assert kind is error and (text == message or not message), (field, value, kind, text)
                unread = field == "batch_first" and input is packed
                if device == "cpu" and name != "LSTM" and not unread:  # torch.nn.LSTM runs the first layers of more
                    assert raised(lambda m=theirs, t=input: m(t))[0] is not None, (field, value)


@pytest.mark.parametrize("dtype", (torch.int16, torch.bool, torch.complex64), ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_input_that_autocast_does_not_cast(backend: str, name: str, dtype: torch.dtype) -> None:
    device = device_of(backend)
    ours, theirs = make_pair(name, 4, 6, device=device)
    x = torch.ones(3, 4, device=device) if name in CELLS else torch.ones(5, 3, 4, device=device)
    with use_backend("reference" if backend == "reference" else backend), torch.autocast(device, dtype=torch.bfloat16):
        for module in (ours,) if device == "cuda" else (ours, theirs):
            assert raised(lambda m=module: m(x.to(dtype)))[0] is RuntimeError
        hx = torch.ones(3, 6, device=device) if name in CELLS else torch.ones(1, 3, 6, device=device)
        wrong = (hx, hx.to(dtype)) if name.startswith("LSTM") else hx.to(dtype)
        assert raised(lambda: ours(x, wrong))[0] is RuntimeError
