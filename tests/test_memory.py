"""Memory that calls on a CPU keep for the next one: shared, bounded, given back when idle and by free_memory."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import fused_rnn
from fused_rnn import _backend
from fused_rnn._backend import has_cpu_kernels

pytestmark = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    fused_rnn.free_memory()
    yield
    _backend.extension.set_idle_seconds(10)  # type: ignore[union-attr]


def kept() -> dict[str, int]:
    return _backend.extension.memory_pool()  # type: ignore[union-attr,no-any-return]


def train(module: nn.Module, x: Tensor) -> Tensor:
    module.zero_grad()
    y = module(x)[0]
    y.square().sum().backward()
    return y.detach()


def large() -> tuple[nn.Module, Tensor]:
    """A layer whose saved gates take 16 MiB, and as much again in backward."""
    torch.manual_seed(0)
    return fused_rnn.LSTM(32, 128), torch.randn(64, 128, 32)


def test_a_training_step_keeps_memory_and_finds_it_again() -> None:
    module, x = large()
    train(module, x)
    first = kept()
    assert first["shared_bytes"] > 32 * MIB
    for _ in range(3):
        train(module, x)
    assert kept()["shared_bytes"] == first["shared_bytes"]


def test_free_memory() -> None:
    module, x = large()
    y = train(module, x)
    with torch.no_grad():
        module(x)
    weights = _backend.extension.weight_cache()["bytes"]  # type: ignore[union-attr]
    before = kept()
    assert weights > 0 and before["thread_bytes"] >= 0
    assert fused_rnn.free_memory() == weights + before["shared_bytes"] + before["thread_bytes"]
    after = kept()
    assert after["shared_bytes"] == after["thread_bytes"] == after["shared_blocks"] == 0
    assert _backend.extension.weight_cache()["bytes"] == 0  # type: ignore[union-attr]
    assert fused_rnn.free_memory() == 0
    assert torch.equal(train(module, x), y)


def test_what_a_call_needs_stays() -> None:
    """Memory that a graph holds is not freed; it comes back when the graph is gone."""
    module, x = large()
    module.zero_grad()
    y = module(x)[0]
    fused_rnn.free_memory()
    junk = [torch.full((1 << 20,), float("nan")) for _ in range(16)]
    y.square().sum().backward()
    grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    del junk
    train(module, x)
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, module.parameters(), strict=True) if p.grad is not None)


def test_threads_share_what_they_keep() -> None:
    """Threads that once trained leave no more than one does."""
    module, x = large()
    train(module, x)
    alone = kept()["shared_bytes"]
    stop = threading.Barrier(5)

    def work() -> None:
        for _ in range(2):
            with lock:
                train(module, x)
        stop.wait()
        stop.wait()

    lock = threading.Lock()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    stop.wait()
    during = kept()
    stop.wait()
    for thread in threads:
        thread.join()
    assert during["threads"] >= 4
    assert during["shared_bytes"] <= alone + 8 * MIB
    assert during["thread_bytes"] <= during["threads"] * MIB
    end = time.monotonic() + 10
    while kept()["threads"] > during["threads"] - 4 and time.monotonic() < end:  # join returns a little before a thread ends
        time.sleep(0.01)
    assert kept()["threads"] <= during["threads"] - 4


@pytest.mark.parametrize("size", ["large", "small"])
def test_idle_memory_goes_back_at_the_next_calls(size: str) -> None:
    module, x = large()
    train(module, x)
    assert kept()["shared_bytes"] > 32 * MIB
    _backend.extension.set_idle_seconds(0.05)  # type: ignore[union-attr]
    time.sleep(0.2)
    if size == "large":
        other, x = fused_rnn.LSTM(32, 100), torch.randn(60, 128, 32)
        y = other(x)[0]
        assert kept()["shared_bytes"] < 8 * MIB
        del y
    else:
        other, x = fused_rnn.LSTM(4, 4), torch.randn(1, 1, 4)
        with torch.no_grad():
            for _ in range(1025):
                other(x)
        assert kept()["shared_bytes"] == 0


def test_sizes_that_come_no_more_are_dropped() -> None:
    module = fused_rnn.GRU(32, 128)
    for steps in range(40, 100, 12):
        train(module, torch.randn(steps, 128, 32))
    assert kept()["shared_bytes"] > 48 * MIB
    x = torch.randn(40, 128, 32)
    for _ in range(33 * kept()["threads"]):
        module(x)
    assert kept()["shared_bytes"] < 32 * MIB


def test_what_is_kept_is_bounded() -> None:
    module = fused_rnn.LSTM(8, 256)
    graphs = [module(torch.randn(64, 80, 8))[0] for _ in range(12)]  # 25 MiB each
    del graphs
    assert 200 * MIB < kept()["shared_bytes"] <= 256 * MIB


def test_freed_beside_running_calls() -> None:
    module, x = large()
    expected = train(module, x)
    inputs = [torch.randn(3, 9, 32) for _ in range(4)]
    with torch.no_grad():
        results = [module(i)[0] for i in inputs]
    stop = threading.Event()

    def free() -> None:
        while not stop.is_set():
            fused_rnn.free_memory()
            time.sleep(0.0005)

    def work(i: int) -> bool:
        if i % 10 == 0:
            return torch.equal(module(x)[0], expected)
        with torch.no_grad():
            return torch.equal(module(inputs[i % 4])[0], results[i % 4])

    freeing = threading.Thread(target=free)
    freeing.start()
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(work, range(150)))
    finally:
        stop.set()
        freeing.join()


def _in_a_child(queue: multiprocessing.Queue) -> None:
    module, x = large()
    y = train(module, x)
    queue.put((fused_rnn.free_memory() > 0, y.sum().item()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_forked_beside_running_calls() -> None:
    """A fork may come while another thread holds the lock: the child must not wait for a thread that it does not have."""
    module, x = large()
    expected = train(module, x).sum().item()
    small, stop = torch.randn(3, 9, 32), threading.Event()

    def work() -> None:
        with torch.no_grad():
            while not stop.is_set():
                module(small)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(5):
            queue = context.Queue()
            child = context.Process(target=_in_a_child, args=(queue,))
            child.start()
            try:
                freed, total = queue.get(timeout=60)
            finally:
                child.join(timeout=10)
                if child.is_alive():
                    child.kill()
            assert freed
            assert total == pytest.approx(expected, rel=1e-4)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


RESIDENT = """
import gc, threading, torch, fused_rnn
torch.set_num_threads(1)
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4 / 1024
def train():
    y = fused_rnn.LSTM(16, 256)(torch.randn(64, 64, 16))[0]
    y.sum().backward()
def work():
    train()
    done.wait()
    done.wait()
fused_rnn.LSTM(2, 2)(torch.zeros(2, 1, 2))[0].sum().backward()
before = resident()
done = threading.Barrier(11)
threads = [threading.Thread(target=work) for _ in range(10)]
for thread in threads:
    thread.start()
done.wait()
idle = resident()
fused_rnn.free_memory()
after = resident()
done.wait()
print(before, idle, after)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_resident_memory_of_idle_threads() -> None:
    """Ten threads, each with 16 MiB of gates, as much of their gradients and 4 MiB of cells."""
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    before, idle, after = map(float, done.stdout.split())
    assert idle - before < 256 + 60
    assert after - before < 60
