"""A plugin of pytest: of each parametrized test every third case runs, all of them in three runs of offset 0, 1 and 2.

The offset is that of the test's place in its file, so that tests with the same parameters run different cases.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

SHARE = 3


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    functions: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        functions[item.nodeid.partition("[")[0]].append(item)
    kept = [item for offset, cases in enumerate(functions.values()) for item in cases[offset % SHARE :: SHARE] or cases[:1]]
    left_out = set(items) - set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = kept
