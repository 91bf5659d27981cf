"""What mkdocs (mkdocs.yml) adds to the pages of docs/.

* Links that leave docs/, as to ../tests/test_packed.py, lead to a page of the site with that file: the pages work in a
  clone of the repository and on the site, and mkdocs checks the links of both. Pictures outside of docs/ are copied.
* Pages of docs/ that mkdocs.yml does not name come last among the recipes.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
SOURCES = "source"  # the folder of the site with files of the repository
LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".cu": "cpp", ".cuh": "cpp", ".toml": "toml", ".sh": "bash"}
PICTURES = {".png", ".svg"}
_LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)\s#]*)(#[^)\s]*)?(\))")
_CODE = re.compile(r"^( *)(```|~~~).*?^\1\2", re.M | re.S)


def on_config(config: Any) -> Any:
    """Adds to the navigation what it does not name."""
    named = set(re.findall(r"[\w/]+\.md", str(config.nav)))
    missing = sorted(
        path.relative_to(ROOT / "docs").as_posix()
        for path in (ROOT / "docs").rglob("*.md")
        if path.relative_to(ROOT / "docs").as_posix() not in named
    )
    next(entry["Recipes"] for entry in config.nav if "Recipes" in entry).extend(missing)
    return config


def _outside(place: str, link: str) -> str | None:
    """The file or folder of the repository that a link on a page at this place means, if it is outside of docs/."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
    inside = path == "docs" or path.startswith("docs/")
    return None if not link or inside or path.startswith("..") else path


def _links(text: str) -> list[str]:
    return [match[2] for match in _LINK.finditer(_CODE.sub("", text))]


def _text_of(path: Path) -> str:
    """The page of a file, or of a folder: the list of what is in it."""
    header = f"---\ntitle: {path.name}\nsearch:\n  exclude: true\n---\n"
    if path.is_dir():
        shown = {".md", *LANGUAGES, *PICTURES}
        names = sorted(p.name for p in path.iterdir() if p.is_file() and p.suffix in shown)
        return f"{header}# {path.relative_to(ROOT)}\n\n" + "\n".join(f"- [{name}]({name})" for name in names) + "\n"
    text = path.read_text()
    if path.suffix == ".md":
        return header + text
    fence = "`" * max(4, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{header}# {path.relative_to(ROOT)}\n\n{fence}{LANGUAGES.get(path.suffix, 'text')}\n{text}\n{fence}\n"


def _uri(path: str) -> str:
    """Where the site has a file of the repository."""
    return f"{SOURCES}/{path}" if Path(path).suffix in PICTURES else f"{SOURCES}/{path}.md"


def on_files(files: Files, config: Any) -> Files:
    """Adds the files that pages link to, and those that these link to."""
    waiting = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    while waiting:
        place, text = waiting.pop()
        for link in _links(text):
            path = _outside(place, link)
            if path is None or files.get_file_from_path(_uri(path)) is not None or not (ROOT / path).exists():
                continue
            if Path(path).suffix in PICTURES:
                files.append(File.generated(config, _uri(path), content=(ROOT / path).read_bytes()))
                continue
            content = _text_of(ROOT / path)
            files.append(File.generated(config, _uri(path), content=content))
            if Path(path).suffix == ".md":
                waiting.append((path, content))
            elif (ROOT / path).is_dir():
                waiting.append((f"{path}/index", content))
    return files


def _place(uri: str) -> str:
    """The place in the repository of a page of the site."""
    if not uri.startswith(f"{SOURCES}/"):
        return f"docs/{uri}"
    path = uri.removeprefix(f"{SOURCES}/").removesuffix(".md")
    return f"{path}/index" if (ROOT / path).is_dir() else path


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Makes links that leave docs/ links to the site's pages of these files, and links back into docs/ links to pages."""
    uri = page.file.src_uri
    place = _place(uri)

    def replaced(match: re.Match[str]) -> str:
        link = match[2]
        path = _outside(place, link)
        if path is not None:
            target = _uri(path)
        elif uri.startswith(SOURCES) and link:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link)).removeprefix("docs/")
        else:
            return match[0]
        if not (ROOT / (path or f"docs/{target}")).exists():
            return match[0]
        anchor = match[3] or ""
        return f"{match[1]}{posixpath.relpath(target, posixpath.dirname(uri) or '.')}{anchor}{match[4]}"

    pieces, end = [], 0
    for code in _CODE.finditer(markdown):
        pieces += [_LINK.sub(replaced, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, _LINK.sub(replaced, markdown[end:])])
