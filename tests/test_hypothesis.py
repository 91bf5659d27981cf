"""Random configurations against torch.nn in float64: any sizes, options, forms of input, and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from module_pairs import CELLS, LAYERS, compare, device_of, make_pair, random_state
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from fused_rnn import use_backend

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
st = hypothesis.strategies

# Function-scoped fixtures are only the backend's name; deadlines measure the machine.
SETTINGS = hypothesis.settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
SIZES = st.integers(1, 19)


@st.composite
def layer_configs(draw: Any) -> dict[str, Any]:
    name = draw(st.sampled_from(LAYERS))
    hidden = draw(SIZES)
    kwargs: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    if name == "LSTM":
        kwargs["proj_size"] = draw(st.integers(0, hidden - 1))
    if name == "RNN":
        kwargs["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    form = draw(st.sampled_from(["batched", "unbatched", "packed"]))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=9)) if form == "packed" else []
    return {
        "name": name,
        "inputs": draw(SIZES),
        "hidden": hidden,
        "kwargs": kwargs,
        "form": form,
        "steps": max(lengths, default=0) or draw(st.integers(1, 9)),
        "batch": len(lengths) or draw(st.integers(0, 9)),
        "lengths": lengths,
        "with_state": draw(st.booleans()),
        "transposed": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


@SETTINGS
@hypothesis.given(config=layer_configs())
def test_layers(backend: str, config: dict[str, Any]) -> None:
    place = {"dtype": torch.float64, "device": device_of(backend)}
    g = torch.Generator().manual_seed(config["seed"])
    with use_backend(backend):
        ours, theirs = make_pair(
            config["name"], config["inputs"], config["hidden"], seed=config["seed"], **config["kwargs"], **place
        )
        batch, batch_first = config["batch"], config["kwargs"]["batch_first"]
        x = torch.randn(config["steps"], batch, config["inputs"], generator=g, dtype=torch.float64).to(**place)
        if config["transposed"]:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        if config["form"] == "packed":
            x = pack_padded_sequence(x, config["lengths"], enforce_sorted=False)
        elif config["form"] == "unbatched":
            x, batch = torch.randn(config["steps"], config["inputs"], generator=g, dtype=torch.float64).to(**place), None
        elif batch_first:
            x = x.transpose(0, 1)
        hx = random_state(theirs, batch, g, **place) if config["with_state"] else None
        compare(ours, theirs, x, hx, str(config))


@SETTINGS
@hypothesis.given(
    name=st.sampled_from(CELLS),
    inputs=SIZES,
    hidden=SIZES,
    bias=st.booleans(),
    relu=st.booleans(),
    batch=st.one_of(st.none(), st.integers(0, 17)),
    with_state=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_cells(
    backend: str, name: str, inputs: int, hidden: int, bias: bool, relu: bool, batch: int | None, with_state: bool, seed: int
) -> None:
    place = {"dtype": torch.float64, "device": device_of(backend)}
    g = torch.Generator().manual_seed(seed)
    kwargs = {"nonlinearity": "relu"} if name == "RNNCell" and relu else {}
    with use_backend(backend):
        ours, theirs = make_pair(name, inputs, hidden, bias, seed=seed, **kwargs, **place)
        x = torch.randn([inputs] if batch is None else [batch, inputs], generator=g, dtype=torch.float64).to(**place)
        compare(ours, theirs, x, random_state(theirs, batch, g, **place) if with_state else None)


@SETTINGS
@hypothesis.given(config=layer_configs(), dropout=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_training_mode_dropout(backend: str, config: dict[str, Any], dropout: float) -> None:
    """The masks of torch.nn from the same seed, whatever the stack looks like."""
    if backend == "cuda":
        pytest.skip("cuDNN draws its masks from a generator of its own")
    config["kwargs"]["num_layers"] += 1
    with use_backend(backend):
        ours, theirs = make_pair(
            config["name"], config["inputs"], config["hidden"], dropout=dropout, **config["kwargs"], dtype=torch.float64
        )
        x = torch.randn(config["steps"], max(config["batch"], 1), config["inputs"], dtype=torch.float64)
        if config["form"] == "packed":
            x = pack_padded_sequence(x, config["lengths"], enforce_sorted=False)
        results = []
        for module in (ours, theirs):
            torch.manual_seed(config["seed"])
            output = module(x)[0]
            results.append(output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output)
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
