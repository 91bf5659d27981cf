"""The fixture `setting`: what environment variables choose when the package is imported, changed for one test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from fused_rnn import _settings

Setting = Callable[[str, str], None]


@pytest.fixture
def setting() -> Iterator[Setting]:
    """setting(name, value), until the end of the test; an empty value is the default."""
    with contextlib.ExitStack() as stack:
        yield lambda name, value: stack.enter_context(_settings.use(name, value))
