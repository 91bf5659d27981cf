"""checkpoint=k of cells written as formulas: the bits of checkpoint=0, and less is kept for backward."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import formula_cells as cells
import pytest
import torch
from settings import Setting
from test_checkpoint import assert_same_bits, results_and_gradients, saved_bytes
from test_formula_options import CELLS, DEVICE, FORMS, PLAIN, SETS, Case, Heads, Lstm, Odd, options_of
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from fused_rnn import Cell, Layer, use_backend
from fused_rnn._backend import has_cpu_kernels

needs_kernels = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")
T, B, I, H = 11, 5, 6, 12  # noqa: E741
OWN: tuple[type[Cell], ...] = (
    cells.Lstm, cells.Gru, cells.Everything, cells.NormLstm, cells.HeadedSLstm, cells.OutputLast, cells.IndRnn, cells.Delay,
)  # fmt: skip


def layers(cell: type[Cell], every: int, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Layer, Layer]:
    """(with checkpoint, without), of the same weights."""
    torch.manual_seed(0)
    plain = Layer(cell(), I, H, dtype=dtype, **more)
    kept = Layer(cell(), I, H, dtype=dtype, checkpoint=every, **more)
    kept.load_state_dict(plain.state_dict())
    return kept, plain


def check_case(backend: str, every: int, **config: Any) -> None:
    options = config.pop("options", {})
    found = []
    for more in ({"checkpoint": every}, {}):
        case = Case(options={**options, **more}, device=DEVICE[backend], **config)
        found.append(case.results_and_gradients(case.run()))
    assert_same_bits(*found)


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
@pytest.mark.parametrize(("cell", "option"), [(Lstm, "zoneout"), *((cell, "all") for cell in CELLS)])
def test_options(backend: str, cell: type[Cell], option: str, form: dict[str, Any], every: int) -> None:
    """The masks of a call are those of forward in backward too."""
    with use_backend(backend):
        check_case(backend, every, cell=cell, **{"steps": 7, **form}, options=options_of(cell, option))


@needs_kernels
@pytest.mark.parametrize("form", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("cell", OWN)
def test_cells(cell: type[Cell], form: str) -> None:
    """Products, norms, heads, several states, an output that is not the first of them."""
    kept, plain = layers(cell, 3, num_layers=2, bidirectional=True, dropout=0.4)
    x = torch.randn(T, B, I, requires_grad=True)
    lengths = torch.tensor([4, 11, 1, 7, 1])
    count = len(cell().declaration.states)
    hx, put = ([torch.randn(4, rows, H, requires_grad=True) for _ in range(count)] for rows in (B, 1))
    more: dict[str, Any] = {"return_all_states": True}
    if form != "packed":
        more["resets"] = torch.rand(T, B) < 0.2
        more["reset_state"] = put[0] if count == 1 else tuple(put)
    if form == "lengths":
        more["lengths"] = lengths
    leaves = [x, *hx, *(put if form != "packed" else [])]
    state = hx[0] if count == 1 else tuple(hx)
    found = []
    for layer in (kept, plain):
        given: Any = pack_padded_sequence(x, lengths, enforce_sorted=False) if form == "packed" else x
        with use_backend("cpu"):
            found.append(results_and_gradients(layer, given, leaves, state, **more))
    assert_same_bits(*found)


@needs_kernels
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", [cells.Lstm, cells.NormLstm])
def test_dtypes(cell: type[Cell], dtype: torch.dtype, instruction_set: str, setting: Setting) -> None:
    """No state is rounded where it is kept."""
    setting("FUSED_RNN_CPU", instruction_set)
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    with use_backend("cpu"):
        assert_same_bits(*(results_and_gradients(layer, x, [x]) for layer in layers(cell, 3, dtype)))


@needs_kernels
@pytest.mark.parametrize("cell", [cells.Lstm, cells.NormLstm, cells.HeadedSLstm])
def test_ids_and_sizes(cell: type[Cell]) -> None:
    """Larger ones, whose products are made in other ways, and on several threads."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    plain = Layer(cell(), 80, 138, bidirectional=True)
    kept = Layer(cell(), 80, 138, bidirectional=True, checkpoint=7)
    kept.load_state_dict(plain.state_dict())
    x = torch.randn(50, 9, 80)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for input in (x, torch.randint(80, (50, 9))):
                with use_backend("cpu"):
                    assert_same_bits(*(results_and_gradients(layer, input, []) for layer in (kept, plain)))
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_results_may_be_written_before_backward() -> None:
    kept, plain = layers(cells.Lstm, 4)
    x = torch.randn(T, B, I)
    grads = []
    for layer in (kept, plain):
        y, (h, c) = layer(x)
        total = y.clone().sin().sum() + c.clone().cos().sum()
        if layer is kept:
            with torch.no_grad():
                y.zero_(), h.zero_(), c.zero_()
        grads.append([total.detach(), *torch.autograd.grad(total, list(layer.parameters()))])
    assert_same_bits(*grads)


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3, "recurrent_dropout": 0.4}], ids=str)
def test_second_derivatives(options: dict[str, Any]) -> None:
    x = torch.randn(T, 2, I, dtype=torch.float64, requires_grad=True)
    both = []
    for layer in layers(Lstm, 4, torch.float64, **options):
        torch.manual_seed(3)
        (first,) = torch.autograd.grad(layer(x)[0].sin().sum(), x, create_graph=True)
        both.append(torch.autograd.grad(first.square().sum(), list(layer.parameters())))
    for got, expected in zip(*both, strict=True):
        torch.testing.assert_close(got, expected)


@needs_kernels
def test_gradcheck() -> None:
    layer = Layer(Odd(), 2, 4, checkpoint=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], (x,))


@needs_kernels
@pytest.mark.parametrize("options", [{}, PLAIN], ids=["plain", "options"])
def test_autocast_compile_and_transforms(options: dict[str, Any]) -> None:
    kept, plain = layers(Lstm, 4, num_layers=2, **options)
    x = torch.randn(T, B, I, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(*(results_and_gradients(layer, x, [x]) for layer in (kept, plain)))
    expected = results_and_gradients(plain, x, [x])
    torch._dynamo.reset()
    compiled = torch.compile(kept, fullgraph=True, backend="aot_eager")
    assert_same_bits(results_and_gradients(compiled, x, [x]), expected)

    def gradient(layer: Layer) -> Tensor:
        torch.manual_seed(3)
        return torch.func.grad(lambda v: layer(v)[0].sum())(x.detach())

    assert torch.equal(gradient(kept), gradient(plain))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", [cells.Lstm, cells.NormLstm, Heads])
def test_what_is_kept(cell: type[Cell], dtype: torch.dtype) -> None:
    """The states of every k-th step, in the type that kernels compute in; of masks their flags, a byte each."""
    steps, every, hidden = 400, 20, 16
    x, states = torch.randn(steps, 4, 8, dtype=dtype), len(cell().declaration.states)
    kept, plain = (Layer(cell(), 8, hidden, checkpoint=k, dtype=dtype) for k in (every, 0))
    wanted = states * (steps // every - 1) * 4 * hidden * 4
    assert saved_bytes(kept, x) == wanted
    assert saved_bytes(plain, x) >= 10 * wanted * dtype.itemsize // 4
    for layer in (kept, plain):
        explained = fused_rnn.explain(layer, x, show=False).layers[0]
        assert explained.saved_bytes == saved_bytes(layer, x)


@needs_kernels
def test_what_is_kept_of_masks() -> None:
    steps, every, hidden = 400, 20, 16
    x = torch.randn(steps, 4, 8)
    layer = Layer(Lstm(), 8, hidden, checkpoint=every, zoneout=0.3, recurrent_dropout=0.2)
    states = 3 * (steps // every - 1) * 4 * hidden * 4  # with what the recurrent product reads
    assert saved_bytes(layer, x) == states + 2 * steps * 4 * hidden + 4 * hidden * 4


def test_inference_is_the_same(backend: str) -> None:
    with use_backend(backend), torch.no_grad():
        kept, plain = (layer.to(DEVICE[backend]) for layer in layers(Lstm, 4))
        x = torch.randn(T, B, I, device=DEVICE[backend])
        assert torch.equal(kept(x)[0], plain(x)[0])


@needs_kernels
def test_forward_mode() -> None:
    kept, plain = layers(Lstm, 2)
    x, v = torch.randn(2, T, B, I).unbind()
    made = [torch.func.jvp(lambda x, layer=layer: layer(x)[0], (x,), (v,)) for layer in (kept, plain)]
    for got, expected in zip(*made, strict=True):
        assert torch.equal(got, expected)


def test_constructor() -> None:
    for bad in (True, 1.5, "2", None):
        with pytest.raises(TypeError, match="checkpoint: expected an int, got"):
            Layer(Lstm(), 2, 3, checkpoint=bad)
    with pytest.raises(ValueError, match="checkpoint: expected a number of steps, or 0 for none, got -1"):
        Layer(Lstm(), 2, 3, checkpoint=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'checkpoint'"):
        fused_rnn.Step(Lstm(), 2, 3, checkpoint=2)
    layer = Layer(fused_rnn.zoo.LSTM(), 2, 3, checkpoint=5)
    assert layer.checkpoint == 5
    assert repr(layer).endswith(", 2, 3, checkpoint=5)")
    assert copy.deepcopy(layer).checkpoint == pickle.loads(pickle.dumps(layer)).checkpoint == 5
    assert Layer(Lstm(), 2, 3).checkpoint == 0
    assert "checkpoint" not in repr(Layer(Lstm(), 2, 3, checkpoint=0))
    layer.checkpoint = 0
    assert layer(torch.zeros(4, 1, 2))[0].shape == (4, 1, 3)


@needs_kernels
def test_the_op_checks_its_arguments() -> None:
    layer = Layer(Lstm(), 3, 4)
    x, weights = torch.randn(5, 2, 3), list(layer.parameters())
    layer(x)
    with pytest.raises(ValueError, match="flags_and_every: expected flags and a number of at least 1"):
        torch.ops.fused_rnn.formula_checkpointed(x, [], weights, [], layer.formula, [1, 0])
    with pytest.raises(ValueError, match="kept: expected 1 tensor of forward, got 0"):
        torch.ops.fused_rnn.formula_checkpointed_backward(x, [], x, [], weights, [], [], layer.formula, [1, 2])
    with pytest.raises(RuntimeError, match=r"kept: expected shape \[1, 2, 2, 2, 4\]"):
        kept = [torch.zeros(1, 2, 1, 2, 4)]
        torch.ops.fused_rnn.formula_checkpointed_backward(x, [], x, [], weights, [], kept, layer.formula, [1, 2])


class Recorded(TorchDispatchMode):
    """Notes the arguments of a call of the op."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.fused_rnn.formula_checkpointed.default:
            self.arguments = args
        return func(*args, **(kwargs or {}))


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"zoneout": 0.3, "recurrent_dropout": 0.2}], ids=str)
def test_opcheck(options: dict[str, Any]) -> None:
    layer = Layer(Lstm(), 3, 4, bidirectional=True, checkpoint=2, **options)
    x = torch.randn(5, 2, 3, requires_grad=True)
    layer(x)  # which compiles
    with Recorded() as recorded:
        layer(x)
    torch.library.opcheck(torch.ops.fused_rnn.formula_checkpointed.default, recorded.arguments)
