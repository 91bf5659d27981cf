"""Family cudnn of the planner: what cuDNN lacks, and which of its algorithms torch asks for (ATen/native/cudnn/RNN.cpp)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fused_rnn import _settings
from fused_rnn._explain import DEVICES
from fused_rnn._kinds import KINDS, Kind

if _settings.extension is None:
    pytest.skip("needs the extension, which plans", allow_module_level=True)


def plan(device: str = "H100", **changed: Any) -> dict[str, Any]:
    sizes = {"cell": "lstm", "dtype": "float16", "T": 100, "B": 16, "I": 256, "H": 256, "forced": "cudnn", **changed}
    result: dict[str, Any] = _settings.extension.plan(device=DEVICES[device], **sizes)  # type: ignore[union-attr]
    return result


def lacks(**changed: Any) -> str:
    call = {
        "cell": "lstm", "T": 100, "enabled": True, "deterministic": False, "one_step": False, "modified": False,
        "empty": False, **changed,
    }  # fmt: skip
    result: str = _settings.extension.cudnn_lacks(**call)  # type: ignore[union-attr]
    return result


@pytest.mark.parametrize(
    ("changed", "algorithm"),
    [
        ({}, "persistent algorithm: fp16"),
        ({"H": 192}, "small-H persistent algorithm: H is 192 at most"),
        ({"H": 192, "backward": True}, "standard algorithm"),
        ({"H": 128, "backward": True}, "small-H persistent algorithm: H is 128 at most"),
        ({"cell": "rnn_tanh", "H": 384, "dtype": "float32"}, "small-H persistent algorithm: H is 384 at most"),
        (
            {"cell": "rnn_relu", "H": 384, "dtype": "float32", "backward": True},
            "standard algorithm: the persistent one is for",
        ),
        ({"dtype": "bfloat16"}, "standard algorithm: the persistent one is for fp16"),
        ({"H": 64, "dtype": "float64"}, "standard algorithm: it is in fp64"),
        ({"H": 64, "ragged": True}, "standard algorithm: the input is packed"),
        ({"H": 64, "P": 32}, "standard algorithm: it has a projection"),
        ({"cell": "gru"}, "standard algorithm: the persistent one is not for GRUs"),
        ({"I": 200}, "standard algorithm: the persistent one takes one layer in one direction"),
        ({"D": 2}, "standard algorithm: the persistent one takes one layer in one direction"),
        ({"H": 1152}, "standard algorithm: the persistent one takes one layer in one direction"),
        ({"B": 12}, "standard algorithm: the persistent one takes multiples of 8 batch rows"),
        ({"B": 136}, "standard algorithm: the persistent one takes multiples of 8 batch rows"),
        ({"cell": "rnn_tanh", "B": 96, "H": 896}, "standard algorithm: the persistent one takes multiples of 8 batch rows"),
        ({"device": "RTX 3090"}, "standard algorithm: the persistent one is not for this device"),
        ({"device": "T4"}, "standard algorithm: the persistent one is not for this device"),
    ],
    ids=str,
)
def test_algorithm(changed: dict[str, Any], algorithm: str) -> None:
    made = plan(**changed)
    assert made["family"] == "cudnn" and f"torch asks cuDNN for its {algorithm}" in made["reason"]
    assert made["kernels"] == [] and made["us"] > 0
    assert algorithm in made["text"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"cell": "rnn_identity"}, "cudnn has no cell rnn_identity"),
        ({"T": 65536}, "cudnn makes 65535 steps at most"),
        ({"I": 0}, "cudnn takes no empty input"),
    ],
    ids=str,
)
def test_what_it_lacks(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"kernel family cudnn cannot serve this layer: {reason}"):
        plan(**changed)
    assert plan(forced=None, preferred="cudnn", **changed)["family"] == "step", "where it can"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.mode)
def test_cells(kind: Kind) -> None:
    """Every cell that torch.nn runs by cuDNN, and no other: planned, called and explained alike."""
    lacking = "" if kind.mode in ("LSTM", "GRU", "RNN_TANH", "RNN_RELU") else f"has no cell {kind.name}"
    assert lacks(cell=kind.name) == lacking
    assert plan(forced=None, preferred="cudnn", cell=kind.name)["rejected"].get("cudnn") == (lacking or None)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"T": 65535}, ""),
        ({"T": 65536}, "makes 65535 steps at most"),
        ({"enabled": False}, "is not there, or torch.backends.cudnn.enabled is False"),
        ({"deterministic": True}, "is not bitwise repeatable"),
        ({"one_step": True}, "makes no single steps"),
        ({"modified": True}, "has no kernels with zoneout"),
        ({"empty": True}, "takes no empty input"),
    ],
    ids=str,
)
def test_what_a_call_may_lack(changed: dict[str, Any], reason: str) -> None:
    assert lacks(**changed).startswith(reason) and bool(lacks(**changed)) == bool(reason)


def test_the_conditions_stand_once() -> None:
    """csrc/plan/cudnn.cpp has them; what serves calls and what explains them ask there."""
    root = Path(__file__).parent.parent
    for file in (
        "csrc/torch/cudnn_cuda.cpp",
        "csrc/torch/choice_cuda.cpp",
        "csrc/torch/stack_cuda.cpp",
        "fused_rnn/_explain.py",
    ):
        text = (root / file).read_text()
        assert "65535" not in text and "has no cell" not in text and "CellKind::k" not in text, file
    assert "return cudnn_lacks(call);" in (root / "csrc/torch/cudnn_cuda.cpp").read_text()
    assert "planner().cudnn_lacks(" in (root / "fused_rnn/_explain.py").read_text()


def test_preferred_family() -> None:
    """It serves where it can; what is forced comes first, and nobody else prefers cuDNN."""
    assert "cudnn" not in plan(forced=None)["candidates"]
    made = plan(forced=None, preferred="grid")
    assert made["family"] == "grid" and made["reason"].startswith("grid is chosen for this call; ")
    assert made["rejected"]["step"] == "grid is chosen for this call"
    assert plan(forced=None, preferred="cudnn")["family"] == "cudnn"
    assert plan(forced="step", preferred="grid")["family"] == "step"
    assert plan(forced="cheapest", preferred="step")["family"] == "cluster"
    assert plan(forced=None, preferred="cluster", device="A100")["family"] == "step"
