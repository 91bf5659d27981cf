"""How the build finds torch and decides on CUDA, without building anything; the metadata; the source distribution."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SUPPORT = ROOT / "build_support"


def load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, SUPPORT / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    """cuda_env on a machine without any CUDA."""
    module = load("cuda_env")
    for name in ("CUDA_HOME", "CUDA_PATH", "FUSED_RNN_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module, "Path", lambda *parts: Path(str(tmp_path) + "/" + "/".join(parts).lstrip("/")))
    monkeypatch.setattr(module.sys, "path", ["/site"])
    return module


def fake_torch(cuda: str | None, capabilities: tuple[tuple[int, int], ...] = ()) -> types.SimpleNamespace:
    device = types.SimpleNamespace(
        device_count=lambda: len(capabilities), get_device_capability=lambda index: capabilities[index]
    )
    return types.SimpleNamespace(version=types.SimpleNamespace(cuda=cuda), cuda=device)


def put_nvcc(home: Path, release: str) -> None:
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)


def test_no_cuda_in_torch(cuda_env, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_env.cuda_plan(fake_torch(None))["skipped"] == "torch was built without CUDA"
    monkeypatch.setenv("FUSED_RNN_CUDA", "1")
    with pytest.raises(SystemExit, match="FUSED_RNN_CUDA=1, but torch was built without CUDA"):
        cuda_env.cuda_plan(fake_torch(None))


def test_no_nvcc(cuda_env) -> None:
    plan = cuda_env.cuda_plan(fake_torch("13.0"))
    assert plan["skipped"] == "torch was built with CUDA 13 but no nvcc was found"
    assert '"nvidia-cuda-nvcc==13.0.*"' in plan["mend"]
    assert "CUDA 12.6 toolkit" in cuda_env.cuda_plan(fake_torch("12.6"))["mend"]


def test_nvcc_of_another_major_version(cuda_env, tmp_path: Path) -> None:
    put_nvcc(tmp_path / "usr/local/cuda", "12.4")
    assert "but nvcc is 12.4 at" in cuda_env.cuda_plan(fake_torch("13.0"))["skipped"]


def test_nvcc_of_another_minor_version_will_do(cuda_env, tmp_path: Path) -> None:
    put_nvcc(tmp_path / "usr/local/cuda", "13.2")
    plan = cuda_env.cuda_plan(fake_torch("13.0"))
    assert plan["nvcc"] == "13.2" and plan["home"] == str(tmp_path / "usr/local/cuda")


def test_nvcc_of_the_wheels(cuda_env, tmp_path: Path) -> None:
    put_nvcc(tmp_path / "usr/local/cuda", "12.4")
    put_nvcc(tmp_path / "site/nvidia/cu13", "13.0")
    (tmp_path / "site/nvidia/cu13/include").mkdir()
    plan = cuda_env.cuda_plan(fake_torch("13.0"))
    assert plan["home"] == str(tmp_path / "site/nvidia/cu13")
    assert plan["include_after"] == [str(tmp_path / "site/nvidia/cu13/include")]


def test_cuda_home_goes_first(cuda_env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for home in ("usr/local/cuda", "mine"):
        put_nvcc(tmp_path / home, "13.0")
    monkeypatch.setenv("CUDA_HOME", "/mine")
    assert cuda_env.cuda_plan(fake_torch("13.0"))["home"] == str(tmp_path / "mine")
    # An nvcc without headers beside it (a wrapper script) gives way to a whole toolkit.
    (tmp_path / "usr/local/cuda/include").mkdir()
    (tmp_path / "usr/local/cuda/include/cuda_runtime_api.h").touch()
    assert cuda_env.cuda_plan(fake_torch("13.0"))["home"] == str(tmp_path / "usr/local/cuda")


def test_cuda_can_be_switched_off(cuda_env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvcc(tmp_path / "usr/local/cuda", "13.0")
    monkeypatch.setenv("FUSED_RNN_CUDA", "0")
    assert cuda_env.cuda_plan(fake_torch("13.0"))["skipped"] == "FUSED_RNN_CUDA=0 was set"
    monkeypatch.setenv("FUSED_RNN_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, 1 or unset, got 'yes'"):
        cuda_env.cuda_plan(fake_torch("13.0"))


@pytest.mark.parametrize(
    ("listed", "capabilities", "expected"),
    [
        (None, (), "8.0+PTX;9.0a"),
        (None, ((9, 0), (9, 0), (8, 6)), "8.6;9.0a"),
        ("native", ((12, 0),), "12.0"),
        ("7.5 8.0+PTX", ((9, 0),), "7.5 8.0+PTX"),
    ],
)
def test_architectures(cuda_env, tmp_path: Path, monkeypatch, listed, capabilities, expected) -> None:
    put_nvcc(tmp_path / "usr/local/cuda", "13.0")
    if listed:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert cuda_env.cuda_plan(fake_torch("13.0", capabilities))["architectures"] == expected


def test_installed_torch_is_found_through_build_isolation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip hides the environment by a sitecustomize on PYTHONPATH: the probe must look behind it."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.path[:] = []")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    torch_env = load("torch_env")
    version, path = torch_env.installed_torch()
    assert version is not None and version.split("+")[0] == torch.__version__.split("+")[0]
    assert str(Path(torch.__file__).parent.parent) in path
    assert torch_env.torch_requirement() == []


@pytest.mark.parametrize(
    ("version", "needed"), [(None, True), ("2.10.1", True), ("2.11.0+cu130", False), ("2.15.0", False), ("3.0.0a0", False)]
)
def test_torch_becomes_a_requirement(monkeypatch: pytest.MonkeyPatch, version: str | None, needed: bool) -> None:
    torch_env = load("torch_env")
    monkeypatch.setattr(torch_env, "installed_torch", lambda: (version, []))
    assert torch_env.torch_requirement() == (["torch>=2.11"] if needed else [])


def test_build_without_torch_says_so(tmp_path: Path) -> None:
    """setup.py in an interpreter that has setuptools and no torch."""
    code = (
        "import sys; sys.argv = ['setup.py', 'build_ext']; sys.path.insert(0, 'build_support'); import torch_env;"
        "torch_env.import_torch = lambda: None; exec(open('setup.py').read(), {'__file__': 'setup.py'})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "torch >= 2.11, which is not installed here" in done.stderr


def test_sources_have_no_compiler_flags_that_break_other_machines() -> None:
    text = (ROOT / "setup.py").read_text()
    assert not re.search(r"""["']-(std|march|mtune)""", text)


def test_sdist_is_complete(tmp_path: Path) -> None:
    code = f"import backend; print(backend.build_sdist({str(tmp_path)!r}))"
    env = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = [path for folder in ("csrc", "build_support", "fused_rnn", "examples") for path in (ROOT / folder).rglob("*")]
    suffixes = (".py", ".cpp", ".h", ".cu", ".cuh")
    missing = {str(path.relative_to(ROOT)) for path in wanted if path.suffix in suffixes} - packed
    assert not missing
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "fused_rnn/py.typed"} <= packed
    assert not {name for name in packed if name.endswith((".so", ".o", ".pyc")) or "/_C." in name}


def test_code_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for_others = [block for block in blocks if "integrations" in block]  # tests/test_integrations*.py run these packages
    blocks = [block for block in blocks if block not in for_others]
    assert (len(blocks), len(for_others)) == (5, 1)
    weights = [torch.randn(24, 8), torch.randn(24, 8), torch.randn(24), torch.randn(24)]
    names: dict[str, object] = {
        "model": torch.nn.Sequential(torch.nn.LSTM(8, 8)),
        "SomeoneElsesModel": lambda: torch.nn.GRU(8, 8),
        "weights": weights,
        "starts": torch.zeros(35, 3, dtype=torch.bool),
        "h_start": torch.zeros(1, 1, 8, requires_grad=True),
    }
    names |= dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), weights, strict=True))
    for block in blocks:
        names["x"] = torch.randn(35, 3, 28 if "use_backend" in block else 8)
        exec(block, names)
    assert type(names["model"]).__module__ == "fused_rnn.modules"
