"""The samples of docs/ run as they stand, in their order; links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
NAMES = [str(page.relative_to(ROOT / "docs")) for page in PAGES]


def samples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", [page for page in PAGES if samples(page)], ids=lambda page: page.name)
def test_pages_run(page: Path) -> None:
    found = samples(page)
    names: dict[str, Any] = {}
    for number, text in enumerate(found):
        exec(compile(text, f"{page.name}, sample {number + 1}", "exec"), names)


def test_recipes_have_samples() -> None:
    """Samples in another language than python are not run: a recipe has to have some that are."""
    for page in PAGES:
        assert samples(page) or page.parent.name != "recipes", page.name


def test_every_page_is_in_the_site() -> None:
    """mkdocs.yml puts pages in order; build_support/site.py adds those that it does not name."""
    named = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1])
    assert set(named) <= set(NAMES)


def test_features_have_tests() -> None:
    """Each row of the table of features links to a test, or says no of ourselves."""
    rows = [line for line in (ROOT / "docs" / "features.md").read_text().splitlines() if line.startswith("| ")]
    ours = [row.split(" | ")[1] for row in rows if not row.startswith("| | ")]
    assert len(ours) > 20
    assert all("](../tests/" in cell or cell == "no" for cell in ours), ours


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert all((page.parent / link).exists() for link in links), links
