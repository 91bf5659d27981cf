"""resets, reset_state and return_all_states against loops of torch ops in float64, row by row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import formula_cells as cells
import pytest
import torch
from cases import CELLS, DTYPES, GATES, GRADIENT_TOLERANCE, OUTPUT_TOLERANCE
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn import functional, use_backend
from fused_rnn._backend import extension
from fused_rnn._kinds import KINDS, NUMBER_OF_MODE
from fused_rnn._recipe import Recipe, Rows
from fused_rnn.formula import Layer, Step

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
st = hypothesis.strategies
SETTINGS = hypothesis.settings(
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
DEVICE = {"reference": "cpu", "cpu": "cpu", "cuda": "cuda"}
FORMS = ("dense", "lengths", "packed", "unbatched")


# --- the loop ---


def step_by_hand(cell: str, x: Tensor, states: list[Tensor], w: Sequence[Tensor], biases: bool) -> list[Tensor]:
    """x [I], states [.] -> the states after it, by the formulas of torch.nn's documentation."""
    i, h = w[0] @ x, w[1] @ states[0]
    if biases:
        i, h = i + w[2], h + w[3]
    if cell == "LSTM":
        a, f, g, o = (i + h).chunk(4)
        c = f.sigmoid() * states[1] + a.sigmoid() * g.tanh()
        out = o.sigmoid() * c.tanh()
        return [w[-1] @ out if len(w) % 2 else out, c]
    if cell == "GRU":
        (ir, iz, i_n), (hr, hz, hn) = i.chunk(3), h.chunk(3)
        z = (iz + hz).sigmoid()
        return [(1 - z) * (i_n + (ir + hr).sigmoid() * hn).tanh() + z * states[0]]
    return [{"RNN_TANH": torch.tanh, "RNN_RELU": torch.relu, "RNN_IDENTITY": lambda v: v}[cell](i + h)]


Stepper = Callable[[Tensor, list[Tensor], Sequence[Tensor]], list[Tensor]]


class Call:
    """A stack and its arguments, padded: input [T, B, I], hx and reset states [L*D, B, .], resets [T, B]."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
        self.config = config
        g = torch.Generator().manual_seed(config["seed"])

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(device).requires_grad_()

        cell, hidden = config["cell"], config["hidden"]
        self.out = config["proj"] or hidden
        self.directions = 2 if config["bidirectional"] else 1
        self.groups = config["layers"] * self.directions
        steps, batch = config["steps"], config["batch"]
        sizes = [self.out, hidden][: KINDS[NUMBER_OF_MODE[cell]].states]
        rows, scale = GATES[cell] * hidden, hidden**-0.5
        self.weights: list[Tensor] = []
        for group in range(self.groups):
            inputs = config["inputs"] if group < self.directions else self.directions * self.out
            shapes: list[tuple[int, ...]] = [(rows, inputs), (rows, self.out)]
            shapes += [(rows,), (rows,)] * config["biases"] + [(self.out, hidden)] * bool(config["proj"])
            self.weights += [(randn(*shape).detach() * scale).requires_grad_() for shape in shapes]
        self.input = randn(steps, batch, config["inputs"])
        self.hx = [randn(self.groups, batch, size) for size in sizes] if config["states"] else []
        resets = torch.rand(steps, batch, generator=g) < config["density"]
        self.resets = resets.to(device) if config["resets"] else None
        kind = config["reset_state"] if config["resets"] else "zeros"
        shape = {"shared": (self.groups, 1), "rows": (self.groups, batch), "steps": (steps, self.groups, batch)}.get(kind)
        self.reset_state = [randn(*shape, size) for size in sizes] if shape else []
        self.sizes = sizes
        lengths = torch.randint(0 if config["form"] == "lengths" else 1, steps + 1, (batch,), generator=g)
        if config["form"] == "packed":
            lengths, _ = lengths.sort(descending=True)
            lengths[0] = steps
        self.lengths = lengths if config["form"] in ("lengths", "packed") else None

    def leaves(self) -> list[Tensor]:
        return [self.input, *self.weights, *self.hx, *self.reset_state]

    def by_hand(self, stepper: Stepper | None = None) -> list[Tensor]:
        """Output [T, B, D*P], last states, every state [T, L*D, B, .], row by row."""
        config = self.config
        per_group = len(self.weights) // self.groups
        steps, batch = self.input.shape[:2]
        layer_input = [[self.input[t, b] for b in range(batch)] for t in range(steps)]
        last: list[list[Tensor]] = [[] for _ in self.sizes]
        every: list[list[list[Tensor]]] = [[] for _ in self.sizes]  # by state, group, row b: [T, .]
        for group in range(self.groups):
            w = self.weights[group * per_group : (group + 1) * per_group]

            def step(x: Tensor, states: list[Tensor], w: Sequence[Tensor] = w) -> list[Tensor]:
                return stepper(x, states, w) if stepper else step_by_hand(config["cell"], x, states, w, config["biases"])

            of_rows = [self._row(layer_input, group, b, step) for b in range(batch)]
            for s in range(len(self.sizes)):
                last[s].append(torch.stack([row[1][s] for row in of_rows]))
                every[s].append([row[0][s] for row in of_rows])
            if group % self.directions == self.directions - 1:
                of_layer = every[0][group + 1 - self.directions :]
                layer_input = [
                    [torch.cat([direction[b][t] for direction in of_layer]) for b in range(batch)] for t in range(steps)
                ]
        y = torch.stack([torch.stack(row) for row in layer_input])
        return [y, *map(torch.stack, last), *(torch.stack([torch.stack(g, 1) for g in of], 1) for of in every)]

    def _row(
        self, inputs: list[list[Tensor]], group: int, b: int, step: Callable[[Tensor, list[Tensor]], list[Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        length = len(inputs) if self.lengths is None else int(self.lengths[b])
        states = [s[group, b] for s in self.hx] or [self.input.new_zeros(size) for size in self.sizes]
        every = [[s.new_zeros(size)] * len(inputs) for s, size in zip(states, self.sizes, strict=True)]
        for t in reversed(range(length)) if group % self.directions else range(length):
            if self.resets is not None and self.resets[t, b]:
                states = [self._put(s, t, group, b) for s in self.reset_state] or [torch.zeros_like(s) for s in states]
            states = step(inputs[t][b], states)
            for series, state in zip(every, states, strict=True):
                series[t] = state
        return [torch.stack(series) for series in every], states

    @staticmethod
    def _put(state: Tensor, t: int, group: int, b: int) -> Tensor:
        of_step = state[t] if state.dim() == 4 else state
        return of_step[group, b if of_step.shape[1] > 1 else 0]

    def arguments(self) -> tuple[Any, dict[str, Any]]:
        """The input in its form, and the keywords."""
        form, batch_first = self.config["form"], self.config["batch_first"]
        put = list(self.reset_state)
        keywords: dict[str, Any] = {"return_all_states": True}
        x: Any = self.input
        resets = self.resets
        hx = list(self.hx)
        if form == "packed":
            assert self.lengths is not None
            x = pack_padded_sequence(x, self.lengths)
            resets = None if resets is None else pack_padded_sequence(resets.unsqueeze(-1), self.lengths).data.squeeze(-1)
        elif form == "unbatched":
            x, hx, put = x[:, 0], [s[:, 0] for s in hx], [s[..., 0, :] for s in put]
            resets = None if resets is None else resets[:, 0]
        else:
            keywords["lengths"] = self.lengths
            if batch_first:
                x, resets = x.transpose(0, 1), None if resets is None else resets.t()
                put = [s.permute(2, 0, 1, 3) if s.dim() == 4 else s for s in put]
        keywords |= {"resets": resets, "reset_state": as_state(put)}
        return x, {"hx": as_state(hx), **keywords}

    def in_one_form(self, result: Any) -> list[Tensor]:
        """Output, last and every state as ``by_hand`` gives them."""
        form = self.config["form"]
        tensors = flat(result)
        count = len(self.sizes)
        y, last, every = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
        if form == "packed":
            assert isinstance(y, PackedSequence)
            y = pad_packed_sequence(y)[0]
            every = [pad_packed_sequence(s)[0].transpose(1, 2) for s in every]
        elif form == "unbatched":
            y, last, every = y.unsqueeze(1), [s.unsqueeze(1) for s in last], [s.unsqueeze(2) for s in every]
        elif self.config["batch_first"]:
            y, every = y.transpose(0, 1), [s.permute(1, 2, 0, 3) for s in every]
        return [y, *last, *every]


def as_state(states: Sequence[Tensor]) -> Any:
    return None if not states else states[0] if len(states) == 1 else tuple(states)


def flat(value: Any) -> list[Any]:
    if isinstance(value, (Tensor, PackedSequence)):
        return [value]
    return [tensor for part in value for tensor in flat(part)]


def by_function(call: Call) -> list[Tensor]:
    config = call.config
    x, keywords = call.arguments()
    if config["form"] == "packed":
        keywords["batch_sizes"] = x.batch_sizes
    cell = config["cell"]
    if cell.startswith("RNN"):
        keywords["nonlinearity"] = cell[4:].lower()
    function = {"LSTM": functional.lstm, "GRU": functional.gru}.get(cell, functional.rnn)
    options = {"num_layers": config["layers"], "has_biases": config["biases"], "bidirectional": config["bidirectional"]}
    batch_first = config["batch_first"] and config["form"] != "packed"
    if config["form"] == "packed":
        x, sizes = x.data, x.batch_sizes
    y, last, every = function(x, call.weights, **keywords, **options, batch_first=batch_first)
    if config["form"] == "packed":
        y, every = PackedSequence(y, sizes), [PackedSequence(s, sizes) for s in flat(every)]
    return call.in_one_form((y, last, every))


def by_module(call: Call) -> list[Tensor]:
    config = call.config
    cell = config["cell"]
    keywords: dict[str, Any] = {"nonlinearity": cell[4:].lower()} if cell.startswith("RNN") else {}
    if config["proj"]:
        keywords["proj_size"] = config["proj"]
    module = getattr(fused_rnn, cell[:3] if cell.startswith("RNN") else cell)(
        config["inputs"],
        config["hidden"],
        config["layers"],
        bias=config["biases"],
        bidirectional=config["bidirectional"],
        batch_first=config["batch_first"],
        **keywords,
    )
    module._flat_weights = call.weights
    x, keywords = call.arguments()
    return call.in_one_form(module(x, **keywords))


def gradients(results: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Of a random combination of the results."""
    g = torch.Generator().manual_seed(3)
    weights = [torch.randn(r.shape, generator=g, dtype=torch.float64).to(r) for r in results]
    # Results of rows without a step depend on nothing in a loop.
    pairs = [(r, w) for r, w in zip(results, weights, strict=True) if r.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    outputs, weights = ([pair[i] for pair in pairs] for i in (0, 1))
    return list(torch.autograd.grad(outputs, leaves, weights, materialize_grads=True))


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float, what: str) -> None:
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.shape == other.shape, what
        if one.numel():
            allowed = tolerance * max(1.0, float(other.detach().abs().max()))
            difference = float((one.double() - other.double()).detach().abs().max())
            assert difference <= allowed, f"{what}: tensor {index} differs by {difference}"


CONFIG: dict[str, Any] = {
    "cell": "LSTM",
    "steps": 5,
    "batch": 3,
    "inputs": 3,
    "hidden": 4,
    "proj": 0,
    "layers": 1,
    "biases": True,
    "bidirectional": False,
    "batch_first": False,
    "states": True,
    "form": "dense",
    "resets": True,
    "reset_state": "rows",
    "density": 0.4,
    "seed": 0,
}


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    cell, hidden, form = draw(st.sampled_from(CELLS)), draw(st.integers(1, 9)), draw(st.sampled_from(FORMS))
    return {
        "cell": cell,
        "steps": draw(st.integers(1, 5)),
        "batch": 1 if form == "unbatched" else draw(st.integers(1, 4)),
        "inputs": draw(st.integers(1, 5)),
        "hidden": hidden,
        "proj": draw(st.integers(0, hidden - 1)) if cell == "LSTM" else 0,
        "layers": draw(st.integers(1, 2)),
        "form": form,
        "reset_state": draw(st.sampled_from(["zeros", "shared", "rows", "steps"])),
        "density": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "seed": draw(st.integers(0, 2**31)),
        **{name: draw(st.booleans()) for name in ("biases", "bidirectional", "batch_first", "states", "resets")},
    }


@hypothesis.settings(SETTINGS, max_examples=25)
@hypothesis.given(config=configs(), module=st.booleans())
def test_any_configuration(backend: str, config: dict[str, Any], module: bool) -> None:
    call = Call(config, device=DEVICE[backend])
    with use_backend(backend):
        ours = (by_module if module else by_function)(call)
    theirs = call.by_hand()
    assert_close(ours, theirs, 1e-12, "results")
    assert_close(gradients(ours, call.leaves()), gradients(theirs, call.leaves()), 1e-11, "gradients")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_dtypes(cell: str, dtype: torch.dtype, backend: str) -> None:
    """Against float64 from the same numbers."""
    for form, kind in itertools.product(("lengths", "packed"), ("rows", "steps")):
        config = CONFIG | {"cell": cell, "form": form, "reset_state": kind, "bidirectional": True, "hidden": 9}
        call, exact = Call(config, dtype, DEVICE[backend]), Call(config, device=DEVICE[backend])
        for mine, theirs in zip(call.leaves(), exact.leaves(), strict=True):
            theirs.data = mine.detach().double()
        with use_backend(backend):
            ours = by_function(call)
        expected = exact.by_hand()
        assert all(result.dtype is dtype for result in ours)
        assert_close(ours, expected, OUTPUT_TOLERANCE[dtype], "results")
        found = gradients(ours, call.leaves())
        assert_close(found, gradients(expected, exact.leaves()), GRADIENT_TOLERANCE[dtype], "gradients")


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_threads_of_a_team(cell: str) -> None:
    """Few rows and many units: threads share the units of a row."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for kind, proj in (("shared", 0), ("steps", 40 if cell == "LSTM" else 0)):
            sizes = {"hidden": 150, "inputs": 70, "batch": 2, "steps": 4, "proj": proj}
            call = Call(CONFIG | {"cell": cell, "reset_state": kind, **sizes})
            ours, theirs = by_function(call), call.by_hand()
            assert_close(ours, theirs, 1e-11, "results")
            assert_close(gradients(ours, call.leaves()), gradients(theirs, call.leaves()), 1e-10, "gradients")
    finally:
        torch.set_num_threads(before)


# --- cells ---


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("kind", ["zeros", "shared", "steps"])
def test_equal_to_a_loop_over_cells(name: str, kind: str, backend: str) -> None:
    config = CONFIG | {"cell": "RNN_TANH" if name == "RNN" else name, "reset_state": kind}
    call = Call(config, device=DEVICE[backend])
    cell = getattr(fused_rnn, name + "Cell")(3, 4, dtype=torch.float64)
    cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh = map(nn.Parameter, call.weights)
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    call.weights = weights
    assert call.resets is not None
    with use_backend(backend):
        ours = by_function(call)
        hx, outputs = as_state([s[0] for s in call.hx]), []
        for t in range(5):
            put = as_state([(s[t] if s.dim() == 4 else s)[0] for s in call.reset_state])
            hx = cell(call.input[t], hx, resets=call.resets[t], reset_state=put)
            outputs.append(flat(hx))
    every = [torch.stack(states).unsqueeze(1) for states in zip(*outputs, strict=True)]
    theirs = [every[0].squeeze(1), *(s[-1] for s in every), *every]
    assert_close(ours, theirs, 1e-12, "results")
    assert_close(gradients(ours, call.leaves()), gradients(theirs, call.leaves()), 1e-11, "gradients")


def test_cells_without_batch_and_without_states() -> None:
    cell, put = fused_rnn.LSTMCell(3, 4), (torch.randn(4), torch.randn(4))
    x = torch.randn(3)
    for flag, begin in ((True, put), (False, (torch.zeros(4), torch.zeros(4)))):
        for one, other in zip(cell(x, resets=torch.tensor(flag), reset_state=put), cell(x, begin), strict=True):
            torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="reset_state: expected None without resets"):
        cell(x, reset_state=put)
    with pytest.raises(ValueError, match=r"resets: expected shape \[2\], got \[3\]"):
        fused_rnn.GRUCell(3, 4)(torch.randn(2, 3), resets=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"reset_state: expected shape \[2, 4\] or \[1, 4\], got \[2, 5\]"):
        fused_rnn.GRUCell(3, 4)(torch.randn(2, 3), resets=torch.zeros(2, dtype=torch.bool), reset_state=torch.zeros(2, 5))


# --- what gradients must not do ---


def test_nothing_passes_the_cut(backend: str) -> None:
    """A replaced state may be NaN; unused reset states get zeros."""
    for cell in CELLS:
        call = Call(CONFIG | {"cell": cell, "reset_state": "rows", "density": 0.0}, device=DEVICE[backend])
        assert call.resets is not None
        call.resets[0] = True
        call.resets[:, 2] = False
        call.resets[2, 1] = True
        for state in call.hx:
            state.data[:, :2] = torch.nan
        with use_backend(backend):
            results = by_function(call)
            assert all(result.isfinite().all() for result in results)
            found = gradients(results, call.leaves())
        assert all(gradient.isfinite().all() for gradient in found)
        count = len(call.sizes)
        for gradient in found[-2 * count : -count]:
            assert not gradient[:, :2].any()
            assert gradient[:, 2].all() or cell == "RNN_RELU"
        for gradient in found[-count:]:
            assert not gradient[:, 2].any()
            assert gradient[:, :2].any()


@pytest.mark.parametrize("config", [{"cell": "LSTM", "proj": 2}, {"cell": "GRU"}, {"cell": "RNN_TANH"}], ids=str)
@pytest.mark.parametrize("kind", ["shared", "steps"])
def test_gradcheck(config: dict[str, Any], kind: str, backend: str) -> None:
    small = {"steps": 2, "batch": 2, "inputs": 1, "hidden": 3, "form": "lengths", "bidirectional": True, "density": 0.6}
    call = Call(CONFIG | config | small | {"reset_state": kind}, device=DEVICE[backend])

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        again = Call(call.config, device=DEVICE[backend])
        count = len(again.weights)
        again.input, again.weights = leaves[0], list(leaves[1 : 1 + count])
        again.hx = list(leaves[1 + count : 1 + count + len(again.sizes)])
        again.reset_state = list(leaves[1 + count + len(again.sizes) :])
        return tuple(by_function(again))

    with use_backend(backend):
        assert torch.autograd.gradcheck(run, call.leaves(), fast_mode=True)
        assert torch.autograd.gradgradcheck(run, call.leaves(), fast_mode=True)


@pytest.mark.parametrize("layers", [1, 2])
def test_writing_into_results(layers: int, backend: str) -> None:
    """Of what a caller writes into a result, no other result and no gradient is made: it is right or an error."""
    with use_backend(backend):
        for place in range(5):
            call = Call(CONFIG | {"layers": layers}, device=DEVICE[backend])
            expected = [result.detach().clone() for result in by_function(call)]
            wanted = gradients([r for i, r in enumerate(by_function(call)) if i != place], call.leaves())
            results = by_function(call)
            with torch.no_grad():
                results[place].zero_()
            others = [r for i, r in enumerate(results) if i != place]
            assert_close(others, [r for i, r in enumerate(expected) if i != place], 1e-15, str(place))
            try:
                found = gradients(others, call.leaves())
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
            else:
                assert_close(found, wanted, 1e-13, str(place))


# --- the other ways to call ---


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_results_as_without(name: str) -> None:
    """The same output with return_all_states, bit by bit, with dropout too; its parts are the output and the last states."""
    module = getattr(fused_rnn, name)(5, 6, 2, bidirectional=True, dropout=0.5)
    x = torch.randn(7, 3, 5)
    torch.manual_seed(1)
    y, last = module(x)
    torch.manual_seed(1)
    y_again, last_again, every = module(x, return_all_states=True)
    assert torch.equal(y, y_again)
    for one, other in zip(flat(last), flat(last_again), strict=True):
        assert torch.equal(one, other)
    h = flat(every)[0]
    assert torch.equal(h[:, 2:].transpose(1, 2).flatten(2), y)
    for state, after in zip(flat(every), flat(last), strict=True):
        assert torch.equal(state[-1, ::2], after[::2]) and torch.equal(state[0, 1::2], after[1::2])
    with torch.no_grad():
        torch.manual_seed(1)
        for one, other in zip(flat(module(x, return_all_states=True)), flat((y, last, every)), strict=True):
            torch.testing.assert_close(one, other)


def test_packed_rows_in_any_order() -> None:
    """hx and reset_state come, and states go, in the caller's order."""
    module = fused_rnn.LSTM(3, 4, bidirectional=True, dtype=torch.float64)
    lengths, x = torch.tensor([2, 5, 0, 4]), torch.randn(5, 4, 3, dtype=torch.float64)
    lengths[2] = 1
    hx, put = ((torch.randn(2, 4, 4, dtype=torch.float64), torch.randn(2, 4, 4, dtype=torch.float64)) for _ in range(2))
    stored = tuple(torch.randn(5, 2, 4, 4, dtype=torch.float64) for _ in range(2))
    resets = torch.rand(5, 4) < 0.5
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    flags = pack_padded_sequence(resets.unsqueeze(-1), lengths, enforce_sorted=False).data.squeeze(-1)
    for state in (put, stored):
        y, last, every = module(packed, hx, resets=flags, reset_state=state, return_all_states=True)
        theirs = module(x, hx, lengths=lengths, resets=resets, reset_state=state, return_all_states=True)
        ours = [pad_packed_sequence(y)[0], *last, *(pad_packed_sequence(s)[0].transpose(1, 2) for s in every)]
        assert_close(ours, flat(theirs), 1e-14, "results")


@pytest.mark.skipif(extension is None, reason="needs the compiled extension")
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_compile_and_export(name: str) -> None:
    call = Call(CONFIG | {"cell": name, "form": "lengths", "layers": 2}, torch.float32)
    module = getattr(fused_rnn, name)(3, 4, 2)
    x, keywords = call.arguments()
    with torch._dynamo.config.patch(allow_rnn=True):
        expected = flat(module(x, **keywords))
        graph = torch.compile(module, fullgraph=True, backend="aot_eager")
        ours = flat(graph(x, **keywords))
        assert_close(ours, expected, 1e-6, "results")
        leaves = [*module.parameters(), *call.reset_state]
        assert_close(gradients(ours, leaves), gradients(expected, leaves), 1e-6, "gradients")
        with torch.no_grad():
            exported = torch.export.export(module, (x,), keywords).module()
            assert_close(flat(exported(x, **keywords)), expected, 1e-6, "exported")


def test_autocast() -> None:
    call = Call(CONFIG | {"layers": 2}, torch.float32)
    for backend in ("cpu", "reference") if extension is not None else ("reference",):
        with torch.autocast("cpu", torch.bfloat16), use_backend(backend):
            results = by_function(call)
        assert all(result.dtype is torch.bfloat16 for result in results)
        assert_close(results, call.by_hand(), 0.05, backend)
        assert all(gradient.dtype is torch.float32 for gradient in gradients(results, call.leaves()))


def test_func_transforms() -> None:
    """torch.func differentiates the reference."""
    call = Call(CONFIG)
    put = call.reset_state

    def total(h: Tensor) -> Tensor:
        call.reset_state = [h, put[1]]
        return sum(result.square().sum() for result in by_function(call))  # type: ignore[return-value]

    with use_backend("reference"):
        found = torch.func.grad(total)(put[0].detach())
    (expected,) = torch.autograd.grad(total(put[0]), put[0])
    assert_close([found], [expected], 1e-12, "gradient")


# --- cells of one's own ---

OWN = (cells.Lstm, cells.RecurrentOnly, cells.OutputLast, cells.Everything, cells.HeadedSLstm)


@pytest.mark.parametrize("own", OWN, ids=lambda own: own.__name__)
def test_own_cells(own: Any, backend: str) -> None:
    """Against ``Step`` in a loop, row by row."""
    cell = own()
    hidden, states = 6, cell.declaration.states
    forms = (("lengths", "rows", 2), ("packed", "steps", 1), ("dense", "shared", 1), ("unbatched", "steps", 1))
    for form, kind, layers in forms:
        layer = Layer(cell, 3, hidden, layers, bidirectional=True, dtype=torch.float64, device=DEVICE[backend])
        batch = 1 if form == "unbatched" else 3
        config = CONFIG | {"form": form, "reset_state": kind, "layers": layers, "bidirectional": True, "batch": batch}
        call = OwnCall(config | {"hidden": hidden}, layer, len(states))
        x, keywords = call.arguments()
        with use_backend(backend):
            ours = call.in_one_form(layer(x, **keywords))
        with use_backend("reference"):
            theirs = call.by_hand(call.step)
        assert_close(ours, theirs, 1e-11, f"{form} results")
        leaves = call.leaves()
        assert_close(gradients(ours, leaves), gradients(theirs, leaves), 1e-10, f"{form} gradients")


@pytest.mark.skipif(extension is None, reason="needs the compiled extension")
def test_own_cells_on_a_team_of_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for own in (cells.Lstm, cells.HeadedSLstm):
            layer = Layer(own(), 20, 150, dtype=torch.float64)
            config = CONFIG | {"hidden": 150, "inputs": 20, "batch": 2, "reset_state": "steps"}
            call = OwnCall(config, layer, len(layer.cell.declaration.states))
            x, keywords = call.arguments()
            ours = flat(layer(x, **keywords))
            with use_backend("reference"):
                theirs = flat(layer(x, **keywords))
            assert_close(ours, theirs, 1e-11, "results")
            assert_close(gradients(ours, call.leaves()), gradients(theirs, call.leaves()), 1e-10, "gradients")
    finally:
        torch.set_num_threads(before)


class OwnCall(Call):
    """The same of a Layer: every state has H units; by_hand's first state is the output."""

    def __init__(self, config: dict[str, Any], layer: Layer, states: int) -> None:
        device = next(layer.parameters()).device
        super().__init__(config, device=str(device))
        g = torch.Generator().manual_seed(5)

        def like(shape: Sequence[int]) -> list[Tensor]:
            made = (torch.rand(*shape, generator=g, dtype=torch.float64) for _ in range(states))
            return [state.to(device).requires_grad_() for state in made]

        self.sizes = [config["hidden"]] * states
        self.hx, self.reset_state = like(self.hx[0].shape), like(self.reset_state[0].shape)
        self.output = layer.cell.declaration.output
        self.weights = list(layer.parameters())
        # Step's parameters are those of a Layer of one layer and direction; only their shapes differ.
        self.layer, self.names = layer, [spec.name for spec in Step(layer.cell, 3, config["hidden"])._specs()]

    def step(self, x: Tensor, states: list[Tensor], w: Sequence[Tensor]) -> list[Tensor]:
        module = Step(self.layer.cell, x.shape[0], states[0].shape[0], dtype=torch.float64, device=x.device)
        after = torch.func.functional_call(module, dict(zip(self.names, w, strict=True)), (x, as_state(states)))
        return flat(after)

    def by_hand(self, stepper: Stepper | None = None) -> list[Tensor]:
        """In the cell's order of states; the loop has the output first."""
        order = [self.output, *(i for i in range(len(self.sizes)) if i != self.output)]
        back = [order.index(i) for i in range(len(order))]
        hx, put = self.hx, self.reset_state
        self.hx, self.reset_state = [hx[i] for i in order], [put[i] for i in order]

        def step(x: Tensor, states: list[Tensor], w: Sequence[Tensor]) -> list[Tensor]:
            after = self.step(x, [states[back[i]] for i in range(len(back))], w)
            return [after[i] for i in order]

        try:
            y, *others = super().by_hand(step)
        finally:
            self.hx, self.reset_state = hx, put
        count = len(order)
        last, every = others[:count], others[count:]
        return [y, *(last[i] for i in back), *(every[i] for i in back)]


# --- errors ---


def errors() -> Iterator[tuple[str, dict[str, Any]]]:
    flags, h, c = torch.zeros(5, 2, dtype=torch.bool), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    yield "reset_state: expected None without resets", {"reset_state": (h, c)}
    yield r"reset_state: expected a tuple of 2 Tensors \(h, c\), got a Tensor", {"resets": flags, "reset_state": h}
    yield r"reset_state: expected a tuple of 2 Tensors \(h, c\), got a tuple of 1", {"resets": flags, "reset_state": (h,)}
    yield r"reset_state\[1\] \(c\): expected a Tensor, got int", {"resets": flags, "reset_state": (h, 3)}
    shapes = r"expected shape \[1, 1, 4\] or \[1, 2, 4\] or \[5, 1, 2, 4\], got "
    for shape in ((1, 3, 4), (2, 2, 4), (1, 2, 5), (2, 4), (5, 2, 2, 4), (4, 1, 2, 4)):
        got = str(list(shape)).replace("[", r"\[").replace("]", r"\]")
        yield rf"reset_state\[0\] \(h\): {shapes}{got}", {"resets": flags, "reset_state": (torch.zeros(shape), c)}
    yield r"reset_state\[1\] \(c\): expected dtype torch.float32", {"resets": flags, "reset_state": (h, c.double())}
    yield r"reset_state\[0\] \(h\): expected device cpu", {"resets": flags, "reset_state": (h.to("meta"), c)}
    yield "return_all_states: expected a bool, got int", {"return_all_states": 1}
    yield "resets: expected dtype torch.bool, got torch.float32", {"resets": torch.zeros(5, 2)}
    yield r"resets: expected shape \[5, 2\], got \[2, 5\]", {"resets": flags.t()}
    yield r"lengths: expected shape \[2\], got \[3\]", {"lengths": [1, 2, 3]}


@pytest.mark.parametrize(("message", "keywords"), [*errors()], ids=lambda value: value if isinstance(value, str) else "")
def test_errors(message: str, keywords: dict[str, Any]) -> None:
    module, own, x = fused_rnn.LSTM(3, 4), Layer(cells.Lstm(), 3, 4), torch.zeros(5, 2, 3)
    with use_backend("reference"):
        for run in (
            lambda: module(x, **keywords),
            lambda: functional.lstm(x, list(module.parameters()), **keywords),
            lambda: own(x, **keywords),
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                run()


def test_lengths_with_packed_input() -> None:
    packed = pack_padded_sequence(torch.zeros(5, 2, 3), torch.tensor([5, 3]))
    for module in (fused_rnn.LSTM(3, 4), Layer(cells.Lstm(), 3, 4)):
        with pytest.raises(ValueError, match="lengths: expected None with packed input"):
            module(packed, lengths=[5, 3])


@pytest.mark.skipif(extension is None, reason="needs the compiled extension")
def test_the_op_checks_too() -> None:
    weights, recipe = list(fused_rnn.GRU(3, 4).parameters()), Recipe(NUMBER_OF_MODE["GRU"], all_states=True)
    x, flags = torch.zeros(5, 2, 3), torch.zeros(5, 2, dtype=torch.bool)

    def fails(message: str, rows: Rows) -> None:
        with pytest.raises((ValueError, RuntimeError), match=message):
            torch.ops.fused_rnn.layer(x, [], weights, rows.given(), recipe.packed | rows.bits, False)

    fails("reset_state: expected none without resets", Rows(reset_states=(torch.zeros(1, 2, 4),)))
    fails("reset_state: expected 1 tensors or none, got 2", Rows(resets=flags, reset_states=(torch.zeros(1, 2, 4),) * 2))
    for shape in ((1, 2, 5), (2, 2, 4), (5, 1, 1, 4), (4, 1, 2, 4), (1, 3, 4)):
        fails("reset_state: expected shape", Rows(resets=flags, reset_states=(torch.zeros(shape),)))
    fails("reset_state: expected dtype", Rows(resets=flags, reset_states=(torch.zeros(1, 2, 4).double(),)))


@pytest.mark.skipif(extension is None, reason="needs the compiled extension")
@pytest.mark.parametrize(("cell", "form"), [("LSTM", "packed"), ("GRU", "dense")])
def test_opcheck(cell: str, form: str) -> None:
    call = Call(CONFIG | {"cell": cell, "form": form, "bidirectional": True, "steps": 3})
    x, keywords = call.arguments()
    offsets = None
    if form == "packed":
        offsets, x = torch.cat([torch.zeros(1, dtype=torch.int64), x.batch_sizes.cumsum(0)]), x.data
    rows = Rows(None, offsets, keywords["resets"], tuple(call.reset_state))
    recipe = Recipe(NUMBER_OF_MODE[cell], bidirectional=True, all_states=True).packed | rows.bits
    x = x.detach().requires_grad_()
    for save in (False, True):
        torch.library.opcheck(torch.ops.fused_rnn.layer.default, (x, call.hx, call.weights, rows.given(), recipe, save))
    torch.library.opcheck(torch.ops.fused_rnn.rnn.default, (x, call.hx, call.weights, rows.given(), recipe, 0.0))
