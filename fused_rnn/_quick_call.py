"""``__call__`` of the modules in one C++ call where nn.Module's would do no more than run forward on plain CPU tensors."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.compiler import is_compiling

from fused_rnn import _backend
from fused_rnn._kinds import NUMBER_OF_MODE, NUMBER_OF_NONLINEARITY

_GLOBAL_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")
_call_module = None if _backend.extension is None else _backend.extension.call_module
_torch_call = nn.Module.__call__


class QuickCall:
    """Gives a module ``__call__``, which does what nn.Module's does: by csrc/torch/module_call.cpp where no hooks, modes
    or subclasses have a part in it, else by nn.Module's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_compiling():
            if _call_module is not None and not kwargs and _backend.forced is None:
                result = _call_module(self, *args)
                if result is not None:
                    return result
            if nn.Module.__call__ is not _torch_call and type(self).__module__.startswith("fused_rnn."):
                return self._call_as_torchs(*args, **kwargs)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _call_as_torchs(self, *args: Any, **kwargs: Any) -> Any:
        """The call while torch.fx traces, which it does by a ``__call__`` of its own in nn.Module.

        A tracer takes a module for a leaf, one node that calls it, if ``module.__module__`` begins with "torch.nn"
        (torch.fx.Tracer.is_leaf_module, which other tracers inherit). The layers and cells are leaves as torch.nn's are,
        so they bear that name while a tracer looks at them. Subclasses are traced, as torch.nn's are.
        """
        self.__dict__["__module__"] = nn.RNNBase.__module__
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.__dict__.pop("__module__", None)


def watch(*classes: Any) -> None:
    """Tells the C++ side for the forward functions of which classes it stands: (function, whether it is a cell's, the number
    of its cell, or -1 where the module's ``mode`` or ``nonlinearity`` decides)."""
    numbers = [cls._cell_number if isinstance(cls._cell_number, int) else -1 for cls in classes]
    forwards = tuple((cls.forward, issubclass(cls, nn.RNNCellBase), n) for cls, n in zip(classes, numbers, strict=True))
    hooks = [getattr(nn.modules.module, f"_global_{when}_hooks", None) for when in _GLOBAL_HOOKS]
    if _backend.extension is not None and None not in hooks:  # a torch that keeps its hooks elsewhere: no quick calls
        _backend.extension.watch_modules(nn.Module, tuple(hooks), forwards, NUMBER_OF_MODE, NUMBER_OF_NONLINEARITY)
