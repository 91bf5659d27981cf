"""Training under torch.compile, beside cudnn_checks.py: whole stacks by cuDNN or by the family that was chosen."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import FlopCounterMode

# isort: off
from checks import EXTENSION, calls  # builds the extension, before fused_rnn is imported
from cudnn_checks import cudnn_calls
from cudnn_checks import cudnn_enabled as cudnn_enabled

# isort: on
from cases import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE
from settings import Setting
from settings import setting as setting
from test_layers import assert_near

import fused_rnn
from fused_rnn import _kinds, use_backend
from fused_rnn._recipe import Recipe

MODULES = (fused_rnn.LSTM, fused_rnn.GRU, fused_rnn.RNN)
STACK = torch.ops.fused_rnn.stack


@pytest.fixture(autouse=True)
def default(setting: Setting, cudnn_enabled: None) -> Iterator[None]:
    """Nothing is recorded of any family, and Dynamo takes layers into its graphs."""
    setting("FUSED_RNN_PLAN", "")
    setting("FUSED_RNN_TUNE", "off")
    EXTENSION.forget_choices()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


def made_by(run: Callable[..., Any], module: torch.nn.Module, x: Tensor) -> tuple[list[Tensor], tuple[int, int, int]]:
    """Results and gradients of a call, and what has run."""
    found: list[Tensor] = []
    counts = counted(lambda: found.extend(everything(run, module, x)))
    return found, counts


def counted(call: Callable[[], object]) -> tuple[int, int, int]:
    """Forwards and backwards by cuDNN, and calls of our kernels, that a call has made."""
    cudnn, ours = cudnn_calls(), sum(calls())
    call()
    after = cudnn_calls()
    return after[0] - cudnn[0], after[1] - cudnn[1], sum(calls()) - ours


def compiled(module: torch.nn.Module, backend: Any = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(module, backend=backend, fullgraph=True, **options)


def everything(run: Callable[..., Any], module: torch.nn.Module, x: Tensor, *state: Any) -> list[Tensor]:
    """Results of a call, and the gradients of a loss that all of them enter."""
    y, last = run(x, *state)
    results = [y, *(last if isinstance(last, tuple) else (last,))]
    inputs = [t for t in [x, *module.parameters()] if t.requires_grad]
    return [*results, *torch.autograd.grad(sum(t.square().sum() for t in results), inputs)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for index, (actual, want) in enumerate(zip(found, expected, strict=True)):
        assert actual.shape == want.shape and actual.dtype == want.dtype
        assert_near(f"tensor {index}", actual, want, 4 * GRADIENT_TOLERANCE[want.dtype])


def compare(module: torch.nn.Module, x: Tensor, *state: Any, run: Callable[..., Any] | None = None) -> None:
    with use_backend("reference"):
        expected = everything(module, module, x, *state)
    run = compiled(module) if run is None else run  # a compiled module has no truth value
    everything(run, module, x, *state)  # compiles
    found: list[Tensor] = []
    assert counted(lambda: found.extend(everything(run, module, x, *state))) == (1, 1, 0)
    assert_same(found, expected)


OPTIONS: list[dict[str, Any]] = [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("module", MODULES)
def test_by_cudnn(module: type, options: dict[str, Any]) -> None:
    """A stack is one call of cuDNN's, forward and backward."""
    compare(module(4, 20, **options), torch.randn(7, 3, 4, requires_grad=True))


def test_states_and_projection() -> None:
    lstm = fused_rnn.LSTM(4, 20, 2, proj_size=6)
    state = torch.randn(2, 3, 6), torch.randn(2, 3, 20)
    compare(lstm, torch.randn(7, 3, 4), state)


def test_dynamic_sizes() -> None:
    gru = fused_rnn.GRU(4, 20, 2)
    run = compiled(gru, dynamic=True)
    compare(gru, torch.randn(7, 3, 4, requires_grad=True), run=run)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare(gru, torch.randn(5, 2, 4, requires_grad=True), run=run)


@pytest.mark.parametrize("module", MODULES)
def test_packed(module: type) -> None:
    rnn = module(4, 20, 2, bidirectional=True)
    data, sizes = torch.randn(9, 4, requires_grad=True), torch.tensor([3, 3, 2, 1])

    def run(data: Tensor) -> tuple[Tensor, Any]:
        y, last = rnn(PackedSequence(data, sizes))
        return y.data, last

    with use_backend("reference"):
        expected = everything(run, rnn, data)
    graph = torch.compile(run, backend="aot_eager")
    everything(graph, rnn, data)
    found, counts = made_by(graph, rnn, data)
    assert counts == (1, 1, 0)
    assert_same(found, expected)


def test_dropout() -> None:
    """Each layer is a call then, and the masks are those of the graph."""
    lstm = fused_rnn.LSTM(4, 20, 3, dropout=0.5)
    x, run = torch.randn(7, 3, 4, requires_grad=True), compiled(lstm)
    everything(run, lstm, x)
    assert counted(lambda: everything(run, lstm, x)) == (3, 3, 0)
    torch.manual_seed(3)
    found = everything(run, lstm, x)
    torch.manual_seed(3)
    assert_same(found, everything(lstm, lstm, x))


def test_inductor() -> None:
    lstm, x = fused_rnn.LSTM(4, 20, 2), torch.randn(7, 3, 4, requires_grad=True)

    def run(x: Tensor) -> Any:
        y, last = lstm(x * 2)
        return y.sigmoid(), last

    expected = everything(run, lstm, x)
    graph = torch.compile(run, backend="inductor", fullgraph=True)
    everything(graph, lstm, x)
    found, counts = made_by(graph, lstm, x)
    assert counts == (1, 1, 0)
    assert_same(found, expected)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("family", ["step", "grid"])
def test_by_another_family(module: type, family: str, setting: Setting) -> None:
    """The family is chosen when the graph runs: the graph that cuDNN has served is the one that another family serves."""
    rnn, x = module(4, 20, 2, bidirectional=True), torch.randn(7, 3, 4, requires_grad=True)
    run = compiled(rnn)
    expected = everything(run, rnn, x)
    setting("FUSED_RNN_PLAN", family)
    found, (cudnn, backward, ours) = made_by(run, rnn, x)
    assert (cudnn, backward) == (0, 0) and ours > 0
    assert_same(found, expected)


@pytest.mark.parametrize("family", ["cudnn", "step"])
@pytest.mark.parametrize("module", MODULES)
def test_backward_twice(module: type, family: str, setting: Setting) -> None:
    setting("FUSED_RNN_PLAN", family)
    rnn, x = module(4, 20, 2), torch.randn(7, 3, 4, requires_grad=True)
    with torch._functorch.config.patch(donated_buffer=False):
        loss = compiled(rnn)(x)[0].square().sum()
        first = torch.autograd.grad(loss, [x, *rnn.parameters()], retain_graph=True)
        for a, b in zip(first, torch.autograd.grad(loss, [x, *rnn.parameters()]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["cudnn", "step"])
@pytest.mark.parametrize("module", MODULES)
def test_saved_tensors_that_were_copied(module: type, family: str, setting: Setting) -> None:
    """A copy of what forward has saved has no memory of it: forward runs once more."""
    setting("FUSED_RNN_PLAN", family)
    rnn, x = module(4, 20, 2), torch.randn(7, 3, 4, requires_grad=True)
    run = compiled(rnn)
    expected = everything(run, rnn, x)
    arena = torch.zeros(1 << 16, dtype=torch.uint8)

    def packed(t: Tensor) -> Tensor:
        return arena[:0] if t.numel() == 0 else t.clone()

    for pack in (Tensor.clone, packed):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            found, (forwards, backwards, ours) = made_by(run, rnn, x)
        assert (forwards, backwards) == ((2, 1) if family == "cudnn" else (0, 0)) and (ours > 0) == (family == "step")
        assert_same(found, expected)


def test_activation_checkpointing() -> None:
    gru, x = fused_rnn.GRU(4, 20, 2), torch.randn(7, 3, 4, requires_grad=True)

    def run(x: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(gru, x, use_reentrant=False)

    expected = everything(gru, gru, x)
    graph = torch.compile(run, backend="aot_eager", fullgraph=True)
    everything(graph, gru, x)
    found, counts = made_by(graph, gru, x)
    assert counts == (2, 1, 0)
    assert_same(found, expected)


@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False]], ids=str)
def test_operations(wanted: list[bool]) -> None:
    """FlopCounterMode counts a stack as its layers."""
    lstm, x = fused_rnn.LSTM(4, 20, 2, bidirectional=True), torch.randn(7, 3, 4)
    params = [p.detach() for p in lstm.parameters()]
    recipe = Recipe(_kinds.NUMBER_OF_MODE["LSTM"], 2, bidirectional=True)

    def flops(run: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return int(counter.get_total_flops())

    y, last, saved = STACK(x, [], params, [], recipe.packed)
    backward = functools.partial(torch.ops.fused_rnn.stack_backward, y, last, x, [], params, [], [y, *saved], recipe.packed)
    of_layers, layer = 0, recipe.of_layer().packed
    for number, (input, weights) in enumerate([(x, params[:8]), (torch.randn(7, 3, 40), params[8:])]):
        y, ends, kept = torch.ops.fused_rnn.layer(input, [], weights, [], layer, True)
        mask = [wanted[0] or number > 0, *wanted[1:]]
        args = y, ends, input, [], weights, [], [*kept, y], layer, mask
        of_layers += flops(lambda args=args: torch.ops.fused_rnn.layer_backward(*args))  # type: ignore[misc]
    assert flops(lambda: backward(wanted)) == of_layers > 0
    assert flops(lambda: STACK(x, [], params, [], recipe.packed)) == flops(lambda: lstm(x)) > 0


def test_autocast() -> None:
    lstm, x = fused_rnn.LSTM(4, 20, 2), torch.randn(7, 3, 4, requires_grad=True)

    def run(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return lstm(x)

    expected = everything(run, lstm, x)
    graph = torch.compile(run, backend="aot_eager", fullgraph=True)
    everything(graph, lstm, x)
    found, counts = made_by(graph, lstm, x)
    assert counts == (1, 1, 0)
    assert_same(found, expected)


def test_transforms_are_left_to_layers() -> None:
    gru, x = fused_rnn.GRU(4, 20), torch.randn(7, 3, 4)

    def run(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: gru(x)[0].square().sum())(x)

    expected = run(x)
    graph = torch.compile(run, backend="aot_eager")
    assert counted(lambda: graph(x))[:2] == (0, 0)
    assert_near("gradient", graph(x), expected, GRADIENT_TOLERANCE[torch.float32])


def test_exported_programs() -> None:
    """A program has the call of the whole stack, which trains by cuDNN; decomposed it has layers, on any device."""
    gru, x = fused_rnn.GRU(4, 20, 2), torch.randn(7, 3, 4, requires_grad=True)
    program = torch.export.export(gru, (x,))
    for made, op, counts in (
        (program, "fused_rnn.rnn.default", (1, 0, 0)),
        (program.run_decompositions(), "fused_rnn.layer.default", (2, 0, 0)),
    ):
        assert {str(node.target) for node in made.graph.nodes if "fused_rnn" in str(node.target)} == {op}
        run = made.module()
        with torch.no_grad():
            assert counted(lambda run=run: run(x)) == counts  # type: ignore[misc]
    module = program.module()
    found, counts = made_by(module, module, x)
    assert counts == (1, 1, 0)
    assert_same(found, everything(gru, gru, x))


def test_results_written_in_place() -> None:
    gru, x = fused_rnn.GRU(4, 20, 2), torch.randn(7, 3, 4, requires_grad=True)

    def run(x: Tensor) -> Any:
        y, last = gru(x)
        return y.mul_(3), last

    expected = everything(run, gru, x)
    assert_same(everything(torch.compile(run, backend="aot_eager", fullgraph=True), gru, x), expected)


def test_what_cudnn_refuses() -> None:
    library = ctypes.CDLL(EXTENSION.__file__)
    rnn, x = fused_rnn.LSTM(4, 20, 2), torch.randn(7, 3, 4, requires_grad=True)
    run = compiled(rnn)
    expected = everything(run, rnn, x)
    library.torch_host_cudnn_refuses(1)
    try:
        for _ in range(2):
            found, (cudnn, backward, ours) = made_by(run, rnn, x)
            assert (cudnn, backward) == (0, 0) and ours > 0
            assert_same(found, expected)
    finally:
        library.torch_host_cudnn_refuses(0)


def test_what_is_left_to_layers(setting: Setting) -> None:
    """Calls that cuDNN cannot serve are recorded as layers, and a call that it cannot serve when it runs is by ours."""
    lstm, x = fused_rnn.LSTM(4, 20), torch.randn(7, 3, 4, requires_grad=True)
    weights = list(lstm.parameters())
    functional = torch.compile(fused_rnn.functional.lstm, backend="aot_eager", fullgraph=True)
    lengths = torch.tensor([7, 3, 1])
    assert counted(lambda: functional(x, weights, lengths=lengths)[0].sum().backward())[:2] == (0, 0)
    run = compiled(lstm)
    expected = everything(run, lstm, x)
    torch.use_deterministic_algorithms(True)
    try:
        found, counts = made_by(run, lstm, x)
        assert counts[:2] == (0, 0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(found, expected)


@pytest.mark.parametrize("family", ["cudnn", "step"])
@pytest.mark.parametrize("module", MODULES)
def test_ops(module: type, family: str, setting: Setting) -> None:
    """Fake kernels tell the shapes of both families' tensors, and arguments are not written."""
    setting("FUSED_RNN_PLAN", family)
    rnn = module(4, 20, 2, bidirectional=True)
    number = _kinds.NUMBER_OF_MODE[{"RNN": "RNN_TANH"}.get(module.__name__, module.__name__)]
    recipe = Recipe(number, 2, bidirectional=True).packed
    args = (torch.randn(7, 3, 4, requires_grad=True), [], list(rnn.parameters()), [], recipe)
    torch.library.opcheck(STACK.default, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
    y, last, saved = STACK(*args)
    assert all(t.shape == (0,) and t.dtype == torch.uint8 for t in saved)
    assert (saved[0].untyped_storage().nbytes() > 0) == (family == "cudnn")
    with torch.no_grad():
        backward = (torch.randn_like(y), [torch.zeros_like(t) for t in last], args[0], [], args[2], [], [y, *saved], recipe)
        torch.library.opcheck(
            torch.ops.fused_rnn.stack_backward.default,
            (*backward, [True, True, True]),
            test_utils=("test_schema", "test_faketensor"),
        )
    with use_backend("reference"):
        assert_near("y", y, rnn(args[0])[0], OUTPUT_TOLERANCE[torch.float32])


def test_numbers_that_are_no_part() -> None:
    gru = fused_rnn.GRU(4, 20)
    args = torch.randn(7, 3, 4), [], list(gru.parameters()), []
    number = _kinds.NUMBER_OF_MODE["GRU"]
    for recipe in (Recipe(number, batch_first=True), Recipe(number, all_states=True), Recipe(number, num_layers=3)):
        with pytest.raises(ValueError, match="fused_rnn::stack: expected input"):
            STACK(*args, recipe.packed)
    with pytest.raises(ValueError, match="saved: expected y and 2 tensors of forward, got 1"):
        y = torch.randn(7, 3, 20)
        torch.ops.fused_rnn.stack_backward(y, [], *args, [y], Recipe(number).packed, [True, True, True])
