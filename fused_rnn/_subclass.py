"""Classes made at run time for ``convert(model, subclasses=True)``: a user's subclass of a torch.nn layer, over ours.

``class Theirs(nn.LSTM)`` becomes ``class Derived(Theirs, fused_rnn.LSTM)``. Its method resolution order puts fused_rnn.LSTM
before nn.LSTM, so that ``super().forward(...)`` in Theirs runs on the kernels. Name, module and documentation are theirs.
"""

from __future__ import annotations

import copyreg
import dis
import threading
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from fused_rnn import cells, modules
from fused_rnn._quick_call import QuickCall
from fused_rnn._regularisation import FIELD, Regularisation, Regularised

FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: modules.RNN,
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNNCell: cells.RNNCell,
    nn.LSTMCell: cells.LSTMCell,
    nn.GRUCell: cells.GRUCell,
}

# Methods that torch.nn's forward calls every time. Ours calls them to raise an error, or never.
_TORCHS = {"check_input", "check_forward_args", "check_hidden_size", "get_expected_hidden_size", "permute_hidden"}
_OURS = {
    name
    for fused in FUSED.values()
    for ours in fused.__mro__
    if issubclass(ours, (QuickCall, Regularised))
    for name in vars(ours)
    if name.startswith("_") and not name.startswith("__")
} - {"_apply", "_abc_impl"}
_OURS |= {FIELD, *Regularisation._fields}
_PICKLING = {"__reduce__", "__reduce_ex__"}
_ORIGINAL = "_fused_rnn_original"  # in a derived class: theirs

_lock = threading.RLock()  # making a class runs its metaclass's code, which may convert


def torch_class(cls: type) -> type[nn.Module] | None:
    """The class that a derived class was derived from; None for other classes."""
    return vars(cls).get(_ORIGINAL)


def derived(cls: type[nn.Module]) -> type[nn.Module] | str:
    """The class derived from a user's class, the same at every call, or why there is none, as a clause."""
    original = next((base for base in cls.__mro__ if base in FUSED), None)
    if original is None:
        return f"a subclass of {nn.RNNBase.__name__} or RNNCellBase, not of a layer or cell"
    with _lock:
        # Python keeps a class's subclasses, weakly: no table of ours holds anybody's classes alive.
        found = next((sub for sub in type.__subclasses__(cls) if torch_class(sub) is cls), None)
        return found or _why_not(cls, original) or _derive(cls, FUSED[original])


def _derive(cls: type[nn.Module], fused: type[nn.Module]) -> type[nn.Module] | str:
    fields = {
        _ORIGINAL: cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce_ex,
    }
    try:
        made = types.new_class(cls.__name__, (cls, fused), exec_body=lambda namespace: namespace.update(fields))
        object.__new__(cls).__class__ = made  # what convert and revert do must work
        object.__new__(made).__class__ = cls  # type: ignore[assignment]
    except Exception as error:  # whatever its metaclass or __init_subclass__ raises
        return f"no class can be derived from it ({type(error).__name__}: {error})"
    return made


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Pickles and copies name the user's class; loading derives again."""
    cls = type(self)
    result = nn.Module.__reduce_ex__(self, protocol)
    original = torch_class(cls)
    if original is None:  # a class derived further: by a user, or by torch's parametrizations
        return result
    function, args, *rest = result  # type: ignore[str-unpack]
    if function is not copyreg.__newobj__ or args[0] is not cls:  # type: ignore[attr-defined]
        raise TypeError(f"cannot pickle a converted {cls.__name__} with protocol {protocol}: use 2 or higher")
    return (_rebuild, (original, *args[1:]), *rest)


def _rebuild(original: type[nn.Module], *args: Any) -> nn.Module:
    """An instance, without its state, of the class derived from the user's."""
    cls = derived(original)
    if isinstance(cls, str):
        raise RuntimeError(f"cannot load a converted {original.__module__}.{original.__qualname__}: {cls}")
    return cls.__new__(cls, *args)


# --- what cannot work ---


def clashes(module: nn.Module) -> str | None:
    """The first attribute of an instance whose name the fused forward uses for something else; None if there is none."""
    names = {*module.__dict__, *module._parameters, *module._buffers, *module._modules}
    return min(names & _OURS - {"_flat_weights"}, default=None)


def _why_not(cls: type, original: type) -> str | None:
    """Where the fused forward would differ from torch.nn's for this class, as a clause; None if nowhere."""
    theirs = [base for base in cls.__mro__ if base not in original.__mro__]
    for base in theirs:
        names = set(vars(base))
        if _PICKLING & names:
            return f"{base.__name__} defines {min(_PICKLING & names)}"
        changed = (_TORCHS | _OURS) & names
        if changed:
            return f"{base.__name__} defines {min(changed)}, which fused layers do not use as torch.nn's do"
    functions = [(base, function) for base in theirs for function in _functions(base)]
    for base, function in functions:
        called = _torch_forward(function, original)
        if called:
            return f"{base.__name__}.{function.__name__} calls torch.nn.{called}.forward by name instead of super().forward"
    overridden = "forward" in {name for base in theirs for name in vars(base)}
    if overridden and not any(_calls_super(function) for _, function in functions):
        return "its forward does not call super().forward"
    return None


def _functions(cls: type) -> Iterator[types.FunctionType]:
    """The functions in a class: methods, properties, static and class methods, and the functions that decorators wrapped."""
    for value in vars(cls).values():
        values = [value.fget, value.fset] if isinstance(value, property) else [getattr(value, "__func__", value)]
        while values:
            function = values.pop()
            if isinstance(function, types.FunctionType):
                yield function
                values.append(getattr(function, "__wrapped__", None))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and the code of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _calls_super(function: types.FunctionType) -> bool:
    return any(
        "super" in code.co_names and {"forward", "__call__"} & set(code.co_names) for code in _codes(function.__code__)
    )


def _torch_forward(function: types.FunctionType, original: type) -> str | None:
    """The torch.nn class whose forward or __call__ the function reads by name, as in ``nn.LSTM.forward``; None if none."""
    if function is vars(original).get("forward"):  # forward = nn.LSTM.forward in the class
        return original.__name__
    captured = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    for code in _codes(function.__code__):
        value: Any = None  # what the dotted name read so far stands for
        for instruction in dis.get_instructions(code):
            if instruction.opname == "LOAD_GLOBAL":
                value = function.__globals__.get(instruction.argval)
            elif instruction.opname == "LOAD_DEREF" and instruction.argval in captured:
                value = _contents(captured[instruction.argval])
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, (type, types.ModuleType)):
                if isinstance(value, type) and value in original.__mro__ and instruction.argval in ("forward", "__call__"):
                    return value.__name__
                value = vars(value).get(instruction.argval)
            elif instruction.opname not in ("PUSH_NULL", "CACHE"):
                value = None
    return None


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
