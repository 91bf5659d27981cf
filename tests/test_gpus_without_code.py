"""A GPU that the build has no code for: the reference serves it, with one warning; others keep their kernels."""

from __future__ import annotations

import warnings

import pytest
import torch

from fused_rnn import _backend
from fused_rnn._build import runs_on

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("architectures", "runs", "runs_not"),
    [
        (["8.0+PTX", "9.0a"], [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 0), (7, 5)]),
        (["8.6"], [(8, 6), (8, 9)], [(8, 0), (9, 0), (7, 5)]),
        (["9.0a"], [(9, 0)], [(8, 0), (10, 0)]),
        (["10.0f"], [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        (["7.5", "12.0"], [(7, 5), (12, 0), (12, 1)], [(8, 0), (10, 0)]),
        ([], [], [(8, 0)]),
    ],
)
def test_runs_on(architectures: list[str], runs: list[tuple[int, int]], runs_not: list[tuple[int, int]]) -> None:
    assert all(runs_on(architectures, capability) for capability in runs)
    assert not any(runs_on(architectures, capability) for capability in runs_not)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """gpus(capability, ...): so many are visible, to a build for 8.0 and its successors."""

    def pretend(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    info = {**_backend.build_info(), "cuda": True, "cuda_architectures": ["8.0+PTX"]}
    monkeypatch.setattr(_backend, "build_info", lambda: info)
    monkeypatch.setattr(_backend, "_native", {"cpu": True, "cuda": True})
    monkeypatch.setattr(_backend, "_gpus_without_code", None)
    monkeypatch.setattr(_backend, "_warned", set())
    monkeypatch.setattr(_backend, "forced", None)
    return pretend


def test_all_have_code(gpus) -> None:
    gpus((9, 0), (8, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(_backend.uses_ops("cuda", torch.float32, device) for device in (FIRST, SECOND, torch.device("cuda")))


def test_one_lacks_code(gpus) -> None:
    gpus((9, 0), (7, 5))
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert not _backend.uses_ops("cuda", torch.float32, SECOND)
            assert _backend.uses_ops("cuda", torch.float32, FIRST)
            assert _backend.uses_ops("cuda", torch.float32, torch.device("cuda"))
            assert _backend.uses_ops("cpu", torch.float32, torch.device("cpu"))
        if _ == 0:
            (warning,) = caught
            assert "built for 8.0+PTX, which GPU 1 of compute capability 7.5 cannot run" in str(warning.message)
        else:
            assert not caught


def test_a_forced_backend_raises(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus((7, 5))
    monkeypatch.setattr(_backend, "forced", "cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' is forced but the kernels were built for 8.0"):
        _backend.uses_ops("cuda", torch.float32, FIRST)


def test_a_description_is_planned_for(gpus) -> None:
    """explain with a described device asks no GPU."""
    gpus((7, 5))
    assert _backend.uses_ops("cuda", torch.float32)
