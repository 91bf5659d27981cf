"""What mkdocstrings reads of our docstrings, as Markdown: an extension of griffe, named in mkdocs.yml.

Docstrings are written for `help()`. A * between names, as in [L*D, B, H], is a product, and :func:`lstm` a name.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

_PRODUCT = re.compile(r"(?<=[\w\]])\*(?=[\w\[])")
_ROLE = re.compile(r":(?:func|class|meth):(?=`)")


def as_markdown(text: str) -> str:
    """The text with products escaped, outside of code, and names as code."""
    parts = re.split(r"(``.*?``|`[^`]*`)", _ROLE.sub("", text))
    return "".join(part if part.startswith("`") else _PRODUCT.sub(r"\\*", part) for part in parts)


class Docstrings(Extension):
    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
