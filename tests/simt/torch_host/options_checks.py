"""Options of steps, reset states, every state and checkpoints, beside checks.py: by the ops for CUDA, from modules and
functions on, against loops of torch ops in float64."""

from __future__ import annotations

import ctypes
import itertools
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# isort: off
from checks import EXTENSION, calls  # builds the extension, before fused_rnn is imported

# isort: on
import test_regularisation
from cases import CELLS, GRADIENT_TOLERANCE, OUTPUT_TOLERANCE
from settings import Setting
from settings import setting as setting
from test_regularisation import OPTIONS, PAIRS

import fused_rnn
from fused_rnn import _checkpoint, use_backend


class _NoCells(types.ModuleType):
    """In place of formula_cells, which calls functions of torch's that end a process of the simulator."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


sys.modules["formula_cells"] = _NoCells("formula_cells")
import test_extras  # noqa: E402
from test_extras import CONFIG, Call, by_function, by_module, flat  # noqa: E402

del sys.modules["formula_cells"]

F16 = torch.float16
EXACT, EXACT_GRADIENTS = 1e-12, 1e-11
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # CPU tensors are the device's here: so are these two
    _library = torch.library.Library("fused_rnn", "IMPL")
    _library.impl("layer_checkpointed", _checkpoint._layer_on_gpu, "CPU", allow_override=True)
    _library.impl("layer_checkpointed_backward", _checkpoint._layer_backward_on_gpu, "CPU", allow_override=True)


@pytest.fixture(autouse=True)
def by_kernels() -> Iterator[None]:
    """The kernels serve the calls of a check."""
    before = calls()[0]
    with use_backend("cpu"):
        yield
    assert calls()[0] > before


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("cell", "option"), PAIRS)
def test_options(cell: str, option: str, training: bool) -> None:
    form, resets = ("dense", "lengths", "packed")[len(option) % 3], "state" if training else "zeros"
    test_regularisation.Case(
        cell=cell, form=form, resets=resets, bidirectional=True, layers=2, all_states=training, training=training,
        options=OPTIONS[option],
    ).check(EXACT_GRADIENTS)  # fmt: skip


@pytest.mark.parametrize("option", ["state", "candidate", "clip"])
def test_options_with_a_projection(option: str) -> None:
    test_regularisation.Case(
        proj=3, form="lengths", resets="state", all_states=True, bidirectional=True, options=OPTIONS[option]
    ).check(EXACT_GRADIENTS)


@pytest.mark.parametrize("dtype", [torch.float32, F16], ids=str)
@pytest.mark.parametrize("option", ["zoneout", "state", "candidate"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_options_of_a_dtype(cell: str, option: str, dtype: torch.dtype) -> None:
    """Against the loop in float64, from the same numbers and masks."""
    config = {"cell": cell, "hidden": 12, "form": "packed", "resets": "state", "options": OPTIONS[option]}
    case, exact = (test_regularisation.Case(dtype=d, **config) for d in (dtype, torch.float64))
    with torch.no_grad():
        for mine, theirs in zip(case.leaves(), exact.leaves(), strict=True):
            theirs.copy_(mine)
    drawn = test_regularisation._as(case.drawn(), exact)
    exact.drawn = lambda: drawn  # type: ignore[method-assign]
    found, expected = case.results_and_gradients(case.run()), exact.results_and_gradients(exact.by_hand())
    results = len(case.sizes) + 1
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        allowed = (OUTPUT_TOLERANCE if index < results else GRADIENT_TOLERANCE)[dtype]
        test_extras.assert_close([mine], [theirs], allowed, f"tensor {index}")


@pytest.mark.parametrize("form", ["dense", "lengths", "packed", "unbatched"])
@pytest.mark.parametrize(("cell", "kind"), [*itertools.product(CELLS, ("shared", "rows", "steps")), ("LSTM", "zeros")])
def test_reset_states_and_every_state(cell: str, kind: str, form: str) -> None:
    more = {"batch": 1} if form == "unbatched" else {}
    call = Call(CONFIG | {"cell": cell, "form": form, "reset_state": kind, "bidirectional": True, "layers": 2} | more)
    ours, theirs = (by_module if kind == "rows" else by_function)(call), call.by_hand()
    test_extras.assert_close(ours, theirs, EXACT, "results")
    pairs = (test_extras.gradients(results, call.leaves()) for results in (ours, theirs))
    test_extras.assert_close(*pairs, EXACT_GRADIENTS, "gradients")


def products() -> int:
    """How many matrix products family `gemm` has asked for."""
    return ctypes.CDLL(EXTENSION.__file__).torch_host_library_products()


@pytest.mark.parametrize(("cell", "option"), PAIRS)
def test_options_by_family_gemm(cell: str, option: str, setting: Setting) -> None:
    """Forward and backward: a product for each step and direction of both, and the gradient of h0 is the last one."""
    setting("FUSED_RNN_PLAN", "gemm")
    case = test_regularisation.Case(
        cell=cell, form=("dense", "lengths", "packed")[len(option) % 3], resets="state", bidirectional=True, layers=2,
        all_states=True, options=OPTIONS[option],
    )  # fmt: skip
    before = products()
    case.check(EXACT_GRADIENTS)
    steps, made = case.config["steps"], products() - before
    assert made == 2 * 2 * 2 * steps, (made, steps)


@pytest.mark.parametrize("family", ["step", "grid", "cluster", "gemm", "single"])
@pytest.mark.parametrize("dtype", [torch.float32, F16], ids=str)
def test_every_c_by_every_family(family: str, dtype: torch.dtype, setting: Setting) -> None:
    """Of inference, whose kernels give it as those of training do. Its gradients are the family step's."""
    setting("FUSED_RNN_PLAN", family)
    lstm = fused_rnn.LSTM(4, 20, dtype=dtype)
    x = torch.randn(1 if family == "single" else 6, 3, 4, dtype=dtype)
    lengths = torch.tensor([x.shape[0], 0, 1])
    exact = fused_rnn.LSTM(4, 20, dtype=torch.float64)
    exact.load_state_dict(lstm.state_dict())
    with torch.no_grad():
        inferred = flat(lstm(x, lengths=lengths, return_all_states=True))
    found = flat(lstm(x, lengths=lengths, return_all_states=True))
    with use_backend("reference"):
        expected = flat(exact(x.double(), lengths=lengths, return_all_states=True))
    for results in (inferred, found):
        test_extras.assert_close(results, expected, OUTPUT_TOLERANCE[dtype], "results")
    pairs = (test_extras.gradients(r, list(m.parameters())) for r, m in ((found, lstm), (expected, exact)))
    test_extras.assert_close(*pairs, GRADIENT_TOLERANCE[dtype], "gradients")


@pytest.mark.parametrize("option", ["all", "none"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_checkpoint(cell: str, option: str) -> None:
    """Outputs and gradients are those of a layer that keeps everything."""
    results = []
    for every in (0, 2):
        case = test_regularisation.Case(
            cell=cell, resets="state", form="lengths", bidirectional=True, layers=2, all_states=True,
            options={**OPTIONS.get(option, {}), "checkpoint": every},
        )  # fmt: skip
        results.append(case.results_and_gradients(case.run()))
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


def test_second_derivatives() -> None:
    test_regularisation.test_second_derivatives("cpu")


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_gradients_of_samples(cell: str) -> None:
    """Of weights, by rows of the batch, with a state that resets put."""
    module = getattr(fused_rnn, cell)(3, 5, dtype=torch.float64)
    parameters = dict(module.named_parameters())
    x, resets = torch.randn(4, 3, 3, dtype=torch.float64), torch.rand(4, 3) < 0.4
    put = torch.randn(1, 1, 5, dtype=torch.float64)
    state: Any = (put, put + 1) if cell == "LSTM" else put

    def loss(values: Any, sample: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
        keywords = {"resets": flags.unsqueeze(1), "reset_state": state}
        return torch.func.functional_call(module, values, (sample.unsqueeze(1),), keywords)[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 1, 1))(parameters, x, resets)
    for b in range(3):
        expected = torch.func.grad(loss)(parameters, x[:, b], resets[:, b])
        for name, value in expected.items():
            torch.testing.assert_close(found[name][b], value)


@pytest.mark.parametrize("family", ["grid", "cluster"])
def test_a_family_without_such_kernels(family: str, setting: Setting) -> None:
    """Forced, it says what it lacks; chosen for calls of that size, it leaves these to the family step."""
    lstm, x = fused_rnn.LSTM(4, 20, zoneout=0.2), torch.randn(5, 3, 4)
    lstm(x)
    setting("FUSED_RNN_PLAN", family)
    with pytest.raises(RuntimeError, match=f"family {family} cannot serve this layer: {family} has no kernels with zoneout"):
        lstm(x)


def test_the_tuner_is_not_asked() -> None:
    """There is one family with such kernels."""
    asked = []

    def chooser(question: Any, arguments: Any) -> Any:
        asked.append(question)
        return None, False, None

    x = torch.randn(5, 3, 4)
    resets, put = torch.rand(5, 3) < 0.5, torch.randn(1, 1, 20)
    EXTENSION.set_chooser(chooser)
    try:
        fused_rnn.GRU(4, 20, zoneout=0.2)(x)
        fused_rnn.GRU(4, 20)(x, resets=resets, reset_state=put)
        assert not asked
    finally:
        EXTENSION.set_chooser(None)
