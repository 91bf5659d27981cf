"""The cells of fused_rnn.zoo, and the table of them in its docstring: `python tests/zoo_table.py` prints it."""

from __future__ import annotations

import inspect
import re

from fused_rnn import zoo
from fused_rnn.formula import Cell

CELLS: dict[str, Cell] = {
    name: value() for name in zoo.__all__ if inspect.isclass(value := getattr(zoo, name)) and issubclass(value, Cell)
}
KINDS = {"product": "product", "layer_norm": "layer norm", "rms_norm": "RMS norm"}


def paper(cell: Cell) -> str:
    """ "Ravanelli et al. 2018", of the first line of the docstring's second paragraph."""
    paragraph = inspect.cleandoc(type(cell).__doc__ or "").split("\n\n")[1].replace("\n", " ")
    found = re.match(r"(?:After )?([^\"\d]+) (\d{4}), ", paragraph)
    if found is None:
        venue = re.match(r"\"[^\"]+\", (\w+ \d{4}), ", paragraph)
        assert venue is not None, f"{cell}: no paper in {paragraph!r}"
        return venue[1]
    authors = re.split(r", | and ", found[1])
    both = " and ".join(authors) + f" {found[2]}"
    return both if len(authors) <= 2 and len(both) <= 27 else f"{authors[0].removesuffix(' et al.')} et al. {found[2]}"


def inside(cell: Cell) -> str:
    """ "products i f g o", "5 products", "9 layer norms"."""
    parts = []
    for kind, word in KINDS.items():
        names = [phase.name for phase in cell.phases if phase.kind == kind]
        if 0 < len(names) <= 4 and kind == "product":
            parts.append(f"{word}{'s' * (len(names) > 1)} {' '.join(names)}")
        elif names:
            parts.append(f"{len(names)} {word}{'s' * (len(names) > 1)}")
    return ", ".join(parts)


def gates(cell: Cell) -> str:
    """ "z(x) u(h)": (x) for a gate without recurrent product, (h) for one without input."""
    says = cell.declaration
    if isinstance(cell, zoo.NAS):
        return "a0 to a7"
    if not says.recurrent_gates and len(says.gates) > 1:
        return f"{' '.join(says.input_gates)} (x)"
    marks = {(True, True): "", (True, False): "(x)", (False, True): "(h)"}
    return " ".join(gate.name + marks[gate.input, gate.recurrent] for gate in says.gates)


def table() -> str:
    rows = [("cell", "paper", "gates", "states", "products and norms inside")]
    for name, cell in sorted(CELLS.items(), key=lambda item: item[0].lower()):
        says = cell.declaration
        rows.append((name, paper(cell), gates(cell), " ".join(says.states), inside(cell)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
