"""The sources that are compiled together (build_support/unity.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "build_support"))
from unity import united  # noqa: E402


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.delenv("FUSED_RNN_UNITY", raising=False)
    made = []
    for number in range(7):
        made.append(str(tmp_path / f"source_{number}.cpp"))
        Path(made[-1]).write_text("x" * (1 + 10 * number))
    return made


def test_every_source_is_included_once(sources: list[str], tmp_path: Path) -> None:
    groups = [Path(name).read_text().splitlines() for name in united(sources, tmp_path / "made", 3)]
    assert len(groups) == 3 and sorted(sum(groups, [])) == sorted(f'#include "{name}"' for name in sources)
    sizes = [sum(Path(line.split('"')[1]).stat().st_size for line in group) for group in groups]
    assert max(sizes) - min(sizes) <= 61  # the largest source
    assert united(sources[:2], tmp_path / "few", 3) == [str(tmp_path / "few" / f"united_{n}.cpp") for n in (0, 1)]


def test_a_file_is_written_only_if_its_text_changes(sources: list[str], tmp_path: Path) -> None:
    first = [Path(name).stat().st_mtime_ns for name in united(sources, tmp_path / "made", 2)]
    assert [Path(name).stat().st_mtime_ns for name in united(sources, tmp_path / "made", 2)] == first
    changed = [Path(name).stat().st_mtime_ns for name in united(sources[:-1], tmp_path / "made", 2)]
    assert changed != first


def test_one_by_one(sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_RNN_UNITY", "0")
    assert united(sources, tmp_path / "made", 3) == sources and not (tmp_path / "made").exists()
    monkeypatch.setenv("FUSED_RNN_UNITY", "no")
    with pytest.raises(ValueError, match="FUSED_RNN_UNITY: expected 0, 1 or nothing, got 'no'"):
        united(sources, tmp_path / "made", 3)
