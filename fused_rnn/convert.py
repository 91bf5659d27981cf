"""Put the fused layers into models that exist, and take them out again (patch.py is for models that are being built).

convert changes the class of each layer in place instead of building a new object. The object stays the same, and with it
everything that refers to it or hangs on it: Parameters (and so optimizers), buffers, hooks and their handles, training mode,
attributes that others put on it, modules shared between parents, the root module itself.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from fused_rnn import _opacus, _subclass
from fused_rnn._checks import DTYPES
from fused_rnn._kinds import NUMBER_OF_NONLINEARITY, TORCH_NONLINEARITIES
from fused_rnn._quick_call import QuickCall
from fused_rnn._regularisation import options_of
from fused_rnn._subclass import FUSED

__all__ = ["convert", "revert"]

_Model = TypeVar("_Model", bound=nn.Module)

_TORCH = {fused: original for original, fused in FUSED.items()}
_CACHES = ("_flat_weights", "_flat_weight_refs")


def convert(model: _Model, *, subclasses: bool = False) -> _Model:
    """Make every torch.nn recurrent layer and cell inside a model, or the model itself, a fused one, in place.

    Layers and cells of torchrecurrent (0.2.5) become a Layer or Step of the zoo's cell. The object stays, its parameters
    are new ones (fused_rnn.zoo.from_torchrecurrent says which): convert before the optimizer is made.

    Args:
        model: any module.
        subclasses: also change subclasses of torch.nn's layers and cells whose forward calls ``super().forward``. Such a
            module gets a class made of its own and the fused one: it stays an instance of its class, and pickles and
            copies as before.

    A warning names the recurrent modules left as they are: subclasses without ``subclasses=True``, or those that it cannot
    serve, with the reason; parametrized ones and those sharded by fully_shard (their class is made at run time: convert
    first, then parametrize or shard), ones whose forward was replaced on the instance, ones of a dtype without kernels
    (complex), and TorchScript's, which cannot be changed; and torchrecurrent's whose states are others than the zoo's, or
    with an activation that the zoo does not have.
    Modules that torch does not know as submodules (kept in a plain list) are not reached.

    Returns:
        The same model.

    Raises:
        TypeError: model is not a torch.nn.Module, or subclasses is not a bool.
    """
    if not isinstance(subclasses, bool):
        raise TypeError(f"subclasses: expected a bool, got {type(subclasses).__name__}")
    _opacus.register()
    return _swap(model, "convert", subclasses)


def revert(model: _Model) -> _Model:
    """Undo :func:`convert`, in place: every fused layer and cell becomes torch.nn's, or of its own class again.

    Left as they are, with a warning: instances of subclasses of ours, parametrized modules, and those that torch.nn has no
    class for (nonlinearity "identity", zoneout and the other options that torch.nn lacks). What was torchrecurrent's stays
    ours. Returns the same model.
    """
    return _swap(model, "revert")


def _swap(model: _Model, caller: str, subclasses: bool = False) -> _Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected a torch.nn.Module, got {type(model).__name__}")
    left = []
    inside: set[nn.Module] = set()  # of modules of torchrecurrent that stay as they are
    for name, module in model.named_modules():
        if module in inside:
            continue
        if caller == "convert" and _is_torchrecurrent(module):
            reason = _from_torchrecurrent(module)
            inside.update(module.modules() if reason is not None else ())
        else:
            target = _target(module, caller, subclasses)
            reason = target if isinstance(target, str) else None if target is None else _why_not(module, caller)
            if reason is None and isinstance(target, type):
                _set_class(module, target)
        if reason is not None:
            left.append(f"{name or 'the model itself'} ({type(module).__name__}: {reason})")
    if left:
        warnings.warn(f"fused_rnn.{caller} left unchanged: {', '.join(left)}", UserWarning, stacklevel=3)
    return model


def _is_torchrecurrent(module: nn.Module) -> bool:
    """Whether it is a layer or cell of torchrecurrent's, or of a subclass of one."""
    return any(
        cls.__module__.partition(".")[0] == "torchrecurrent" and cls.__name__.endswith(("LayerBase", "CellBase"))
        for cls in type(module).__mro__
    )


def _from_torchrecurrent(module: nn.Module) -> str | None:
    """Makes it ours; the reason where it stays as it is."""
    from fused_rnn.zoo import _torchrecurrent  # the zoo takes time to import

    reason = "its forward was replaced on the instance" if "forward" in module.__dict__ else _torchrecurrent.why_not(module)
    if reason is None:
        _torchrecurrent.become_ours(module)
    return reason


def _target(module: nn.Module, caller: str, subclasses: bool) -> type[nn.Module] | str | None:
    """The class that a module gets; the reason where a recurrent module stays as it is; None for every other module."""
    cls = type(module)
    target = FUSED.get(cls) if caller == "convert" else _TORCH.get(cls) or _subclass.torch_class(cls)
    if target is not None:
        return target
    if isinstance(module, torch.jit.ScriptModule):
        original = getattr(module, "original_name", "")
        return "a TorchScript module cannot be changed" if original in {c.__name__ for c in FUSED} else None
    ours = isinstance(module, QuickCall)
    theirs = isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and not ours
    if not (theirs if caller == "convert" else ours):
        return None
    if nn.utils.parametrize.is_parametrized(module):
        return f"parametrized; {caller} first, then parametrize"
    if any(base.__name__ == "FSDPModule" and base.__module__.startswith("torch.") for base in cls.__mro__):
        return f"sharded by fully_shard; {caller} first, then shard"
    if caller == "revert":
        return "a subclass"
    return _subclass.derived(cls) if subclasses else "a subclass; see subclasses=True"


def _why_not(module: nn.Module, caller: str) -> str | None:
    """Why a module of a class that has a counterpart stays as it is; None if it is to be changed."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    nonlinearity = getattr(module, "nonlinearity", None)
    if nonlinearity in NUMBER_OF_NONLINEARITY and nonlinearity not in TORCH_NONLINEARITIES:
        return f"torch.nn has no nonlinearity {nonlinearity!r}"
    options = options_of(module)
    if caller == "revert" and options is not None:
        return f"torch.nn has no {options.shown().removeprefix(', ')}"
    dtype = next((p.dtype for p in module.parameters(recurse=False)), None)
    if caller == "convert" and dtype is not None and dtype not in DTYPES:
        return f"no kernels for {dtype}"
    if caller == "convert" and type(module) not in FUSED:
        own = _subclass.clashes(module)
        return own and f"its attribute {own} has the name of one of the fused class's"
    return None


def _set_class(module: nn.Module, target: type[nn.Module]) -> None:
    """Changes the class in place, and removes or makes the weight caches, which only torch.nn's layers keep."""
    assigned = _assigned_weights(module) if isinstance(module, nn.RNNBase) else None
    module.__class__ = target
    if not isinstance(module, nn.RNNBase):
        return
    for cache in (*_CACHES, "_weights_override"):
        module.__dict__.pop(cache, None)
    module._init_flat_weights()
    if assigned is not None:
        module._flat_weights = assigned


def _assigned_weights(layer: nn.RNNBase) -> list[Any] | None:
    """The assigned ``_flat_weights`` that forward would use; None where forward would use the named weights."""
    layer._update_flat_weights()
    weights = list(layer._flat_weights)
    named = [getattr(layer, name, None) for name in layer._flat_weights_names]
    return None if len(weights) == len(named) and all(map(operator.is_, weights, named)) else weights
