"""The ops on DTensors: every rank runs the kernels on its own rows of the batch, with whole weights.

A recurrence needs a row's whole state at every step, so on each dimension of the device mesh a call is either the same on
every rank (the input is replicated: the "replica" of a tensor-parallel model) or each rank has other rows (the input is
sharded on its batch dimension: data parallel). The input decides; what lies otherwise (weights sharded as FSDP does, inputs
sharded on time or features) is gathered first. A gradient comes back in the placements of its tensor: of weights, that is a
sum over the ranks that had other rows.

torch calls the rules below for tensors of class DTensor; nothing here runs for others. ``prepare`` registers them at the
first call that is not of plain tensors, as importing torch.distributed.tensor takes long. The Python reference is
torch's own ops, with torch's own rules.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn._recipe import ALL_STATES, rows_of

FORMULA_ALL_STATES = 1 << 6  # of an own cell's flags: csrc/torch/formula_ops.h
_OPS = ("layer", "layer_checkpointed", "formula", "formula_checkpointed")
_registered = False


def prepare() -> None:
    """Registers the rules, once, where there can be a DTensor: in a process that has imported the class."""
    global _registered
    if _registered or "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import DTensor

    _registered = True
    for name in _OPS:
        torch.library.register_torch_dispatch(f"fused_rnn::{name}", DTensor, _forward)
        torch.library.register_torch_dispatch(f"fused_rnn::{name}_backward", DTensor, _backward)


prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo calls it while it compiles


def is_dtensor(tensor: Tensor) -> bool:
    """Imports nothing."""
    if type(tensor) is Tensor or "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor on every rank, which is a collective call; a Tensor as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


class _Mesh:
    """The mesh of a call, and where its batch lies on each dimension of it."""

    def __init__(self, x: Any, others: Sequence[tuple[str, Any]]) -> None:
        from torch.distributed.tensor import DTensor, Replicate

        for name, tensor in (("input", x), *others):
            if not isinstance(tensor, DTensor):
                raise TypeError(
                    f"{name}: expected a DTensor as another tensor of the call is one, got {type(tensor).__name__}; "
                    "DTensor.from_local or distribute_tensor makes one, local tensors (to_local) need local weights"
                )
            if tensor.device_mesh != x.device_mesh:
                raise ValueError(f"{name}: expected the device mesh of input, {x.device_mesh}, got {tensor.device_mesh}")
        self.mesh = x.device_mesh
        # Packed rows have no batch dimension. Ids have one dimension less.
        dim = 3 if x.is_floating_point() else 2
        batch = [x.dim() == dim and placement.is_shard(1) for placement in x.placements]
        self.is_batch = batch
        self.whole = [Replicate()] * len(batch)

    def along(self, dim: int) -> list[Any]:
        """The placements of a tensor whose dimension ``dim`` is the batch."""
        from torch.distributed.tensor import Replicate, Shard

        return [Shard(dim) if batch else Replicate() for batch in self.is_batch]

    def local(self, tensor: Any, placements: list[Any]) -> Tensor:
        """This rank's part of a tensor in these placements; a plain tensor is the same on all ranks."""
        from torch.distributed.tensor import DTensor

        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, self.mesh, self.whole, run_check=False)
        return tensor.redistribute(self.mesh, placements).to_local()

    @staticmethod
    def own(saved: Any) -> Tensor:
        """What this rank's forward saved: local tensors, and the output."""
        return saved if type(saved) is Tensor else saved.to_local()

    def rows(self, rows: Sequence[Any]) -> list[Tensor]:
        """lengths [B], resets [T, B]; of packed rows, whose batch is whole, offsets and resets as they are; numbers too."""
        return [self.local(tensor, self.along(tensor.dim() - 1)) if tensor.dim() else tensor for tensor in rows]

    def whole_of(self, tensor: Tensor, batch: int) -> Any:
        """The result of all ranks of which this is the local one: its dimension 1 is the batch."""
        if not any(self.is_batch):
            return self.global_of(tensor, tensor.shape, self.whole)
        return self.global_of(tensor, (tensor.shape[0], batch, *tensor.shape[2:]), self.along(1))

    def global_of(self, tensor: Tensor, shape: Sequence[int], placements: list[Any]) -> Any:
        """The DTensor of this shape, which from_local alone would guess: wrongly where ranks have parts of other sizes."""
        from torch.distributed.tensor import DTensor

        stride = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        tensor = tensor.contiguous()
        return DTensor.from_local(
            tensor, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
        )

    def gradient_like(self, tensor: Any, grad: Tensor, placements: list[Any]) -> Any:
        """The gradient of a DTensor, in its placements, from the local one in these; [0], if nobody asked, as it is."""
        from torch.distributed.tensor import Replicate

        if grad.shape == (0,) and tensor.shape != (0,):
            return grad
        made = self.global_of(grad, tensor.shape, placements)
        wanted = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
        return made.redistribute(self.mesh, wanted)


def _of_call(x: Any, states: Sequence[Any], params: Sequence[Any]) -> _Mesh:
    names = [(f"hx[{i}]", state) for i, state in enumerate(states)]
    return _Mesh(x, [*names, *((f"weights[{i}]", param) for i, param in enumerate(params))])


def _asks_for_all_states(first: Any, *others: Any) -> bool:
    return bool(_bits(first, *others) & (FORMULA_ALL_STATES if isinstance(first, str) else ALL_STATES))


def _bits(first: Any, *others: Any) -> int:
    """Of the arguments after rows: a recipe, or an own cell's name and flags; of checkpointed ops with k, in a list."""
    bits = others[0] if isinstance(first, str) else first
    return int(bits if isinstance(bits, int) else bits[0])


@torch.no_grad()
def _forward(cls: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[Any, list[Any], list[Tensor]]:
    """fused_rnn::layer and formula: (x, states, params, rows, ...) -> (y, last, saved). ``saved`` stays local."""
    x, states, params, rows, *rest = args
    mesh = _of_call(x, states, params)
    of_call = rows_of(rows, _bits(*rest))
    masks = any(isinstance(option, Tensor) and option.dim() for option in of_call.options)  # what has none is a number
    for name, is_given in (
        ("a mask of zoneout or recurrent_dropout (in training)", masks),
        ("reset_state", of_call.reset_states),
        ("return_all_states", _asks_for_all_states(*rest)),
    ):
        if is_given:
            raise NotImplementedError(f"{name}: has no rule for DTensors; expected local tensors (to_local)")
    y, last, saved = op(
        mesh.local(x, mesh.along(1)),
        [mesh.local(state, mesh.along(1)) for state in states],
        [mesh.local(param, mesh.whole) for param in params],
        mesh.rows(rows),
        *rest,
    )
    batch = x.shape[1] if x.dim() > 1 else 0
    return mesh.whole_of(y, batch), [mesh.whole_of(state, batch) for state in last], saved


@torch.no_grad()
def _backward(cls: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[Any, list[Any], list[Any]]:
    """Their backwards: (dy, dlast, x, states, params, rows, saved, ...) -> (dx, dstates, dparams)."""
    from torch.distributed.tensor import Partial, Replicate

    dy, dlast, x, states, params, rows, saved, *rest = args
    mesh = _of_call(x, states, params)
    dx, dstates, dparams = op(
        None if dy is None else mesh.local(dy, mesh.along(1)),
        [mesh.local(grad, mesh.along(1) if grad.dim() > 1 else mesh.whole) for grad in dlast],  # [0]: none
        mesh.local(x, mesh.along(1)),
        [mesh.local(state, mesh.along(1)) for state in states],
        [mesh.local(param, mesh.whole) for param in params],
        mesh.rows(rows),
        [mesh.own(tensor) for tensor in saved],
        *rest,
    )
    summed = [Partial() if batch else Replicate() for batch in mesh.is_batch]
    return (
        mesh.gradient_like(x, dx, mesh.along(1)),
        [mesh.gradient_like(state, grad, mesh.along(1)) for state, grad in zip(states, dstates, strict=True)],
        [mesh.gradient_like(param, grad, summed) for param, grad in zip(params, dparams, strict=True)],
    )
