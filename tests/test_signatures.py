"""No function takes more than nine parameters: what belongs together travels as one value."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST = 9
# Their arguments are documentation, as torch.nn's are; below them everything is a Recipe.
PUBLIC = {"lstm", "gru", "rnn"}


def python_signatures() -> Iterator[tuple[str, int]]:
    for path in sorted((ROOT / "fused_rnn").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not (path.name == "functional.py" and node.name in PUBLIC):
                arguments = node.args
                count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
                yield f"{path.relative_to(ROOT)}: {node.name}", count


def parameters(text: str, start: int) -> tuple[list[str], int]:
    """What stands between the parenthesis at `start` and its partner, cut at the commas of its own level; the end."""
    depth, parts, begin = 0, [], start + 1
    for place in range(start, len(text)):
        letter = text[place]
        if letter in "([{<":
            depth += 1
        elif letter in ")]}" or (letter == ">" and text[place - 1] != "-"):
            depth -= 1
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(text[begin:place].strip())
            begin = place + 1
        if depth == 0:
            return parts, place
    return [], len(text)


def is_parameter(part: str) -> bool:
    """Whether a part declares: a type and a name, not an argument of a call."""
    if re.fullmatch(r"(?:const )?\w+ \(&\w*\)\[.*\]", part, re.S):  # a reference to an array
        return True
    return (
        re.fullmatch(r"(?:const )?[\w:]+(?:<.*>)?(?: const)?[ &*]+(?:const )?\w*(?:\[\w*\])?(?: = .*)?", part, re.S)
        is not None
    )


def cpp_signatures() -> Iterator[tuple[str, int]]:
    for path in sorted((ROOT / "csrc").rglob("*")):
        if not path.is_file():
            continue
        text = re.sub(r"//[^\n]*|\"(?:\\.|[^\"\\\n])*\"", "", path.read_text())
        text = re.sub(r"(?m)^\s*#.*(?:\\\n.*)*$", "", text)
        for match in re.finditer(r"[\w>\]]\s*\(|\]\(", text):
            parts, end = parameters(text, match.end() - 1)
            follows = re.match(r"\)\s*(?:const|noexcept|override|mutable|->[^;{]*)*\s*[{;:]", text[end:])
            if parts and follows and all(map(is_parameter, parts)):
                line = text.count("\n", 0, match.start()) + 1
                yield (
                    f"{path.relative_to(ROOT)}: `{text[max(0, match.start() - 30) : match.end()].split()[-1]}` line {line}",
                    len(parts),
                )


def test_the_counts_see_signatures() -> None:
    found = dict(cpp_signatures())
    arrays = [count for where, count in found.items() if where.startswith("csrc/core/cells.h: `backward(`")]
    assert arrays and min(arrays) == 9, "references to arrays are parameters"
    assert len(found) > 500 and max(found.values()) >= 7
    assert max(count for _, count in python_signatures()) >= 7


def test_no_signature_is_long() -> None:
    counts = [*python_signatures(), *cpp_signatures()]
    long = [f"{where}: {count} parameters" for where, count in counts if count > MOST]
    assert not long, "\n".join(long)
