"""Calls of the ops and of the bindings with arguments that lie. test_hostile.py runs this in a process of its own.

A call either raises an exception of Python or returns what it should. A line of JSON is printed for every call, whatever
became of it: its name, and what is wrong ("": nothing). `python tests/hardening/hostile.py NAME` makes that call alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from hostile_arguments import ANYTHING, ERROR, META, flatten
from hostile_calls import calls
from torch import Tensor

# Calls that one child makes before the next is forked: one that dies ends its child alone.
TOGETHER = 40


def outcome(call: Callable[[], Any], expected: Any) -> str:
    """ "" for what should be, else what is wrong."""
    try:
        result = call()
    except Exception as error:
        if expected in (ERROR, ANYTHING, META):
            return "" if str(error) else f"{type(error).__name__} without a text"
        return f"raised {type(error).__name__}: {str(error)[:300]}"
    found = [t for t in flatten(result) if isinstance(t, Tensor)]
    if expected == ANYTHING or (expected == META and all(t.is_meta for t in found)):
        return ""
    if expected in (ERROR, META):
        return f"returned {str(result)[:300]}, expected {expected}"
    for index, (a, b) in enumerate(zip(found, expected, strict=False)):
        if b is None or b.numel() == 0:
            continue
        a = a.as_subclass(Tensor)
        if a.shape != b.shape or not torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5):
            return f"result {index}: {str(a)[:150]}, expected {str(b)[:150]}"
    return ""


def run_in_child(batch: list[tuple[str, Callable[[], Any], Any]]) -> list[str]:
    """Outcomes of the first calls of the batch: of all, or up to one that the child died of."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for _, call, expected in batch:
            os.write(write, json.dumps(outcome(call, expected)).encode() + b"\n")
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        outcomes = [json.loads(line) for line in pipe]
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        outcomes.append(f"died of signal {os.WTERMSIG(status)}")
    return outcomes


def main() -> None:
    """Every call in a child of this process: what it does to the memory ends with it."""
    torch.set_num_threads(1)
    only = sys.argv[1:]
    left = [entry for entry in calls() if not only or entry[0] in only]
    while left:
        outcomes = run_in_child(left[:TOGETHER])
        for (name, _, _), text in zip(left, outcomes, strict=False):
            print(json.dumps([name, text]), flush=True)
        left = left[len(outcomes) :]


if __name__ == "__main__":
    main()
