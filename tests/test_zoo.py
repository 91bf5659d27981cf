"""fused_rnn.zoo: every cell runs, the cells of torch.nn are torch.nn's, others equal loops written from their papers."""

from __future__ import annotations

import importlib.util
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo_table
from torch import Tensor

import fused_rnn
from fused_rnn import zoo
from fused_rnn.formula import Cell, Layer, Step

CELLS = zoo_table.CELLS
T, B, IN, H = 5, 3, 4, 6
LIMIT = 1e-10


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def reference() -> Iterator[None]:
    with fused_rnn.use_backend("reference"):
        yield


def states_of(cell: Cell, *shape: int) -> list[Tensor]:
    return [(0.5 * rand(*shape, seed=index + 1)).requires_grad_() for index in range(len(cell.declaration.states))]


def hx_of(states: list[Tensor]) -> Any:
    return states[0] if len(states) == 1 else tuple(states)


def with_gradients(results: Any, leaves: list[Tensor]) -> list[Tensor]:
    """The tensors in results, and the gradients of a random combination of them with regard to the leaves."""
    tensors = flat(results)
    total = sum((tensor * rand(*tensor.shape, seed=index + 9)).sum() for index, tensor in enumerate(tensors))
    return [*tensors, *torch.autograd.grad(total, leaves)]


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [tensor for part in results for tensor in flat(part)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=LIMIT, rtol=LIMIT)


# --- every cell ---


def test_at_least_forty() -> None:
    assert len(CELLS) >= 40


@pytest.mark.parametrize("name", CELLS)
def test_gradients(name: str, reference: None) -> None:
    """Of the input, all parameters and initial states, with numbers in place of autograd."""
    torch.manual_seed(1)
    layer = Layer(CELLS[name], 2, 2, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    states = states_of(CELLS[name], 1, 1, 2)
    x = rand(2, 1, 2).requires_grad_()

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(names, tensors[len(states) :], strict=True))
        return tuple(flat(torch.func.functional_call(layer, values, (x, hx_of(list(tensors[: len(states)]))))))

    assert torch.autograd.gradcheck(run, (x, *states, *parameters))


@pytest.mark.parametrize("name", CELLS)
def test_finite_in_float32(name: str, reference: None) -> None:
    torch.manual_seed(2)
    layer = Layer(CELLS[name], IN, H, num_layers=2)
    x = (3 * torch.randn(50, 2, IN)).requires_grad_()
    y, last = layer(x)
    assert y.shape == (50, 2, H) and len(flat(last)) == len(CELLS[name].declaration.states)
    y.square().mean().backward()
    for tensor in (y, *flat(last), x.grad, *(parameter.grad for parameter in layer.parameters())):
        assert tensor is not None and bool(tensor.isfinite().all())
    assert all(bool((parameter.grad != 0).any()) for parameter in layer.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", CELLS)
def test_written_down(name: str) -> None:
    """Arguments and shape of the docstring, pickle by reference, and a repr that makes the cell again."""
    cell = CELLS[name]
    text = inspect.cleandoc(type(cell).__doc__ or "")
    arguments = list(inspect.signature(type(cell).__init__).parameters)[1:] if "__init__" in type(cell).__dict__ else []
    assert ("Args:" in text) == bool(arguments) and all(f"    {argument}: " in text for argument in arguments)
    assert "::" in text
    again = pickle.loads(pickle.dumps(cell))
    assert again.identity == cell.identity and repr(again) == repr(cell)
    assert eval(repr(cell), vars(zoo)).identity == cell.identity


def test_table() -> None:
    """The table of the package's docstring is that of the classes: `python tests/zoo_table.py` prints it."""
    assert zoo_table.table() in (zoo.__doc__ or "")


def test_imported_when_asked_for() -> None:
    code = "import sys, fused_rnn; assert 'fused_rnn.zoo' not in sys.modules; fused_rnn.zoo.LiGRU(); fused_rnn.zoo.RNN()"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'zoos'"):
        _ = fused_rnn.zoos


# --- equal to torch.nn ---


@pytest.mark.parametrize(
    "cell, theirs",
    [
        (zoo.RNN(), torch.nn.RNN(IN, H, dtype=torch.float64)),
        (zoo.RNN("relu"), torch.nn.RNN(IN, H, nonlinearity="relu", dtype=torch.float64)),
        (zoo.LSTM(), torch.nn.LSTM(IN, H, dtype=torch.float64)),
        (zoo.GRU(), torch.nn.GRU(IN, H, dtype=torch.float64)),
    ],
    ids=repr,
)
def test_torch_nn(cell: Cell, theirs: torch.nn.RNNBase, reference: None) -> None:
    ours = Layer(cell, IN, H, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    states = states_of(cell, 1, B, H)
    x = rand(T, B, IN).requires_grad_()
    assert_same(
        with_gradients(ours(x, hx_of(states)), [x, *states, *ours.parameters()]),
        with_gradients(theirs(x, hx_of(states)), [x, *states, *theirs.parameters()]),
    )


# --- equal to a loop written by hand from the paper's equations ---


class Loop:
    """Products and parameters of a layer, by gate: `w.x("i")`, `w.r("i")`."""

    def __init__(self, layer: Layer, x: Tensor) -> None:
        says = layer.cell.declaration
        self.layer, self.input, self.says = layer, x, says

    def __getattr__(self, name: str) -> Tensor:
        return getattr(self.layer, f"{name}_l0")

    def x(self, gate: str) -> Tensor:
        row = self.says.input_gates.index(gate) * H
        return self.input @ self.weight_ih[row : row + H].T + self.bias_ih[row : row + H]

    def r(self, gate: str, h: Tensor) -> Tensor:
        index, bias = self.says.recurrent_gates.index(gate), self.bias_hh
        if self.weight_hh.dim() == 2:
            weight = self.weight_hh[index * H : index * H + H]
        else:  # [n, G*H/n, H/n]
            n = len(self.weight_hh)
            weight = torch.block_diag(*(head[index * H // n : (index + 1) * H // n] for head in self.weight_hh))
        return h @ weight.T + bias[index * H : index * H + H]

    def a(self, gate: str, h: Tensor) -> Tensor:
        return self.x(gate) + self.r(gate, h)

    def norm(self, value: Tensor, name: str) -> Tensor:
        mean, variance = value.mean(-1, keepdim=True), value.var(-1, keepdim=True, unbiased=False)
        return (value - mean) / (variance + 1e-5).sqrt() * getattr(self, f"weight_{name}") + getattr(self, f"bias_{name}")

    def rms(self, value: Tensor, name: str) -> Tensor:
        return value / (value.square().mean(-1, keepdim=True) + 1e-5).sqrt() * getattr(self, f"weight_{name}")


def coupled(w: Loop, h: Tensor, c: Tensor) -> list[Tensor]:
    f = w.a("f", h).sigmoid()
    c = f * c + (1 - f) * w.a("g", h).tanh()
    return [w.a("o", h).sigmoid() * c.tanh(), c]


def reset_first(w: Loop, h: Tensor) -> list[Tensor]:
    r, z = w.a("r", h).sigmoid(), w.a("z", h).sigmoid()
    n = (w.x("n") + (r * h) @ w.weight_n.T).tanh()
    return [(1 - z) * n + z * h]


def layer_norm_lstm(w: Loop, h: Tensor, c: Tensor) -> list[Tensor]:
    i, f, g, o = (w.norm(w.x(k), f"x_{k}") + w.norm(w.r(k, h), f"r_{k}") for k in "ifgo")
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return [o.sigmoid() * w.norm(c, "c").tanh(), c]


def layer_norm_gru(w: Loop, h: Tensor) -> list[Tensor]:
    r, z = ((w.norm(w.x(k), f"x_{k}") + w.norm(w.r(k, h), f"r_{k}")).sigmoid() for k in "rz")
    n = (w.norm(w.x("n"), "x_n") + r * w.norm(w.r("n", h), "r_n")).tanh()
    return [(1 - z) * n + z * h]


def block_gru(w: Loop, h: Tensor) -> list[Tensor]:
    r, n, u = (w.rms(w.a(k, h), k) for k in "rnu")
    u = (u - 1).sigmoid()
    return [u * (r.sigmoid() * n).tanh() + (1 - u) * h]


def dreamer(w: Loop, h: Tensor) -> list[Tensor]:
    p = F.silu(w.rms(h @ w.weight_p.T + w.b_p, "norm_p"))
    a = F.silu(w.rms(w.a("a", h) + p @ w.weight_a.T, "norm_a"))
    reset, n, u = (a @ getattr(w, f"weight_{k}").T + getattr(w, f"b_{k}") for k in "rnu")
    u = (u - 1).sigmoid()
    return [u * (reset.sigmoid() * n).tanh() + (1 - u) * h]


def slstm(w: Loop, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> list[Tensor]:
    log_i, f, z, o = (w.a(k, h) for k in "ifzo")
    log_f = f.sigmoid().log()
    new_m = torch.maximum(log_f + m, log_i)
    i, f = (log_i - new_m).exp(), (log_f + m - new_m).exp()
    c, n = f * c + i * z.tanh(), f * n + i
    return [o.sigmoid() * (c / n), c, n, new_m]


def scrn(w: Loop, h: Tensor, s: Tensor) -> list[Tensor]:
    s = 0.05 * w.x("s") + 0.95 * s
    return [(w.a("h", h) + s @ w.weight_s.T).sigmoid(), s]


def lem(w: Loop, h: Tensor, z: Tensor) -> list[Tensor]:
    d_h, d_z = 0.5 * w.a("d_h", h).sigmoid(), 0.5 * w.a("d_z", h).sigmoid()
    z = (1 - d_z) * z + d_z * w.a("z", h).tanh()
    return [(1 - d_h) * h + d_h * (z @ w.weight_h.T + w.x("h")).tanh(), z]


def highway(w: Loop, h: Tensor) -> list[Tensor]:
    g, t = w.a("g", h).tanh(), w.a("t", h).sigmoid()
    s = g * t + h * (1 - t)
    for k in (2, 3):
        g = (s @ getattr(w, f"weight_g{k}").T + getattr(w, f"b_g{k}")).tanh()
        t = (s @ getattr(w, f"weight_t{k}").T + getattr(w, f"b_t{k}")).sigmoid()
        s = g * t + s * (1 - t)
    return [s]


def antisymmetric(w: Loop, h: Tensor) -> list[Tensor]:
    return [h + 0.1 * (w.a("a", h) - 0.2 * h).tanh()]


LOOPS: list[tuple[Cell, Callable[..., list[Tensor]]]] = [
    (zoo.CoupledLSTM(), coupled),
    (zoo.ResetFirstGRU(), reset_first),
    (zoo.LayerNormLSTM(), layer_norm_lstm),
    (zoo.LayerNormGRU(), layer_norm_gru),
    (zoo.BlockGRU(heads=3), block_gru),
    (zoo.DreamerGRU(heads=2), dreamer),
    (zoo.SLSTM(heads=2), slstm),
    (zoo.SCRN(), scrn),
    (zoo.LEM(0.5), lem),
    (zoo.RHN(), highway),
    (zoo.AntisymmetricRNN(0.1, 0.2), antisymmetric),
]


@pytest.mark.parametrize("cell, step", LOOPS, ids=[repr(cell) for cell, _ in LOOPS])
def test_equal_to_a_loop(cell: Cell, step: Callable[..., list[Tensor]], reference: None) -> None:
    torch.manual_seed(3)
    layer = Layer(cell, IN, H, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    states = states_of(cell, 1, B, H)
    x = rand(T, B, IN).requires_grad_()
    before, outputs = [state[0] for state in states], []
    for t in range(T):
        before = step(Loop(layer, x[t]), *before)
        outputs.append(before[0])
    leaves = [x, *states, *layer.parameters()]
    loop = [torch.stack(outputs), *(state.unsqueeze(0) for state in before)]
    assert_same(with_gradients(layer(x, hx_of(states)), leaves), with_gradients(loop, leaves))


# --- sLSTM and its authors' own vanilla versions ---


def vanilla(package: str, path: str) -> ModuleType:
    """A file of an installed package, without the package's own imports."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"needs {package} (pip install --no-deps {package})")
    spec = importlib.util.spec_from_file_location("vanilla", Path(found.submodule_search_locations[0]) / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("package", ["xlstm", "flashrnn"])
def test_slstm_is_its_authors(package: str, backend: str) -> None:
    """From zeros, where all start with m = log_i; raw products of heads by hand."""
    heads, width = 2, H // 2
    with fused_rnn.use_backend(backend):
        layer = Layer(zoo.SLSTM(heads), IN, H, dtype=torch.float64)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, 0.0, 1.0)
        x = rand(T, B, IN).requires_grad_()
        ours = with_gradients(layer(x), [x, *layer.parameters()])
    w_ih, w_hh, b_ih, b_hh = layer.parameters()
    states, outputs = x.new_zeros(4, B, H), []
    for t in range(T):
        wx = (x[t] @ w_ih.T + b_ih).view(B, 4, H)
        products = torch.einsum("bnk,ngrk->bgnr", states[0].view(B, heads, width), w_hh.view(heads, 4, width, width))
        ry, b = products.reshape(B, 4, H), b_hh.view(1, 4, H)
        if package == "xlstm":
            step = vanilla("xlstm", "blocks/slstm/src/vanilla/slstm.py").slstm_forward_pointwise
            states = step(wx.flatten(1), ry.flatten(1), b.flatten(1), states, {})[0]
        else:
            step = vanilla("flashrnn", "flashrnn/vanilla/slstm.py").flashrnn_forward_pointwise
            states = step(wx, ry, b, states.transpose(0, 1), {})[0].transpose(0, 1)
        outputs.append(states[0])
    theirs = [torch.stack(outputs), *(state.unsqueeze(0) for state in states)]
    assert_same(ours, with_gradients(theirs, [x, *layer.parameters()]))


def test_slstm_begins_with_a_small_input_gate() -> None:
    """m' = max(log_f + m, log_i) alone makes i = exp(-200) = 0 at the first step, and 0 / 0 of it. m' = log_i alone makes f
    infinite, and infinity times 0 of it."""
    layer = Layer(zoo.SLSTM(), 1, 1)
    with torch.no_grad():
        for parameter, values in zip(layer.parameters(), ([0.0] * 4, [0.0] * 4, [-200.0, 9.0, 1.0, 9.0]), strict=False):
            parameter.copy_(torch.tensor(values).reshape(parameter.shape))
        layer.bias_hh_l0.zero_()
    with fused_rnn.use_backend("reference"):
        y, _ = layer(torch.zeros(2, 1, 1), resets=torch.tensor([[False], [True]]))
        y.sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in layer.parameters())
    torch.testing.assert_close(y, torch.full((2, 1, 1), float(torch.tensor(9.0).sigmoid() * torch.tensor(1.0).tanh())))


# --- freely chosen activations ---


def test_textbook_lstm(backend: str) -> None:
    """An LSTM with identity candidate and output whose hand-set gates store, keep, forget and show."""
    with fused_rnn.use_backend(backend):
        layer = Layer(zoo.LSTM("sigmoid", "identity", "identity"), 3, 1)
        with torch.no_grad():
            layer.weight_ih_l0.copy_(torch.tensor([[0.0, 100, 0], [0, 100, 0], [1, 0, 0], [0, 0, 100]]))
            layer.bias_ih_l0.copy_(torch.tensor([-10.0, 10, 0, -10]))
            layer.weight_hh_l0.zero_()
            layer.bias_hh_l0.zero_()
        y, _ = layer(torch.tensor([[3.0, 1, 0], [1, 1, 0], [-1, 0, 0], [-2, 0, 1], [5, -1, 0]]))
    torch.testing.assert_close(y[:, 0], torch.tensor([0.0, 0, 0, 4, 0]), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "activation, expected",
    [
        ("identity", lambda v: v),
        ("Affine", None),
        (("Affine", 2.0, 0.5), lambda v: 2 * v + 0.5),
        (("ScaledTanh", 1.5, 0.7), lambda v: 1.5 * torch.tanh(0.7 * v)),
        ("HardSigmoid", lambda v: (0.2 * v + 0.5).clamp(0, 1)),
        (("HardSigmoid", 0.3, 0.4), lambda v: (0.3 * v + 0.4).clamp(0, 1)),
        ("hardsigmoid", F.hardsigmoid),
        (("ThresholdedRelu", 0.5), lambda v: v * (v > 0.5)),
        (("LeakyRelu", 0.2), lambda v: F.leaky_relu(v, 0.2)),
        (("elu", 0.5), lambda v: F.elu(v, 0.5)),
        (("softplus", 2.0, 3.0), lambda v: F.softplus(v, 2.0, 3.0)),
        ("gelu_tanh", lambda v: F.gelu(v, approximate="tanh")),
    ],
)
def test_activations(activation: Any, expected: Callable[[Tensor], Tensor] | None, reference: None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="f: expected Affine with alpha, beta, got 0"):
            zoo.RNN(activation)
        return
    step = Step(zoo.RNN(activation), 1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        step.weight_ih.fill_(1.0)
        step.weight_hh.zero_()
    x = torch.linspace(-4, 4, 17, dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(step(x), expected(x))


def test_every_activation_is_a_formula() -> None:
    for name in zoo.activations.ACTIVATIONS:
        zoo.LSTM(*[(name, 0.5, 0.5) if name in ("Affine", "ScaledTanh") else name] * 3)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: zoo.LSTM("sigmoid", "tahn"), ValueError, "g: expected one of identity, sigmoid, .*, got 'tahn'"),
        (lambda: zoo.GRU(f=torch.sigmoid), TypeError, "f: expected a name, or a tuple of a name and numbers, got <"),
        (lambda: zoo.GRU(g=("elu", "1")), TypeError, "g: expected a name, or a tuple"),
        (lambda: zoo.GRU(g=("tanh", 1.0)), ValueError, r"g: expected tanh with no number, got 1 number\(s\)"),
        (lambda: zoo.RHN(0), ValueError, "depth: expected an int of at least 1, got 0"),
        (lambda: zoo.TauGRU(delay=1.5), ValueError, "delay: expected an int of at least 1, got 1.5"),
        (lambda: zoo.SLSTM(0), fused_rnn.formula.FormulaError, "heads: expected an int of at least 1, got 0"),
        (lambda: zoo.antisymmetric(torch.nn.RNN(2, 2)), TypeError, "module: expected a Layer or Step of Antis.*, got RNN"),
        (lambda: zoo.antisymmetric(Layer(zoo.ATR(), 2, 2)), TypeError, "got Layer of ATR"),
    ],
)
def test_bad_arguments(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# --- others ---


def test_antisymmetric_weights_stay_so(reference: None) -> None:
    layer = Layer(zoo.GatedAntisymmetricRNN(), IN, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    before = layer.weight_hh_l1_reverse.detach().clone()
    assert zoo.antisymmetric(layer) is layer
    torch.testing.assert_close(layer.weight_hh_l1_reverse, (before - before.T) / 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(rand(T, B, IN))[0].square().sum().backward()
    optimizer.step()
    for name in ("weight_hh_l0", "weight_hh_l0_reverse", "weight_hh_l1", "weight_hh_l1_reverse"):
        weight = getattr(layer, name)
        assert bool((weight == -weight.T).all()) and bool((weight != 0).any())


@pytest.mark.parametrize("cell", [zoo.JANET(0.7, learnable=True), zoo.SCRN(0.7, learnable=True)], ids=repr)
def test_learnable_numbers(cell: Cell, reference: None) -> None:
    """Start where the constant is, and give what the constant gives."""
    torch.manual_seed(4)
    layer, fixed = Layer(cell, IN, H), Layer(type(cell)(0.7), IN, H)
    fixed.load_state_dict(layer.state_dict(), strict=False)
    name = "beta_l0" if isinstance(cell, zoo.JANET) else "alpha_l0"
    assert getattr(layer, name).item() == pytest.approx(0.7)
    x = torch.randn(T, B, IN)
    torch.testing.assert_close(layer(x)[0], fixed(x)[0])


@pytest.mark.parametrize("delay", [1, 3])
def test_tau_gru_sees_the_delayed_state(delay: int, reference: None) -> None:
    torch.manual_seed(5)
    layer = Layer(zoo.TauGRU(delay), IN, H, dtype=torch.float64)
    x = rand(T, B, IN)
    h = [torch.zeros(B, H, dtype=torch.float64)] * (delay + 1)  # h[-1] is the last one
    outputs = []
    for t in range(T):
        w = Loop(layer, x[t])
        u, g, a = w.a("u", h[-1]).tanh(), w.a("g", h[-1]).sigmoid(), w.a("a", h[-1]).sigmoid()
        z = (w.x("z") + h[-1 - delay] @ w.weight_z.T).tanh()
        h.append((1 - g) * h[-1] + g * (u + a * z))
        outputs.append(h[-1])
    torch.testing.assert_close(layer(x)[0], torch.stack(outputs), atol=LIMIT, rtol=0)
