"""zoneout, recurrent_dropout, weight_dropout and state_clip of cells written as formulas, against loops of torch ops in
float64 that draw the same masks; and against the LSTM and the GRU written by hand."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn import Cell, Gate, Layer, Step, _settings, use_backend, zoo
from fused_rnn._backend import extension
from fused_rnn._kinds import NUMBER_OF_MODE
from fused_rnn._recipe import Recipe, Rows, StepOptions
from fused_rnn._regularisation import flags
from fused_rnn.formula import ops
from fused_rnn.formula.parameters import OWN_KIND, specs_of

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
st = hypothesis.strategies
DEVICE = {"reference": "cpu", "cpu": "cpu", "cuda": "cuda"}
SETS = fused_rnn.build_info().get("cpu_instruction_sets", [])

# --- cells: each step as a function of a hook that clamps a new state ---

Hook = Callable[[str, Tensor], Tensor]
Inside = Callable[[str, Tensor], Tensor]  # a product or a norm inside of the step, by its name


def as_it_is(_: str, value: Tensor) -> Tensor:
    return value


def step_of_lstm(x: Any, r: Any, own: Any, inside: Inside, clip: Hook, h: Tensor, c: Tensor) -> list[Tensor]:
    c = clip("c", torch.sigmoid(x.f + r.f) * c + torch.sigmoid(x.i + r.i) * torch.tanh(x.g + r.g))
    return [clip("h", torch.sigmoid(x.o + r.o) * torch.tanh(c)), c]


def step_of_gru(x: Any, r: Any, own: Any, inside: Inside, clip: Hook, h: Tensor) -> list[Tensor]:
    z = torch.sigmoid(x.z + r.z)
    n = torch.tanh(x.n + torch.sigmoid(x.r + r.r) * r.n)
    return [clip("h", n + z * (h - n))]


def step_of_heads(
    x: Any, r: Any, own: Any, inside: Inside, clip: Hook, h: Tensor, c: Tensor, n: Tensor, m: Tensor
) -> list[Tensor]:
    log_f, log_i = F.logsigmoid(x.f + r.f) + m, x.i + r.i
    m = clip("m", torch.maximum(log_f, log_i))
    i, f = torch.exp(log_i - m), torch.exp(log_f - m)
    c = clip("c", f * c + i * torch.tanh(x.z + r.z))
    n = clip("n", f * n + i)
    return [clip("h", torch.sigmoid(x.o + r.o) * c / (n + 1)), c, n, m]


def step_of_units(x: Any, r: Any, own: Any, inside: Inside, clip: Hook, h: Tensor) -> list[Tensor]:
    return [clip("h", torch.tanh(x.a + own.u * h))]


def step_of_odd(x: Any, r: Any, own: Any, inside: Inside, clip: Hook, m: Tensor, y: Tensor, q: Tensor) -> list[Tensor]:
    """The third state is what the recurrent product reads, and read by nothing else; the second is the output; the first is
    the output before the step."""
    v = inside("v", x.a * r.b)
    q = clip("q", torch.tanh(inside("p", v) + x.b + 0.5 * m))
    new = clip("y", torch.sigmoid(x.a) * q + own.s * y)
    return [clip("m", y), new, q]


class FormulaOptionsCell(Cell):
    by_hand: Any

    def step(self, x: Any, r: Any, *states: Any) -> Any:
        def inside(name: str, value: Any) -> Any:
            return self.layer_norm(value, name) if name == "v" else self.product(name, value)

        return tuple(type(self).by_hand(x, r, self, inside, as_it_is, *states))


class Lstm(FormulaOptionsCell):
    gates = ("i", "f", "g", "o")
    states = ("h", "c")
    by_hand = staticmethod(step_of_lstm)


class Gru(FormulaOptionsCell):
    gates = ("r", "z", "n")
    by_hand = staticmethod(step_of_gru)


class Heads(FormulaOptionsCell):
    """sLSTM's kind: h is made of c and n."""

    gates = ("i", "f", "z", "o")
    states = ("h", "c", "n", "m")
    heads = 2
    by_hand = staticmethod(step_of_heads)


class Units(FormulaOptionsCell):
    """IndRNN's kind: no recurrent product."""

    gates = (Gate("a", recurrent=False),)
    unit_parameters = ("u",)
    by_hand = staticmethod(step_of_units)


class Odd(FormulaOptionsCell):
    gates = (Gate("b"), Gate("a", recurrent=False))
    states = ("m", "y", "q")
    output, recurrent = "y", "q"
    scalar_parameters = ("s",)
    heads = 2
    by_hand = staticmethod(step_of_odd)


CELLS: tuple[type[FormulaOptionsCell], ...] = (Lstm, Gru, Heads, Units, Odd)

# --- the loop ---


class Named:
    def __init__(self, values: dict[str, Tensor]) -> None:
        self.__dict__.update(values)


def recurrent_products(h: Tensor, weight: Tensor, bias: Tensor | None, gates: Sequence[str]) -> dict[str, Tensor]:
    """weight [G*H, H], or of n heads [n, G*H/n, H/n], of each head the rows of all its gates."""
    if weight.dim() == 2:
        blocks = [h @ w.T for w in weight.chunk(len(gates))]
    else:
        parts = h.chunk(len(weight), -1)
        of_heads = [[part @ w.T for w in own.chunk(len(gates))] for part, own in zip(parts, weight, strict=True)]
        blocks = [torch.cat(of_gate, -1) for of_gate in zip(*of_heads, strict=True)]
    biases = [0] * len(gates) if bias is None else bias.chunk(len(gates))
    return {gate: block + b for gate, block, b in zip(gates, blocks, biases, strict=True)}


class Case:
    """A layer with options and the arguments of a call of it, padded: input [T, B, I], hx [L*D, B, H], resets [T, B]."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu", **config: Any) -> None:
        defaults = {
            "cell": Lstm, "steps": 4, "batch": 3, "inputs": 2, "hidden": 6, "layers": 1, "bidirectional": False,
            "bias": True, "batch_first": False, "form": "dense", "resets": "none", "hx": True, "all_states": False,
            "training": True, "options": {},
        }  # fmt: skip
        self.config = config = {**defaults, **config}
        self.seed = seed
        g = torch.Generator().manual_seed(seed)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=g, dtype=torch.float64) * scale
            return values.to(dtype).to(device).requires_grad_()

        self.cell = config["cell"]()
        self.says = self.cell.declaration
        hidden, batch, steps = config["hidden"], config["batch"], config["steps"]
        self.groups = config["layers"] * (1 + config["bidirectional"])
        self.layer = Layer(
            self.cell, config["inputs"], hidden, config["layers"], config["bias"], config["batch_first"],
            bidirectional=config["bidirectional"], dtype=dtype, device=device, **config["options"],
        ).train(config["training"])  # fmt: skip
        with torch.no_grad():
            for p in self.layer.parameters():
                p.copy_(randn(*p.shape, scale=hidden**-0.5))
        self.input = randn(steps, batch, config["inputs"])
        self.hx = [randn(self.groups, batch, hidden) for _ in self.says.states] if config["hx"] else []
        lengths = torch.randint(0 if config["form"] == "lengths" else 1, steps + 1, (batch,), generator=g)
        if config["form"] == "packed":
            lengths, _ = lengths.sort(descending=True)
            lengths[0] = steps
        self.lengths = lengths if config["form"] in ("lengths", "packed") else None
        resets = torch.rand(steps, batch, generator=g) < 0.3
        self.resets = resets.to(device) if config["resets"] != "none" else None
        rows = {"state": [batch], "shared": [1]}.get(config["resets"], [])
        self.reset_state = [randn(self.groups, rows[0], hidden) for _ in self.says.states] if rows else []

    def leaves(self) -> list[Tensor]:
        return [self.input, *self.layer.parameters(), *self.hx, *self.reset_state]

    def form_of(self, states: Sequence[Tensor]) -> Any:
        return None if not states else states[0] if len(states) == 1 else tuple(states)

    def run(self) -> list[Tensor]:
        """Output [T, B, D*H], last states and, with all_states, each state after every step [T, L*D, B, H]."""
        config, kwargs = self.config, {}
        batch_first, packed = config["batch_first"], config["form"] == "packed"
        x: Any = self.input
        if packed:
            x = pack_padded_sequence(x.transpose(0, 1) if batch_first else x, self.lengths, batch_first)
        elif batch_first:
            x = x.transpose(0, 1)
        if config["form"] == "lengths":
            kwargs["lengths"] = self.lengths
        if self.resets is not None:
            of_packed = pack_padded_sequence(self.resets.unsqueeze(-1), self.lengths).data.squeeze(-1) if packed else None
            kwargs["resets"] = of_packed if packed else self.resets.transpose(0, 1) if batch_first else self.resets
        if self.reset_state:
            kwargs["reset_state"] = self.form_of(self.reset_state)
        torch.manual_seed(self.seed)
        y, last, *every = self.layer(x, self.form_of(self.hx), return_all_states=config["all_states"], **kwargs)

        def padded(t: Any) -> Tensor:
            return pad_packed_sequence(t, total_length=config["steps"])[0] if packed else t

        y = padded(y) if packed or not batch_first else y.transpose(0, 1)
        flat = [*last] if isinstance(last, tuple) else [last]
        all_states = [padded(s) for of_states in every for s in of_states]
        if packed:
            all_states = [s.transpose(1, 2) for s in all_states]
        elif batch_first:
            all_states = [s.permute(1, 2, 0, 3) for s in all_states]
        return [y, *flat, *all_states]

    def counts(self) -> list[int]:
        """The rows of every step in memory."""
        steps, batch = self.config["steps"], self.config["batch"]
        if self.config["form"] != "packed":
            return [batch] * steps
        return [int((self.lengths > t).sum()) for t in range(steps)]

    def drawn(self) -> tuple[list[Tensor], list[Any], Tensor | None]:
        """Weights, zoneout [L*D, N, H] (or a share) of each state, and factors [L*D, B, H], in the documented order."""
        config, options = self.config, self.config["options"]
        training, weights = config["training"], list(self.layer.parameters())
        per_group, hidden = len(weights) // self.groups, config["hidden"]
        torch.manual_seed(self.seed)
        if options.get("weight_dropout") and training:
            for group in range(self.groups):
                at = group * per_group + 1
                weights[at] = F.dropout(weights[at], options["weight_dropout"])
        zoneout = options.get("zoneout", 0.0)
        shares: list[Any] = list(zoneout) if isinstance(zoneout, tuple) else [zoneout] * len(self.says.states)
        if training:
            shape, device = (self.groups, sum(self.counts()), hidden), self.input.device
            shares = [p and flags(shape, p, device) for p in shares]
        factors = None
        if options.get("recurrent_dropout") and training:
            factors = F.dropout(
                self.input.new_ones(self.groups, config["batch"], hidden), options["recurrent_dropout"]
            ).detach()
        return weights, shares, factors

    def step_by_hand(self, x: Tensor, before: list[Tensor], w: Sequence[Tensor], factors: Tensor | None) -> list[Tensor]:
        """The states after a step, without zoneout."""
        says, bias = self.says, self.config["bias"]
        named = dict(zip((s.name for s in specs_of(self.cell, 1, says.heads, bias)), w, strict=True))
        i = F.linear(x, named["weight_ih"], named.get("bias_ih")).chunk(len(says.input_gates), -1)
        h = before[says.recurrent]
        r = {}
        if says.recurrent_gates:
            h = h if factors is None else factors * h
            r = recurrent_products(h, named["weight_hh"], named.get("bias_hh"), says.recurrent_gates)
        clips = self.config["options"].get("state_clip")
        clips = clips if isinstance(clips, tuple) else (clips,) * len(says.states)

        def clip(name: str, value: Tensor) -> Tensor:
            limit = clips[says.states.index(name)]
            return value if limit is None else value.clamp(-limit, limit)

        def inside(name: str, value: Tensor) -> Tensor:
            if name == "v":
                return F.layer_norm(value, value.shape[-1:], named["weight_v"], named["bias_v"])
            return value @ named[f"weight_{name}"].T

        x_gates = dict(zip(says.input_gates, i, strict=True))
        found: list[Tensor] = type(self.cell).by_hand(Named(x_gates), Named(r), Named(named), inside, clip, *before)
        return found

    def by_hand(self) -> list[Tensor]:
        """What ``run`` gives, by a loop over time of torch ops."""
        weights, shares, factors = self.drawn()
        config, per_group = self.config, len(weights) // self.groups
        steps, batch = self.input.shape[:2]
        lengths = torch.full((batch,), steps) if self.lengths is None else self.lengths
        starts = [0, *itertools.accumulate(self.counts())]
        directions = 1 + config["bidirectional"]
        layer_input, last, every = list(self.input), [], []
        for group in range(self.groups):
            w = weights[group * per_group : (group + 1) * per_group]
            zeros = self.input.new_zeros(batch, config["hidden"])
            states = [h[group] for h in self.hx] or [zeros] * len(self.says.states)
            series: list[list[Tensor]] = [[] for _ in range(steps)]
            for t in reversed(range(steps)) if group % directions else range(steps):
                before = states
                if self.resets is not None:
                    put = [s[group] for s in self.reset_state] or [zeros] * len(states)
                    before = [torch.where(self.resets[t].unsqueeze(-1), p, s) for p, s in zip(put, states, strict=True)]
                after = self.step_by_hand(layer_input[t], before, w, None if factors is None else factors[group])
                for i, share in enumerate(shares):
                    if isinstance(share, Tensor):
                        rows = share[group][starts[t] : starts[t + 1]]
                        missing = rows.new_zeros(batch - len(rows), rows.shape[-1])
                        share = torch.cat([rows, missing]).to(self.input.dtype)
                    after[i] = share * before[i] + (1 - share) * after[i]
                active = (t < lengths).unsqueeze(-1).to(self.input.device)
                states = [torch.where(active, new, old) for new, old in zip(after, states, strict=True)]
                series[t] = [torch.where(active, new, 0) for new in after]
            last.append(states)
            every.append([torch.stack(of_state) for of_state in zip(*series, strict=True)])
            if group % directions == directions - 1:
                layer_input = list(torch.cat([s[self.says.output] for s in every[group + 1 - directions :]], -1))
        result = [torch.stack(layer_input), *(torch.stack(s) for s in zip(*last, strict=True))]
        return result + [torch.stack(s, 1) for s in zip(*every, strict=True)] * config["all_states"]

    def results_and_gradients(self, results: list[Tensor]) -> list[Tensor]:
        g = torch.Generator().manual_seed(self.seed + 1)
        grads = [torch.randn(r.shape, generator=g, dtype=torch.float64).to(r) for r in results]
        given = [
            (r, d) for r, d in zip(results, grads, strict=True) if r.requires_grad
        ]  # a state may be zeros by definition
        found = torch.autograd.grad(
            [r for r, _ in given], self.leaves(), [d for _, d in given], allow_unused=True, materialize_grads=True
        )
        return [*(r.detach() for r in results), *found]

    def check(self, tolerance: float = 1e-10) -> None:
        found, expected = (self.results_and_gradients(made) for made in (self.run(), self.by_hand()))
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert a.shape == b.shape
            error = float((a - b).abs().max()) / max(1.0, float(b.abs().max())) if a.numel() else 0.0
            assert error <= tolerance, f"result {index} of {len(found)}: error {error:.2e}; {self.config}"


EACH: dict[type[Cell], tuple[float | None, ...]] = {Lstm: (None, 0.3), Heads: (0.2, 0.6, None, None), Odd: (None, 0.3, 0.4)}


def options_of(cell: type[Cell], option: str) -> dict[str, Any]:
    """The options of this name, as the cell can have them."""
    recurs = bool(cell().declaration.recurrent_gates)
    dropped = {"recurrent_dropout": 0.4} if recurs else {}
    weights = {"weight_dropout": 0.3} if recurs else {}
    states = len(cell.states)
    return {
        "zoneout": {"zoneout": 0.3},
        "zoneout-of-the-last": {"zoneout": (*[0.0] * (states - 1), 0.4)},
        "dropout": dropped,
        "weights": weights,
        "clip": {"state_clip": 0.25},
        "clip-each": {"state_clip": EACH.get(cell, (0.3,))},
        "all": {"zoneout": 0.2, **dropped, **weights, "state_clip": EACH.get(cell, 0.3)},
    }[option]


OPTIONS = ("zoneout", "zoneout-of-the-last", "dropout", "weights", "clip", "clip-each", "all")
# Every formula is compiled by itself: kernels take one cell through all options, and every cell through all at once.
PAIRS = [(cell, option) for cell, option in itertools.product(CELLS, OPTIONS) if options_of(cell, option)]
COMPILED = [(cell, option) for cell, option in PAIRS if cell is Lstm or option == "all"]
FORMS: list[dict[str, Any]] = [
    {"all_states": True},
    {"layers": 2, "bidirectional": True, "form": "lengths", "resets": "state", "all_states": True},
    {"batch_first": True, "bidirectional": True, "form": "packed", "resets": "shared", "hx": False},
    {"batch_first": True, "resets": "zeros", "hx": False, "bias": False, "layers": 2},
    {"steps": 1, "form": "packed", "all_states": True},
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
@pytest.mark.parametrize(("cell", "option"), PAIRS)
def test_the_reference(cell: type[Cell], option: str, form: dict[str, Any], training: bool) -> None:
    with use_backend("reference"):
        Case(cell=cell, options=options_of(cell, option), training=training, **form).check()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
@pytest.mark.parametrize(("cell", "option"), COMPILED)
def test_values_and_gradients(device: str, cell: type[Cell], option: str, form: dict[str, Any], training: bool) -> None:
    with use_backend(device):
        Case(cell=cell, options=options_of(cell, option), training=training, device=DEVICE[device], **form).check()


CONFIGS = st.fixed_dictionaries(
    {
        "steps": st.integers(1, 5),
        "batch": st.integers(1, 5),
        "inputs": st.integers(1, 4),
        "hidden": st.sampled_from([2, 6, 20, 38]),
        "layers": st.integers(1, 2),
        "bidirectional": st.booleans(),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "form": st.sampled_from(["dense", "lengths", "packed"]),
        "resets": st.sampled_from(["none", "zeros", "state", "shared"]),
        "hx": st.booleans(),
        "all_states": st.booleans(),
        "training": st.sampled_from([True, True, False]),
    }
)


@hypothesis.settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(
    config=CONFIGS, cell=st.sampled_from(CELLS), option=st.sampled_from(["zoneout", "all"]), seed=st.integers(0, 99)
)
def test_combinations(backend: str, config: dict[str, Any], cell: type[Cell], option: str, seed: int) -> None:
    option = option if (cell, option) in COMPILED else "all"
    with use_backend(backend):
        Case(**config, cell=cell, options=options_of(cell, option), seed=seed, device=DEVICE[backend]).check()


@pytest.mark.skipif(extension is None, reason="needs the compiled extension")
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_instruction_sets(dtype: torch.dtype, instruction_set: str) -> None:
    """Masks lie behind input products whose rows end within a vector."""
    options = {"zoneout": 0.3, "recurrent_dropout": 0.4}
    config = {
        "cell": Lstm,
        "options": options,
        "hidden": 37,
        "batch": 9,
        "inputs": 5,
        "bidirectional": True,
        "form": "lengths",
    }
    case, exact = Case(dtype, **config), Case(torch.float64, **config)
    with torch.no_grad():
        for to, of in zip(exact.leaves(), case.leaves(), strict=True):
            to.copy_(of)
    with _settings.use("FUSED_RNN_CPU", instruction_set), use_backend("cpu"):
        found = case.results_and_gradients(case.run())
    weights, zoneout, factors = case.drawn()
    exact.drawn = lambda: (list(exact.layer.parameters()), zoneout, factors.double())  # type: ignore[method-assign]
    assert weights[1] is list(case.layer.parameters())[1]
    limit = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}[dtype]
    for a, b in zip(found, exact.results_and_gradients(exact.by_hand()), strict=True):
        assert float((a.double() - b).abs().max()) <= limit * max(1.0, float(b.abs().max()))


@pytest.mark.skipif(extension is None, reason="needs the compiled extension")
def test_threads_that_share_rows() -> None:
    """One of them copies the masks behind the products of all; several chunks of steps."""
    case = Case(cell=Lstm, options=options_of(Lstm, "all"), steps=300, batch=1, hidden=38, bidirectional=True)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with use_backend("cpu"):
            case.check()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("cell", [Lstm, Gru, Odd])
def test_gradcheck(device: str, cell: type[Cell]) -> None:
    case = Case(cell=cell, options=options_of(cell, "all"), steps=2, batch=2, hidden=2, inputs=1, device=device)
    with use_backend(device):
        assert torch.autograd.gradcheck(lambda *leaves: tuple(case.run()), case.leaves())


def test_second_derivatives(backend: str) -> None:
    case = Case(cell=Gru, options=options_of(Gru, "all"), steps=3, device=DEVICE[backend])

    def second(results: list[Tensor]) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(results[0].square().sum(), case.input, create_graph=True)
        return torch.autograd.grad(first.square().sum(), case.leaves(), allow_unused=True, materialize_grads=True)

    with use_backend(backend):
        for found, expected in zip(second(case.run()), second(case.by_hand()), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


# --- the cells written by hand ---

PLAIN: dict[str, Any] = {"zoneout": 0.2, "recurrent_dropout": 0.3, "weight_dropout": 0.2}
HAND: list[tuple[Any, Any, dict[str, Any], dict[str, Any]]] = [
    (zoo.LSTM, fused_rnn.LSTM, {**PLAIN, "zoneout": (0.2, 0.4), "state_clip": (None, 0.3)}, {"state_clip": 0.3}),
    (zoo.GRU, fused_rnn.GRU, {**PLAIN, "state_clip": 0.3}, {}),
    (zoo.RNN, fused_rnn.RNN, {**PLAIN, "state_clip": 0.3}, {}),
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("cell", "theirs", "options", "others"), HAND, ids=["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("call", ["dense", "lengths", "resets"])
def test_equal_to_those_written_by_hand(
    backend: str, cell: Any, theirs: Any, options: dict[str, Any], others: dict[str, Any], call: str, training: bool
) -> None:
    """The same masks by the same seed; dropout between layers is drawn behind them."""
    where: dict[str, Any] = {"dtype": torch.float64, "device": DEVICE[backend]}
    ours = Layer(cell(), 3, 6, 2, bidirectional=True, dropout=0.2, **where, **options)
    hand = theirs(3, 6, 2, bidirectional=True, dropout=0.2, **where, **{**options, **others})
    hand.load_state_dict(ours.state_dict())
    x = torch.randn(5, 4, 3, **where, requires_grad=True)
    hx = [torch.randn(4, 4, 6, **where, requires_grad=True) for _ in ours.cell.declaration.states]
    kwargs: dict[str, Any] = {"return_all_states": True}
    if call == "lengths":
        kwargs = {"lengths": torch.tensor([5, 0, 2, 4])}
    elif call == "resets":
        kwargs = {"resets": torch.rand(5, 4, device=DEVICE[backend]) < 0.3}
    found = []
    with use_backend(backend):
        for layer in (ours, hand):
            layer.train(training)
            torch.manual_seed(4)
            y, last, *every = layer(x, hx[0] if len(hx) == 1 else tuple(hx), **kwargs)
            results = [y, *(last if isinstance(last, tuple) else [last])]
            for of_steps in every:
                results += list(of_steps) if isinstance(of_steps, tuple) else [of_steps]
            torch.manual_seed(5)
            grads = [torch.randn_like(r) for r in results]
            found.append([*results, *torch.autograd.grad(results, [x, *hx, *layer.parameters()], grads)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


# --- masks ---


def test_eval_takes_expectations() -> None:
    x = torch.randn(7, 2, 4)
    dropped = {"recurrent_dropout": 0.5, "weight_dropout": 0.5}
    plain, layer = Layer(Gru(), 4, 6), Layer(Gru(), 4, 6, **dropped).eval()
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(plain(x)[0], layer(x)[0])
    assert layer.formula == plain.formula  # nothing of it is another formula
    zoned = Layer(Gru(), 4, 6, zoneout=0.5, **dropped).eval()
    state = torch.random.get_rng_state()
    zoned(x)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_zoneout_of_one_keeps_everything(training: bool) -> None:
    layer = Layer(Lstm(), 4, 6, zoneout=1.0).train(training)
    hx = torch.randn(1, 2, 6), torch.randn(1, 2, 6)
    y, last = layer(torch.randn(5, 2, 4), hx)
    assert torch.equal(y, hx[0].expand(5, 2, 6)) and torch.equal(last[0], hx[0]) and torch.equal(last[1], hx[1])


@pytest.mark.parametrize("option", ["zoneout", "dropout", "weights"])
def test_a_new_mask_for_each_call_and_the_same_by_the_seed(option: str) -> None:
    layer, x = Layer(Lstm(), 4, 6, num_layers=2, bidirectional=True, **options_of(Lstm, option)), torch.randn(5, 3, 4)
    torch.manual_seed(1)
    first, second = layer(x)[0], layer(x)[0]
    torch.manual_seed(1)
    assert torch.equal(layer(x)[0], first) and not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    layer, x = Layer(Lstm(), 4, 6, num_layers=2, **options_of(Lstm, "all")), torch.randn(5, 3, 4, requires_grad=True)

    def gradients(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(3)
        y = checkpoint(lambda v: layer(v)[0], x, use_reentrant=reentrant) if checkpointed else layer(x)[0]
        torch.rand(7)  # others draw meanwhile
        leaves = [x, *layer.parameters()]
        for leaf in leaves:
            leaf.grad = None
        y.square().sum().backward()
        return [y.detach(), *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


def test_a_clamped_state_has_no_gradient() -> None:
    """0.5 exactly at the limit, and beyond it."""

    class Sum(Cell):
        gates = ("a",)

        def step(self, x: Any, r: Any, h: Any) -> Any:
            return x.a + r.a

    for limit, expected in ((0.5, 1.0), (0.4999, 0.0)):
        layer = Layer(Sum(), 1, 1, bias=False, state_clip=limit, dtype=torch.float64)
        with torch.no_grad():
            layer.weight_ih_l0.fill_(1), layer.weight_hh_l0.fill_(1)
        x = torch.full((1, 1, 1), 0.5, dtype=torch.float64, requires_grad=True)
        y, _ = layer(x)
        assert y.item() == min(0.5, limit)
        assert float(torch.autograd.grad(y.sum(), x)[0]) == expected


@pytest.mark.parametrize("bounds", [(0.5, 0.2), (0.2, 0.5), (None, 0.2), (0.2, None)], ids=str)
def test_a_value_that_is_two_states_has_both_bounds(bounds: tuple[float | None, ...]) -> None:
    class Twice(Cell):
        gates = ("a",)
        states = ("h", "k")

        def step(self, x: Any, r: Any, h: Any, k: Any) -> Any:
            new = x.a + r.a + 0.5 * k
            return new, new

    layer = Layer(Twice(), 2, 3, state_clip=bounds, dtype=torch.float64)
    x = 10 * torch.randn(4, 2, 2, dtype=torch.float64)
    for backend in ("reference", "cpu") if extension is not None else ("reference",):
        with use_backend(backend):
            y, (_, k) = layer(x)
        for state, bound in zip((y, k), bounds, strict=True):
            assert state.abs().max() == bound if bound is not None else state.abs().max() > 1


# --- numbers of other kinds, ids, graphs ---


def test_ids() -> None:
    """Ids give what their one-hot rows give, with the same masks."""
    layer, tokens = Layer(Lstm(), 5, 6, 2, dtype=torch.float64, **options_of(Lstm, "all")), torch.randint(5, (4, 3))
    found = []
    for given in (tokens, F.one_hot(tokens, 5).double()):
        for backend in ("reference", "cpu") if extension is not None else ("reference",):
            torch.manual_seed(2)
            with use_backend(backend):
                y, _ = layer(given)
            found.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_autocast() -> None:
    x, layer = torch.randn(4, 3, 5), Layer(Lstm(), 5, 8, **PLAIN)
    y = []
    for backend in ("reference", "cpu") if extension is not None else ("reference",):
        torch.manual_seed(5)
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            y.append(layer(x)[0])
    assert all(t.dtype == torch.bfloat16 for t in y)
    torch.testing.assert_close(y[0], y[-1], rtol=0, atol=0.03)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("where", [None, "reference"])
def test_compile(where: str | None, training: bool) -> None:
    torch._dynamo.reset()
    layer = Layer(Lstm(), 4, 6, **options_of(Lstm, "all")).train(training)
    x = torch.randn(5, 3, 4, requires_grad=True)
    found = []
    with use_backend(where):
        for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            torch.manual_seed(2)
            y, _ = call(x)
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(extension is None, reason="needs the compiled extension")
def test_exported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also of a formula that nothing has compiled yet."""
    monkeypatch.setenv("FUSED_RNN_CACHE", str(tmp_path))
    layer = Layer(Lstm(), 4, 6, zoneout=0.123, state_clip=0.7).eval()
    x, other = torch.randn(5, 3, 4), torch.randn(7, 2, 4)
    sizes = ({0: torch.export.Dim("T"), 1: torch.export.Dim("B")},)
    program = torch.export.export(layer, (x,), dynamic_shapes=sizes)
    assert torch.equal(program.module()(other)[0], layer(other)[0])


def test_vmap() -> None:
    layer, x = Layer(Lstm(), 4, 6, dtype=torch.float64, **PLAIN), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    torch.manual_seed(3)
    mapped = torch.func.vmap(lambda v: layer(v)[0], randomness="same")(x)
    for index in range(2):
        torch.manual_seed(3)
        torch.testing.assert_close(mapped[index], layer(x[index])[0])


@pytest.mark.skipif(extension is None, reason="needs the compiled extension")
def test_explain_and_formulas() -> None:
    x, layer = torch.randn(5, 3, 4), Layer(Lstm(), 4, 6, zoneout=0.3)
    plain = Layer(Lstm(), 4, 6)
    saved = [fused_rnn.explain(module, x, show=False).layers[0].saved_bytes for module in (plain, layer)]
    assert saved[1] == saved[0] + 2 * 15 * 6 * 4  # two masks
    text = str(fused_rnn.explain(layer, x, show=False))
    assert "4 input products, 4 recurrent ones" in text and "LstmWithOptions" in text
    assert fused_rnn.explain(layer, x, device="H100", show=False).backend == "cuda"
    formulas = {layer.formula, layer.eval().formula, plain.formula, Layer(Lstm(), 4, 6, state_clip=0.3).formula}
    formulas.add(Layer(Lstm(), 4, 6, state_clip=0.4).formula)
    assert len(formulas) == 5
    assert Layer(Lstm(), 4, 6, zoneout=0.6).formula == layer.train().formula  # the masks alone differ


@pytest.mark.skipif(extension is None, reason="needs the compiled extension")
def test_the_op_checks_values() -> None:
    layer = Layer(Gru(), 3, 4, zoneout=0.3)
    layer(torch.randn(2, 1, 3))
    recipe = Recipe(OWN_KIND)

    def call(**options: Any) -> None:
        rows = Rows(options=StepOptions(**options))
        ops.layer(layer.formula, torch.randn(5, 2, 3), [], list(layer.parameters()), rows, recipe)

    for options, message in (
        ({"values": torch.zeros(1, 9, 1, 4)}, r"values: expected shape \[1, 10, 1, 4\], got \[1, 9, 1, 4\]"),
        ({"values": torch.zeros(1, 10, 1, 4).bool()}, "values: expected dtype Float"),
        ({"values": torch.zeros(1, 10, 4)}, r"values: expected shape \[D, N, K, H\] with K less than 4"),
        ({"clip": 0.5}, "rows: expected no options of steps of a cell that is a formula"),
        ({}, r"weight_ih: expected shape \[4\*H, I\]|weight_hh: expected shape"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            call(**options)
    lstm_layer = fused_rnn.LSTM(3, 4)
    rows = Rows(options=StepOptions(values=torch.zeros(1, 10, 1, 4)))
    with pytest.raises(ValueError, match="values: expected none but of a cell that is a formula"):
        number = Recipe(NUMBER_OF_MODE["LSTM"]).packed | rows.bits
        torch.ops.fused_rnn.rnn(torch.randn(5, 2, 3), [], list(lstm_layer.parameters()), rows.given(), number, 0.0)


# --- Step ---


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("options", [{"zoneout": 0.4}, {"state_clip": 0.2}, {"weight_dropout": 0.4}], ids=str)
def test_a_step_is_a_layer_of_one(backend: str, options: dict[str, Any], training: bool) -> None:
    check_step(Lstm, DEVICE[backend], backend, options, training)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("options", [{"zoneout": 0.4, "state_clip": 0.2}, {"weight_dropout": 0.4}], ids=str)
@pytest.mark.parametrize("cell", [Heads, Odd])
def test_steps_on_the_reference(cell: type[Cell], options: dict[str, Any], training: bool) -> None:
    check_step(cell, "cpu", "reference", options, training)


def check_step(cell: type[Cell], device: str, backend: str, options: dict[str, Any], training: bool) -> None:
    where: dict[str, Any] = {"dtype": torch.float64, "device": device}
    layer = Layer(cell(), 4, 6, **where, **options).train(training)
    made = Step(cell(), 4, 6, **where, **options).train(training)
    made.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x, states = torch.randn(3, 4, **where), [torch.randn(3, 6, **where) for _ in cell.states]
    with use_backend(backend):
        torch.manual_seed(0)
        after = made(x, tuple(states))
        torch.manual_seed(0)
        _, last = layer(x.unsqueeze(0), tuple(s.unsqueeze(0) for s in states))
        torch.manual_seed(0)
        alone = made(x[0], tuple(s[0] for s in states))
        torch.manual_seed(0)
        row = made(x[:1], tuple(s[:1] for s in states))
    for a, b in zip(after, last, strict=True):
        torch.testing.assert_close(a, b[0], rtol=0, atol=1e-15)
    for a, b in zip(alone, row, strict=True):
        torch.testing.assert_close(a, b[0], rtol=0, atol=1e-15)
    assert made(x[0])[0].shape == (6,)


# --- constructors ---

BAD: list[tuple[type[Cell], dict[str, Any], type[Exception], str]] = [
    (Lstm, {"zoneout": 1.5}, ValueError, "zoneout: expected a probability from 0 to 1, got 1.5"),
    (Lstm, {"zoneout": (0.1, -0.2)}, ValueError, r"zoneout\[1\] \(c\): expected a probability from 0 to 1, got -0.2"),
    (Heads, {"zoneout": (0.1,)}, ValueError, r"zoneout: expected a number or a tuple of 4 \(h, c, n, m\), got 1 numbers"),
    (Lstm, {"zoneout": "0.1"}, TypeError, r"zoneout: expected a number or a tuple of 2 \(h, c\), got str"),
    (Lstm, {"recurrent_dropout": float("nan")}, ValueError, "recurrent_dropout: expected a probability .*, got nan"),
    (
        Units,
        {"recurrent_dropout": 0.1},
        ValueError,
        r"recurrent_dropout: expected 0 for Layer \(Units has no recurrent product\)",
    ),
    (Lstm, {"recurrent_dropout_variant": "x"}, ValueError, "variant: expected 'state' or 'candidate', got 'x'"),
    (Lstm, {"recurrent_dropout_variant": "candidate"}, ValueError, "variant: expected 'state' for Layer .* as a candidate"),
    (Lstm, {"weight_dropout": 2}, ValueError, "weight_dropout: expected a probability from 0 to 1, got 2"),
    (Units, {"weight_dropout": 0.1}, ValueError, "weight_dropout: expected 0 for Layer .*, so no weight_hh"),
    (Lstm, {"state_clip": 0}, ValueError, "state_clip: expected a finite number above 0, or None, got 0"),
    (
        Lstm,
        {"state_clip": (0.1, float("inf"))},
        ValueError,
        r"state_clip\[1\] \(c\): expected a finite number above 0, .* inf",
    ),
    (Lstm, {"state_clip": (0.1,)}, ValueError, r"state_clip: expected a number, None, or a tuple of 2 .*, got 1"),
    (
        Lstm,
        {"state_clip": "1"},
        TypeError,
        r"state_clip: expected a number, None, or a tuple of 2 of these \(h, c\), got str",
    ),
    (Lstm, {"forget_bias": 1.0}, ValueError, r"forget_bias: expected None for Layer \(Lstm starts its own parameters"),
    (Lstm, {"zone": 1.0}, TypeError, r"Layer\(\) got an unexpected keyword argument 'zone'"),
]


@pytest.mark.parametrize(("cell", "options", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_arguments(cell: type[Cell], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Layer(cell(), 3, 4, **options)


def test_bad_arguments_of_steps_and_attributes() -> None:
    with pytest.raises(ValueError, match="recurrent_dropout: expected 0 for Step .* got 0.5"):
        Step(Lstm(), 3, 4, recurrent_dropout=0.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'dropout'"):
        Step(Lstm(), 3, 4, dropout=0.5)
    layer = Layer(Lstm(), 3, 4)
    with pytest.raises(ValueError, match="zoneout: expected a probability from 0 to 1, got 3"):
        layer.zoneout = 3
    plain = layer.formula
    layer.zoneout = 0.5
    assert layer.zoneout == (0.5, 0.5) and layer.recurrent_dropout == 0 and layer.state_clip is None
    assert layer.formula != plain
    layer.zoneout = 0
    assert layer.formula == plain and layer.zoneout == 0
    layer.state_clip = (None, 2)
    assert layer.state_clip == (None, 2.0)


def test_modules_with_options() -> None:
    options = {"zoneout": (0.1, 0.2), "recurrent_dropout": 0.3, "state_clip": (None, 5.0)}
    torch.manual_seed(0)
    layer = Layer(zoo.LSTM(), 3, 4, num_layers=2, **options)
    torch.manual_seed(0)
    plain = Layer(zoo.LSTM(), 3, 4, num_layers=2)
    shown = "zoneout=(0.1, 0.2), recurrent_dropout=0.3, state_clip=(None, 5.0))"
    assert repr(layer) == f"{repr(plain)[:-1]}, {shown}"
    assert repr(Step(zoo.LSTM(), 3, 4, zoneout=0.5)).endswith(", 3, 4, zoneout=0.5)")
    assert list(layer.state_dict()) == list(plain.state_dict())
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    x = torch.randn(5, 2, 3)
    torch.manual_seed(0)
    y = layer(x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)):
        torch.manual_seed(0)
        assert torch.equal(other(x)[0], y) and repr(other) == repr(layer)


def test_a_module_saved_without_options() -> None:
    """As those before there were any: the cells that run are made anew."""
    layer = Layer(zoo.GRU(), 3, 4)
    state = {name: value for name, value in layer.__getstate__().items() if name not in ("_running", "_formulas")}
    old = Layer.__new__(Layer)
    old.__setstate__(state)
    x = torch.randn(2, 1, 3)
    assert old.zoneout == 0 and torch.equal(old(x)[0], layer(x)[0])


def test_packed_in_any_order() -> None:
    """Masks are drawn for rows as they lie in memory, longest first."""
    layer = Layer(Gru(), 3, 4, dtype=torch.float64, zoneout=0.3, recurrent_dropout=0.4)
    rows = [torch.randn(n, 3, dtype=torch.float64) for n in (2, 4, 3)]
    found = []
    for order, is_sorted in (((0, 1, 2), False), ((1, 2, 0), True)):
        torch.manual_seed(1)
        y, last = layer(torch.nn.utils.rnn.pack_sequence([rows[i] for i in order], enforce_sorted=is_sorted))
        assert isinstance(y, PackedSequence)
        found.append((y.data, {i: last[0, place] for place, i in enumerate(order)}))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][i], found[1][1][i]) for i in range(3))
