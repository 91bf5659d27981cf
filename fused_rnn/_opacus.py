"""Makes Opacus (differential privacy) refuse the fused layers and cells.

Opacus knows layers by their exact type. For a type that it does not know, it makes per-sample gradients by itself, from the
first argument and the first result alone. Those of a cell whose state is not zeros would be wrong, without an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn


def _advice(module: nn.Module) -> str:
    name = next(cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("fused_rnn."))
    if isinstance(module, nn.RNNCellBase):
        return f"fused_rnn.{name} has no per-sample gradients, and Opacus has no cells: build the step of nn.Linear layers"
    return (
        f"fused_rnn.{name} has no per-sample gradients: use opacus.layers.DP{name}, which takes its state_dict, and which "
        "fused_rnn.integrations.opacus.enable() puts on the kernels "
        "(or fused_rnn.revert, then opacus.validators.ModuleValidator.fix, for LSTM and GRU)"
    )


def _no_attribute(module: nn.Module) -> Any:
    raise AttributeError("ft_compute_sample_grad")


def _refuse(module: nn.Module, value: Any) -> None:
    """Raises: Opacus's GradSampleModule sets this attribute on a layer whose type it does not know."""
    register()
    raise NotImplementedError(_advice(module))


ft_compute_sample_grad = property(_no_attribute, _refuse)


def register() -> None:
    """Makes the ModuleValidator of a loaded Opacus replace LSTM and GRU as it does torch.nn's, and refuse the rest."""
    opacus = sys.modules.get("opacus")
    validator = getattr(getattr(opacus, "validators", None), "ModuleValidator", None)
    if validator is None:
        return
    from fused_rnn._subclass import FUSED

    errors = opacus.validators.errors  # type: ignore[union-attr]
    for original, fused in FUSED.items():
        fixer = validator.FIXERS.get(original)
        kind = errors.NotYetSupportedModuleError if fixer is None else errors.ShouldReplaceModuleError
        validator.VALIDATORS.setdefault(fused, _validate(kind))
        if fixer is not None:
            validator.FIXERS.setdefault(fused, fixer)


def _validate(kind: type[Exception]) -> Callable[[nn.Module], list[Exception]]:
    return lambda module: [kind(_advice(module))]
