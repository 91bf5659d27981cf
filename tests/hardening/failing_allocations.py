"""Every larger allocation of a call fails once, under LD_PRELOAD of failing_malloc.c; test_failing_allocations.py runs this.

Prints for every call how many allocations failed in turn. Ends with an exception where a failure was not an exception, or
where the call after it gave another result.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fused_rnn

LEAST = 4096  # bytes: tensors and workspaces; Python's own objects are smaller
STEPS, ROWS, SIZE = 8, 16, 32

library = ctypes.CDLL(None)
library.failing_malloc_arm.argtypes = [ctypes.c_long, ctypes.c_long]


def train(module: torch.nn.Module, x: Tensor) -> list[Tensor]:
    given = x.clone().requires_grad_()
    result = module(given)
    y = result if isinstance(result, Tensor) else result[0]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [given, *module.parameters()])]


def infer(module: torch.nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad():
        result = module(x)
    y = result if isinstance(result, Tensor) else result[0]
    return [y if isinstance(y, Tensor) else y.data]


def calls() -> Iterator[tuple[str, Callable[..., list[Tensor]], torch.nn.Module, Any]]:
    """(name, function, its module, its input)."""
    torch.manual_seed(0)
    x = torch.randn(STEPS, ROWS, SIZE)
    packed = pack_sequence([torch.randn(STEPS - i // 4, SIZE) for i in range(ROWS)])
    for dtype in (torch.float32, torch.bfloat16):
        for kind, options in (("LSTM", {"proj_size": 9}), ("GRU", {"num_layers": 2}), ("RNN", {"batch_first": True})):
            module = getattr(fused_rnn, kind)(SIZE, SIZE, bidirectional=True, dtype=dtype, **options)
            yield f"{kind} {dtype} inference", infer, module, x.to(dtype)
            yield f"{kind} {dtype} training", train, module, x.to(dtype)
        yield f"packed {dtype}", infer, fused_rnn.GRU(SIZE, SIZE, dtype=dtype), packed.to(dtype)
        for kind in ("LSTMCell", "GRUCell"):
            cell = getattr(fused_rnn, kind)(SIZE, 2 * SIZE, dtype=dtype)
            rows = torch.randn(4 * ROWS, SIZE, dtype=dtype)
            yield f"{kind} {dtype} inference", infer, cell, rows
            yield f"{kind} {dtype} training", train, cell, rows
    # What a training step saves lies in memory that its thread keeps for the next.
    yield "large training", train, fused_rnn.LSTM(8, 80), torch.randn(64, 64, 8)


def survive(name: str, function: Callable[..., list[Tensor]], module: torch.nn.Module, x: Any) -> None:
    expected = function(module, x)
    modules = []  # all alive, so that the weights of none lie where the library has packed others before
    for n in range(500):
        modules.append(copy.deepcopy(module))
        # A new thread has no memory of earlier calls.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(warm_up).result()
            if not thread.submit(fail_once, f"{name}, allocation {n}", n, function, modules[-1], x, expected).result():
                print(f"{name}: {n}", flush=True)
                return
    raise AssertionError(f"{name}: more than 500 allocations")


def warm_up() -> None:
    """Without its thread-local data, which is made at the first use of a library, glibc ends the process."""
    torch.set_num_threads(1)
    train(fused_rnn.LSTM(2, 2, num_layers=2, dtype=torch.bfloat16), torch.randn(2, 2, 2, dtype=torch.bfloat16))
    train(fused_rnn.GRU(2, 2), torch.randn(2, 2, 2))


def fail_once(
    name: str, n: int, function: Callable[..., list[Tensor]], module: torch.nn.Module, x: Any, expected: list[Tensor]
) -> bool:
    """Whether the call came to the n-th allocation, which failed."""
    text = ""
    library.failing_malloc_arm(n, LEAST)
    try:
        function(module, x)
    except (RuntimeError, MemoryError) as error:
        text = str(error) or type(error).__name__
    failed = bool(library.failing_malloc_has_failed())
    library.failing_malloc_arm(-1, 0)
    assert failed or not text, f"{name}: {text}"
    for index, (a, b) in enumerate(zip(function(module, x), expected, strict=True)):
        assert torch.equal(a, b), f"{name}: result {index} of the next call"
    return failed


if __name__ == "__main__":
    torch.set_num_threads(1)
    for arguments in calls():
        survive(*arguments)
