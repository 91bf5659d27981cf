"""zoneout, recurrent_dropout, weight_dropout, state_clip and forget_bias against loops of torch ops in float64."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import CELLS, GRADIENT_TOLERANCE, OUTPUT_TOLERANCE
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn import _settings, use_backend
from fused_rnn._backend import extension
from fused_rnn._kinds import KINDS, NUMBER_OF_MODE
from fused_rnn._recipe import StepOptions
from fused_rnn._regularisation import Regularisation, Sizes

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
st = hypothesis.strategies
DEVICE = {"reference": "cpu", "cpu": "cpu", "cuda": "cuda"}
SETS = fused_rnn.build_info().get("cpu_instruction_sets", [])
LAYERS = {"LSTM": fused_rnn.LSTM, "GRU": fused_rnn.GRU}
CELL_CLASSES = {"LSTM": fused_rnn.LSTMCell, "GRU": fused_rnn.GRUCell}


def layer_of(cell: str, *args: Any, **kwargs: Any) -> Any:
    if cell in LAYERS:
        return LAYERS[cell](*args, **kwargs)
    return fused_rnn.RNN(*args, nonlinearity=cell.removeprefix("RNN_").lower(), **kwargs)


def states_of(cell: str) -> int:
    return KINDS[NUMBER_OF_MODE[cell]].states


# --- the loop ---


def step_by_hand(
    cell: str, x: Tensor, states: list[Tensor], w: Sequence[Tensor], biases: bool, options: StepOptions
) -> list[Tensor]:
    """x [B, I], states [B, .] -> the states after a step, by the formulas of the papers; options: of the step."""
    h = states[0]
    i = x @ w[0].T + (w[2] if biases else 0)
    h_in = h if options.product is None else options.product * h
    a = h_in @ w[1].T + (w[3] if biases else 0)
    d = 1 if options.candidate is None else options.candidate
    limit = float("inf") if options.clip is None else options.clip
    if cell == "LSTM":
        i_, f, g, o = (i + a).chunk(4, -1)
        c = (f.sigmoid() * states[1] + i_.sigmoid() * g.tanh() * d).clamp(-limit, limit)
        out = o.sigmoid() * c.tanh()
        new = [out @ w[-1].T if len(w) % 2 else out, c]
    elif cell == "GRU":
        (ir, iz, i_n), (hr, hz, hn) = i.chunk(3, -1), a.chunk(3, -1)
        z = (iz + hz).sigmoid()
        n = (i_n + (ir + hr).sigmoid() * hn).tanh() * d
        new = [((1 - z) * n + z * h).clamp(-limit, limit)]
    else:
        act = {"RNN_TANH": torch.tanh, "RNN_RELU": torch.relu, "RNN_IDENTITY": lambda v: v}[cell]
        new = [act(i + a).clamp(-limit, limit)]
    kept = [0.0 if k is None else k.to(x.dtype) if isinstance(k, Tensor) else k for k in options[:2]]
    return [k * before + (1 - k) * after for k, before, after in zip(kept, states, new, strict=False)]


class Case:
    """A layer with options and the arguments of a call of it, padded: input [T, B, I], hx [L*D, B, .], resets [T, B]."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu", **config: Any) -> None:
        defaults = {
            "cell": "LSTM", "steps": 4, "batch": 3, "inputs": 2, "hidden": 5, "layers": 1, "bidirectional": False,
            "bias": True, "batch_first": False, "proj": 0, "form": "dense", "resets": "none", "hx": True,
            "all_states": False, "training": True, "options": {},
        }  # fmt: skip
        self.config = config = {**defaults, **config}
        self.seed = seed
        g = torch.Generator().manual_seed(seed)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=g, dtype=torch.float64) * scale
            return values.to(dtype).to(device).requires_grad_()

        self.cell, self.directions = config["cell"], 1 + config["bidirectional"]
        self.groups = config["layers"] * self.directions
        hidden, batch, steps = config["hidden"], config["batch"], config["steps"]
        proj = {"proj_size": config["proj"]} if config["proj"] else {}
        self.layer = layer_of(
            self.cell, config["inputs"], hidden, config["layers"], bidirectional=config["bidirectional"],
            bias=config["bias"], batch_first=config["batch_first"], dtype=dtype, device=device,
            **proj, **config["options"],
        )  # fmt: skip
        self.layer.train(config["training"])
        with torch.no_grad():
            for p in self.layer.parameters():
                p.copy_(randn(*p.shape, scale=hidden**-0.5))
        out = config["proj"] or hidden
        self.sizes = [out, hidden][: states_of(self.cell)]
        self.input = randn(steps, batch, config["inputs"])
        self.hx = [randn(self.groups, batch, size) for size in self.sizes] if config["hx"] else []
        lengths = torch.randint(0 if config["form"] == "lengths" else 1, steps + 1, (batch,), generator=g)
        if config["form"] == "packed":
            lengths, _ = lengths.sort(descending=True)
            lengths[0] = steps
        self.lengths = lengths if config["form"] in ("lengths", "packed") else None
        resets = torch.rand(steps, batch, generator=g) < 0.3
        self.resets = resets.to(device) if config["resets"] != "none" else None
        self.reset_state = [randn(self.groups, batch, size) for size in self.sizes] if config["resets"] == "state" else []
        self.call_sizes = Sizes(
            self.groups, steps * batch if self.lengths is None or config["form"] == "lengths" else int(lengths.sum()), batch,
            out, hidden,
        )  # fmt: skip

    def leaves(self) -> list[Tensor]:
        return [self.input, *self.layer.parameters(), *self.hx, *self.reset_state]

    def arguments(self) -> tuple[Any, Any, dict[str, Any]]:
        """(input, hx, keywords) in the form of the call."""
        config, kwargs = self.config, {}
        x: Any = self.input
        batch_first = config["batch_first"]
        if config["form"] == "packed":
            x = pack_padded_sequence(x.transpose(0, 1) if batch_first else x, self.lengths, batch_first)
        elif batch_first:
            x = x.transpose(0, 1)
        if config["form"] == "lengths":
            kwargs["lengths"] = self.lengths
        if self.resets is not None:
            resets = self.resets
            if config["form"] == "packed":
                resets = pack_padded_sequence(resets.unsqueeze(-1), self.lengths).data.squeeze(-1)
            elif batch_first:
                resets = resets.transpose(0, 1)
            kwargs["resets"] = resets
        if self.reset_state:
            kwargs["reset_state"] = self.reset_state[0] if len(self.sizes) == 1 else tuple(self.reset_state)
        if config["all_states"]:
            kwargs["return_all_states"] = True
        hx = None if not self.hx else self.hx[0] if len(self.sizes) == 1 else tuple(self.hx)
        return x, hx, kwargs

    def run(self) -> list[Tensor]:
        """Output [T, B, D*P], last states and, with all_states, each state after every step [T, L*D, B, .]."""
        x, hx, kwargs = self.arguments()
        torch.manual_seed(self.seed)
        y, last, *every = self.layer(x, hx, **kwargs)
        steps, batch_first = self.config["steps"], self.config["batch_first"]

        def padded(t: Any) -> Tensor:
            if isinstance(t, PackedSequence):
                return pad_packed_sequence(t, total_length=steps)[0]
            return t.transpose(0, 1) if batch_first else t

        flat = [*last] if isinstance(last, tuple) else [last]
        all_states = [s for t in every for s in (t if isinstance(t, tuple) and not isinstance(t, PackedSequence) else [t])]
        if self.config["form"] == "packed":
            all_states = [pad_packed_sequence(s, total_length=steps)[0].transpose(1, 2) for s in all_states]
        elif batch_first:
            all_states = [s.permute(1, 2, 0, 3) for s in all_states]
        return [padded(y), *flat, *all_states]

    def drawn(self) -> tuple[list[Tensor], StepOptions]:
        """The weights and the steps' options that the call draws."""
        torch.manual_seed(self.seed)
        of = self.layer.__dict__.get("_regularisation") or Regularisation()
        weights = list(self.layer.parameters())
        training = self.config["training"]
        weights = of.dropped(weights, len(weights) // self.groups, training)
        return weights, of.step_options(self.input, self.call_sizes, training)

    def by_hand(self) -> list[Tensor]:
        """What ``run`` gives, by a loop over time of torch ops."""
        weights, options = self.drawn()
        config, per_group = self.config, len(weights) // self.groups
        steps, batch = self.input.shape[:2]
        lengths = torch.full((batch,), steps) if self.lengths is None else self.lengths
        counts = [int((lengths > t).sum()) if config["form"] == "packed" else batch for t in range(steps)]
        starts = [0, *itertools.accumulate(counts)]
        layer_input, last, every = list(self.input), [], []
        for group in range(self.groups):
            d = group % self.directions
            w = weights[group * per_group : (group + 1) * per_group]
            states = [h[group] for h in self.hx] or [self.input.new_zeros(batch, size) for size in self.sizes]
            series: list[list[Tensor]] = [[] for _ in range(steps)]
            for t in reversed(range(steps)) if d else range(steps):
                before = states
                if self.resets is not None:
                    put = [s[group] for s in self.reset_state] or [torch.zeros_like(s) for s in states]
                    before = [torch.where(self.resets[t].unsqueeze(-1), p, s) for p, s in zip(put, states, strict=True)]
                rows = slice(starts[t], starts[t + 1])

                def flags(k: Any, rows: slice = rows, group: int = group) -> Any:
                    if not isinstance(k, Tensor):
                        return k
                    return torch.cat([k[group][rows], k.new_zeros(batch - (rows.stop - rows.start), k.shape[-1])])

                of_group = [None if f is None else f[group] for f in options[3:]]
                of_step = StepOptions(flags(options[0]), flags(options[1]), options.clip, *of_group)
                after = step_by_hand(self.cell, layer_input[t], before, w, config["bias"], of_step)
                active = (t < lengths).unsqueeze(-1).to(self.input.device)
                states = [torch.where(active, new, old) for new, old in zip(after, states, strict=True)]
                series[t] = [torch.where(active, new, 0) for new in after]
            last.append(states)
            every.append([torch.stack(of_state) for of_state in zip(*series, strict=True)])
            if d == self.directions - 1:
                layer_input = list(torch.cat([s[0] for s in every[group + 1 - self.directions :]], -1))
        result = [torch.stack(layer_input), *(torch.stack(s) for s in zip(*last, strict=True))]
        if config["all_states"]:
            result += [torch.stack(s, 1) for s in zip(*every, strict=True)]
        return result

    def results_and_gradients(self, results: list[Tensor]) -> list[Tensor]:
        g = torch.Generator().manual_seed(self.seed + 1)
        grads = [torch.randn(r.shape, generator=g, dtype=torch.float64).to(r) for r in results]
        found = torch.autograd.grad(results, self.leaves(), grads, allow_unused=True, materialize_grads=True)
        return [*(r.detach() for r in results), *found]

    def check(self, tolerance: float = 1e-11) -> None:
        found, expected = (self.results_and_gradients(made) for made in (self.run(), self.by_hand()))
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            error = float((a - b).abs().max()) / max(1.0, float(b.abs().max())) if a.numel() else 0.0
            assert error <= tolerance, f"result {index} of {len(found)}: error {error:.2e}; {self.config}"


OPTIONS = {
    "zoneout": {"zoneout": 0.3},
    "zoneout-of-one": {"zoneout": (0.6, 0.0)},
    "zoneout-of-the-other": {"zoneout": (0.0, 0.4)},
    "state": {"recurrent_dropout": 0.4},
    "candidate": {"recurrent_dropout": 0.4, "recurrent_dropout_variant": "candidate"},
    "weights": {"weight_dropout": 0.3},
    "clip": {"state_clip": 0.2},
    "all": {"zoneout": 0.2, "recurrent_dropout": 0.3, "weight_dropout": 0.2, "state_clip": 0.4},
}


def fits(cell: str, option: str) -> bool:
    return not (states_of(cell) == 1 and option.startswith("zoneout-of")) and not (
        cell.startswith("RNN") and option == "candidate"
    )


PAIRS = [(cell, option) for cell, option in itertools.product(CELLS, OPTIONS) if fits(cell, option)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("cell", "option"), PAIRS)
def test_values_and_gradients(backend: str, cell: str, option: str, training: bool) -> None:
    with use_backend(backend):
        config = {"training": training, "all_states": True, "hidden": 9, "batch": 2}
        Case(cell=cell, options=OPTIONS[option], device=DEVICE[backend], **config).check()


@pytest.mark.skipif(extension is None, reason="needs the compiled extension")
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cell", "option"), [pair for pair in PAIRS if pair[1] in ("zoneout", "candidate", "all")])
def test_instruction_sets(cell: str, option: str, dtype: torch.dtype, instruction_set: str) -> None:
    """Odd sizes on both sides of a vector and a tile. Reset, with a state that comes with the call."""
    options = dict(OPTIONS[option])
    if dtype.itemsize == 2:  # the gradient jumps where the state is cut, which rounding decides
        options.pop("state_clip", None)
    config = {"cell": cell, "options": options, "hidden": 37, "batch": 9, "inputs": 5, "steps": 3, "bidirectional": True}
    case, exact = Case(dtype, **config, resets="state"), Case(torch.float64, **config, resets="state")
    with torch.no_grad():
        for to, of in zip(exact.leaves(), case.leaves(), strict=True):
            to.copy_(of)
    exact.drawn = lambda: _as(case.drawn(), exact)  # type: ignore[method-assign]
    with _settings.use("FUSED_RNN_CPU", instruction_set), use_backend("cpu"):
        found = case.results_and_gradients(case.run())
    expected = exact.results_and_gradients(exact.by_hand())
    results = 1 + states_of(cell)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        tolerance = 4 * (OUTPUT_TOLERANCE if index < results else GRADIENT_TOLERANCE)[dtype]
        error = float((a.double() - b).abs().max()) / max(1.0, float(b.abs().max()))
        assert error <= tolerance, f"result {index}: error {error:.2e}, tolerance {tolerance:.1e}"


def _as(drawn: tuple[list[Tensor], StepOptions], exact: Case) -> tuple[list[Tensor], StepOptions]:
    """What was drawn in another dtype, for the leaves of a case in float64."""
    weights, options = drawn
    masks = [w.detach().double() / p.detach().double() for w, p in zip(weights, exact.layer.parameters(), strict=True)]
    double = [f if f is None else f.double() for f in options[3:]]
    return [p * m for p, m in zip(exact.layer.parameters(), masks, strict=True)], StepOptions(*options[:3], *double)


CONFIGS = st.fixed_dictionaries(
    {
        "cell": st.sampled_from(CELLS),
        "steps": st.integers(1, 5),
        "batch": st.integers(1, 5),
        "inputs": st.integers(1, 4),
        "hidden": st.integers(1, 20),
        "layers": st.integers(1, 2),
        "bidirectional": st.booleans(),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "proj": st.sampled_from([0, 0, 1]),
        "form": st.sampled_from(["dense", "lengths", "packed"]),
        "resets": st.sampled_from(["none", "zeros", "state"]),
        "hx": st.booleans(),
        "all_states": st.booleans(),
        "training": st.sampled_from([True, True, False]),
        "zoneout": st.tuples(*[st.sampled_from([0.0, 0.3, 1.0])] * 2),
        "recurrent": st.sampled_from([0.0, 0.4, 1.0]),
        "variant": st.sampled_from(["state", "candidate"]),
        "weights": st.sampled_from([0.0, 0.5]),
        "clip": st.sampled_from([None, 0.1, 0.5]),
    }
)


@hypothesis.settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(config=CONFIGS, seed=st.integers(0, 99))
def test_combinations(backend: str, config: dict[str, Any], seed: int) -> None:
    config = dict(config)
    cell = config["cell"]
    zoneout, variant = config.pop("zoneout")[: states_of(cell)], config.pop("variant")
    if cell != "LSTM" or config["hidden"] == 1:
        config["proj"] = 0
    options = {
        "zoneout": (0.0,) * len(zoneout) if config["proj"] else zoneout,
        "recurrent_dropout": config.pop("recurrent"),
        "recurrent_dropout_variant": "state" if cell.startswith("RNN") else variant,
        "weight_dropout": config.pop("weights"),
        "state_clip": config.pop("clip"),
    }
    with use_backend(backend):
        Case(**config, options=options, seed=seed, device=DEVICE[backend]).check()


@pytest.mark.parametrize(("cell", "option"), [pair for pair in PAIRS if pair[0] in ("LSTM", "GRU", "RNN_TANH")])
def test_gradcheck(device: str, cell: str, option: str) -> None:
    case = Case(cell=cell, options=OPTIONS[option], steps=2, batch=2, hidden=2, inputs=1, device=device)

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(case.run())

    with use_backend(device):
        assert torch.autograd.gradcheck(run, case.leaves())


def test_second_derivatives(backend: str) -> None:
    case = Case(cell="GRU", options=OPTIONS["all"], steps=3, device=DEVICE[backend])

    def second(results: list[Tensor]) -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(results[0].square().sum(), case.input, create_graph=True)
        return torch.autograd.grad(first.square().sum(), case.leaves(), allow_unused=True, materialize_grads=True)

    with use_backend(backend):
        for found, expected in zip(second(case.run()), second(case.by_hand()), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


# --- masks ---


def test_masks_are_as_the_papers_say() -> None:
    sizes = Sizes(groups=2, rows=60 * 8, batch=8, out=30, hidden=30)
    x = torch.randn(60, 8, 3)
    torch.manual_seed(0)
    of = Regularisation(zoneout=(0.2, 0.5), recurrent_dropout=0.25)
    options = of.step_options(x, sizes, training=True)
    h, c, product = options.zoneout_h, options.zoneout_c, options.product
    assert isinstance(h, Tensor) and isinstance(c, Tensor) and product is not None and options.candidate is None
    for flags, p in ((h, 0.2), (c, 0.5)):  # a mask for each step, row, unit and group
        assert flags.shape == (2, 480, 30) and flags.dtype == torch.bool
        assert float(flags.float().mean()) == pytest.approx(p, abs=0.015)
        steps = flags.view(2, 60, 8, 30).float().mean(1)
        assert float(steps.min()) > 0 and float(steps.max()) < 1
    assert float((h & c).float().mean()) == pytest.approx(0.1, abs=0.015)  # h and c apart
    assert product.shape == (2, 8, 30)  # one for all steps, inverted
    assert set(product.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert not torch.equal(product[0], product[1]) and not torch.equal(product[:, 0], product[:, 1])


def test_eval_takes_expectations() -> None:
    x = torch.randn(7, 2, 4)
    for cell in ("LSTM", "GRU", "RNN_TANH"):
        options = {"recurrent_dropout": 0.5, "weight_dropout": 0.5}
        plain, dropped = layer_of(cell, 4, 6), layer_of(cell, 4, 6, **options).eval()
        dropped.load_state_dict(plain.state_dict())
        assert torch.equal(plain(x)[0], dropped(x)[0])
        state = torch.random.get_rng_state()
        layer_of(cell, 4, 6, zoneout=0.5, **options).eval()  # draws weights
        after_weights = torch.random.get_rng_state()
        zoned = layer_of(cell, 4, 6, zoneout=0.5, **options).eval()
        drawn = torch.random.get_rng_state()
        zoned(x)
        assert torch.equal(drawn, torch.random.get_rng_state()) and not torch.equal(state, after_weights)


def test_zoneout_of_one_keeps_everything() -> None:
    for cell, training in itertools.product(("LSTM", "GRU", "RNN_RELU"), (True, False)):
        layer = layer_of(cell, 4, 6, zoneout=1.0).train(training)
        hx = [torch.randn(1, 2, 6) for _ in range(states_of(cell))]
        y, last = layer(torch.randn(5, 2, 4), hx[0] if len(hx) == 1 else tuple(hx))  # the quick way of calls
        assert torch.equal(y, hx[0].expand(5, 2, 6))
        for found, given in zip(last if isinstance(last, tuple) else (last,), hx, strict=True):
            assert torch.equal(found, given)


def test_a_new_mask_for_each_call_and_the_same_by_the_seed() -> None:
    x = torch.randn(5, 3, 4)
    for options in (OPTIONS["zoneout"], OPTIONS["state"], OPTIONS["candidate"], OPTIONS["weights"]):
        layer = fused_rnn.LSTM(4, 6, num_layers=2, bidirectional=True, **options)
        torch.manual_seed(1)
        first, second = layer(x)[0], layer(x)[0]
        torch.manual_seed(1)
        assert torch.equal(layer(x)[0], first) and not torch.equal(first, second)


def test_weight_dropout_is_a_mask_on_weight_hh() -> None:
    layer = fused_rnn.LSTM(3, 20, weight_dropout=0.25)
    weights = [p.detach() for p in layer.parameters()]
    torch.manual_seed(0)
    dropped = layer._regularisation.dropped(weights, 4, training=True)
    assert dropped[0] is weights[0] and dropped[2] is weights[2] and dropped[3] is weights[3]
    kept = dropped[1] != 0
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.05)
    torch.testing.assert_close(dropped[1][kept], weights[1][kept] / 0.75)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_activation_checkpointing(option: str, reentrant: bool) -> None:
    layer = fused_rnn.LSTM(4, 6, num_layers=2, **OPTIONS[option])
    x = torch.randn(5, 3, 4, requires_grad=True)

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


# --- numbers of other kinds ---


def test_a_clamped_state_has_no_gradient() -> None:
    """c = 0.5 exactly at the limit, and beyond it."""
    for limit, expected in ((0.5, 1.0), (0.4999, 0.0)):
        layer = fused_rnn.RNN(1, 1, bias=False, nonlinearity="identity", state_clip=limit, dtype=torch.float64)
        with torch.no_grad():
            layer.weight_ih_l0.fill_(1), layer.weight_hh_l0.fill_(1)
        x = torch.full((1, 1, 1), 0.5, dtype=torch.float64, requires_grad=True)
        y, _ = layer(x)
        assert y.item() == min(0.5, limit)
        assert float(torch.autograd.grad(y.sum(), x)[0]) == expected


@pytest.mark.parametrize("option", OPTIONS)
def test_autocast(option: str) -> None:
    x = torch.randn(4, 3, 5)
    layer = fused_rnn.LSTM(5, 8, **OPTIONS[option])
    y = []
    for backend in ("reference", "cpu") if extension is not None else ("reference",):
        torch.manual_seed(5)
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            y.append(layer(x)[0])
    assert all(t.dtype == torch.bfloat16 for t in y)
    torch.testing.assert_close(y[0], y[-1], rtol=0, atol=0.03)


def test_c_in_float32() -> None:
    layer = fused_rnn.LSTM(3, 6, dtype=torch.bfloat16, **OPTIONS["all"])
    hx = torch.randn(1, 2, 6).bfloat16(), torch.randn(1, 2, 6)
    y, (h, c) = layer(torch.randn(4, 2, 3).bfloat16(), hx)
    assert (y.dtype, h.dtype, c.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("cell", "option"), [("LSTM", "all"), ("GRU", "candidate"), ("RNN_TANH", "all")])
def test_compile(cell: str, option: str) -> None:
    torch._dynamo.reset()
    layer, x = layer_of(cell, 4, 6, **OPTIONS[option]), torch.randn(5, 3, 4, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = []
    for call in (layer, compiled):
        torch.manual_seed(2)
        with torch._dynamo.config.patch(allow_rnn=True):
            y, _ = call(x)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_traced_and_exported(training: bool) -> None:
    """Graphs draw their masks, and hold for any T and B."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fused_rnn.LSTM(4, 6, num_layers=2, bidirectional=True, **OPTIONS["all"])

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)[0]
            return y

    model, x, other = Model().train(training), torch.randn(5, 3, 4), torch.randn(7, 2, 4)
    graphs = [torch.jit.trace(model, (x,), check_trace=False)]
    if not training:
        sizes = ({0: torch.export.Dim("T"), 1: torch.export.Dim("B")},)
        graphs.append(torch.export.export(model, (x,), dynamic_shapes=sizes).module())
    for graph in graphs:
        torch.manual_seed(0)
        found = graph(other)
        torch.manual_seed(0)
        assert torch.equal(found, model(other))


@pytest.mark.skipif(extension is None, reason="needs the compiled extension")
def test_explain() -> None:
    x, options = torch.randn(5, 3, 4), {"recurrent_dropout": 0.5}
    assert fused_rnn.explain(fused_rnn.LSTM(4, 6, **options), x, show=False).backend == "cpu"
    planned = fused_rnn.explain(fused_rnn.LSTM(4, 6, **options), x, device="H100", show=False)
    forward = planned.layers[0].forward
    assert planned.backend == "cuda" and forward.family == "step" and forward.kernels[0].name == "forward_modified"
    assert any(r.name == "grid" and "no kernels with zoneout" in r.reason for r in forward.rejected)
    plain = fused_rnn.explain(fused_rnn.LSTM(4, 6, **options).eval(), x, device="H100", show=False)
    assert plain.backend == "cuda" and plain.family == "cudnn"


@pytest.mark.parametrize("option", ["zoneout", "clip", "all"])
def test_transforms_take_the_reference(option: str) -> None:
    layer, x = fused_rnn.LSTM(4, 6, **OPTIONS[option]).eval(), torch.randn(2, 5, 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapped = torch.func.vmap(lambda v: layer(v)[0])(x)
    torch.testing.assert_close(mapped, torch.stack([layer(v)[0] for v in x]))


# --- cells ---


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("options", [{"zoneout": 0.4}, {"state_clip": 0.2}, {"weight_dropout": 0.4}, {}], ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN_TANH"])
def test_cells(backend: str, cell: str, options: dict[str, Any], training: bool) -> None:
    """A cell is a layer of one step."""
    where = {"dtype": torch.float64, "device": DEVICE[backend]}
    layer = layer_of(cell, 4, 6, **where, **options).train(training)
    made = CELL_CLASSES.get(cell, fused_rnn.RNNCell)(4, 6, **where, **options).train(training)
    made.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    x, states = torch.randn(3, 4, **where), [torch.randn(3, 6, **where) for _ in range(states_of(cell))]
    with use_backend(backend):
        torch.manual_seed(0)
        after = made(x, states[0] if len(states) == 1 else tuple(states))
        torch.manual_seed(0)
        lifted = [s.unsqueeze(0) for s in states]
        _, last = layer(x.unsqueeze(0), lifted[0] if len(states) == 1 else tuple(lifted))
    for a, b in zip(after if len(states) > 1 else (after,), last if len(states) > 1 else (last,), strict=True):
        assert torch.equal(a, b[0])
    unbatched = made(x[0])
    assert (unbatched[0] if len(states) > 1 else unbatched).shape == (6,)


# --- constructors ---


BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("LSTM", {"zoneout": 1.5}, ValueError, "zoneout: expected a probability from 0 to 1, got 1.5"),
    ("LSTM", {"zoneout": (0.1, -0.2)}, ValueError, r"zoneout\[1\] \(c\): expected a probability from 0 to 1, got -0.2"),
    ("LSTM", {"zoneout": (0.1,)}, ValueError, r"zoneout: expected a number or a tuple of 2 \(h, c\), got 1 numbers"),
    ("GRU", {"zoneout": (0.1, 0.2)}, ValueError, r"zoneout: expected a number or a tuple of 1 \(h\), got 2 numbers"),
    ("GRU", {"zoneout": "0.1"}, TypeError, r"zoneout: expected a number or a tuple of 1 \(h\), got str"),
    ("LSTM", {"zoneout": True}, TypeError, r"zoneout: expected a number or a tuple of 2 \(h, c\), got bool"),
    ("LSTM", {"zoneout": 0.1, "proj_size": 2}, ValueError, "zoneout: expected 0 with proj_size .*, got 0.1"),
    ("LSTM", {"recurrent_dropout": float("nan")}, ValueError, "recurrent_dropout: expected a probability .*, got nan"),
    ("LSTM", {"recurrent_dropout": None}, TypeError, "recurrent_dropout: expected a number, got NoneType"),
    ("LSTM", {"recurrent_dropout_variant": "x"}, ValueError, "variant: expected 'state' or 'candidate', got 'x'"),
    ("RNN_TANH", {"recurrent_dropout_variant": "candidate"}, ValueError, "variant: expected 'state' for RNN .* 'candidate'"),
    ("LSTM", {"weight_dropout": 2}, ValueError, "weight_dropout: expected a probability from 0 to 1, got 2"),
    ("LSTM", {"state_clip": 0}, ValueError, "state_clip: expected a finite number above 0, or None, got 0"),
    ("LSTM", {"state_clip": float("inf")}, ValueError, "state_clip: expected a finite number above 0, or None, got inf"),
    ("LSTM", {"state_clip": "1"}, TypeError, "state_clip: expected a number or None, got str"),
    ("GRU", {"forget_bias": 1.0}, ValueError, r"forget_bias: expected None for GRU \(it has no forget gate\), got 1.0"),
    ("LSTM", {"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias: expected None with bias=False, got 1.0"),
    ("LSTM", {"forget_bias": float("nan")}, ValueError, "forget_bias: expected a finite number, or None, got nan"),
]


@pytest.mark.parametrize(("cell", "options", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_arguments(cell: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer_of(cell, 3, 4, **options)


def test_bad_arguments_of_cells_and_attributes() -> None:
    with pytest.raises(ValueError, match="recurrent_dropout: expected 0 for LSTMCell .* got 0.5"):
        fused_rnn.LSTMCell(3, 4, recurrent_dropout=0.5)
    with pytest.raises(ValueError, match="forget_bias: expected None for RNNCell"):
        fused_rnn.RNNCell(3, 4, forget_bias=1)
    layer = fused_rnn.LSTM(3, 4)
    with pytest.raises(ValueError, match="zoneout: expected a probability from 0 to 1, got 3"):
        layer.zoneout = 3
    layer.zoneout = 0.5
    assert layer.zoneout == (0.5, 0.5) and layer.recurrent_dropout == 0 and layer.state_clip is None
    layer.zoneout = 0
    assert "_regularisation" not in layer.__dict__ and layer.zoneout == 0
    with pytest.raises(TypeError):
        fused_rnn.LSTM(3, 4, 1, True, False, 0.0, False, 0, None, None, 0.5)  # keywords alone


def test_forget_bias() -> None:
    torch.manual_seed(0)
    plain = fused_rnn.LSTM(3, 4, num_layers=2, bidirectional=True)
    torch.manual_seed(0)
    layer = fused_rnn.LSTM(3, 4, num_layers=2, bidirectional=True, forget_bias=1.5)
    for _ in range(2):  # also after reset_parameters
        for name, value in layer.named_parameters():
            expected = plain.get_parameter(name).detach().clone()
            if name.startswith("bias"):
                expected[4:8] = 1.5 if name.startswith("bias_ih") else 0.0
            assert torch.equal(value, expected), name
        torch.manual_seed(1)
        plain.reset_parameters()
        torch.manual_seed(1)
        layer.reset_parameters()
    cell = fused_rnn.LSTMCell(3, 4, forget_bias=-1)
    assert cell.bias_ih[4:8].tolist() == [-1] * 4 and cell.bias_hh[4:8].tolist() == [0] * 4
    assert "forget_bias=-1.0" in repr(cell)


def test_modules_with_options() -> None:
    options = {"zoneout": (0.1, 0.2), "recurrent_dropout": 0.3, "state_clip": 5.0}
    torch.manual_seed(0)
    layer = fused_rnn.LSTM(3, 4, num_layers=2, **options)
    torch.manual_seed(0)
    plain = fused_rnn.LSTM(3, 4, num_layers=2)
    assert repr(plain) == "LSTM(3, 4, num_layers=2)"
    assert repr(layer) == "LSTM(3, 4, num_layers=2, zoneout=(0.1, 0.2), recurrent_dropout=0.3, state_clip=5.0)"
    assert list(layer.state_dict()) == list(plain.state_dict())
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)]
    x = torch.randn(5, 2, 3)
    torch.manual_seed(0)
    y = layer(x)[0]
    for other in copies:
        torch.manual_seed(0)
        assert torch.equal(other(x)[0], y) and repr(other) == repr(layer)


def test_old_pickles_have_no_options() -> None:
    layer = fused_rnn.GRU(3, 4)
    assert not any("regularisation" in name or name in Regularisation._fields for name in layer.__getstate__())
    old = fused_rnn.GRU.__new__(fused_rnn.GRU)
    old.__setstate__(nn.GRU(3, 4).__getstate__())
    assert old.zoneout == 0 and old(torch.randn(2, 1, 3))[0].shape == (2, 1, 4)


def test_revert_leaves_what_torch_does_not_have() -> None:
    model = nn.Sequential(fused_rnn.GRU(3, 4, zoneout=0.1), fused_rnn.GRU(3, 4))
    with pytest.warns(UserWarning, match=r"left unchanged: 0 \(GRU: torch.nn has no zoneout=0.1\)"):
        fused_rnn.revert(model)
    assert type(model[0]) is fused_rnn.GRU and type(model[1]) is nn.GRU


def test_convert_leaves_subclasses_with_attributes_of_these_names() -> None:
    class WeightDrop(nn.LSTM):
        def __init__(self) -> None:
            super().__init__(3, 4)
            self.weight_dropout = "theirs"

        def forward(self, *args: Any) -> Any:
            return super().forward(*args)

    with pytest.warns(UserWarning, match="its attribute weight_dropout has the name of one of the fused class's"):
        model = fused_rnn.convert(WeightDrop(), subclasses=True)
    assert model.weight_dropout == "theirs"


def test_ops_check_their_options() -> None:
    from fused_rnn._recipe import Recipe, Rows

    lstm, rnn = NUMBER_OF_MODE["LSTM"], NUMBER_OF_MODE["RNN_TANH"]

    def call(number: int, proj: int = 0, **options: Any) -> None:
        rows, gates = Rows(options=StepOptions(**options)), KINDS[number].gates
        weights = [torch.randn(gates * 4, 3), torch.randn(gates * 4, proj or 4)] + [torch.randn(proj, 4)] * bool(proj)
        recipe = Recipe(number, has_biases=False)
        torch.ops.fused_rnn.rnn(torch.randn(5, 2, 3), [], weights, rows.given(), recipe.packed | rows.bits, 0.0)

    for number, options, message in (
        (lstm, {"zoneout_h": torch.zeros(1, 9, 4, dtype=torch.bool)}, r"zoneout of h: expected shape \[1, 10, 4\]"),
        (lstm, {"zoneout_c": torch.zeros(1, 10, 4)}, "zoneout of c: expected dtype Bool"),
        (lstm, {"zoneout_h": 2.0}, "zoneout of h: expected a share of 0 to 1, got 2"),
        (rnn, {"zoneout_c": 0.5}, "zoneout of c: expected none for a cell without c"),
        (rnn, {"candidate": torch.ones(1, 2, 4)}, "candidate: expected none for a cell without gates"),
        (lstm, {"product": torch.ones(1, 1, 4)}, r"product: expected shape \[1, 2, 4\]"),
        (lstm, {"clip": -1.0}, "clip: expected more than 0, got -1"),
        (lstm, {"zoneout_h": 0.5, "proj": 2}, "zoneout: expected none with a projection"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            call(number, **options)
