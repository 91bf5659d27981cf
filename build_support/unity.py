"""Sources that are compiled together: torch's headers take most of the time that a file of csrc/torch takes to compile."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

# The same everywhere: what has been compiled by CI is what is compiled by users. One takes about 1.5 GB of memory.
GROUPS = 4


def united(sources: Sequence[str], folder: Path, groups: int = GROUPS) -> list[str]:
    """Writes files that include the sources, about as many bytes each, and returns their paths.

    A file is written only if its text changes. None are made where FUSED_RNN_UNITY=0: then the sources are returned.

    Raises:
        ValueError: FUSED_RNN_UNITY is neither empty nor 0 or 1.
    """
    wanted = os.environ.get("FUSED_RNN_UNITY", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"FUSED_RNN_UNITY: expected 0, 1 or nothing, got {wanted!r}")
    if wanted == "0":
        return list(sources)
    shares: list[list[str]] = [[] for _ in range(min(groups, len(sources)))]
    sizes = [0] * len(shares)
    for source in sorted(sources, key=lambda name: (-Path(name).stat().st_size, name)):
        least = sizes.index(min(sizes))
        shares[least].append(source)
        sizes[least] += Path(source).stat().st_size
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number, share in enumerate(shares):
        path = folder / f"united_{number}.cpp"
        text = "".join(f'#include "{Path(source).resolve()}"\n' for source in sorted(share))
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        made.append(str(path))
    return made
