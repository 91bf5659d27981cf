"""csrc's folders: includes point one way, and only csrc/torch includes torch."""

from __future__ import annotations

import re
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"
# Of each folder those whose headers its files may include, besides its own.
BELOW = {
    "core": set(),
    "plan": {"core"},
    "cpu/isa": {"core"},
    "cpu": {"core", "plan", "cpu/isa"},
    "cpu/gemm": {"core", "cpu/isa", "cpu"},
    "cpu/scan": {"core", "cpu/isa", "cpu", "cpu/gemm"},
    "cpu/formula": {"core", "cpu/isa", "cpu", "cpu/gemm", "cpu/scan"},
    "cuda/device": {"core", "plan"},
    "cuda/step": {"core", "plan", "cuda/device"},
    "cuda/persistent": {"core", "plan", "cuda/device"},
    "cuda/block": {"core", "plan", "cuda/device", "cuda/persistent"},
    "cuda/gemm": {"core", "plan", "cuda/device", "cuda/step"},
    "cuda": {"core", "plan", "cuda/device", "cuda/step", "cuda/persistent", "cuda/block", "cuda/gemm"},
    "cuda/formula": {"core", "plan", "cuda", "cuda/device", "cuda/step"},
    "cuda/formula/rtc": set(),
    "torch": {"core", "plan", "cpu", "cpu/isa", "cpu/gemm", "cpu/scan", "cpu/formula", "cuda", "cuda/formula"},
}
FILES = sorted(path for path in CSRC.rglob("*") if path.is_file())


def includes(path: Path) -> list[str]:
    return re.findall(r'^#include ["<]([^">]+)[">]', path.read_text(), re.M)


def folder_of(path: Path) -> str:
    return path.parent.relative_to(CSRC).as_posix()


def test_every_folder_is_known() -> None:
    assert {folder_of(path) for path in FILES} == set(BELOW)


def test_includes_point_one_way() -> None:
    wrong = []
    for path in FILES:
        for name in includes(path):
            target = CSRC / name
            if target.exists() and folder_of(target) not in {folder_of(path), *BELOW[folder_of(path)]}:
                wrong.append(f"{path.relative_to(CSRC)} includes {name}")
    assert not wrong, "\n".join(wrong)


def test_a_header_is_named_by_its_place_in_csrc() -> None:
    """The kernels' hardware, which the simulator replaces, is the exception."""
    replaced = ("simt.cuh", "launch.cuh")
    quoted = [(path, name) for path in FILES for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.M)]
    assert all((CSRC / name).exists() for _, name in quoted), [name for _, name in quoted if not (CSRC / name).exists()]
    assert all((CSRC / "cuda" / "device" / name).exists() for name in replaced)


def test_only_csrc_torch_includes_torch() -> None:
    outside = re.compile(r"^(torch|ATen|c10|pybind11|Python\.h)")
    wrong = [
        f"{path.relative_to(CSRC)} includes {name}"
        for path in FILES
        if folder_of(path) != "torch"
        for name in includes(path)
        if outside.match(name) and not (CSRC / name).exists()
    ]
    assert not wrong, "\n".join(wrong)


def test_ptx_and_the_runtime_have_one_file_each() -> None:
    assert {path.name for path in FILES if re.search(r"\basm\b", path.read_text()) and path.suffix in (".cuh", ".cu")} == {
        "simt.cuh"
    }
    calls = {path.name for path in FILES if re.search(r"\bcuda[A-Z]\w+\(", path.read_text())}
    assert calls == {"launch.cuh"}, calls


def test_no_default_hides_a_new_enumerator() -> None:
    """A `default:` stands only in switches over numbers and over torch's own enums."""
    others = {
        "copy_width({p.y, p.h0, p.out, put.data}, distances, 2)", "unit_tiles", "rows", "vectors", "call.n_rows",
        "call.vectors", "x.scalar_type()",
    }  # fmt: skip
    found = set()
    for path in FILES:
        text = path.read_text()
        for default in re.finditer(r"^\s*default:", text, re.MULTILINE):
            *_, switch = re.finditer(r"switch \((.*)\) \{", text[: default.start()])
            found.add(switch[1])
    assert found == others


def test_constants_of_the_cost_model_stand_in_one_file() -> None:
    """machine.h has them: by their names, times, clocks and rates."""
    constant = re.compile(r"\bconstexpr [^;(]*\bk\w*(?:Us|Clocks?|Ghz|Instructions)\b", re.S)
    files = [path for path in FILES if folder_of(path) == "plan" and constant.search(path.read_text())]
    assert [path.name for path in files] == ["machine.h"]


def test_lines_fit() -> None:
    """125 columns, comments included: clang-format leaves them as they are, and ruff every line that ends in a pragma."""
    root = CSRC.parent
    folders = ("csrc", "fused_rnn", "tests", "benchmarks", "examples", "build_support")
    files = [root / "setup.py", *(path for folder in folders for path in (root / folder).rglob("*"))]
    kinds = (".h", ".cuh", ".cpp", ".cu", ".c", ".py")
    long = [
        f"{path.relative_to(root)}:{number}"
        for path in files
        if path.suffix in kinds
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 125
    ]
    assert not long, "\n".join(long)
