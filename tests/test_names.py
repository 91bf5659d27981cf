"""Private names stay in their module: no module of the package imports or reads another one's `_name`.

A private module (`_checks`) may be imported by all of the package; what others use of it has a public name there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fused_rnn"
MODULES = {
    ".".join(["fused_rnn", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_reads(source: str, module: str) -> Iterator[str]:
    """ "other._name" for each private name of another module of the package that the source of `module` uses."""
    tree = ast.parse(source)
    known: dict[str, str] = {}  # name in this module -> module of the package
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    known[alias.asname or alias.name.partition(".")[0]] = alias.name if alias.asname else "fused_rnn"
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                if f"{node.module}.{alias.name}" in MODULES:
                    known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                elif is_private(alias.name) and node.module != module:
                    yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = owner_of(node.value, known)
            if owner not in (None, module) and f"{owner}.{node.attr}" not in MODULES:
                yield f"{owner}.{node.attr}"


def owner_of(node: ast.expr, known: dict[str, str]) -> str | None:
    """The module of the package that a dotted name stands for, or None."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        above = owner_of(node.value, known)
        return f"{above}.{node.attr}" if above and f"{above}.{node.attr}" in MODULES else None
    return None


def test_finds_each_way_of_reading_a_private_name() -> None:
    source = """
import fused_rnn, fused_rnn.bench.sides as s
from fused_rnn import _backend, _checks as c, modules
from fused_rnn.functional import _one, two
_backend._two; c._three; modules._Four(); s._five; fused_rnn._checks._six; fused_rnn.bench.sides._seven
_backend.public; modules.__name__; _own; two._of_an_object; fused_rnn._checks.public; self._mine
"""
    assert sorted(name.removeprefix("fused_rnn.") for name in private_reads(source, "fused_rnn.elsewhere")) == [
        "_backend._two", "_checks._six", "_checks._three", "bench.sides._five", "bench.sides._seven", "functional._one",
        "modules._Four",
    ]  # fmt: skip


# Still to be given a public name: module -> what it reads. The test is whole when this is empty.
@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_private_name_of_another_module(module: str) -> None:
    assert not set(private_reads(MODULES[module].read_text(), module))
