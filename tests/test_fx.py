"""torch.fx: the layers and cells are leaves of a traced model, as torch.nn's are."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from module_pairs import CELLS, CLASSES, LAYERS, assert_close, device_of, make_pair, random_state
from torch import Tensor, fx, nn

import fused_rnn
from fused_rnn import use_backend


class Model(nn.Module):
    """A layer or cell, with or without hx, between modules that are leaves."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.body = nn.ModuleDict({"rnn": rnn})
        self.last = nn.Linear(6, 2)

    def forward(self, x, hx=None):  # no annotations: a GraphModule cannot pickle those of a postponed evaluation
        out = self.body["rnn"](self.first(x).relu(), hx=hx)
        if not isinstance(self.body["rnn"], (nn.GRUCell, nn.RNNCell)):
            out, _ = out
        return self.last(out)


def example(module: nn.Module, device: str) -> tuple[Tensor, Any]:
    g = torch.Generator().manual_seed(0)
    size = (2, 4) if isinstance(module, nn.RNNCellBase) else (5, 2, 4)
    return torch.randn(size, generator=g).to(device), random_state(module, 2, g, dtype=torch.float32, device=device)


@pytest.mark.parametrize("name", CLASSES)
def test_leaves(backend: str, name: str) -> None:
    """One call_module node, whose results and gradients are the model's, after every change of the graph."""
    device = device_of(backend)
    ours, theirs = (Model(m).to(device) for m in make_pair(name, 4, 6))
    x, hx = example(ours.body["rnn"], device)
    with use_backend(backend):
        traced, expected = fx.symbolic_trace(ours), fx.symbolic_trace(theirs)
        assert [(n.op, str(n.target)) for n in traced.graph.nodes] == [(n.op, str(n.target)) for n in expected.graph.nodes]
        assert ("call_module", "body.rnn") in [(n.op, n.target) for n in traced.graph.nodes]
        rnn = traced.get_submodule("body.rnn")
        assert rnn is ours.body["rnn"] and type(rnn) is getattr(fused_rnn, name)
        assert "__module__" not in rnn.__dict__ and rnn.__module__.startswith("fused_rnn.")
        y = ours(x, hx)
        clone = copy.deepcopy(traced)
        again = fx.symbolic_trace(traced)
        loaded = pickle.loads(pickle.dumps(traced))
        traced.graph.lint()
        traced.recompile()
        for graph in (traced, clone, again, loaded):
            out = graph(x, hx)
            assert_close(out, y, "output")
            grads = torch.autograd.grad(out.sum(), list(graph.parameters()))
            assert_close(list(grads), list(torch.autograd.grad(ours(x, hx).sum(), list(ours.parameters()))))
        assert type(clone.get_submodule("body.rnn")) is getattr(fused_rnn, name)
        assert_close(fx.Interpreter(traced).run(x, hx), y)
        with torch.no_grad():
            rnn.get_parameter("weight_hh" if name in CELLS else "weight_hh_l0").zero_()
            assert_close(traced(x, hx), ours(x, hx))


class Paths(fx.Tracer):
    """What torchvision's create_feature_extractor traces with (NodePathTracer): the path of a module is kept for each node
    made while it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.current = ""
        self.paths: dict[str, str] = {}

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        before, self.current = self.current, self.path_of_module(m)
        try:
            if not self.is_leaf_module(m, self.current):
                return forward(*args, **kwargs)
            return self.create_proxy("call_module", self.current, args, kwargs)
        finally:
            self.current = before

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        self.paths[proxy.node.name] = self.current
        return proxy


@pytest.mark.parametrize("name", CLASSES)
def test_feature_extractor(name: str) -> None:
    """The node found by its path becomes the output; what comes after it is cut off."""
    ours, _ = make_pair(name, 4, 6)
    model = fused_rnn.convert(Model(getattr(nn, name)(4, 6))).eval()
    model.body["rnn"].load_state_dict(ours.state_dict())
    tracer = Paths()
    graph = tracer.trace(model)
    node = next(n for n in graph.nodes if tracer.paths.get(n.name) == "body.rnn")
    graph.erase_node(graph.output_node())
    graph.output({"feature": node})
    extractor = fx.GraphModule(tracer.root, graph)
    graph.eliminate_dead_code()
    extractor.recompile()
    x, hx = example(model.body["rnn"], "cpu")
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["first", "body.rnn"]
    assert_close(extractor(x, hx)["feature"], model.body["rnn"](model.first(x).relu(), hx))


@pytest.mark.parametrize("name", CLASSES)
def test_hooks_stay_with_the_leaf(name: str) -> None:
    """Hooks run when the traced model is called, once, and never while it is traced."""
    model, events = Model(getattr(fused_rnn, name)(4, 6)), []
    model.body["rnn"].register_forward_hook(lambda m, args, out: events.append(type(out)))
    traced = fx.symbolic_trace(model)
    assert events == []
    traced(*example(model.body["rnn"], "cpu"))
    assert events == [torch.Tensor if name in ("GRUCell", "RNNCell") else tuple]


def test_parametrized_layers_are_leaves_and_subclasses_are_not() -> None:
    class Own(fused_rnn.GRU):
        def forward(self, input: Any, hx: Any = None) -> Any:
            return input * 2, None

    model = Model(Own(4, 6))
    model.last = nn.Identity()
    assert "call_module" not in [n.op for n in fx.symbolic_trace(model).graph.nodes if n.target == "body.rnn"]
    for name in LAYERS:
        module = Model(getattr(fused_rnn, name)(4, 6))
        nn.utils.parametrizations.weight_norm(module.body["rnn"], "weight_hh_l0")
        traced = fx.symbolic_trace(module)
        assert ("call_module", "body.rnn") in [(n.op, n.target) for n in traced.graph.nodes]
        x = torch.randn(5, 2, 4)
        assert_close(traced(x), module(x))


def test_a_trace_that_fails_leaves_the_name_alone() -> None:
    class Refusing(fx.Tracer):
        def call_module(self, m: nn.Module, *args: Any) -> Any:
            assert m.__module__ == "torch.nn.modules.rnn"
            raise ZeroDivisionError

    layer = fused_rnn.LSTM(4, 6)
    with pytest.raises(ZeroDivisionError), warnings.catch_warnings():
        Refusing().trace(nn.Sequential(layer))
    assert layer.__module__ == "fused_rnn.modules" and "__module__" not in layer.__dict__
