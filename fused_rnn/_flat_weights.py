"""Where a layer's weights come from: its parameters by name, what replaces them, or what ``_flat_weights`` was set to."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn


class _FlatWeights(list[Any]):
    """The weights of a layer in order, as they were when ``_flat_weights`` was read. Writing another tensor into it assigns
    ``_flat_weights`` with that one replaced, as in torch.nn."""

    def __init__(self, layer: FlatWeights, weights: Iterable[Any]) -> None:
        super().__init__(weights)
        self._layer = layer

    def __setitem__(self, index: Any, value: Any) -> None:
        weights = list(self._layer._flat_weights)
        weights[index] = value
        self._layer._flat_weights = weights
        super().__setitem__(index, value)

    def __reduce_ex__(self, protocol: Any) -> Any:  # a copy is a plain list
        return list, (list(self),)


class _Override(NamedTuple):
    """What forward uses instead of the named weights, after ``_flat_weights`` was assigned."""

    weights: list[Any]
    named: list[weakref.ref[Any] | None]  # the named weights at that moment

    def is_outdated(self, named: list[Any]) -> bool:
        """Whether a weight has been replaced under its name since: then it and all the other named ones count again."""
        return any(
            weight is not None and ref is not None and ref() is not weight
            for weight, ref in zip(named, self.named, strict=True)
        )


class FlatWeights(nn.RNNBase):
    """A layer whose weights are separate tensors, read at each use; fused_rnn/modules.py says what that means to users."""

    def _weights(self) -> list[Tensor]:
        """The weights in _flat_weights_names' order, as they are now: parameters, or what replaces them by name
        (parametrizations, weight_norm, prune, DataParallel replicas)."""
        fields = self.__dict__
        if "_weights_override" in fields:
            return self._overriding_weights()
        parameters = fields["_parameters"]
        try:
            return [parameters[name] for name in fields["_flat_weights_names"]]
        except KeyError:
            return [getattr(self, name) for name in fields["_flat_weights_names"]]

    def _named_weights(self) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    def _overriding_weights(self) -> list[Any]:
        """What ``_flat_weights`` was set to; the named weights if one of them has been replaced since."""
        named, override = self._named_weights(), self.__dict__["_weights_override"]
        if override.is_outdated(named):
            del self.__dict__["_weights_override"]
            return named
        return override.weights

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        override = "_weights_override" in self.__dict__
        return _FlatWeights(self, self._overriding_weights() if override else self._named_weights())

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor | None]) -> None:
        """Assigning other tensors than the named weights makes forward use them. The last write wins: until a weight is
        assigned by its name, the named ones are assigned back, or the module is moved; copies have the named ones. All
        this is as in torch.nn, except that there an assignment by name also wins over a later one of the list, unless
        there was a call in between."""
        named = self._named_weights()
        self.__dict__.pop("_weights_override", None)
        if len(value) != len(named) or any(new is not old for new, old in zip(value, named, strict=False)):
            refs = [None if weight is None else weakref.ref(weight) for weight in named]
            self.__dict__["_weights_override"] = _Override(list(value), refs)

    def __setattr__(self, attr: str, value: Any) -> None:
        nn.Module.__setattr__(self, attr, value)

    def _init_flat_weights(self) -> None:
        self.__dict__.pop("_weights_override", None)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.__dict__.pop(
            "_weights_override", None
        )  # before, too: torch.utils.swap_tensors refuses weakly referenced tensors
        return super()._apply(fn, recurse)

    def _update_flat_weights(self) -> None:
        pass

    def _weights_have_changed(self) -> bool:
        return False

    def flatten_parameters(self) -> None:
        """Does nothing: weights are separate tensors and no layout of them is faster than another."""

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_flat_weight_refs", None)
        state.pop("_weights_override", None)
        return state

    def __setstate__(self, d: dict[str, Any]) -> None:
        state = {key: value for key, value in d.items() if key not in ("_flat_weights", "_flat_weight_refs")}
        names = state.get("_all_weights", state.get("all_weights"))
        if "_flat_weights_names" not in state and names and isinstance(names[0][0], str):
            state["_flat_weights_names"] = [name for group in names for name in group]
        super().__setstate__(state)
        self.__dict__.pop("_flat_weight_refs", None)
