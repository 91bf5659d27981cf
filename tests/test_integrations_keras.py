"""Keras's layers on our kernels against themselves, and Keras's own tests of them.

The package is optional (``pip install '.[integrations]'``); without it the tests skip.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from module_pairs import assert_close
from torch import Tensor

from fused_rnn import use_backend
from fused_rnn._backend import has_cpu_kernels
from fused_rnn.integrations import keras as ours

os.environ.setdefault("KERAS_BACKEND", "torch")
if importlib.util.find_spec("keras") is None:
    pytest.skip("needs the package keras", allow_module_level=True)
if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("needs KERAS_BACKEND=torch", allow_module_level=True)
import keras

ORIGINALS = [vars(cls)["inner_loop"] for cls in (keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU)]
B, T, INPUTS, H = 5, 7, 4, 6
needs_kernels = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")
MASKS = {
    "none": None,
    "right": torch.arange(T) < torch.tensor([[7], [3], [1], [0], [5]]),  # one row without any step
    "left": torch.arange(T) >= torch.tensor([[7], [3], [1], [0], [5]]),
    "holes": torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.5,
}


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And Keras's products of float64 in float64: its own torch backend casts them to float32 and back."""

    def matmul(a: Any, b: Any) -> Tensor:
        return torch.matmul(keras.ops.convert_to_tensor(a), keras.ops.convert_to_tensor(b))

    monkeypatch.setattr(keras.src.backend.numpy, "matmul", matmul)
    yield
    assert ORIGINALS == [vars(cls)["inner_loop"] for cls in (keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU)]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call with values was ours."""
    calls: list[bool] = []
    original = ours._serve

    def recording(layer: Any, sequences: Any, *args: Any) -> Any:
        found = original(layer, sequences, *args)
        if sequences.device.type != "meta":
            calls.append(found is not None)
        return found

    monkeypatch.setattr(ours, "_serve", recording)
    return calls


def run(layer: Any, mask: Tensor | None = None, states: bool = False, **call: Any) -> list[Tensor]:
    """Outputs, and the gradients of the weights, the input and the initial states."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, INPUTS, dtype=torch.float64, generator=generator, requires_grad=True)
    initial = None
    if states:
        sizes = layer.state_size
        initial = [torch.randn(B, s, dtype=torch.float64, generator=generator, requires_grad=True) for s in sizes]
    outputs = layer(x, mask=mask, initial_state=initial, **call)
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    weights = [variable.value for variable in layer.trainable_variables]
    loss = sum((output * torch.linspace(0.5, 1, output.shape[-1])).square().sum() for output in keras.tree.flatten(outputs))
    leaves = [x, *weights, *(initial or [])]
    gradients = torch.autograd.grad(loss, leaves)
    return [*keras.tree.flatten(outputs), *gradients]


def make(name: str, **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    layer = getattr(keras.layers, name)(H, dtype="float64", **options)
    layer.build((B, T, INPUTS))
    for variable in layer.trainable_variables:  # biases that are not zeros
        variable.assign(variable + 0.1 * torch.randn(variable.shape, dtype=torch.float64))
    return layer


def check(layer: Any, served: list[bool], mine: bool = True, mask: Tensor | None = None, **call: Any) -> None:
    expected = run(layer, mask, **call)
    assert served == []
    with ours.enabled():
        found = run(layer, mask, **call)
    assert_close(found, expected)
    assert served and served[-1] is mine and (mine or not any(served))
    served.clear()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{}, {"go_backwards": True}, {"zero_output_for_mask": True}], ids=str)
@pytest.mark.parametrize("sequences", [True, False])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN"])
def test_masks(name: str, sequences: bool, options: dict[str, Any], mask: str, served: list[bool]) -> None:
    layer = make(name, return_sequences=sequences, return_state=True, **options)
    for states in (False, True):
        check(layer, served, mask=MASKS[mask], states=states)


@pytest.mark.parametrize(
    "options", [{"unroll": True}, {"use_bias": False}, {"implementation": 1}, {"use_cudnn": False}], ids=str
)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN"])
def test_options(name: str, options: dict[str, Any], served: list[bool]) -> None:
    if name == "SimpleRNN" and ("implementation" in options or "use_cudnn" in options):
        pytest.skip("SimpleRNN has no such argument")
    layer = make(name, return_sequences=True, return_state=True, **options)
    check(layer, served)
    check(layer, served, mask=MASKS["holes"])


@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_simple_rnns_activations(activation: str, served: list[bool]) -> None:
    check(make("SimpleRNN", activation=activation), served)


FORMULAS = [
    ("GRU", {"reset_after": False}),
    ("LSTM", {"activation": "relu", "recurrent_activation": "hard_sigmoid"}),
    pytest.param("GRU", {"recurrent_activation": "hard_sigmoid"}, marks=pytest.mark.slow),
    pytest.param("GRU", {"reset_after": False, "recurrent_activation": "hard_sigmoid"}, marks=pytest.mark.slow),
    *(
        pytest.param("SimpleRNN", {"activation": name}, marks=pytest.mark.slow)
        for name in ("hard_sigmoid", "softplus", "softsign", "silu", "gelu", "elu", "leaky_relu")
    ),
]


@needs_kernels
@pytest.mark.parametrize(("name", "options"), FORMULAS, ids=str)
def test_formulas(name: str, options: dict[str, Any], served: list[bool]) -> None:
    """What has kernels as a cell of the zoo."""
    for use_bias in (True, False):
        layer = make(name, return_sequences=True, return_state=True, use_bias=use_bias, **options)
        for mask in MASKS.values():
            check(layer, served, mask=mask)
        check(layer, served, states=True)


def test_backends(backend: str, served: list[bool]) -> None:
    if backend == "cuda":
        pytest.skip("the tensors are on the CPU")
    with use_backend(backend):
        check(make("LSTM", return_sequences=True), served, mask=MASKS["holes"])


def test_cells_of_other_dtypes_stay_theirs(served: list[bool]) -> None:
    """Keras casts between a layer, a stack of cells and its cells."""
    mixed = [keras.layers.RNN(cells("GRU")[0]), keras.layers.RNN(cells("GRU", "LSTM"), dtype="float64")]
    for layer in mixed:
        layer.build((B, T, INPUTS))
        check(layer, served, mine=False)


def test_stateful(served: list[bool]) -> None:
    """Three batches; the states of each are where the next one starts. With a mask: Keras's backward fails without one."""
    layer = make("LSTM", return_sequences=True, stateful=True)
    layer.reset_state()
    expected = [run(layer, MASKS["holes"]) for _ in range(3)]
    layer.reset_state()
    with ours.enabled():
        for theirs in expected:
            assert_close(run(layer, MASKS["holes"]), theirs)
        run(layer)
    assert served == [True] * 4
    assert (expected[0][0] - expected[1][0]).abs().max() > 1e-3


def cells(*kinds: str) -> list[Any]:
    return [getattr(keras.layers, f"{kind}Cell")(H, dtype="float64") for kind in kinds]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kinds", [["LSTM"], ["GRU"], ["SimpleRNN"], ["LSTM", "GRU", "SimpleRNN"], ["GRU", "GRU"]], ids=str)
def test_rnn_of_cells(kinds: list[str], mask: str, served: list[bool]) -> None:
    made = cells(*kinds)
    cell = keras.layers.StackedRNNCells(made, dtype="float64") if len(made) > 1 else made[0]
    layer = keras.layers.RNN(cell, return_sequences=True, return_state=True, dtype="float64")
    layer.build((B, T, INPUTS))
    check(layer, served, mask=MASKS[mask])


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_bidirectional(name: str, served: list[bool]) -> None:
    layer = keras.layers.Bidirectional(make(name, return_sequences=True), dtype="float64")
    layer.build((B, T, INPUTS))
    for mask in MASKS.values():
        check(layer, served, mask=mask)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN"])
def test_dropout(name: str, served: list[bool]) -> None:
    """The same seed draws the same masks."""

    def found(training: bool) -> list[Tensor]:
        return run(make(name, dropout=0.5, seed=7, return_sequences=True), training=training)

    expected = found(True), found(False)
    with ours.enabled():
        assert_close(found(True), expected[0])
        assert_close(found(False), expected[1])
    assert served == [True, True]
    assert (expected[0][0] - expected[1][0]).abs().max() > 1e-3


def custom(x: Tensor) -> Tensor:
    return torch.sin(x)


@pytest.mark.parametrize(
    ("name", "options", "call"),
    [
        ("LSTM", {"activation": custom}, {}),
        ("GRU", {"recurrent_activation": custom}, {}),
        ("SimpleRNN", {"activation": custom}, {}),
        ("GRU", {"recurrent_dropout": 0.5, "seed": 7}, {"training": True}),
        ("SimpleRNN", {"dropout": 0.5, "recurrent_dropout": 0.5, "seed": 7}, {"training": True}),
    ],
    ids=str,
)
def test_what_stays_theirs(name: str, options: dict[str, Any], call: dict[str, Any], served: list[bool]) -> None:
    expected = run(make(name, return_sequences=True, **options), **call)
    with ours.enabled():
        assert_close(run(make(name, return_sequences=True, **options), **call), expected)
    assert served and not any(served)


def test_derived_cells_and_hooks_stay_theirs(served: list[bool]) -> None:
    class Derived(keras.layers.LSTMCell):
        def call(self, inputs: Any, states: Any, training: bool = False) -> Any:
            output, states = super().call(inputs, states, training)
            return 2 * output, states

    layer = keras.layers.RNN(Derived(H, dtype="float64"), return_sequences=True, dtype="float64")
    layer.build((B, T, INPUTS))
    check(layer, served, mine=False)
    hooked = keras.layers.RNN(cells("GRU")[0], dtype="float64")
    hooked.build((B, T, INPUTS))
    hooked.cell.register_forward_hook(lambda *args: None)
    check(hooked, served, mine=False)


def test_errors_stay_theirs() -> None:
    """use_cudnn=True refuses a mask, as without ours."""
    layer = make("LSTM", use_cudnn=True)
    for enable in (False, True):
        if enable:
            ours.enable()
        try:
            with pytest.raises(ValueError, match="use_cudnn=True was specified"):
                run(layer, MASKS["right"])
        finally:
            ours.disable()


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_fit(dtype: str, served: list[bool]) -> None:
    """A model trains to the same weights; its Embedding masks, and mixed precision casts."""

    def weights() -> list[Tensor]:
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.layers.Embedding(20, INPUTS, mask_zero=True, dtype=dtype),
                keras.layers.Bidirectional(keras.layers.LSTM(H, return_sequences=True, dtype=dtype), dtype=dtype),
                keras.layers.GRU(H, dtype=dtype),
                keras.layers.Dense(1, dtype="float32"),
            ]
        )
        model.compile(optimizer=keras.optimizers.SGD(0.05), loss="mse")
        tokens = torch.randint(0, 20, (32, T), generator=torch.Generator().manual_seed(0))
        model.fit(tokens, tokens.float().mean(1, keepdim=True) / 10, epochs=3, batch_size=8, shuffle=False, verbose=0)
        return [torch.as_tensor(weight) for weight in model.get_weights()]

    expected = weights()
    with ours.enabled():
        found = weights()
    assert served and all(served)
    error = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
    assert error < (1e-5 if dtype == "float32" else 1e-2)


def test_refuses_other_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match="expected Keras's backend torch, found jax"):
        ours.enable()


@pytest.mark.slow
def test_kerass_own_tests() -> None:
    """Keras's tests of these layers, from its wheel, with ours on."""
    folder = Path(keras.__file__).parent / "src" / "layers" / "rnn"
    names = ("lstm", "gru", "simple_rnn", "rnn", "stacked_rnn_cells", "bidirectional")
    files = [str(folder / f"{name}_test.py") for name in names]
    missing = [file for file in files if not Path(file).exists()]
    if missing:
        pytest.skip(f"needs {missing}, which this wheel of Keras lacks")
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, str(Path(here).parent)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "keras_enabled", "-p", "no:cacheprovider", "-W", "ignore", *files]
    done = subprocess.run([*command, "--rootdir", str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]
    served = re.search(r"fused_rnn served (\d+) calls", done.stdout)
    assert served is not None and int(served[1]) > 100, done.stdout[-1000:]
