"""What `python -m fused_rnn info` says in every state an installation can be in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import fused_rnn
from fused_rnn import _backend, _build, info
from fused_rnn.__main__ import main

RECORD = {
    "torch": torch.__version__,
    "torch_cuda": "13.0",
    "python": "3.11.7",
    "nvcc": None,
    "cuda_architectures": [],
    "cuda_skipped": "no nvcc was found",
    "cuda_mend": "pip install nvcc",
}


class FakeExtension:
    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda

    def build_info(self) -> dict[str, object]:
        return {"cuda": self.cuda, "cpu_instruction_set": "avx9", "cpu_instruction_sets": ["avx9", "portable"]}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Pretends that this was built: installed(record, extension or None, reason)."""

    def pretend(record: dict[str, object] | None, extension: FakeExtension | None, reason: str | None = None) -> None:
        monkeypatch.setattr(_build, "build_record", lambda: record)
        monkeypatch.setattr(_backend, "build_record", lambda: record)
        monkeypatch.setattr(_backend, "extension", extension)
        monkeypatch.setattr(_backend, "import_error", reason)
        native = {"cpu": extension is not None, "cuda": extension is not None and extension.cuda}
        monkeypatch.setattr(_backend, "_native", native)

    monkeypatch.setattr(_backend, "forced", None)
    return pretend


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    main(["info"])
    return capsys.readouterr().out


def test_of_this_installation(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys)
    assert fused_rnn.__version__ in out and torch.__version__ in out
    if _backend.has_cpu_kernels():
        assert fused_rnn.build_info()["torch"] == torch.__version__
        assert fused_rnn.build_info()["cpu_instruction_set"] in out
    else:
        assert "Missing: compiled kernels" in out


def test_cpu_build(installed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed(RECORD, FakeExtension(cuda=False))
    monkeypatch.setattr(info, "gpus", list)
    out = printed(capsys)
    assert "CPU tensors        served by cpu kernels (avx9)" in out
    assert "CUDA tensors       served by the Python reference: fused_rnn was built without CUDA kernels" in out
    assert "Missing: CUDA kernels (only a GPU needs them): no nvcc was found. To mend it:\n  pip install nvcc\n" in out
    assert "\n  FUSED_RNN_CUDA=1 pip install " in out


def test_cuda_build(installed, capsys: pytest.CaptureFixture[str]) -> None:
    built = {"nvcc": "13.0", "cuda_architectures": ["8.0+PTX", "9.0a"], "cuda_skipped": None, "cuda_mend": None}
    installed({**RECORD, **built}, FakeExtension(cuda=True))
    out = printed(capsys)
    assert "CUDA tensors       served by cuda kernels (built for 8.0+PTX;9.0a)" in out
    assert "Missing" not in out


def test_nothing_built(installed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", sys.executable)
    installed(None, None, "the extension was never compiled")
    out = printed(capsys)
    assert out.count("served by the Python reference: the extension was never compiled") == 2
    assert "Missing: compiled kernels: the extension was never compiled. To mend it:\n  pip install" in out
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    assert "To mend it:\n  install a C++ compiler (no-such-compiler)" in printed(capsys)


@pytest.mark.parametrize(("forced", "cpu"), [("cuda", "nothing: backend cuda is forced"), ("reference", "(forced)")])
def test_forced_backend(installed, capsys: pytest.CaptureFixture[str], forced: str, cpu: str) -> None:
    installed(RECORD, FakeExtension(cuda=False))
    with fused_rnn.use_backend(forced):
        lines = printed(capsys).splitlines()
    assert cpu in next(line for line in lines if line.startswith("CPU tensors"))
    if forced == "cuda":
        line = next(line for line in lines if line.startswith("CUDA tensors"))
        assert "nothing: backend cuda is forced but fused_rnn was built without CUDA kernels" in line


def test_an_extension_of_another_torch_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "build_record", lambda: {**RECORD, "torch": "1.0.0"})
    extension, reason = _build.load_extension()
    assert extension is None
    assert reason == f"the extension was compiled for torch 1.0.0 and this is torch {torch.__version__}"


def test_record_lies_beside_the_extension(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_build, "__file__", str(tmp_path / "_build.py"))
    monkeypatch.setattr(_build.sysconfig, "get_config_var", lambda name: {"EXT_SUFFIX": ".cpython-399-x86_64.so"}[name])
    assert _build.build_record() is None
    (tmp_path / "_C.cpython-399-x86_64.json").write_text(json.dumps(RECORD))
    assert _build.build_record() == RECORD
