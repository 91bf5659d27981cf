"""checkpoint=k: outputs and gradients are those of checkpoint=0 bit for bit, and less is kept for backward."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from module_pairs import device_of
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import _backend, use_backend
from fused_rnn._backend import has_cpu_kernels

needs_kernels = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")
KINDS: dict[str, dict[str, Any]] = {
    "LSTM": {},
    "GRU": {},
    "RNN": {"nonlinearity": "relu"},
    "projected": {"proj_size": 5},
}
T, B, I, H = 11, 5, 6, 9  # noqa: E741


def layers(kind: str, every: int, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[nn.Module, nn.Module]:
    """(with checkpoint, without), of the same weights."""
    torch.manual_seed(0)
    cls = fused_rnn.LSTM if kind == "projected" else getattr(fused_rnn, kind)
    plain = cls(I, H, **KINDS[kind], **more).to(dtype)
    kept = cls(I, H, checkpoint=every, **KINDS[kind], **more).to(dtype)
    kept.load_state_dict(plain.state_dict())
    return kept, plain


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    if hasattr(results, "batch_sizes"):
        return [results.data]
    return [t for part in results for t in flat(part)]


def results_and_gradients(layer: nn.Module, input: Any, leaves: list[Tensor], *args: Any, **more: Any) -> list[Tensor]:
    torch.manual_seed(3)  # of dropout
    outputs = flat(layer(input, *args, **more))
    generator = torch.Generator().manual_seed(4)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype).to(t.device) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [*leaves, *layer.parameters()], grads)]


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected) > 2
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("every", [1, 4, 100])
@pytest.mark.parametrize("form", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits(backend: str, kind: str, form: str, every: int) -> None:
    with use_backend(backend):
        device = device_of(backend)
        kept, plain = (layer.to(device) for layer in layers(kind, every, num_layers=2, bidirectional=True, dropout=0.4))
        x = torch.randn(T, B, I, device=device, requires_grad=True)
        lengths = torch.tensor([4, 11, 0, 7, 1], device=device)
        more: dict[str, Any] = {"lengths": lengths} if form == "lengths" else {}

        def given() -> Any:
            return pack_padded_sequence(x, lengths.cpu().clamp(min=1), enforce_sorted=False) if form == "packed" else x

        if form != "packed":
            more["resets"] = torch.rand(T, B, device=device) < 0.2
        hx: list[Any] = [torch.randn_like(s, requires_grad=True) for s in flat(plain(x)[1])]
        state = hx[0] if len(hx) == 1 else tuple(hx)
        got = results_and_gradients(kept, given(), [x, *hx], state, **more)
        assert_same_bits(got, results_and_gradients(plain, given(), [x, *hx], state, **more))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    """c is not rounded where it is kept."""
    kept, plain = layers(kind, 3, dtype)
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    assert_same_bits(results_and_gradients(kept, x, [x]), results_and_gradients(plain, x, [x]))
    if kind == "LSTM" and dtype != torch.float64:
        hx = (torch.randn(1, B, H, dtype=dtype), torch.randn(1, B, H))  # c in float32
        assert_same_bits(results_and_gradients(kept, x, [x], hx), results_and_gradients(plain, x, [x], hx))


@needs_kernels
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_extras(kind: str, batch_first: bool) -> None:
    kept, plain = layers(kind, 3, num_layers=2, bidirectional=True, batch_first=batch_first)
    rows = (B, T) if batch_first else (T, B)
    x = torch.randn(*rows, I, requires_grad=True)
    put = [torch.randn(4, 1, H, requires_grad=True) for _ in range(2 if kind == "LSTM" else 1)]
    more: dict[str, Any] = {
        "resets": torch.rand(rows) < 0.2,
        "reset_state": put[0] if len(put) == 1 else tuple(put),
        "return_all_states": True,
        "lengths": torch.tensor([4, 11, 0, 7, 1]),
    }
    got = results_and_gradients(kept, x, [x, *put], **more)
    assert_same_bits(got, results_and_gradients(plain, x, [x, *put], **more))


@needs_kernels
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_ids_and_sizes(kind: str) -> None:
    """Larger ones, whose products are made in other ways, and on several threads."""
    torch.manual_seed(0)
    cls, before = getattr(fused_rnn, kind), torch.get_num_threads()
    plain = cls(80, 136, bidirectional=True)
    kept = cls(80, 136, bidirectional=True, checkpoint=7)
    kept.load_state_dict(plain.state_dict())
    x = torch.randn(50, 9, 80)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for input in (x, torch.randint(80, (50, 9))):
                assert_same_bits(results_and_gradients(kept, input, []), results_and_gradients(plain, input, []))
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_results_may_be_written_before_backward() -> None:
    kept, plain = layers("LSTM", 4)
    x = torch.randn(T, B, I)
    grads = []
    for layer in (kept, plain):
        y, (h, c) = layer(x)
        total = y.clone().sin().sum() + c.clone().cos().sum()
        with torch.no_grad():
            y.zero_()
            h.zero_()
            c.zero_()
        grads.append([total.detach(), *torch.autograd.grad(total, list(layer.parameters()))])
    assert_same_bits(*grads)


@needs_kernels
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_second_derivatives(kind: str) -> None:
    kept, plain = layers(kind, 4, torch.float64)
    x = torch.randn(T, 2, I, dtype=torch.float64, requires_grad=True)
    both = []
    for layer in (kept, plain):
        (first,) = torch.autograd.grad(layer(x)[0].sin().sum(), x, create_graph=True)
        both.append(torch.autograd.grad(first.square().sum(), list(layer.parameters())))
    for got, expected in zip(*both, strict=True):
        torch.testing.assert_close(got, expected)


@needs_kernels
def test_gradcheck() -> None:
    layer = fused_rnn.LSTM(2, 3, checkpoint=2, bidirectional=True).double()
    x = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: flat(layer(x)), (x,))


@needs_kernels
def test_autocast_and_compile() -> None:
    kept, plain = layers("GRU", 4, num_layers=2)
    x = torch.randn(T, B, I, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(results_and_gradients(kept, x, [x]), results_and_gradients(plain, x, [x]))
    compiled = torch.compile(kept, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(allow_rnn=True):
        got = results_and_gradients(compiled, x, [x])
    assert_same_bits(got, results_and_gradients(plain, x, [x]))


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Of what autograd keeps beside parameters, the input, and the output."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)[0]
    for t in (x, y, *layer.parameters()):
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@needs_kernels
@pytest.mark.parametrize(("kind", "states"), [("LSTM", 2), ("GRU", 1), ("RNN", 1)])
def test_what_is_kept(kind: str, states: int) -> None:
    steps, every = 400, 20
    torch.manual_seed(0)
    x = torch.randn(steps, 4, 8)
    layer = getattr(fused_rnn, kind)(8, 16, checkpoint=every)
    assert saved_bytes(layer, x) == states * (steps // every - 1) * 4 * 16 * 4
    if kind != "RNN":  # which keeps its output alone
        assert saved_bytes(getattr(fused_rnn, kind)(8, 16), x) >= 4 * steps * 4 * 16 * 4


@needs_kernels
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_forward_mode_asks_the_backends_as_without(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels serve a call whose tangents they have, without a warning, and where a backend is forced."""
    kept, plain = layers(kind, 2)
    x, v = torch.randn(T, B, I), torch.randn(T, B, I)
    monkeypatch.setattr(_backend, "_warned", set())
    for forced in (None, "cpu"):
        made = []
        for layer in (kept, plain):
            with use_backend(forced), warnings.catch_warnings(), forward_ad.dual_level():
                warnings.simplefilter("error", RuntimeWarning)
                y = layer(forward_ad.make_dual(x, v))[0]
                tangent = forward_ad.unpack_dual(y).tangent
                assert tangent is not None
                made.append([y, tangent, *torch.autograd.grad(y.sum(), [*layer.parameters()])])
        assert_same_bits(*made)


@needs_kernels
def test_forward_mode_that_no_kernel_serves() -> None:
    """As without checkpoint: the reference with its warning, an error where a backend is forced."""
    for layer in layers("LSTM", 2, state_clip=2.0):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(torch.randn(T, B, I), torch.randn(T, B, I))
            with use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' is forced but forward-mode AD does not"):
                layer(x)


@needs_kernels
def test_forward_mode_with_lengths() -> None:
    """By the kernels, the same bits as without checkpoint."""
    made = []
    for layer in layers("LSTM", 2):
        with forward_ad.dual_level(), use_backend("cpu"):
            generator = torch.Generator().manual_seed(1)
            x = forward_ad.make_dual(*torch.randn(2, T, B, I, generator=generator).unbind())
            made.append(forward_ad.unpack_dual(layer(x, lengths=torch.tensor([4, 11, 0, 7, 1]))[0]).tangent)
            assert made[-1] is not None
    assert torch.equal(*made)


def test_inference_keeps_nothing_and_is_the_same(backend: str) -> None:
    with use_backend(backend), torch.no_grad():
        kept, plain = (layer.to(device_of(backend)) for layer in layers("LSTM", 4))
        x = torch.randn(T, B, I, device=device_of(backend))
        for got, expected in zip(flat(kept(x)), flat(plain(x)), strict=True):
            assert torch.equal(got, expected)


def test_constructor() -> None:
    for bad in (True, 1.5, "2", None):
        with pytest.raises(TypeError, match="checkpoint: expected an int, got"):
            fused_rnn.LSTM(2, 3, checkpoint=bad)
    with pytest.raises(ValueError, match="checkpoint: expected a number of steps, or 0 for none, got -1"):
        fused_rnn.GRU(2, 3, checkpoint=-1)
    layer = fused_rnn.RNN(2, 3, 1, "identity", checkpoint=5)
    assert layer.checkpoint == 5
    assert repr(layer) == "RNN(2, 3, checkpoint=5)"
    assert copy.deepcopy(layer).checkpoint == pickle.loads(pickle.dumps(layer)).checkpoint == 5
    assert fused_rnn.RNN(2, 3).checkpoint == 0
    assert repr(fused_rnn.RNN(2, 3, checkpoint=0)) == "RNN(2, 3)"
    layer.checkpoint = 0
    assert layer(torch.zeros(4, 1, 2))[0].shape == (4, 1, 3)
