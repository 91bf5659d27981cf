"""Put the fused layers into models: convert and revert change models that are built, patched the ones being built.

convert changes the class of each layer in place instead of building a new object. The object stays the same, and with it
everything that refers to it or hangs on it: Parameters (and so optimizers), buffers, hooks and their handles, training mode,
attributes that others put on it, modules shared between parents, the root module itself.
"""

from __future__ import annotations

import contextlib
import operator
import threading
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from fused_rnn import cells, modules
from fused_rnn.functional import _DTYPES

__all__ = ["convert", "patched", "revert"]

_Model = TypeVar("_Model", bound=nn.Module)

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: modules.RNN,
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNNCell: cells.RNNCell,
    nn.LSTMCell: cells.LSTMCell,
    nn.GRUCell: cells.GRUCell,
}
_TORCH = {fused: original for original, fused in _FUSED.items()}
_CACHES = ("_flat_weights", "_flat_weight_refs")


def convert(model: _Model) -> _Model:
    """Make every torch.nn recurrent layer and cell inside a model, or the model itself, a fused one, in place.

    Exact types only. A warning names the recurrent modules left as they are: subclasses (their forward may differ),
    parametrized ones (their class is made at run time: convert first, then parametrize), ones whose forward was replaced on
    the instance, ones of a dtype without kernels (complex), and TorchScript's, which cannot be changed. Modules that torch
    does not know as submodules (kept in a plain list) are not reached.

    Returns:
        The same model.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    return _swap(model, _FUSED, "convert")


def revert(model: _Model) -> _Model:
    """Undo :func:`convert`, in place: every fused layer and cell becomes torch.nn's. Returns the same model.

    Left as they are, with a warning: subclasses, parametrized modules, and those that torch.nn has no class for
    (nonlinearity "identity").
    """
    return _swap(model, _TORCH, "revert")


def _swap(model: _Model, classes: dict[type[nn.Module], type[nn.Module]], caller: str) -> _Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected a torch.nn.Module, got {type(model).__name__}")
    left = []
    for name, module in model.named_modules():
        target = classes.get(type(module))
        reason = _why_not(module, target, caller)
        if reason is not None:
            left.append(f"{name or 'the model itself'} ({type(module).__name__}: {reason})")
        elif target is not None:
            _set_class(module, target)
    if left:
        warnings.warn(f"fused_rnn.{caller} left unchanged: {', '.join(left)}", UserWarning, stacklevel=3)
    return model


def _why_not(module: nn.Module, target: type[nn.Module] | None, caller: str) -> str | None:
    """Why a recurrent module stays as it is; None if it is to be changed or is not recurrent or needs no change."""
    if target is not None:
        if "forward" in module.__dict__:
            return "its forward was replaced on the instance"
        if getattr(module, "nonlinearity", None) == "identity":
            return "torch.nn has no nonlinearity 'identity'"
        dtype = next((p.dtype for p in module.parameters(recurse=False)), None)
        if caller == "convert" and dtype is not None and dtype not in _DTYPES:
            return f"no kernels for {dtype}"
        return None
    if isinstance(module, torch.jit.ScriptModule):
        original = getattr(module, "original_name", "")
        return "a TorchScript module cannot be changed" if original in {c.__name__ for c in _FUSED} else None
    ours = isinstance(module, (modules._Layer, cells._Cell))
    theirs = isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and not ours
    if not (theirs if caller == "convert" else ours):
        return None
    if nn.utils.parametrize.is_parametrized(module):
        return f"parametrized; {caller} first, then parametrize"
    return "a subclass"


def _set_class(module: nn.Module, target: type[nn.Module]) -> None:
    """Change the class in place; the weight caches that torch.nn's layers keep and ours do not come and go with it."""
    if not isinstance(module, nn.RNNBase):
        module.__class__ = target
        return
    assigned = _assigned_weights(module)
    module.__class__ = target
    for cache in (*_CACHES, "_weights_override"):
        module.__dict__.pop(cache, None)
    module._init_flat_weights()
    if assigned is not None:
        module._flat_weights = assigned


def _assigned_weights(layer: nn.RNNBase) -> list[Any] | None:
    """``_flat_weights`` if it was assigned and forward would use it, None if forward would use the named weights."""
    layer._update_flat_weights()
    weights = list(layer._flat_weights)
    named = [getattr(layer, name, None) for name in layer._flat_weights_names]
    return None if len(weights) == len(named) and all(map(operator.is_, weights, named)) else weights


_NAMESPACES = (nn, nn.modules, nn.modules.rnn)
_patch_lock = threading.Lock()
_patch_depth = 0
_replaced: list[tuple[Any, str, Any]] = []


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Make torch.nn.RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell name the fused classes inside a ``with`` block.

    For models that are built by code one cannot change: ``with fused_rnn.patched(): model = build()``. Names that were
    imported before (``from torch.nn import LSTM``) are not reached: use :func:`convert` there. The names are the process's,
    so other threads see them too. Blocks may nest and may overlap between threads: the last one to end restores the names,
    on an exception as well, except a name that someone else has replaced in the meantime.
    """
    global _patch_depth
    with _patch_lock:
        _patch_depth += 1
        if _patch_depth == 1:
            for namespace in _NAMESPACES:
                for original, fused in _FUSED.items():
                    _replaced.append((namespace, original.__name__, getattr(namespace, original.__name__)))
                    setattr(namespace, original.__name__, fused)
    try:
        yield
    finally:
        with _patch_lock:
            _patch_depth -= 1
            if _patch_depth == 0:
                fused_classes = tuple(_FUSED.values())
                for namespace, name, value in _replaced:
                    if getattr(namespace, name) in fused_classes:
                        setattr(namespace, name, value)
                _replaced.clear()
