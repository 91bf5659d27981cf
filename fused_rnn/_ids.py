"""Ids in place of one-hot rows: an integer input, whose input product is a gather of columns of weight_ih.

Callers give ids of input_size classes without the last dimension: [T, B] ([B, T] with batch_first), [T] unbatched, [N]
packed; cells [B], unbatched []. Between the public arguments and run_rnn or run_cell they carry a last dimension of 1, so
that they have as many dimensions as other inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_rnn._dtensor import whole

DTYPES = (torch.int64, torch.int32)


def are(input: Any) -> bool:
    return isinstance(input, Tensor) and input.dtype in DTYPES


def lifted(input: Tensor) -> Tensor:
    """Ids [...] as int64 [..., 1]; any other input, also one that is no tensor, as it is.

    Raises:
        ValueError: ids with more than two dimensions.
    """
    if getattr(input, "dtype", None) not in DTYPES:
        return input
    if input.dim() > 2:
        raise ValueError(
            f"input: expected {input.dtype} to be ids of input_size classes, in at most 2 dimensions, got {input.dim()}-D"
        )
    return input.to(torch.int64).unsqueeze(-1)


def stand_in(ids: Tensor, weights: Sequence[Any]) -> Tensor:
    """What checks see in place of ids [..., 1]: the one-hot rows' shape, and the dtype of the weights; no memory."""
    w_ih = next((weight for weight in weights if isinstance(weight, Tensor) and weight.dim() == 2), None)
    if w_ih is None:
        return ids
    return torch.empty((), dtype=w_ih.dtype, device=ids.device).expand(*ids.shape[:-1], w_ih.shape[1])


def checked(ids: Tensor, size: int, lengths: Tensor | None, packed: bool, batch_first: bool = False) -> Tensor:
    """Ids [T, B], packed [N], for the reference: those of padding are 0, and on a GPU those out of range the nearest in it.

    Raises:
        IndexError: on a CPU, an id out of range of a row that takes part; not while a graph is captured.
    """
    if lengths is not None and not packed:
        time_first = ids.transpose(0, 1) if batch_first else ids
        active = torch.arange(time_first.shape[0], device=ids.device).unsqueeze(1) < lengths
        ids = torch.where(active.transpose(0, 1) if batch_first else active, ids, 0)
    known = ids.device.type == "cpu" and not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None
    if not known or torch._C._functorch.peek_interpreter_stack() is not None:
        return ids if ids.device.type == "cpu" else ids.clamp(0, max(size - 1, 0))
    values = whole(ids)
    wrong = ((values < 0) | (values >= size)).nonzero()
    if len(wrong):
        place = wrong[0].tolist()
        if packed:
            at = f"packed row {place[0]}"
        else:
            t, b = reversed(place) if batch_first else place
            at = f"time step {t} of batch row {b}"
        got = int(values[tuple(place)])
        raise IndexError(f"input: expected ids from 0 to {size - 1} (input_size - 1), got {got} at {at}")
    return ids


def input_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I] times weight_ih [C, I], plus a bias [C]: [..., C]; of ids [...] that are in range likewise."""
    if x.is_floating_point() or x.is_complex():
        return torch.nn.functional.linear(x, weight, bias)
    columns = torch.nn.functional.embedding(x, weight.t())
    return columns if bias is None else columns + bias
