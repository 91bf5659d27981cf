"""What all integrations share: versions, enabling and disabling; without the packages, on a stand-in for one."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import nn
from torch.nn.utils import prune

import fused_rnn
from fused_rnn import integrations
from fused_rnn.integrations._integration import Integration, Replacement, weights_of

PACKAGES = {"keras": "keras", "opacus": "opacus", "sb3": "sb3-contrib", "torchrl": "torchrl"}


class Theirs:
    @staticmethod
    def fixed(x: int) -> str:
        return f"theirs {x}"

    def method(self, x: int) -> str:
        return f"theirs {x}"


ORIGINALS = dict(vars(Theirs))


def make(original: Callable[..., str]) -> Callable[..., str]:
    return lambda *args: f"ours over {original(*args)}"


def replacements() -> Iterator[Replacement]:
    yield Replacement(Theirs, "fixed", make)
    yield Replacement(Theirs, "method", make)


def found() -> tuple[str, str]:
    return Theirs.fixed(1), Theirs().method(2)


PLAIN, OURS = ("theirs 1", "theirs 2"), ("ours over theirs 1", "ours over theirs 2")


@pytest.fixture
def integration(monkeypatch: pytest.MonkeyPatch) -> Integration:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.2")
    return Integration("stand_in", "stand-in", ("2.8", "2.9"), replacements)


def test_enable_and_disable(integration: Integration) -> None:
    assert found() == PLAIN
    integration.enable()
    integration.enable()
    assert found() == OURS
    integration.disable()
    assert found() == PLAIN
    assert {name: vars(Theirs)[name] for name in ("fixed", "method")} == {n: ORIGINALS[n] for n in ("fixed", "method")}
    integration.disable()
    assert found() == PLAIN


def test_blocks(integration: Integration) -> None:
    with integration.enabled():
        with integration.enabled():
            assert found() == OURS
        integration.disable()  # undoes enable(), of which there was none
        assert found() == OURS
    assert found() == PLAIN
    with pytest.raises(KeyError), integration.enabled():
        raise KeyError
    assert found() == PLAIN
    integration.enable()
    with integration.enabled():
        pass
    assert found() == OURS
    integration.disable()
    assert found() == PLAIN


def test_threads(integration: Integration) -> None:
    """Blocks that overlap between threads: whoever is inside finds ours, and in the end theirs are back."""
    errors = []

    def work() -> None:
        for _ in range(200):
            with integration.enabled():
                if found() != OURS:
                    errors.append(found())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and found() == PLAIN


def test_replaced_again(integration: Integration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Theirs, "method", Theirs.method)  # puts it back after the test
    integration.enable()
    Theirs.method = lambda self, x: "a third party's"  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"stand_in: left as they are, since they were replaced again: Theirs\.method$"):
        integration.disable()
    assert found() == ("theirs 1", "a third party's")


def test_nothing_is_replaced_where_one_is_missing(integration: Integration) -> None:
    def some() -> Iterator[Replacement]:
        yield from replacements()
        yield Replacement(Theirs, "gone", make)

    integration._replacements = some
    with pytest.raises(KeyError):
        integration.enable()
    assert found() == PLAIN


@pytest.mark.parametrize("version", ["2.7.9", "2.10.0", "2.90", "3.0"])
def test_unknown_version(integration: Integration, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(RuntimeError, match=rf"expected stand-in 2\.8\.\* or 2\.9\.\*, found {version}, of which"):
        integration.enable()
    with pytest.raises(RuntimeError, match="stand_in"), integration.enabled():
        pass
    assert found() == PLAIN


@pytest.mark.parametrize("name", PACKAGES)
def test_each_refuses_unknown_versions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = getattr(integrations, name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    with pytest.raises(RuntimeError, match=rf"integrations\.{name}: expected {PACKAGES[name]} .*, found 0\.0\.1"):
        module.enable()

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=rf"integrations\.{name}: expected {PACKAGES[name]} .*, which is not installed"):
        module.enable()


def test_imports() -> None:
    """fused_rnn imports no integration, and an integration no package before it is enabled."""
    code = """
import sys, fused_rnn
print("fused_rnn.integrations" in sys.modules)
for name in fused_rnn.integrations.__all__:
    getattr(fused_rnn.integrations, name).disable()
print([name for name in ("keras", "opacus", "sb3_contrib", "torchrl", "tensordict") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n[]\n"
    assert isinstance(fused_rnn.integrations, types.ModuleType)
    with pytest.raises(AttributeError, match="no attribute 'jax'"):
        _ = fused_rnn.integrations.jax


def test_weights_of() -> None:
    def layer() -> Any:
        return nn.LSTM(3, 4, num_layers=2, proj_size=2)

    weights = weights_of(layer(), nn.LSTM)
    assert weights is not None and [tuple(w.shape) for w in weights] == [tuple(p.shape) for p in layer().parameters()]
    assert weights_of(layer(), nn.GRU) is None
    assert weights_of(fused_rnn.convert(layer()), nn.LSTM) is None
    assert weights_of(fused_rnn.convert(layer()), nn.LSTM, fused_rnn.LSTM) is not None
    hooked, own = layer(), layer()
    hooked.register_forward_hook(lambda *args: None)
    own.forward = lambda *args: None
    parametrized = nn.utils.parametrizations.weight_norm(layer(), "weight_hh_l0")
    pruned = layer()
    prune.l1_unstructured(pruned, "weight_hh_l0", 0.5)  # a pre-hook computes the weight
    for other in (hooked, own, parametrized, pruned):
        assert weights_of(other, nn.LSTM) is None
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert weights_of(layer(), nn.LSTM) is None
    handle.remove()
    assert weights_of(layer(), nn.LSTM) is not None
