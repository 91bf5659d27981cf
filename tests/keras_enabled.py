"""A plugin of pytest, for Keras's own tests: they run with fused_rnn.integrations.keras on (test_integrations_keras.py)."""

from __future__ import annotations

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

from fused_rnn.integrations import keras

served = 0
_original = keras._serve


def _counting(*args: Any) -> Any:
    global served
    found = _original(*args)
    served += found is not None
    return found


keras._serve = _counting
keras.enable()


def pytest_sessionfinish() -> None:
    print(f"\nfused_rnn served {served} calls")
