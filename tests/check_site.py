"""Builds the documentation with warnings as errors, and follows every link inside of what was built.

    python tests/check_site.py

Needs the extra `docs`. mkdocs checks the links of Markdown; this also those of HTML, of docstrings and of pictures. Links to
other sites are counted and not followed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent


class Page(HTMLParser):
    """The anchors of a page and what it links to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.links = {""}, set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if name in ("href", "src") and value is not None:
                self.links.add(value)


def broken(site: Path) -> tuple[list[str], int, int]:
    """(links that lead nowhere, how many lead somewhere, how many leave the site)."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    wrong, right, outside = [], 0, 0
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                outside += parts.scheme not in ("data", "mailto")
                continue
            start = site if parts.path.startswith("/") else path.parent
            target = (start / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            anchor = unquote(parts.fragment)
            # Material's own script makes the anchors that begin with __.
            found = target.exists() and (target not in pages or anchor in pages[target].anchors or anchor.startswith("__"))
            right += found
            if not found and path.name != "404.html":
                wrong.append(f"{path.relative_to(site)}: {link}")
    return wrong, right, outside


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
        built = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        if built.returncode != 0:
            return built.returncode
        wrong, right, outside = broken(Path(folder).resolve())
    print(f"documentation: {right} links inside of the site, {len(wrong)} broken, {outside} to other sites")
    print("\n".join(wrong))
    return min(len(wrong), 1) if right else 1


if __name__ == "__main__":
    sys.exit(main())
