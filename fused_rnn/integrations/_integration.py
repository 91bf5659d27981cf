"""What all integrations share: the check of the version, functions of a package replaced and put back."""

from __future__ import annotations

import contextlib
import importlib.metadata
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fused_rnn import _backend


class Replacement(NamedTuple):
    """A function ``name`` of ``owner`` (a class or a module) and what makes the one that takes its place of it."""

    owner: Any
    name: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]


class _Replaced(NamedTuple):
    owner: Any
    name: str
    original: Any  # as it is in the owner's __dict__: a function or a staticmethod
    ours: Any


_lock = threading.RLock()  # of all integrations: enabling one may import a package that others import, too


class Integration:
    """Replaces functions of a package while it is enabled, for the whole process.

    Args:
        name: of the module in fused_rnn.integrations.
        distribution: the package's name for pip.
        known: the versions that it knows, as beginnings: "2.9" is 2.9.0, 2.9.1 and so on.
        replacements: says what is replaced; called once the version is known to fit, it imports the package.
    """

    def __init__(
        self, name: str, distribution: str, known: tuple[str, ...], replacements: Callable[[], Iterable[Replacement]]
    ) -> None:
        self._name, self._distribution, self._known = name, distribution, known
        self._replacements = replacements
        self._replaced: list[_Replaced] = []
        self._asked = False  # by enable()
        self._blocks = 0  # of enabled() that run

    def enable(self) -> None:
        """Replace the functions named in this module's docstring, until ``disable()``. Twice is once.

        Raises:
            ImportError: the package is not installed.
            RuntimeError: its version is not one of those known; nothing is replaced.
        """
        with _lock:
            self._replace()
            self._asked = True

    def disable(self) -> None:
        """Put the package's own functions back; blocks of ``enabled()`` that still run keep ours until they end."""
        with _lock:
            self._asked = False
            stolen = self._restore_unless_used()
        _warn_of(stolen, self._name)

    @contextlib.contextmanager
    def enabled(self) -> Iterator[None]:
        """``enable()`` for a ``with`` block. Blocks may nest, and overlap between threads: the last to end restores."""
        with _lock:
            self._replace()
            self._blocks += 1
        stolen: list[str] = []
        try:
            yield
        finally:
            with _lock:
                self._blocks -= 1
                stolen = self._restore_unless_used()
        _warn_of(stolen, self._name)

    def _replace(self) -> None:
        if self._replaced:
            return
        self._check_version()
        made = []
        for owner, name, make in self._replacements():
            original = vars(owner)[name]
            ours: Any = make(getattr(owner, name))
            made.append(_Replaced(owner, name, original, staticmethod(ours) if isinstance(original, staticmethod) else ours))
        for entry in made:  # all of them, or none where one could not be made
            setattr(entry.owner, entry.name, entry.ours)
        self._replaced = made

    def _restore_unless_used(self) -> list[str]:
        """The names that somebody else has replaced in the meantime: they stay as they are."""
        if self._asked or self._blocks:
            return []
        stolen = []
        for entry in self._replaced:
            if vars(entry.owner)[entry.name] is entry.ours:
                setattr(entry.owner, entry.name, entry.original)
            else:
                stolen.append(f"{entry.owner.__name__}.{entry.name}")
        self._replaced = []
        return stolen

    def _check_version(self) -> None:
        expected = " or ".join(f"{beginning}.*" for beginning in self._known)
        try:
            found = importlib.metadata.version(self._distribution)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(
                f"fused_rnn.integrations.{self._name}: expected {self._distribution} {expected}, which is not installed"
            ) from None
        if not any(f"{found}.".startswith(f"{beginning}.") for beginning in self._known):
            raise RuntimeError(
                f"fused_rnn.integrations.{self._name}: expected {self._distribution} {expected}, found {found}, "
                "of which fused_rnn does not know what it would replace"
            )


def _warn_of(stolen: list[str], name: str) -> None:
    if stolen:
        warnings.warn(
            f"fused_rnn.integrations.{name}: left as they are, since they were replaced again: {', '.join(stolen)}",
            UserWarning,
            stacklevel=4,
        )


def weights_of(layer: nn.Module, *classes: type[nn.Module]) -> list[torch.Tensor] | None:
    """The weights of a recurrent layer that a function call can stand for; None where calling the layer does more.

    That is: it is exactly of one of ``classes`` (no subclass, no parametrization), has no hooks and no forward of its own,
    and no torch.func transform, tracer or compiler looks on, whose view of the layer would change.
    """
    if type(layer) not in classes or "forward" in layer.__dict__ or has_hooks(layer) or watched():
        return None
    return named_weights(layer)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than forward."""
    fields = module.__dict__
    return bool(
        fields["_forward_hooks"]
        or fields["_forward_pre_hooks"]
        or fields["_backward_hooks"]
        or fields["_backward_pre_hooks"]
        or torch_module._has_any_global_hook()
    )


def named_weights(layer: Any) -> list[torch.Tensor]:
    """A recurrent layer's weights as they are now, in torch.nn's order."""
    return [getattr(layer, name) for group in layer._all_weights for name in group]


def watched() -> bool:
    """Whether a torch.func transform, forward-mode AD, a tracer or a compiler is at work."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or _backend.is_transformed()
