"""Packed weights kept between inferences on a CPU: no change of the weights goes unnoticed, and memory is bounded."""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_cpu import INSTRUCTION_SETS
from torch import Tensor, nn

import fused_rnn
from fused_rnn import _backend
from fused_rnn._backend import has_cpu_kernels

pytestmark = [
    pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension"),
    pytest.mark.skipif("FUSED_RNN_WEIGHT_CACHE" in os.environ, reason="needs the cache as it is by default"),
]

STEPS, BATCH, SIZE, HIDDEN = 3, 7, 37, 52
# Weights of one test must not be those of another: they may come to lie in the same memory, and would be found.
SEEDS = itertools.count()


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FUSED_RNN_CPU", request.param)
    return request.param


def counts() -> tuple[int, int]:
    """Panels (found, packed) since the process began."""
    cache = _backend._C.weight_cache()  # type: ignore[union-attr]
    return cache["panels_found"], cache["panels_packed"]


def counted(call: Callable[[], Tensor]) -> tuple[Tensor, int, int]:
    """(result, panels found, panels packed)."""
    before = counts()
    result = call()
    after = counts()
    return result, after[0] - before[0], after[1] - before[1]


def infer(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result = module(x)
    return result[0] if isinstance(result, tuple) else result


def fresh(module: nn.Module, x: Tensor) -> Tensor:
    """The result of the same weights elsewhere in memory, packed anew."""
    other = copy.deepcopy(module)
    result, _, packed = counted(lambda: infer(other, x))
    assert packed > 0
    return result


def layer(kind: str = "LSTM", dtype: torch.dtype = torch.float32, **options: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(next(SEEDS))
    module = getattr(fused_rnn, kind)(SIZE, HIDDEN, dtype=dtype, **options).eval()
    return module, torch.randn(STEPS, BATCH, SIZE).to(dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", ("LSTM", "GRU", "RNN"))
def test_weights_are_found_again(kind: str, dtype: torch.dtype, instruction_set: str) -> None:
    module, x = layer(kind, dtype, bidirectional=True, num_layers=2, **({"proj_size": 20} if kind == "LSTM" else {}))
    first, found, packed = counted(lambda: infer(module, x))
    assert packed > 0
    panels = found + packed
    second, found, packed = counted(lambda: infer(module, x))
    assert (found, packed) == (panels, 0)
    assert torch.equal(first, second)
    assert torch.equal(first, fresh(module, x))


@pytest.mark.parametrize("kind", ("LSTMCell", "GRUCell", "RNNCell"))
def test_cells_use_it_too(kind: str) -> None:
    torch.manual_seed(next(SEEDS))
    cell, x = getattr(fused_rnn, kind)(SIZE, HIDDEN), torch.randn(32, SIZE)
    first = infer(cell, x)
    second, found, packed = counted(lambda: infer(cell, x))
    assert found > 0
    assert packed == 0
    assert torch.equal(first, second)


def add_in_place(module: nn.LSTM) -> None:
    with torch.no_grad():
        module.weight_hh_l0.add_(0.1)


def one_element_through_data(module: nn.LSTM) -> None:
    module.weight_hh_l0.data[HIDDEN + 3, 5] += 1e-3


def last_bit_through_numpy(module: nn.LSTM) -> None:
    module.weight_ih_l0.detach().numpy().view("int32")[-1, -1] ^= 1


def two_elements_swapped(module: nn.LSTM) -> None:
    values = module.weight_hh_l0.data
    values[0, 0], values[1, 0] = values[1, 0].clone(), values[0, 0].clone()


def rows_turned(module: nn.LSTM) -> None:
    module.weight_hh_l0.data.copy_(module.weight_hh_l0.data.roll(1, 0))


def copied_through_data(module: nn.LSTM) -> None:
    """As reinforcement learning updates a target network."""
    for p in module.parameters():
        p.data.copy_(0.9 * p.data + 0.1)


def new_data(module: nn.LSTM) -> None:
    module.weight_hh_l0.data = module.weight_hh_l0.data * 2


def loaded(module: nn.LSTM) -> None:
    module.load_state_dict({name: value * 1.5 for name, value in module.state_dict().items()})


def optimizer_step(module: nn.LSTM) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module(torch.ones(2, 2, SIZE))[0].sum().backward()
    optimizer.step()
    module.zero_grad()


def tied(module: nn.LSTM) -> None:
    module.weight_ih_l0 = module.weight_ih_l1


def infinite_and_back(module: nn.LSTM) -> None:
    module.weight_hh_l0.data[4, 4] = torch.inf
    infer(module, torch.ones(STEPS, BATCH, SIZE))
    module.weight_hh_l0.data[4, 4] = 0.25


def infinite(module: nn.LSTM) -> None:
    module.weight_hh_l0.data[4, 4] = -torch.inf


CHANGES = (
    add_in_place,
    one_element_through_data,
    last_bit_through_numpy,
    two_elements_swapped,
    rows_turned,
    copied_through_data,
    new_data,
    loaded,
    optimizer_step,
    tied,
    infinite_and_back,
    infinite,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_seen(change: Callable[[nn.Module], None], instruction_set: str) -> None:
    module, _ = layer(num_layers=2, proj_size=SIZE)  # so that both layers' weight_ih have one shape
    x = torch.randn(STEPS, BATCH, SIZE)
    before = infer(module, x)
    change(module)
    after, _, packed = counted(lambda: infer(module, x))
    assert packed > 0 or change is tied  # that matrix is known, from the other layer
    torch.testing.assert_close(after, fresh(module, x), rtol=0, atol=0, equal_nan=True)
    if change is not last_bit_through_numpy:
        assert not torch.equal(after, before)
    again, _, packed = counted(lambda: infer(module, x))
    assert packed == 0
    torch.testing.assert_close(again, after, rtol=0, atol=0, equal_nan=True)


def test_other_weights_in_the_same_memory() -> None:
    memory = torch.empty(4 * HIDDEN, HIDDEN)
    for seed in range(4):
        module, x = layer()
        torch.manual_seed(seed)
        memory.copy_(torch.randn_like(memory) / HIDDEN**0.5)
        module.weight_hh_l0.data = memory
        assert torch.equal(infer(module, x), fresh(module, x))


def test_only_the_changed_panels_are_packed() -> None:
    module, x = layer("RNN")
    infer(module, x)
    module.weight_hh_l0.data[0, 0] += 1
    _, found, packed = counted(lambda: infer(module, x))
    assert packed == 1
    assert found > 0


def test_off_in_training() -> None:
    module, x = layer()
    module.train()
    _, found, packed = counted(lambda: module(x)[0].sum().backward())
    assert (found, packed) == (0, 0)


def test_several_python_threads() -> None:
    """Calls at the same time each have their own; weights change between them."""
    modules = [layer()[0] for _ in range(3)]
    x = torch.randn(STEPS, BATCH, SIZE)
    with torch.no_grad():
        for i, module in enumerate(modules):
            module.weight_hh_l0.mul_(1 + i)
    expected = [fresh(module, x) for module in modules]

    def work(i: int) -> bool:
        return torch.equal(infer(modules[i % 3], x), expected[i % 3])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(300)))


def _forked(queue: multiprocessing.Queue, module: nn.Module, x: Tensor) -> None:
    result, found, packed = counted(lambda: infer(module, x))
    queue.put((result.tolist(), found, packed))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_worker() -> None:
    module, x = layer()
    expected = infer(module, x).tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_forked, args=(queue, module, x))
    child.start()
    try:
        result, found, packed = queue.get(timeout=60)
        assert result == expected
        assert found > 0
        assert packed == 0
    finally:
        child.join(timeout=10)
        if child.is_alive():
            child.kill()


BOUND = """
import json, torch, fused_rnn
from fused_rnn import _backend
most = 0
modules = [fused_rnn.LSTM(40, 40 + i) for i in range(40)]
x = torch.randn(4, 8, 40)
with torch.no_grad():
    for module in modules:
        first, second = module(x)[0], module(x)[0]
        assert torch.equal(first, second)
        cache = _backend._C.weight_cache()
        most = max(most, cache["bytes"])
large, x = fused_rnn.LSTM(40, 700), torch.randn(4, 8, 40)
with torch.no_grad():
    assert torch.equal(large(x)[0], large(x)[0])
print(json.dumps({"most": most, **_backend._C.weight_cache()}))
"""


def in_a_process(limit: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FUSED_RNN_WEIGHT_CACHE": limit}
    return subprocess.run([sys.executable, "-c", BOUND], env=environment, capture_output=True, text=True, check=False)


def test_memory_is_bounded() -> None:
    done = in_a_process("1")
    assert done.returncode == 0, done.stderr
    cache = json.loads(done.stdout)
    assert cache["limit"] == 1 << 20
    assert 0.5 * (1 << 20) < cache["most"] <= 1 << 20
    assert cache["bytes"] <= 1 << 20
    assert 0 < cache["matrices"] < 80
    assert cache["panels_found"] > 0


def test_no_cache() -> None:
    done = in_a_process("0")
    assert done.returncode == 0, done.stderr
    cache = json.loads(done.stdout)
    assert (cache["most"], cache["bytes"], cache["matrices"], cache["panels_found"]) == (0, 0, 0, 0)


@pytest.mark.parametrize("limit", ("-1", "many", "1.5"))
def test_a_limit_that_is_none(limit: str) -> None:
    done = in_a_process(limit)
    assert done.returncode != 0
    assert f"FUSED_RNN_WEIGHT_CACHE={limit}: expected a number of MiB" in done.stderr
