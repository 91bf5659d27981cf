"""Layer and Step: equal to torch.nn where torch.nn has the cell, to loops written by hand where it has not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import formula_cells as cells
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from fused_rnn import functional, reference, zoo
from fused_rnn._backend import extension
from fused_rnn.formula import Cell, Layer, Step

TORCHS = {"LSTM": cells.Lstm(), "GRU": cells.Gru(), "RNN": cells.Rnn()}
EVERY = (*cells.CELLS, cells.Mgu(), cells.NormLstm())
LIMIT = 1e-12
T, B, IN, H = 5, 4, 3, 6


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]


def with_gradients(run: Callable[[], Any], leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The results, and the gradients of a random combination of them with regard to the leaves."""
    results = flat(run())  # retained: a packed input is packed once
    weights = [rand(*result.shape, seed=index + 7) for index, result in enumerate(results)]
    total = sum((result * weight).sum() for result, weight in zip(results, weights, strict=True))
    return results, list(torch.autograd.grad(total, leaves, retain_graph=True))


def assert_same(ours: Any, theirs: Any, leaves: list[Tensor], their_leaves: list[Tensor]) -> None:
    for one, other in zip(with_gradients(ours, leaves), with_gradients(theirs, their_leaves), strict=True):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert a.shape == b.shape
            assert (a - b).detach().abs().max() <= LIMIT * max(1.0, float(b.detach().abs().max()))


def hx_of(name: str, *shape: int) -> Any:
    h = rand(*shape, seed=1).requires_grad_()
    return (h, rand(*shape, seed=2).requires_grad_()) if name == "LSTM" else h


def pair(name: str, **options: Any) -> tuple[Layer, torch.nn.RNNBase]:
    """Ours and torch.nn's with the same seed: the same parameters, by name and value."""
    torch.manual_seed(3)
    ours = Layer(TORCHS[name], IN, H, dtype=torch.float64, **options)
    torch.manual_seed(3)
    theirs = getattr(torch.nn, name)(IN, H, dtype=torch.float64, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "batch_first": True},
]


@pytest.mark.parametrize("name", TORCHS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("form", ["batched", "no hx", "unbatched", "packed"])
def test_equal_to_torch_nn(name: str, options: dict[str, Any], form: str) -> None:
    ours, theirs = pair(name, **options)
    rows = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    x = rand(*((B, T) if options.get("batch_first") else (T, B)), IN).requires_grad_()
    hx = None if form == "no hx" else hx_of(name, rows, B, H)
    if form == "unbatched":
        x, hx = rand(T, IN).requires_grad_(), hx_of(name, rows, H)
    leaves = [x, *([] if hx is None else flat(hx))]
    input = x
    if form == "packed":
        input = pack_padded_sequence(x, [3, 5, 1, 4], bool(options.get("batch_first")), enforce_sorted=False)
    assert_same(
        lambda: ours(input, hx), lambda: theirs(input, hx), [*leaves, *ours.parameters()], [*leaves, *theirs.parameters()]
    )


@pytest.mark.parametrize("name", TORCHS)
@pytest.mark.parametrize("masks", ["lengths", "resets", "lengths and resets", "packed resets"])
def test_lengths_and_resets(name: str, masks: str) -> None:
    """As the functions, whose LSTM, GRU and RNN have them: reference and kernels are compared elsewhere."""
    ours, _ = pair(name, num_layers=2, bidirectional=True)
    hx = hx_of(name, 4, B, H)
    x = rand(T, B, IN).requires_grad_()
    lengths = torch.tensor([3, 5, 0, 4]) if "lengths" in masks else None
    resets = torch.rand(T, B, generator=torch.Generator().manual_seed(5)) < 0.3 if "resets" in masks else None
    weights = list(ours.parameters())
    options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "lengths": lengths, "resets": resets}
    input: Any = x
    if masks == "packed resets":
        input = pack_padded_sequence(x, [5, 4, 3, 1])
        options.update(batch_sizes=input.batch_sizes, resets=resets.flatten()[: len(input.data)])  # type: ignore[union-attr]
    theirs = getattr(functional, name.lower())
    assert_same(
        lambda: ours(input, hx, lengths=lengths, resets=options["resets"]),
        lambda: theirs(input.data if masks == "packed resets" else input, weights, hx, **options),
        [x, *flat(hx), *weights],
        [x, *flat(hx), *weights],
    )


@pytest.mark.parametrize("name", TORCHS)
@pytest.mark.parametrize("bias", [True, False])
def test_step_is_torchs_cell(name: str, bias: bool) -> None:
    torch.manual_seed(3)
    ours = Step(TORCHS[name], IN, H, bias, dtype=torch.float64)
    torch.manual_seed(3)
    theirs = getattr(torch.nn, f"{name}Cell")(IN, H, bias, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    for shape in ((B,), ()):
        x, hx = rand(*shape, IN).requires_grad_(), hx_of(name, *shape, H)
        assert_same(
            lambda x=x, hx=hx: ours(x, hx),
            lambda x=x, hx=hx: theirs(x, hx),
            [x, *flat(hx), *ours.parameters()],
            [x, *flat(hx), *theirs.parameters()],
        )
        torch.testing.assert_close(flat(ours(x)), flat(theirs(x)), atol=LIMIT, rtol=0)


# --- cells that torch.nn lacks, in loops written by hand: (gate rows in the order of the formula) ---


def products(layer: Layer, x: Tensor, h: Tensor, count: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    gi = x @ layer.weight_ih_l0.T + layer.bias_ih_l0
    gh = h @ layer.weight_hh_l0.T + layer.bias_hh_l0
    return gi.split(H, 1), gh.split(H, 1)[:count]


def li_gru(p: Layer, x: Tensor, s: list[Tensor]) -> list[Tensor]:
    (xz, xg), (rz, rg) = products(p, x, s[0], 2)
    z = (xz + rz).sigmoid()
    return [z * s[0] + (1 - z) * (xg + rg).relu()]


def janet(p: Layer, x: Tensor, s: list[Tensor]) -> list[Tensor]:
    (xf, xg), (rf, rg) = products(p, x, s[0], 2)
    return [(xf + rf).sigmoid() * s[0] + (1 - (xf + rf - 1.5).sigmoid()) * (xg + rg).tanh()]


def peephole(p: Layer, x: Tensor, s: list[Tensor]) -> list[Tensor]:
    (xi, xf, xg, xo), (ri, rf, rg, ro) = products(p, x, s[0], 4)
    i, f = (xi + ri + p.p_i_l0 * s[1]).sigmoid(), (xf + rf + p.p_f_l0 * s[1]).sigmoid()
    c = f * s[1] + i * (xg + rg).tanh()
    return [(xo + ro + p.p_o_l0 * c).sigmoid() * c.tanh(), c]


def slstm(p: Layer, x: Tensor, s: list[Tensor]) -> list[Tensor]:
    """Equations 8 to 17 of the paper, with the stabiliser of appendix A."""
    (xi, xf, xz, xo), (ri, rf, rz, ro) = products(p, x, s[0], 4)
    _, c, n, m = s
    m_new = torch.max(F.logsigmoid(xf + rf) + m, xi + ri)
    i, f = (xi + ri - m_new).exp(), (F.logsigmoid(xf + rf) + m - m_new).exp()
    c, n = f * c + i * (xz + rz).tanh(), f * n + i
    return [(xo + ro).sigmoid() * c / n, c, n, m_new]


def minimal(p: Layer, x: Tensor, s: list[Tensor]) -> list[Tensor]:
    (xz, xu), (ru,) = products(p, x, s[0], 1)
    u = (xu + ru).sigmoid()
    return [u * s[0] + (1 - u) * xz.tanh()]


def ind(p: Layer, x: Tensor, s: list[Tensor]) -> list[Tensor]:
    return [(x @ p.weight_ih_l0.T + p.bias_ih_l0 + p.u_l0 * s[0]).relu()]


def fast(p: Layer, x: Tensor, s: list[Tensor]) -> list[Tensor]:
    (xa,), (ra,) = products(p, x, s[0], 1)
    return [p.alpha_l0.sigmoid() * (xa + ra).tanh() + p.beta_l0.sigmoid() * s[0]]


def mgu(p: Layer, x: Tensor, s: list[Tensor]) -> list[Tensor]:
    (xf, xg), (rf,) = products(p, x, s[0], 1)
    f = (xf + rf).sigmoid()
    return [(1 - f) * s[0] + f * (xg + (f * s[0]) @ p.weight_u_l0.T).tanh()]


def norm_lstm(p: Layer, x: Tensor, s: list[Tensor]) -> list[Tensor]:
    (xi, xf, xg, xo), (ri, rf, rg, ro) = products(p, x, s[0], 4)
    v = xg + rg
    g = (v / (v.square().mean(1, keepdim=True) + 1e-5).sqrt() * p.weight_g_l0).tanh()
    c = (xf + rf).sigmoid() * s[1] + (xi + ri).sigmoid() * g
    centred = c - c.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * p.weight_c_l0 + p.bias_c_l0
    return [(xo + ro).sigmoid() * normed.tanh(), c]


def output_last(p: Layer, x: Tensor, s: list[Tensor]) -> list[Tensor]:
    c, recurrent, y = s
    (xf, xg), (rf, rg) = products(p, x, recurrent, 2)
    f = (xf + rf).sigmoid()
    c = f * c + (1 - f) * (xg + rg).tanh()
    return [c, (c - 0.3 * y).tanh(), f * recurrent + 0.2 * c]


BY_HAND = {
    "output last": (cells.OutputLast(), output_last),
    "LiGRU": (cells.LiGru(), li_gru),
    "JANET": (cells.Janet(1.5), janet),
    "peephole LSTM": (cells.PeepholeLstm(), peephole),
    "sLSTM": (cells.SLstm(), slstm),
    "minimal RNN": (cells.MinimalRnn(), minimal),
    "IndRNN": (cells.IndRnn(), ind),
    "FastRNN": (cells.FastRnn(), fast),
    "MGU": (cells.Mgu(), mgu),
    "LSTM with norms": (cells.NormLstm(), norm_lstm),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_equal_to_a_loop(name: str) -> None:
    cell, step = BY_HAND[name]
    torch.manual_seed(0)
    layer = Layer(cell, IN, H, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = rand(T, B, IN).requires_grad_()
    states = [rand(1, B, H, seed=index + 1).abs().requires_grad_() for index in range(len(cell.declaration.states))]

    def loop() -> Any:
        current, outputs = [state[0] for state in states], []
        for row in x:
            current = step(layer, row, current)
            outputs.append(current[cell.declaration.output])
        return [torch.stack(outputs), *(state[None] for state in current)]

    hx = states[0] if len(states) == 1 else tuple(states)
    leaves = [x, *states, *layer.parameters()]
    assert_same(lambda: layer(x, hx), loop, leaves, leaves)


# --- forms of a call, for every cell ---


@pytest.mark.parametrize("cell", EVERY, ids=lambda cell: type(cell).__name__)
def test_forms_agree(cell: Any) -> None:
    """Packed, padded with lengths, row by row and step by step: the same. Resets are a new beginning."""
    layer = Layer(cell, IN, H, num_layers=2, dtype=torch.float64)
    lengths = [5, 3, 1, 4]
    x = rand(T, B, IN)
    count = len(cell.declaration.states)
    states = [rand(2, B, H, seed=index + 1).abs() for index in range(count)]
    form = (lambda s: s[0]) if count == 1 else tuple
    y, last = layer(x, form(states), lengths=lengths)
    packed, packed_last = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), form(states))
    torch.testing.assert_close(pad_packed_sequence(packed)[0], y, atol=LIMIT, rtol=0)
    for one, other in zip(flat(last), flat(packed_last), strict=True):
        torch.testing.assert_close(one, other, atol=LIMIT, rtol=0)
    for b, length in enumerate(lengths):
        row, row_last = layer(x[:length, b], form([state[:, b] for state in states]))
        torch.testing.assert_close(row, y[:length, b], atol=LIMIT, rtol=0)
        assert all((a - z[:, b]).abs().max() < LIMIT for a, z in zip(flat(row_last), flat(last), strict=True))
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[2] = True
    both, _ = layer(x, form(states), resets=resets)
    torch.testing.assert_close(both[2:], layer(x[2:])[0], atol=LIMIT, rtol=0)


@pytest.mark.parametrize("cell", EVERY, ids=lambda cell: type(cell).__name__)
def test_steps_make_a_layer(cell: Any) -> None:
    layer, step = Layer(cell, IN, H, dtype=torch.float64), Step(cell, IN, H, dtype=torch.float64)
    step.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x, hx, outputs = rand(T, B, IN), None, []
    for row in x:
        hx = step(row, hx)
        outputs.append(hx if isinstance(hx, Tensor) else hx[cell.declaration.output])
    y, last = layer(x)
    torch.testing.assert_close(torch.stack(outputs), y, atol=LIMIT, rtol=0)
    for a, b in zip(flat(last), flat(hx), strict=True):  # one step reads the weights as they lie: another order of sums
        torch.testing.assert_close(a[0], b, atol=LIMIT, rtol=0)


@pytest.mark.parametrize("cell", EVERY, ids=lambda cell: type(cell).__name__)
def test_copies(cell: Any) -> None:
    layer = Layer(cell, IN, H, bidirectional=True, dtype=torch.float64)
    x = rand(T, B, IN)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.cell is not layer.cell and repr(twin) == repr(layer)
        assert all(torch.equal(a, b) for a, b in zip(flat(twin(x)), flat(layer(x)), strict=True))
    other = Layer(cell, IN, H, bidirectional=True, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x)[0], layer(x)[0])


@pytest.mark.parametrize("cell", EVERY, ids=lambda cell: type(cell).__name__)
def test_torch_func(cell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of single samples by vmap, by kernels alone, and a second derivative."""
    torch.manual_seed(0)
    layer = Layer(cell, 2, 3, dtype=torch.float64)
    params = {name: value.detach() for name, value in layer.named_parameters()}
    x = rand(4, B, 2)

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, params, (x,))[0].square().sum()

    layer(x)  # compiled and compared with `step`
    with monkeypatch.context() as refusing:
        refusing.setattr(reference, "layer", None)
        each, of_x = torch.func.vmap(torch.func.grad(loss, (0, 1)), in_dims=(None, 1))(params, x)
        alone_of_x = torch.func.vmap(torch.func.grad(loss, 1), in_dims=(None, 1))(params, x)  # one call of the kernels
    for b in range(B):
        own = {name: value.clone().requires_grad_() for name, value in params.items()}
        point = x[:, b].clone().requires_grad_()
        gradients = torch.autograd.grad(loss(own, point), [*own.values(), point])
        assert all(torch.allclose(each[name][b], grad, atol=LIMIT) for name, grad in zip(own, gradients, strict=False))
        assert torch.allclose(of_x[b], gradients[-1], atol=LIMIT) and torch.allclose(
            alone_of_x[b], gradients[-1], atol=LIMIT
        )
    if cell.phases or isinstance(cell, (cells.ReluRnn, cells.LiGru, cells.IndRnn, cells.Everything, cells.EveryFunction)):
        return  # corners, where a finite difference says nothing; norms are torch's own; hardsigmoid has no second one
    point = rand(2, 2, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], (point,))


def test_dropout_and_training() -> None:
    layer = Layer(cells.Lstm(), IN, H, num_layers=2, dropout=1.0, dtype=torch.float64)
    alone = Layer(cells.Lstm(), H, H, dtype=torch.float64)
    alone.load_state_dict({k.replace("l1", "l0"): v for k, v in layer.state_dict().items() if "l1" in k})
    x = rand(T, B, IN)
    assert torch.equal(layer(x)[0], alone(torch.zeros(T, B, H, dtype=torch.float64))[0])
    assert not torch.equal(layer.eval()(x)[0], alone(torch.zeros(T, B, H, dtype=torch.float64))[0])
    with pytest.warns(UserWarning, match=r"dropout=0.5 has no effect with num_layers=1"):
        Layer(cells.Lstm(), IN, H, dropout=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_autocast(dtype: torch.dtype) -> None:
    layer = Layer(cells.SLstm(), IN, H)
    assert all(tensor.dtype == dtype for tensor in flat(copy.deepcopy(layer).to(dtype)(torch.randn(T, B, IN, dtype=dtype))))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(tensor.dtype == torch.bfloat16 for tensor in flat(layer(torch.randn(T, B, IN))))


def test_starts_of_parameters() -> None:
    layer = Layer(cells.FastRnn(), IN, H)
    assert layer.alpha_l0.shape == () and layer.alpha_l0.item() == -3 and layer.beta_l0.item() == 3
    ind_rnn = Layer(cells.IndRnn(), IN, H, num_layers=2)
    assert torch.equal(ind_rnn.u_l1, torch.full((H,), 0.5)) and "weight_hh_l0" not in ind_rnn.state_dict()

    class Filled(cells.IndRnn):
        unit_parameters = {"u": torch.nn.init.ones_}

    assert torch.equal(Layer(Filled(), IN, H).u_l0, torch.ones(H))
    norms = Layer(cells.NormLstm(), IN, H)
    assert torch.equal(norms.weight_c_l0, torch.ones(H)) and torch.equal(norms.bias_c_l0, torch.zeros(H))
    assert Layer(cells.Mgu(), IN, H).weight_u_l0.shape == (H, H)


@pytest.mark.parametrize("bias", [True, False])
def test_heads_are_blocks_of_the_dense_weights(bias: bool) -> None:
    """Gate by gate, head by head: the same as the dense cell whose recurrent weights are zero outside of the blocks."""
    heads = Layer(cells.HeadedSLstm(), IN, H, bias=bias, dtype=torch.float64)
    dense = Layer(cells.SLstm(), IN, H, bias=bias, dtype=torch.float64)
    blocks = heads.weight_hh_l0.detach().view(3, 4, H // 3, H // 3)
    rows = torch.stack([torch.block_diag(*blocks[:, gate]) for gate in range(4)]).view(4 * H, H)
    dense.load_state_dict({**heads.state_dict(), "weight_hh_l0": rows})
    x = rand(T, B, IN)
    torch.testing.assert_close(heads(x), dense(x), atol=LIMIT, rtol=0)
    with pytest.raises(ValueError, match="hidden_size: expected a multiple of the cell's 3 heads, got 8"):
        Layer(cells.HeadedSLstm(), IN, 8)


# --- wrong arguments ---

LSTM = Layer(cells.Lstm(), IN, H)
X = torch.zeros(T, B, IN)
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Layer(cells.Lstm, IN, H), TypeError, r"cell: expected a fused_rnn Cell, got .*; write Lstm\(\)"),
    (lambda: Layer("lstm", IN, H), TypeError, "cell: expected a fused_rnn Cell, got 'lstm'"),
    (lambda: Layer(cells.Lstm(), 0, H), ValueError, "input_size: expected at least 1, got 0"),
    (lambda: Layer(cells.Lstm(), IN, 2.0), TypeError, "hidden_size: expected an int, got float"),
    (lambda: Layer(cells.Lstm(), IN, H, 0), ValueError, "num_layers: expected at least 1, got 0"),
    (lambda: Layer(cells.Lstm(), IN, H, dropout=2), ValueError, "dropout: expected a probability"),
    (lambda: Layer(cells.Lstm(), IN, H, bias=1), TypeError, "bias: expected a bool, got int"),
    (lambda: Layer(cells.Lstm(), IN, H, proj_size=2), TypeError, "unexpected keyword argument 'proj_size'"),
    (lambda: LSTM(X, X), TypeError, r"hx: expected a tuple of 2 Tensors \(h, c\), got a Tensor"),
    (lambda: LSTM(X, (X,)), TypeError, r"hx: expected a tuple of 2 Tensors \(h, c\), got a tuple of 1"),
    (lambda: LSTM(X, (X, X)), ValueError, r"hx \(h\): expected shape \[1, 4, 6\], got \[5, 4, 3\]"),
    (lambda: LSTM(X.double()), ValueError, "weight_ih_l0: expected dtype torch.float64"),
    (lambda: LSTM(X[..., :2]), ValueError, r"input: expected 3 features in its last dimension, got \[5, 4, 2\]"),
    (lambda: LSTM(X[:0]), ValueError, "input: expected at least 1 time step, got 0"),
    (lambda: LSTM(X[None]), ValueError, "input: expected 2-D or 3-D, got 4-D"),
    (lambda: LSTM(X.short()), ValueError, "input: expected dtype float64, float32"),
    (lambda: LSTM(X, lengths=[1, 2]), ValueError, r"lengths: expected shape \[4\], got \[2\]"),
    (lambda: LSTM(X, resets=X), ValueError, "resets: expected dtype torch.bool"),
    (lambda: LSTM(pack_padded_sequence(X, [5] * B), lengths=[5] * B), ValueError, "lengths: expected None with packed"),
    (lambda: Step(cells.Lstm(), IN, H)(X), ValueError, "input: expected 1-D or 2-D, got 3-D"),
    (lambda: Step(cells.Gru(), IN, H)(X[0], X[0]), ValueError, r"hx \(h\): expected shape \[4, 6\], got \[4, 3\]"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_wrong_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(extension is None, reason="needs the compiled extension")
@pytest.mark.parametrize("reentrant", [True, False])
def test_the_first_call_may_be_checkpointed(reentrant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are made in that call, outside of what checkpointing does to saved tensors."""

    class Checkpointed(Cell):
        gates = ("a", "b")
        states = ("h", "c")

        def __init__(self, reentrant: bool) -> None:
            self.factor = 0.25 if reentrant else 0.75

        def step(self, x: Any, r: Any, h: Any, c: Any) -> Any:
            c = torch.sigmoid(x.a + r.a) * c + self.factor * torch.tanh(x.b + r.b)
            return torch.tanh(c), c

    layer, x = Layer(Checkpointed(reentrant), 4, 6), torch.randn(5, 3, 4, requires_grad=True)
    monkeypatch.setenv("FUSED_RNN_CACHE", str(tmp_path))
    checkpoint(lambda v: layer(v)[0], x, use_reentrant=reentrant).sum().backward()
    found = layer.weight_hh_l0.grad.clone()
    layer.zero_grad()
    layer(x)[0].sum().backward()
    assert torch.equal(found, layer.weight_hh_l0.grad)


@pytest.mark.skipif(extension is None, reason="needs the compiled extension")
@pytest.mark.parametrize("case", ["frozen", "ensemble", "grad of vmap", "grad of an ensemble"])
def test_derivatives_from_outside_of_vmap(case: str) -> None:
    """What vmap wraps says nothing of gradients that autograd, or a transform outside of it, wants."""
    module = Layer(zoo.GRU(), 3, 4, dtype=torch.float64)
    xs = torch.randn(3, 2, 1, 3, dtype=torch.float64)
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    module.requires_grad_(False)

    def of_x(x: Tensor) -> Tensor:
        return module(x)[0].square().sum()

    def of_weights(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, weights, (xs[0],))[0].square().sum()

    many = {name: torch.stack([weight, 2 * weight]) for name, weight in weights.items()}
    one_by_one = [torch.func.grad(of_weights)({name: w[i] for name, w in many.items()}) for i in range(2)]
    wanted = {name: torch.stack([found[name] for found in one_by_one]) for name in weights}
    if case == "frozen":
        leaf = xs.clone().requires_grad_()
        torch.func.vmap(of_x)(leaf).sum().backward()
        torch.testing.assert_close(leaf.grad, torch.stack([torch.func.grad(of_x)(x) for x in xs]))
    elif case == "grad of vmap":
        found = torch.func.grad(lambda x: torch.func.vmap(of_x)(x).sum())(xs)
        torch.testing.assert_close(found, torch.stack([torch.func.grad(of_x)(x) for x in xs]))
    elif case == "ensemble":
        leaves = {name: weight.requires_grad_() for name, weight in many.items()}
        torch.func.vmap(of_weights)(leaves).sum().backward()
        torch.testing.assert_close({name: leaf.grad for name, leaf in leaves.items()}, wanted)
    else:
        torch.testing.assert_close(torch.func.grad(lambda w: torch.func.vmap(of_weights)(w).sum())(many), wanted)


@pytest.mark.skipif(extension is None, reason="needs the compiled extension")
@pytest.mark.parametrize("mode", ["make_fx", "flops", "fake"])
def test_first_call_under_a_mode(mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What compiles and compares the kernels is no part of the call that the mode sees."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setenv("FUSED_RNN_CACHE", str(tmp_path))
    number = {"make_fx": 0.111, "flops": 0.222, "fake": 0.333}[mode]  # of a formula that is new
    module, x = Layer(zoo.GRU(), 3, 4, state_clip=number).eval(), torch.randn(5, 2, 3)
    if mode == "make_fx":
        graph = make_fx(lambda x: module(x)[0])(x)
        assert sum("formula" in str(node.target) for node in graph.graph.nodes) == 1
        assert torch.equal(graph(x), module(x)[0])
    elif mode == "flops":
        counts = []
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                module(x)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1]
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            y, _ = module(fake.from_tensor(x))
        assert y.shape == (5, 2, 4)
