"""Work that what a thread has on must not reach."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from fused_rnn import _backend


def alone(work: Callable[..., Any], *args: Any) -> Any:
    """work(*args), in a thread of its own where transforms, hooks or modes of this one would reach what it does."""
    if not _reaches_other_calls():
        return work(*args)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work, *args).result()


def _reaches_other_calls() -> bool:
    """Whether what the thread has on (transforms, hooks of saved tensors, which activation checkpointing sets, modes and
    tracers) would reach what is traced and compared. A thread of its own has nothing on."""
    return (
        _backend.is_transformed()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or in_first_vmap()
    )


def in_first_vmap() -> bool:
    """Whether torch's first vmap is on, as in torch.autograd.grad(is_grads_batched=True) and jacobian(vectorize=True)."""
    return "VmapMode" in str(torch._C._dispatch_tls_local_include_set())
