"""Whether the GPU's kernels of what only some calls have may serve: once they are verified on the device (tuning/)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn import _backend, _settings
from fused_rnn._recipe import Recipe, Rows

NEEDED = hasattr(_settings.extension, "features_serve")  # by builds with kernels for a GPU
_OF_OPTIONS = ("zoneout", "zoneout", "state_clip", "recurrent_dropout", "recurrent_dropout")  # of StepOptions


def features_of(rows: Rows, recipe: Recipe) -> tuple[str, ...]:
    """Of tuning.verification.FEATURES, what an eager call has that no other family and no comparison stands in for."""
    of_options = zip(_OF_OPTIONS, rows.options, strict=False)
    found = dict.fromkeys(feature for feature, value in of_options if value is not None)
    if rows.reset_states:
        found["reset_state"] = None
    if recipe.all_states and recipe.kind.has_c and torch.is_grad_enabled():
        found["every_c"] = None
    return tuple(found)


def serve(x: Tensor, rows: Rows, recipe: Recipe) -> bool:
    """Whether kernels serve the call; else the reference does, after a warning. The first such call waits for the proof."""
    features = features_of(rows, recipe)
    extension: Any = _settings.extension
    if not features or _backend.forced is not None or extension.features_serve(x, features) or prove(x, features):
        return True
    reason = f"no kernel family is verified on this device for calls with {', '.join(features)}"
    _backend.warn_once(f"proof of {features}", reason)
    return False


def prove(x: Tensor, features: Sequence[str]) -> bool:
    """Whether these kernels are verified on x's device, which is waited for once."""
    from .tuning.serve import prove_features  # which needs the ops

    return prove_features(x.get_device(), features)
