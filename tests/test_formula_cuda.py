"""CUDA kernels of formulas where there is no GPU: compilers, files, the driver's loader, the plan. tests/simt runs them."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import formula_cells as cells
import pytest
import torch
from check_ptxas import parse

import fused_rnn
from fused_rnn import _backend
from fused_rnn._explain import DEVICES
from fused_rnn.explanation import PassPlan
from fused_rnn.formula import Layer, build, cuda, cuda_build, cuda_compiler, ops, serve, store, verify
from fused_rnn.formula.cuda_compiler import Nvcc, Nvrtc
from fused_rnn.formula.plan import make_plan

CSRC = Path(__file__).parent.parent / "csrc"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def nvcc() -> Nvcc:
    found = cuda_compiler.shutil.which("nvcc")
    if found is None:
        pytest.skip("needs nvcc")
    return Nvcc(found)


def nvrtc() -> Nvrtc:
    try:
        return Nvrtc(cuda_compiler._load_nvrtc())
    except build.BuildError as error:
        pytest.skip(f"needs NVRTC: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "cell", [fused_rnn.zoo.LSTM(), fused_rnn.zoo.SLSTM(), fused_rnn.zoo.MGU(), cells.NormLstm()], ids=repr
)
def test_nvcc_spills_nothing(cell: fused_rnn.Cell, dtype: torch.dtype, arch: str, tmp_path: Path) -> None:
    plan = make_plan(cell)
    source = tmp_path / "cell.cu"
    source.write_text(cuda.translation_unit(plan, dtype))
    includes = [part for folder in cuda_compiler.include_directories(rtc=False) for part in ("-I", str(folder))]
    command = [nvcc().path, "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v", *includes, str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "cell.cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = parse(done.stdout + done.stderr)
    assert sorted(row[0] for row in rows) == sorted(kernel.name for kernel in cuda.kernels_of(plan))
    assert all(row[-1] == 0 for row in rows), rows


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_nvrtc_compiles_the_same(capability: int, tmp_path: Path) -> None:
    compiler = nvrtc()
    for cell, dtype in ((cells.NormLstm(), torch.bfloat16), (fused_rnn.zoo.MGU(), torch.float64)):
        kernels, _ = cuda_build.compile_kernels(cell, dtype, capability, compiler, tmp_path, cuda.FAMILIES)
        header, _, code = kernels.read_bytes().partition(b"\n")
        assert header + b"\n" == cuda.header_of(make_plan(cell), dtype, capability)
        assert code.startswith(b"\x7fELF")
        for kernel in cuda.kernels_of(make_plan(cell)):
            assert kernel.name.encode() in code


def test_headers_of_a_package_suffice() -> None:
    """What the kernels include lies in the folders that setup.py puts into an installed package, and is in the hash."""
    text = (CSRC.parent / "setup.py").read_text()
    found = re.search(r"^HEADERS = (\(.*\))$", text, re.M)
    assert found is not None
    packaged = ast.literal_eval(found[1])
    assert set(cuda_build.FOLDERS) <= set(packaged)
    left, seen = [CSRC / "cuda" / "formula" / "formula_kernels.cuh"], set[Path]()
    while left:
        path = left.pop()
        assert path.parent.relative_to(CSRC).as_posix() in cuda_build.FOLDERS, path
        if path not in seen:
            seen.add(path)
            names = re.findall(r'^#include ["<]([^">]+)[">]', path.read_text(), re.M)
            places = [folder / name for name in names for folder in cuda_compiler.include_directories(rtc=True)]
            assert all(any((folder / name).exists() for folder in cuda_compiler.include_directories(rtc=True))
                       for name in names if name not in ("stdexcept", "cmath")), path  # fmt: skip
            left += [place for place in places if place.exists()]
    assert CSRC / "core" / "cells.h" in seen


def test_a_compiler_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", "false")
    with pytest.raises(build.BuildError, match="nvcc failed with status 1"):
        cuda_build.compile_kernels(cells.Rnn(), torch.float32, 90, cuda_compiler.find_compiler(), tmp_path)
    monkeypatch.setenv("NVCC", "no-such-compiler")
    with pytest.raises(build.BuildError, match=r"no nvcc was found \(NVCC=no-such-compiler\)"):
        cuda_compiler.find_compiler()


# --- the driver ---

# A driver that says what it was asked, and refuses code that begins with "bad".
DRIVER = """
#include <cstdio>
#include <cstring>
extern "C" {
int cuInit(unsigned) { return 0; }
int cuGetErrorString(int, const char** text) { *text = "made-up error"; return 0; }
int cuDeviceGet(int* handle, int device) { *handle = device; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) { *value = attribute == 97 ? 232448 : -1; return 0; }
void* current;
int cuDevicePrimaryCtxRetain(void** context, int) { *context = (void*)1; std::puts("retain"); return 0; }
int cuCtxGetCurrent(void** context) { *context = current; return 0; }
int cuCtxSetCurrent(void* context) { current = context; return 0; }
int cuModuleLoadData(void** module, const void* code) { *module = (void*)code; return !std::memcmp(code, "bad", 3); }
int cuModuleGetFunction(void** f, void*, const char* name) { *f = strdup(name); return 0; }
int cuFuncSetAttribute(void* f, int attribute, int value) {
  if (attribute == 14) return value != 1 || std::strncmp((char*)f, "cluster", 7);
  return attribute != 8 || value != 232448 || !f;
}
struct Attribute { int id; char pad[4]; int value[16]; };
struct Config { unsigned grid[3], block[3], smem; void* stream; Attribute* attributes; unsigned n; };
int cuLaunchKernelEx(const Config* c, void* f, void** arguments, void**) {
  std::printf("%s %u,%u,%u ", (char*)f, c->grid[0], c->grid[1], c->grid[2]);
  std::printf("%u,%u,%u %u %p", c->block[0], c->block[1], c->block[2], c->smem, c->stream);
  for (unsigned i = 0; i < c->n; ++i) {
    const Attribute& a = c->attributes[i];
    std::printf(" attribute %d=%d,%d,%d", a.id, a.value[0], a.value[1], a.value[2]);
  }
  std::printf(" argument %d\\n", *(int*)arguments[0]);
  return c->grid[0] == 1000 ? 720 : 0;
}
}
"""
CALLER = """
#include <cstdio>
#include <stdexcept>
#include "cuda/device/refused.h"
#include "cuda/formula/driver.h"
using namespace fused_rnn::cuda;
int main(int, char** argv) {
  try {
    FormulaModule module(argv[1]);
    std::printf("%d %d %d %d\\n", int(module.dtype()), module.capability(), module.traits().phases, module.traits().saved);
    const FormulaLauncher launch = module.launcher(0, (void*)0x40);
    int argument = 7;
    launch({FormulaRole::kForward, 1, TileSize::kMedium, 2, 3, 4, 128, 1000, false, 1, false}, &argument, sizeof argument);
    const FormulaLaunch initial{FormulaRole::kInitialGradients, 0, TileSize::kSmall, 1, 1, 1, 256, 0, true, 1, false};
    const FormulaLaunch cluster{FormulaRole::kClusterBackward, 0, TileSize::kSmall, 32, 6, 2, 256, 9, false, 16, false};
    FormulaLaunch grid{FormulaRole::kGridForward, 0, TileSize::kSmall, 40, 1, 1, 256, 9, false, 1, true};
    for (const FormulaLaunch& one : {initial, cluster, grid}) launch(one, &argument, sizeof argument);
    module.launcher(0, nullptr);  // loaded once
    grid.grid_x = 1000;  // of which the device takes fewer
    launch(grid, &argument, sizeof argument);
  } catch (const fused_rnn::LaunchRefused& error) {
    std::printf("refused: %s\\n", error.what());
  } catch (const std::exception& error) {
    std::printf("error: %s\\n", error.what());
  }
}
"""


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.cpp").write_text(DRIVER)
    (folder / "caller.cpp").write_text(CALLER)
    subprocess.run(["g++", "-shared", "-fPIC", "driver.cpp", "-o", "libcuda.so.1"], cwd=folder, check=True)
    sources = [str(CSRC / "cuda" / "formula" / name) for name in ("driver.cpp", "module.cpp")]
    command = ["g++", "-std=c++17", f"-I{CSRC}", "caller.cpp", *sources, "-o", "caller", "-ldl"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "caller"


def say(caller: Path, contents: bytes) -> list[str]:
    kernels = caller.parent / "cell.kernels"
    kernels.write_bytes(contents)
    environment = {"LD_LIBRARY_PATH": str(caller.parent)}
    done = subprocess.run([str(caller), str(kernels)], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.splitlines()


def test_launches_by_the_driver(caller: Path) -> None:
    plan = make_plan(fused_rnn.zoo.MGU())
    lines = say(caller, cuda.header_of(plan, torch.float16, 90) + b"code")
    assert lines == [
        f"2 90 1 {len(plan.saved)}",
        "retain",
        "forward_1_kMedium 2,3,4 128,1,1 1000 0x40 argument 7",
        "initial_0_kSmall 1,1,1 256,1,1 0 0x40 attribute 6=1,0,0 argument 7",
        "cluster_backward_0_kSmall 32,6,2 256,1,1 9 0x40 attribute 4=16,1,1 argument 7",
        "grid_forward_0_kSmall 40,1,1 256,1,1 9 0x40 attribute 2=1,0,0 argument 7",
        "grid_forward_0_kSmall 1000,1,1 256,1,1 9 0x40 attribute 2=1,0,0 argument 7",
        "refused: fused_rnn: kernel grid_forward_0_kSmall: made-up error",
    ]


def test_what_the_driver_refuses(caller: Path) -> None:
    header = cuda.header_of(make_plan(fused_rnn.zoo.MGU()), torch.float32, 90)
    assert say(caller, header + b"bad")[-1] == "error: fused_rnn: code of a formula for device 0: made-up error"
    another = cuda.header_of(make_plan(fused_rnn.zoo.LSTM()), torch.float32, 90)
    assert say(caller, another + b"code")[-1] == "error: the formula has no such kernel"


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"no file of ours\ncode",
        b"4 1 90\ncode",
        b"5 1 90 9 0 0\ncode",
        b"5 9 90\n",
        b"5 1 90 1 0 0 1 1 1 0 0 1 0 0 0 3\n",
    ],
)
def test_files_that_are_not_ours(caller: Path, contents: bytes) -> None:
    (line,) = say(caller, contents)
    assert line.startswith("error: the formula's kernels ") and ("not made for this version" in line or not contents)


def test_the_driver_s_interface(tmp_path: Path) -> None:
    """The numbers and sizes in driver.cpp are those of cuda.h."""
    header = next((p for p in (Path("/usr/local/cuda/include/cuda.h"), *Path("/usr/local").glob("cuda*/include/cuda.h"))
                   if p.exists()), None)  # fmt: skip
    if header is None:
        pytest.skip("needs cuda.h")
    text = (CSRC / "cuda" / "formula" / "driver.cpp").read_text()
    numbers = dict(re.findall(r"constexpr int (k\w+) = (\d+);", text))
    program = tmp_path / "sizes.cpp"
    equal = {
        "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION": numbers["kProgrammaticStreamSerialization"],
        "CU_LAUNCH_ATTRIBUTE_COOPERATIVE": numbers["kCooperative"],
        "CUDA_ERROR_NO_BINARY_FOR_GPU": numbers["kNoBinary"],
        "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": numbers["kOutOfResources"],
        "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE": numbers["kCooperativeTooLarge"],
        "CUDA_ERROR_NOT_SUPPORTED": numbers["kNotSupported"],
        "CUDA_ERROR_INVALID_CLUSTER_SIZE": numbers["kInvalidClusterSize"],
        "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION": numbers["kClusterDimension"],
        "CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED": numbers["kNonPortableCluster"],
        "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES": numbers["kMaxDynamicSmem"],
        "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": numbers["kMaxSmemPerBlockOptin"],
        "sizeof(CUlaunchAttribute)": 72,
        "sizeof(CUlaunchConfig)": 56,
        "__builtin_offsetof(CUlaunchAttribute, value)": 8,
        "__builtin_offsetof(CUlaunchConfig, attrs)": 40,
    }
    lines = [f"static_assert({what} == {value});" for what, value in equal.items()]
    program.write_text("\n".join([f"#include <{header}>", *lines, ""]))
    subprocess.run(["g++", "-std=c++17", "-fsyntax-only", f"-I{header.parent}", str(program)], check=True)


# --- what serves ---


class Extension:
    """The part of the extension that loads kernels, without a GPU."""

    def __init__(self) -> None:
        self.loaded: dict[tuple[str, int], str] = {}
        self.families: list[tuple[str, int, int]] = []  # states, each with its blocks
        self.added: list[str] = []

    def has_formula_on_device(self, formula: str, dtype: int, capability: int) -> bool:
        return (formula, dtype) in self.loaded

    def register_formula_on_device(self, formula: str, path: str) -> None:
        contents = Path(path).read_bytes()
        if not contents.startswith(b"%d " % cuda.FILE_VERSION):
            raise RuntimeError("not made for this version")
        self.loaded[formula, int(contents.split()[1])] = path

    def add_formula_on_device(self, formula: str, path: str) -> None:
        self.added.append(path)

    def formula_plan_on_device(self, formula: str, *sizes: int | bool) -> str:
        """Of one block, of two and of three with an odd number of 16 units."""
        family, _, ranks = self.families[-1]
        return f"family {family if ranks in (1, 2, 3) else 'step'}, since it is forced"

    def forget_formula_on_device(self, formula: str, dtype: int, capability: int) -> None:
        self.loaded.pop((formula, dtype), None)

    def set_formula_family(self, formula: str, dtype: int, capability: int, family: str, state: int, ranks: int = 0) -> None:
        self.families.append((family, state, ranks))


class Compiler:
    identity = "a compiler"

    def __init__(self) -> None:
        self.calls = 0
        self.families: list[str] = []  # but `step`, of the last call
        self.refuses = ""  # a family

    def compile(self, source: Path, capability: int, code: Path, what: str) -> None:
        assert f"sm_{capability}" in what
        self.families = [family for family in cuda.FAMILIES if f"FORMULA_{family.upper()}_" in source.read_text()]
        self.calls += 1
        if self.refuses in self.families:
            raise build.BuildError("the compiler fails")
        code.write_bytes(b"code")


@pytest.fixture
def loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Extension, Compiler]]:
    extension, compiler = Extension(), Compiler()
    monkeypatch.setenv("FUSED_RNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_build, "extension", extension)
    monkeypatch.setattr(cuda_build, "find_compiler", lambda: compiler)
    monkeypatch.setattr(cuda_build, "batches_of", lambda device: (3, 1000))
    for name in ("_persistent", "_loaded"):
        monkeypatch.setattr(cuda_build, name, set())
    monkeypatch.setattr(verify, "extension", extension)
    yield extension, compiler


def test_verified_before_first_use_and_kept(loading: tuple[Extension, Compiler], monkeypatch: pytest.MonkeyPatch) -> None:
    extension, compiler = loading
    formula, device = ops.remember(cells.Rnn()), torch.device("cuda", 0)
    checked: list[Any] = []
    monkeypatch.setattr(verify, "check_kernels", lambda *args, **kwargs: checked.append((*args, *kwargs.values())))
    cuda_build.prepare_on(formula, torch.float32, 90, device)
    call = (ops.cell_of(formula), formula, torch.float32, device)
    assert checked == [(*call, 3), (*call, 1000), (*call, 3, 1), (*call, 1000, 1)] and compiler.calls == 1
    assert extension.families == [("single", 1, 0), ("single", 2, 0)]
    (entry,) = store.entries()
    assert entry.path.suffix == ".kernels" and entry.path.with_suffix(".cu").exists()
    extension.loaded.clear()  # a later process finds it
    cuda_build.prepare_on(formula, torch.float32, 90, device)
    assert compiler.calls == 1 and extension.loaded[formula, 1] == str(entry.path)
    assert len(checked) == 4 and extension.families[2:] == [("single", 2, 0)]
    entry.path.write_bytes(b"damaged")
    extension.loaded.clear()
    cuda_build.prepare_on(formula, torch.float32, 90, device)
    assert compiler.calls == 2 and len(checked) == 8
    assert store.clear() > 0 and not list(store.cache_directory().iterdir())


Prepare = Callable[..., list[tuple[str, int, int]]]


@pytest.fixture
def prepare(loading: tuple[Extension, Compiler], monkeypatch: pytest.MonkeyPatch, setting: Any) -> Prepare:
    """What is said of families when a formula is prepared under a plan, with comparisons that pass."""
    monkeypatch.setattr(verify, "check_kernels", lambda *args, **kwargs: None)

    def run(plan: str, capability: int = 90) -> list[tuple[str, int, int]]:
        setting("FUSED_RNN_PLAN", plan)
        loading[0].families.clear()
        cuda_build.prepare_on(ops.remember(cells.Rnn()), torch.float32, capability, torch.device("cuda", 0))
        return list(loading[0].families)

    return run


def verified(family: str, teams: int) -> list[tuple[str, int, int]]:
    """States of a family while it is compared in a block alone and in teams, of which three sizes can be planned."""
    return [*((family, 1, ranks) for ranks in range(1, 6)), (family, 2, 0)] if teams else []


SINGLE = [("single", 1, 0), ("single", 2, 0)]


def test_families_are_verified_when_they_are_asked_for(loading: tuple[Extension, Compiler], prepare: Prepare) -> None:
    """`single` with `step`; a persistent family in a block alone and in teams of several. Before that they do not serve, and
    are not compiled either."""
    extension, compiler = loading
    assert prepare("") == SINGLE and compiler.families == ["single"]
    assert prepare("grid") == verified("grid", 3) and compiler.families == ["grid"]
    for plan in ("", "grid", "step"):
        assert prepare(plan) == []
    assert compiler.calls == 2 and len(extension.added) == 1
    assert prepare("cheapest") == verified("cluster", 3) and compiler.families == ["cluster"]
    for plan in ("cluster", "grid", "", "step", "cheapest"):
        assert prepare(plan) == []
    assert compiler.calls == 3
    extension.loaded.clear()  # a later process
    assert prepare("grid") == [SINGLE[1], *verified("grid", 3)] and compiler.calls == 3


def differs_for(**wanted: Any) -> Callable[..., None]:
    def check_kernels(*args: Any, **kwargs: Any) -> None:
        if all(kwargs.get(name) == value for name, value in wanted.items()):
            raise RuntimeError("disagree with step")

    return check_kernels


def test_a_family_that_differs(
    loading: tuple[Extension, Compiler], prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not serve, with a warning; the others do. A family that is forced raises."""
    extension, compiler = loading
    monkeypatch.setattr(verify, "check_kernels", differs_for(units=verify.UNITS_OF_TEAMS))
    prepare("")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="disagree with step"):
            prepare("grid")
        assert extension.families == [("grid", 1, 1), ("grid", 0, 0)] and compiler.calls == 2
    with pytest.warns(RuntimeWarning, match="kernel family grid of Rnn does not serve: disagree with step"):
        assert prepare("cheapest") == [(name, *state) for name in ("cluster", "grid") for state in ((1, 1), (0, 0))]
    assert prepare("cheapest") == [] and compiler.calls == 3


def test_a_wrong_single(loading: tuple[Extension, Compiler], prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    """`step` serves, and the file is not kept, so that a later process compares again."""
    extension, compiler = loading
    monkeypatch.setattr(verify, "check_kernels", differs_for(steps=1))
    with pytest.warns(RuntimeWarning, match="kernel family single of Rnn does not serve: disagree with step"):
        assert prepare("") == [("single", 1, 0), ("single", 0, 0)]
    assert prepare("") == [] and compiler.calls == 1 and extension.loaded and not store.entries()


def test_a_family_that_does_not_compile(loading: tuple[Extension, Compiler], prepare: Prepare) -> None:
    extension, compiler = loading
    compiler.refuses = "grid"
    with pytest.warns(RuntimeWarning, match="kernel family grid of Rnn does not serve: the compiler fails"):
        assert prepare("grid") == SINGLE
    assert prepare("grid") == prepare("") == [] and compiler.calls == 2 and extension.loaded


def test_a_family_of_which_no_team_can_be_compared(
    loading: tuple[Extension, Compiler], prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    extension, _ = loading
    monkeypatch.setattr(Extension, "formula_plan_on_device", lambda self, *_: "family step, since it serves every formula")
    with pytest.raises(RuntimeError, match="runs no team of several blocks, which could be compared"):
        prepare("grid")
    assert extension.families[-1] == ("grid", 0, 0)
    assert prepare("grid", 75)[-1] == ("grid", 2, 0)  # has none


@pytest.mark.skipif(not _backend.has_cpu_kernels(), reason="needs the compiled extension")
@pytest.mark.parametrize("name", ["T4", "A100", "H100", "B200", "RTX 5090"])
def test_both_tiles_are_verified(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        multi_processor_count = DEVICES[name]["sm_count"]

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    layer = Layer(cells.Lstm(), verify._I, 19, bidirectional=True)
    for batch, tile in zip(cuda_build.batches_of(torch.device("cuda", 0)), ("small", "medium"), strict=True):
        found = fused_rnn.explain(layer, torch.empty(verify._T, batch, verify._I), device=name, show=False).layers[0]
        assert f"{tile} tile" in found.forward.text and found.backward is not None and f"{tile} tile" in found.backward.text


def test_kernels_that_disagree_do_not_serve(loading: tuple[Extension, Compiler], monkeypatch: pytest.MonkeyPatch) -> None:
    extension, _ = loading

    def disagree(*_: Any) -> None:
        raise RuntimeError("they disagree")

    monkeypatch.setattr(verify, "check_kernels", disagree)
    with pytest.raises(RuntimeError, match="they disagree"):
        cuda_build.prepare_on(ops.remember(cells.Rnn()), torch.float32, 90, torch.device("cuda", 0))
    assert not extension.loaded and store.entries() == []


def test_the_name_has_what_the_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, compiler = cells.Rnn(), Compiler()
    name = cuda_build.file_name(cell, torch.float32, 90, compiler)  # type: ignore[arg-type]
    others = [
        cuda_build.file_name(cells.Lstm(), torch.float32, 90, compiler),  # type: ignore[arg-type]
        cuda_build.file_name(cell, torch.float16, 90, compiler),  # type: ignore[arg-type]
        cuda_build.file_name(cell, torch.float32, 80, compiler),  # type: ignore[arg-type]
    ]
    monkeypatch.setattr(Compiler, "identity", "another compiler")
    others.append(cuda_build.file_name(cell, torch.float32, 90, compiler))  # type: ignore[arg-type]
    monkeypatch.setattr(cuda_build, "_headers_digest", lambda: "other headers")
    others.append(cuda_build.file_name(cell, torch.float32, 90, compiler))  # type: ignore[arg-type]
    assert len({name, *others}) == 6


@pytest.mark.skipif(not _backend.has_cpu_kernels(), reason="needs the compiled extension")
def test_explained_for_a_gpu_that_is_not_there() -> None:
    layer = Layer(fused_rnn.zoo.LayerNormLSTM(), 64, 512, num_layers=2)
    x = torch.empty(100, 16, 64, device="meta")
    found = fused_rnn.explain(layer, x, device="H100", show=False)
    plan = make_plan(layer.cell)
    launches = max(plan.forward_levels) + 2
    assert launches < len(layer.cell.phases) + 1 and max(plan.backward_levels) + 2 == launches
    assert found.backend == "cuda" and found.device == "H100"
    forward, backward = found.layers[1].forward, found.layers[1].backward
    assert forward.family == "step" and forward.launches == 100 * launches and forward.overlapped_launches
    assert backward is not None and backward.launches == 100 * launches + 1
    assert f"{launches} launches a step" in str(found) and "small tile" in forward.text
    assert "medium tile" in fused_rnn.explain(layer, x, device="T4", show=False).layers[0].forward.text
    assert (forward.workspace_bytes or 0) > 16 * 512 * 4
    assert 1.3 * launches < (forward.us_per_step or 0) < 20 * launches


PLANNED = [  # cell, H, forward and backward us/step that an H100 is to stay below, clusters
    (fused_rnn.zoo.SLSTM(heads=6), 6 * 128, 3.14, 8.81, "12 clusters of "),
    (fused_rnn.zoo.BlockGRU(heads=8), 512, 5.0, 10.0, "2 clusters of "),
]


@pytest.mark.skipif(not _backend.has_cpu_kernels(), reason="needs the compiled extension")
@pytest.mark.parametrize(("cell", "hidden", "forward_us", "both_us", "clusters"), PLANNED, ids=lambda value: str(value)[:12])
def test_explained_family(
    cell: fused_rnn.Cell, hidden: int, forward_us: float, both_us: float, clusters: str, setting: Any
) -> None:
    """Families with the planner's times; a persistent one serves where it is asked for, and says why not elsewhere."""
    layer = Layer(cell, 64, hidden, dtype=torch.bfloat16)
    x = torch.empty(100, 16, 64, device="meta", dtype=torch.bfloat16)

    def explained(device: str) -> tuple[PassPlan, PassPlan]:
        (found,) = fused_rnn.explain(layer, x, device=device, show=False).layers
        assert found.backward is not None
        return found.forward, found.backward

    for plan in explained("H100"):
        assert plan.family == "step" and plan.cheapest == "cluster"
        assert {r.name: r.reason for r in plan.rejected}["cluster"].startswith("never run on a GPU yet, so it is taken only")
    for choice in ("cluster", "cheapest"):
        setting("FUSED_RNN_PLAN", choice)
        forward, backward = explained("H100")
        assert forward.family == backward.family == "cluster" and forward.launches == backward.launches == 1
        assert (forward.us_per_step or 99) < forward_us
        assert (forward.us_per_step or 99) + (backward.us_per_step or 99) < both_us
        assert clusters in forward.text and not forward.workspace_bytes
        assert {c.family for c in forward.candidates} == {"step", "cluster", "grid"}
    for device in ("H100", "A100"):  # the latter has no clusters
        setting("FUSED_RNN_PLAN", "grid")
        for plan in explained(device):
            assert plan.family == "grid" and plan.launches == 1 and " team" in plan.text
            rejected = {r.name: r.reason for r in plan.rejected}
            assert rejected["step"] == "grid is forced"
    assert rejected["cluster"].endswith("has no clusters, among which to divide them")
    assert rejected["block"] == "formulas have no kernels of this family"
    assert rejected["single"] == "its backward is that of step"


@pytest.mark.skipif(not _backend.has_cpu_kernels(), reason="needs the compiled extension")
def test_what_does_not_fit_a_cluster(setting: Any) -> None:
    """`step` serves it, and the reason has the bytes."""
    setting("FUSED_RNN_PLAN", "cluster")
    layer = Layer(fused_rnn.zoo.LSTM(), 64, 1024)
    found = fused_rnn.explain(layer, torch.empty(100, 16, 64, device="meta"), device="A100", show=False).layers[0].forward
    assert found.family == "step"
    reason = {r.name: r.reason for r in found.rejected}["cluster"]
    assert re.match(
        r"weights and states of a block need at least \d{8} bytes of shared memory, and a block has 166912; ", reason
    )
    assert "no clusters" in reason


@pytest.mark.skipif(not _backend.has_cpu_kernels(), reason="needs the compiled extension")
@pytest.mark.parametrize("forced", ["cluster", "cheapest"])
def test_what_family_cluster_leaves_to_step(forced: str) -> None:
    """Reset states, and gradients of states of every step."""

    def planned(**more: bool) -> tuple[str, str]:
        made = _backend.extension.formula_plan(  # type: ignore[union-attr]
            traits=cuda.traits_of(make_plan(fused_rnn.zoo.LSTM())), dtype="float16", T=100, B=16, H=128, D=1, heads=1,
            device=DEVICES["H100"], forced=forced, **more,
        )  # fmt: skip
        return made["family"], made["rejected"].get("cluster", "")

    for backward in (False, True):
        assert planned(backward=backward) == ("cluster", "")
        family, reason = planned(backward=backward, reset_states=True)
        assert family == "step" and reason == "its kernels replace a state by zeros alone, not by reset_state"
    family, reason = planned(backward=True, d_series=True)
    assert family == "step" and "gradients of the states beside the output of every step" in reason


def test_why_not_on_a_gpu() -> None:
    formula = ops.remember(cells.Rnn())
    if not _backend.has_cuda_kernels():
        reason = serve.why_not(formula, "cuda", torch.float32)
        assert reason is not None and "without CUDA kernels" in reason.text
    reason = serve.why_not(formula, "xpu", torch.float32)
    assert reason is not None and "no kernels for 'xpu'" in reason.text


@pytest.mark.skipif(not torch.cuda.is_available() or not _backend.has_cuda_kernels(), reason="needs a GPU and CUDA kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", [*cells.CELLS, cells.Mgu(), cells.NormLstm()], ids=lambda cell: type(cell).__name__)
@pytest.mark.parametrize("family", ["", "cluster", "grid"], ids=["default", "cluster", "grid"])
def test_on_a_gpu(cell: fused_rnn.Cell, dtype: torch.dtype, family: str, setting: Any) -> None:
    """Compiled, and verified: has_kernels raises where a tensor differs."""
    setting("FUSED_RNN_PLAN", family)
    with fused_rnn.use_backend("cuda"):
        hidden = 4 * 5 * cell.declaration.heads
        layer = Layer(cell, 8, hidden, 2, bidirectional=True, device="cuda", dtype=dtype)
        x = torch.randn(6, 4, 8, device="cuda", dtype=dtype, requires_grad=True)
        y, _ = layer(x, lengths=torch.tensor([6, 2, 0, 5]))
        y.sum().backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    if family and torch.cuda.get_device_capability()[0] >= 9:
        for backward in (False, True):
            text = _backend.extension.formula_plan_on_device(
                layer.formula, ops.dtype_number(dtype), 0, 6, 4, hidden, 2, cell.declaration.heads, backward
            )
            assert text.startswith(f"family {family},")
