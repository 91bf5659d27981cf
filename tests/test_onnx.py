"""torch.onnx.export(model, args, dynamo=True) of models with our layers and cells as they are, run by onnxruntime.

The packages are optional (``pip install '.[tools]'``); a test skips by the name of the one it lacks.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from module_pairs import CELLS, LAYERS, flatten
from torch import Tensor, nn
from torch.export import Dim

import fused_rnn
from fused_rnn import _onnx, functional
from fused_rnn._kinds import GRU

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
    pytest.mark.filterwarnings("ignore"),  # the exporter's own deprecations
]

# Two correct implementations in float32 (tests/module_pairs.py).
TOLERANCE = 2e-5


def export(model: nn.Module, args: tuple[Any, ...], shapes: Any, path: Path) -> tuple[Any, Counter[str]]:
    """(a session of onnxruntime, how many nodes there are of each operator)."""
    import onnxruntime

    program = torch.onnx.export(model.eval(), args, dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(path)
    operators = Counter(node.op_type for node in program.model.graph.all_nodes())
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), operators


def check(session: Any, model: nn.Module, args: tuple[Any, ...]) -> None:
    """Every output within TOLERANCE of the model's in float64."""
    names = [i.name for i in session.get_inputs()]
    tensors = flatten(args)
    found = session.run(None, {name: t.numpy() for name, t in zip(names, tensors, strict=True)})

    def wide(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(wide(v) for v in value)
        return value.double() if value.is_floating_point() else value

    with torch.no_grad():
        expected = flatten(model.double()(*wide(args)))
    model.float()
    assert len(found) == len(expected)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, index
        assert (torch.from_numpy(a).double() - b).abs().max() <= TOLERANCE, index


class Several(nn.Module):
    """Layers of one class in all forms, on one input [B, T, 4] and one state of each row."""

    def __init__(self, name: str) -> None:
        super().__init__()
        cls = getattr(fused_rnn, name)
        self.plain = cls(4, 6)
        self.stack = cls(4, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.bare = cls(12, 6, bias=False, bidirectional=True)
        self.more = nn.ModuleList()
        if name == "RNN":
            self.more = nn.ModuleList(
                [cls(4, 6, nonlinearity="relu"), cls(4, 6, nonlinearity="identity", bidirectional=True)]
            )

    def forward(self, x, h):
        steps = x.transpose(0, 1)
        state = (h, h * 0.5) if isinstance(self.plain, nn.LSTM) else h
        two = (h.expand(2, -1, -1), h.expand(2, -1, -1)) if isinstance(self.plain, nn.LSTM) else h.expand(2, -1, -1)
        y, last = self.stack(x)
        out = [self.plain(steps), self.plain(steps, state), (y, last), self.bare(y.transpose(0, 1), two)]
        return out + [layer(steps) for layer in self.more]


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, tmp_path: Path) -> None:
    """One node a layer; any T and B, also those at the edges."""
    model = Several(name)
    shapes = {"x": {0: Dim("B"), 1: Dim("T")}, "h": {1: Dim("B")}}
    session, operators = export(model, (torch.randn(3, 5, 4), torch.randn(1, 3, 6)), shapes, tmp_path / "m.onnx")
    assert operators[name] == (7 if name == "RNN" else 5)
    for batch, steps in ((3, 5), (2, 9), (1, 1)):
        check(session, model, (torch.randn(batch, steps, 4), torch.randn(1, batch, 6)))


class Step(nn.Module):
    """All cells, with states and without, and an unbatched one."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(getattr(fused_rnn, name)(4, 6, bias=name != "GRUCell") for name in CELLS)
        self.identity = fused_rnn.RNNCell(4, 6, nonlinearity="identity")

    def forward(self, x, h):
        out = [self.identity(x, h), self.cells[0](x[0], h[0])]
        for cell in self.cells:
            out += [cell(x), cell(x, (h, h) if isinstance(cell, nn.LSTMCell) else h)]
        return out


def test_cells(tmp_path: Path) -> None:
    model = Step()
    shapes = {"x": {0: Dim("B")}, "h": {0: Dim("B")}}
    session, operators = export(model, (torch.randn(3, 4), torch.randn(3, 6)), shapes, tmp_path / "m.onnx")
    assert operators["Sigmoid"] > 0 and not {"Loop", "Scan", "RNN", "LSTM", "GRU"} & set(operators)
    for batch in (3, 1, 7):
        check(session, model, (torch.randn(batch, 4), torch.randn(batch, 6)))


@pytest.mark.parametrize("bidirectional", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_projection_is_a_loop_of_any_length(bidirectional: bool, tmp_path: Path) -> None:
    """ONNX's LSTM has none."""
    model = fused_rnn.LSTM(4, 6, proj_size=2, bidirectional=bidirectional)
    rows = 1 + bidirectional

    def example(steps: int, batch: int) -> tuple[Any, ...]:
        return torch.randn(steps, batch, 4), (torch.randn(rows, batch, 2), torch.randn(rows, batch, 6))

    batch = Dim("B")
    shapes = ({0: Dim("T"), 1: batch}, ({1: batch}, {1: batch}))
    session, operators = export(model, example(5, 3), shapes, tmp_path / "m.onnx")
    assert operators["Scan"] == rows
    for size in ((5, 3), (9, 2)):
        check(session, model, example(*size))


def test_a_cell_that_onnx_lacks_is_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_onnx.OPERATORS, GRU)
    model = fused_rnn.GRU(4, 6)
    session, operators = export(model, (torch.randn(5, 3, 4),), ({0: Dim("T"), 1: Dim("B")},), tmp_path / "m.onnx")
    assert operators["Scan"] == 1 and operators["GRU"] == 0
    check(session, model, (torch.randn(9, 2, 4),))


class Masked(nn.Module):
    """The public functions with lengths (one of them 0, none as long as T) and with resets."""

    def __init__(self, resets: bool) -> None:
        super().__init__()
        self.resets = resets
        self.gru, self.lstm = (cls(4, 6, bidirectional=True) for cls in (fused_rnn.GRU, fused_rnn.LSTM))

    def forward(self, x, h, lengths, resets):
        options: Any = {"bidirectional": True, "lengths": lengths, "batch_first": True}
        if self.resets:
            options["resets"] = resets
        gru = functional.gru(x, list(self.gru.parameters()), h, **options)
        return gru, functional.lstm(x, list(self.lstm.parameters()), (h, h * 0.5), **options)


@pytest.mark.slow
@pytest.mark.parametrize("resets", [False, True])
def test_lengths_and_resets(resets: bool, tmp_path: Path) -> None:
    def example(batch: int, steps: int) -> tuple[Tensor, ...]:
        lengths = torch.arange(batch) * (steps - 1) // (batch - 1)
        return torch.randn(batch, steps, 4), torch.randn(2, batch, 6), lengths, torch.rand(batch, steps) < 0.4

    model = Masked(resets)
    batch, steps = Dim("B"), Dim("T")
    shapes = {"x": {0: batch, 1: steps}, "h": {1: batch}, "lengths": {0: batch}, "resets": {0: batch, 1: steps}}
    session, operators = export(model, example(3, 5), shapes, tmp_path / "m.onnx")
    assert operators["Scan"] == (4 if resets else 0) and operators["GRU"] == operators["LSTM"] == (0 if resets else 1)
    for size in ((3, 5), (2, 7), (4, 3)):
        args = example(*size)
        check(session, model, args)


def test_packed_input_is_refused(tmp_path: Path) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = fused_rnn.GRU(4, 6)

        def forward(self, x):
            return self.rnn(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 2])))[1]

    with pytest.raises(Exception, match="a PackedSequence has no counterpart in ONNX; export with padded input"):
        export(Packed(), (torch.randn(5, 3, 4),), None, tmp_path / "m.onnx")


def test_a_plain_export_keeps_our_ops() -> None:
    """ONNX's operators appear in torch.onnx's export only."""
    program = torch.export.export(fused_rnn.GRU(4, 6).eval(), (torch.randn(5, 3, 4),))
    assert "onnx" not in str(program.graph) and "fused_rnn" in str(program.graph)


# --- options and cells of one's own, in eval mode ---

OPTIONS: dict[str, dict[str, Any]] = {
    "weight_dropout": {"weight_dropout": 0.3},
    "recurrent_dropout": {"recurrent_dropout": 0.3},
    "candidate": {"recurrent_dropout": 0.3, "recurrent_dropout_variant": "candidate"},
    "zoneout": {"zoneout": 0.3},
    "state_clip": {"state_clip": 0.2},
    "all": {"zoneout": 0.2, "recurrent_dropout": 0.3, "weight_dropout": 0.4, "state_clip": 0.3},
}
DYNAMIC = ({0: Dim("T"), 1: Dim("B")},)


class OfOptions(nn.Module):
    def __init__(self, name: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.layer = getattr(fused_rnn, name)(4, 6, num_layers=2, bidirectional=True, **options)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_options(name: str, option: str, tmp_path: Path) -> None:
    """What masks weights or states is nothing in eval mode, so one node remains; zoneout and bounds become a Scan."""
    if name == "RNN" and option == "candidate":
        pytest.skip("an RNN has no candidate")
    model = OfOptions(name, OPTIONS[option])
    session, operators = export(model, (torch.randn(5, 3, 4),), DYNAMIC, tmp_path / "m.onnx")
    in_a_loop = option in ("zoneout", "state_clip", "all")
    assert operators["Scan"] == (4 if in_a_loop else 0)
    assert operators[name] == (0 if in_a_loop else 2)
    check(session, model, (4 * torch.randn(7, 2, 4),))


@pytest.mark.parametrize("option", ["zoneout", "state_clip", "weight_dropout"])
@pytest.mark.parametrize("name", CELLS)
def test_options_of_cells(name: str, option: str, tmp_path: Path) -> None:
    model = getattr(fused_rnn, name)(4, 6, **OPTIONS[option])
    session, _ = export(model, (torch.randn(3, 4),), ({0: Dim("B")},), tmp_path / "m.onnx")
    check(session, model, (4 * torch.randn(2, 4),))


@pytest.mark.parametrize("name", LAYERS)
def test_masks_are_refused(name: str) -> None:
    model = getattr(fused_rnn, name)(4, 6, zoneout=0.3)
    with pytest.raises(Exception, match="a mask of zoneout or recurrent_dropout has no counterpart .*; export in eval mode"):
        try:
            torch.onnx.export(model.train(), (torch.randn(5, 3, 4),), dynamo=True, verbose=False)
        except torch.onnx.errors.OnnxExporterError as error:  # torch's wraps ours
            assert isinstance(error.__cause__, NotImplementedError)
            raise error.__cause__ from None


def test_masks_of_an_own_step_are_refused() -> None:
    model = fused_rnn.Step(fused_rnn.zoo.LSTM(), 4, 6, zoneout=0.3)
    with pytest.raises(Exception, match="a mask of zoneout or recurrent_dropout has no counterpart .*; export in eval mode"):
        try:
            torch.onnx.export(model.train(), (torch.randn(3, 4),), dynamo=True, verbose=False)
        except torch.onnx.errors.OnnxExporterError as error:  # torch's wraps ours
            raise error.__cause__ or error from None


class Own(nn.Module):
    def __init__(self, cell: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.layer = fused_rnn.Layer(cell, 4, 6, num_layers=2, bidirectional=True, **options)
        self.step = fused_rnn.Step(cell, 12, 6)

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        y, last = self.layer(x, lengths=lengths)
        return y, last, self.step(y[0])


@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("name", ["LSTM", "LayerNormLSTM"])
def test_cells_of_ones_own(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A Scan for each direction of each layer, with the options in its step."""
    model = Own(getattr(fused_rnn.zoo, name)(), options)
    given = (torch.randn(5, 3, 4), torch.tensor([5, 0, 3]))
    session, operators = export(model, given, (*DYNAMIC, {0: DYNAMIC[0][1]}), tmp_path / "m.onnx")
    assert operators["Scan"] == 4
    check(session, model, (torch.randn(7, 2, 4), torch.tensor([7, 2])))
