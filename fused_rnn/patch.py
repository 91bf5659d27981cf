"""Put the fused layers into models that are being built by code one cannot change: patched."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fused_rnn._quick_call import QuickCall
from fused_rnn._subclass import FUSED, torch_class

__all__ = ["patched"]

_NAMESPACES = (nn, nn.modules, nn.modules.rnn)
_BASES = (nn.RNNBase, nn.RNNCellBase)
_PARAMETRIZE = nn.utils.parametrize.__name__  # the module of the classes that torch's parametrizations make at run time
_lock = threading.Lock()
_depth = 0
_replaced: list[tuple[Any, str, Any]] = []
_watched: _Watch | None = None


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Make torch.nn.RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell name the fused classes inside a ``with`` block.

    For models that are built by code one cannot change: ``with fused_rnn.patched(): model = build()``. Names that were
    bound before (``from torch.nn import LSTM``, ``cell = nn.LSTM`` in a class, tables of classes) are not reached: use
    :func:`convert` there. The names are the process's, so other threads see them too. Blocks may nest and may overlap
    between threads: the last one to end restores the names, on an exception as well, except a name that someone else has
    replaced in the meantime.

    A warning at the end of the last block names torch.nn's layers and cells that were built during it all the same, and what
    stays fused after it: classes that were derived from the fused ones and names that were bound to them by an import.
    """
    global _depth, _watched
    with _lock:
        _depth += 1
        if _depth == 1:
            for namespace in _NAMESPACES:
                for original, fused in FUSED.items():
                    _replaced.append((namespace, original.__name__, getattr(namespace, original.__name__)))
                    setattr(namespace, original.__name__, fused)
            _watched = _Watch()
    texts: list[str] = []
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                fused_classes = tuple(FUSED.values())
                for namespace, name, value in _replaced:
                    if getattr(namespace, name) in fused_classes:
                        setattr(namespace, name, value)
                _replaced.clear()
                if _watched is not None:
                    texts, _watched = _watched.end(), None
    for text in texts:  # not where an exception ends the block: it tells enough
        warnings.warn(text, UserWarning, stacklevel=3)


class _Watch:
    """Watches what a block should not do: build torch.nn's own layers, derive classes from the fused ones."""

    def __init__(self) -> None:
        self.built: Counter[str] = Counter()
        self._classes, self._modules = set(_subclasses()), set(sys.modules)
        self._inits = [(base, base.__init__, self._counting(base.__init__)) for base in _BASES]
        for base, _, counting in self._inits:
            base.__init__ = counting  # type: ignore[method-assign]

    def _counting(self, init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def counting(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            init(module, *args, **kwargs)
            if not isinstance(module, QuickCall):
                self.built[f"{_full_name(type(module))} in {_builder(module)}"] += 1

        return counting

    def end(self) -> list[str]:
        """Stops watching; returns warnings."""
        for base, init, counting in self._inits:
            if base.__init__ is counting:
                base.__init__ = init  # type: ignore[method-assign]
        texts = []
        if self.built:
            found = ", ".join(f"{name} ({count} times)" if count > 1 else name for name, count in self.built.items())
            texts.append(
                f"fused_rnn.patched: torch.nn's own layers were built, by names bound before the block: {found}; "
                "fused_rnn.convert(model) changes them, with subclasses=True also classes derived from them"
            )
        classes = [_full_name(cls) for cls in _subclasses() if cls not in self._classes]
        names = [
            f"{module}.{name}"
            for module in set(sys.modules) - self._modules
            if module.partition(".")[0] != "fused_rnn"
            for name, value in list(getattr(sys.modules.get(module), "__dict__", {}).items())
            if isinstance(value, type) and value in FUSED.values()
        ]
        if classes or names:
            texts.append(
                "fused_rnn.patched: these were made of torch.nn's names during the block and stay fused after it: "
                f"{', '.join(sorted(classes) + sorted(names))}; import such modules before the block, then use "
                "fused_rnn.convert(model, subclasses=True)"
            )
        return texts


def _subclasses() -> Iterator[type]:
    """Classes that users derived from the fused ones, without those that convert and torch's parametrizations make."""
    pending: list[type] = list(FUSED.values())
    cls: type
    while pending:
        for cls in type.__subclasses__(pending.pop()):
            pending.append(cls)
            if torch_class(cls) is None and cls.__module__ != _PARAMETRIZE:
                yield cls


def _full_name(cls: type) -> str:
    module = "torch.nn" if cls in FUSED else cls.__module__
    return f"{module}.{cls.__qualname__}"


def _builder(module: nn.Module) -> str:
    """The name of the Python module whose code builds ``module``: the first caller that is not its own __init__."""
    frame = sys._getframe(2)
    while (
        frame.f_back is not None
        and frame.f_code.co_name == "__init__"
        and next(iter(frame.f_locals.values()), None) is module
    ):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "?"))
