"""Packed weights kept between inferences on a CPU: no change of the weights goes unnoticed, and memory is bounded."""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from settings import Setting
from test_cpu import INSTRUCTION_SETS
from torch import Tensor, nn

import fused_rnn
from fused_rnn import _backend
from fused_rnn._backend import has_cpu_kernels

pytestmark = [
    pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension"),
    pytest.mark.skipif(bool(os.environ.get("FUSED_RNN_WEIGHT_CACHE")), reason="needs the cache as it is by default"),
]

STEPS, BATCH, SIZE, HIDDEN = 3, 7, 37, 52
# Weights of one test must not be those of another: they may come to lie in the same memory, and would be found.
SEEDS = itertools.count()


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, setting: Setting) -> str:
    setting("FUSED_RNN_CPU", request.param)
    return request.param


def counts() -> tuple[int, int]:
    """Panels (found, packed) since the process began."""
    cache = _backend.extension.weight_cache()  # type: ignore[union-attr]
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


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_training_loop_of_a_cell_packs_once(kind: str, instruction_set: str) -> None:
    """The steps of a loop share their weights; a change between two loops, past autograd's versions too, is noticed."""
    torch.manual_seed(next(SEEDS))
    module = getattr(fused_rnn, kind)(SIZE, HIDDEN)
    steps = torch.randn(STEPS, 24, SIZE)

    def run(cell: nn.Module) -> Tensor:
        state = None
        for x in steps:
            state = cell(x, state)
        h = state if isinstance(state, Tensor) else state[0]  # type: ignore[index]
        return torch.cat([h.flatten(), *(g.flatten() for g in torch.autograd.grad(h.sum(), list(cell.parameters())))])

    _, found, packed = counted(lambda: run(module))
    assert packed > 0 and found == (STEPS - 1) * packed
    module.weight_hh.data[-1, 0] += 1
    module.weight_ih.data.mul_(2)
    result, found, packed = counted(lambda: run(module))
    assert 0 < packed < found
    assert torch.equal(result, run(copy.deepcopy(module)))


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_one_step_on_one_and_two_threads(kind: str, instruction_set: str) -> None:
    """A single step packs, or checks, each panel right before its product; threads that share the rows do so before."""
    torch.manual_seed(next(SEEDS))
    module = getattr(fused_rnn, kind)(200, 264).eval()
    x = torch.randn(70, 200)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            module.weight_hh.data[count, -1] += 1
            result, _, packed = counted(lambda: infer(module, x))
            if instruction_set != "amx":  # whose products read up to 64 of the rows with weights as they lie
                assert packed > 0
            torch.testing.assert_close(result, infer(copy.deepcopy(module), x), rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("kind", "sizes"), [("LSTMCell", (1021, 1003)), ("GRUCell", (970, 1229)), ("RNNCell", (3000, 1501))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_with_large_weights(kind: str, sizes: tuple[int, int], dtype: torch.dtype, instruction_set: str) -> None:
    """Its panels are packed on the way, for the call alone: memory holds such a step back, and a hash would read more."""
    torch.manual_seed(next(SEEDS))
    module = getattr(fused_rnn, kind)(*sizes, dtype=dtype).eval()
    reference = getattr(nn, kind)(*sizes, dtype=torch.float64)
    x = torch.randn(41, sizes[0], dtype=dtype)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            module.weight_hh.data[count, -1] += 1
            reference.load_state_dict(module.state_dict())
            result, found, packed = counted(lambda: infer(module, x))
            if instruction_set != "amx" or dtype == torch.float64:  # else bfloat16 parts, with a cache
                assert found == packed == 0
            expected = infer(reference, x.double())
            torch.testing.assert_close(result.double(), expected, rtol=0, atol=6e-6 if dtype == torch.float32 else 2e-14)
    finally:
        torch.set_num_threads(threads)


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
        cache = _backend.extension.weight_cache()
        most = max(most, cache["bytes"])
large, x = fused_rnn.LSTM(40, 700), torch.randn(4, 8, 40)
with torch.no_grad():
    assert torch.equal(large(x)[0], large(x)[0])
print(json.dumps({"most": most, **_backend.extension.weight_cache()}))
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


# --- the hash by which panels are recognised ---


def words_of(t: Tensor) -> Tensor:
    return t.view(torch.int64)


def flip(words: Tensor, place: int, bit: int) -> None:
    words[place] ^= -(2**63) if bit == 63 else 1 << bit


def collision_of_the_old_hash(words: Tensor, random: torch.Generator) -> None:
    """A float64 negated, another changed by 3e-8 of itself."""
    stripe = (8, 16, 32)[int(torch.randint(3, (), generator=random))]
    place = int(torch.randint(len(words) - stripe, (), generator=random))
    flip(words, place, 63)
    flip(words, place + stripe, 28)


def bits_of_two_words(words: Tensor, random: torch.Generator) -> None:
    """Signs, exponents and last bits, of a float64 or of either float32, some lanes or blocks apart."""
    bits = (63, 62, 52, 55, 31, 30, 23, 0, 1, 32, 33, 28, 60)
    first = int(torch.randint(len(words), (), generator=random))
    step = (1, 2, 4, 8, 16, 32, 64, 256, 512)[int(torch.randint(9, (), generator=random))]
    flip(words, first, bits[int(torch.randint(len(bits), (), generator=random))])
    if torch.rand((), generator=random) < 0.8:
        flip(words, (first + step) % len(words), bits[int(torch.randint(len(bits), (), generator=random))])


def swapped(words: Tensor, random: torch.Generator) -> None:
    """Two words, neighbours, lanes or blocks apart."""
    step = (1, 2, 8, 16, 64, 128, 256, 512)[int(torch.randint(8, (), generator=random))]
    first = int(torch.randint(len(words) - step, (), generator=random))
    a, b = int(words[first]), int(words[first + step])
    words[first], words[first + step] = b, a


def moved(words: Tensor, random: torch.Generator) -> None:
    """A stretch turned by some places: every word stands in another lane."""
    length = int(torch.randint(2, len(words), (), generator=random))
    words[:length] = words[:length].roll(int(torch.randint(1, length, (), generator=random)))


def zeros_of_other_signs(words: Tensor, random: torch.Generator) -> None:
    """Some words become 0, and some of these -0."""
    for _ in range(int(torch.randint(1, 4, (), generator=random))):
        place = int(torch.randint(len(words), (), generator=random))
        words[place] = 0
        if torch.rand((), generator=random) < 0.5:
            flip(words, place, 63)


def small_sums(words: Tensor, random: torch.Generator) -> None:
    """What one word gains another loses."""
    first, second = (int(i) for i in torch.randperm(len(words), generator=random)[:2])
    by = 1 << int(torch.randint(62, (), generator=random))
    words[first] += by
    words[second] -= by


STRUCTURED = (collision_of_the_old_hash, bits_of_two_words, swapped, moved, zeros_of_other_signs, small_sums)


@pytest.mark.parametrize("change", STRUCTURED, ids=lambda change: change.__name__)
@pytest.mark.parametrize("source", ("randn", "zeros", "ones"))
def test_no_structured_change_keeps_the_hash(
    source: str, change: Callable[[Tensor, torch.Generator], None], instruction_set: str
) -> None:
    content_hash = _backend.extension.content_hash  # type: ignore[union-attr]
    random = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32):
        base = torch.randn(600, generator=random, dtype=torch.float64)
        if source != "randn":
            base = torch.full((600,), float(source == "ones"), dtype=torch.float64)
        if dtype == torch.float32:
            base = base.repeat(2).float().view(torch.float64)
        expected = content_hash(base)
        assert content_hash(base.clone()) == expected
        for _ in range(400):
            other = base.clone()
            change(words_of(other), random)
            assert (content_hash(other) == expected) == bool((words_of(other) == words_of(base)).all())


@pytest.mark.parametrize("size", (1, 7, 8, 63, 64, 65, 2047, 2048, 2049, 5000))
def test_every_bit_counts(size: int, instruction_set: str) -> None:
    content_hash = _backend.extension.content_hash  # type: ignore[union-attr]
    base = torch.zeros(size, dtype=torch.uint8)
    seen = {content_hash(base)}
    for place in {0, size // 3, size // 2, size - 1}:
        for bit in range(8):
            other = base.clone()
            other[place] = 1 << bit
            seen.add(content_hash(other))
    assert len(seen) == 1 + 8 * len({0, size // 3, size // 2, size - 1})


def test_keys_are_those_of_the_process() -> None:
    code = "import torch; from fused_rnn import _backend; print(_backend.extension.content_hash(torch.ones(100)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) != _backend.extension.content_hash(torch.ones(100))  # type: ignore[union-attr]


@pytest.mark.parametrize("stripe", (8, 16, 32))
def test_a_weight_negated_and_another_changed_by_little(stripe: int, instruction_set: str) -> None:
    module, x = layer(dtype=torch.float64)
    infer(module, x)
    words = words_of(module.weight_hh_l0.data.view(-1))
    flip(words, 5, 63)
    flip(words, 5 + stripe, 28)
    assert torch.equal(infer(module, x), fresh(module, x))


# --- weights that change while they are packed ---


def stale_rounds(seconds: float) -> tuple[int, int]:
    """(rounds whose kept weights were wrong afterwards, rounds): A -> B -> A while other threads infer."""
    torch.manual_seed(next(SEEDS))
    module, x = fused_rnn.LSTM(256, 256).eval(), torch.randn(3, 7, 256)
    a = [p.detach().clone() for p in module.parameters()]
    b = [p + 0.1 for p in a]
    expected = infer(module, x)
    stop = threading.Event()

    def swap(values: list[Tensor]) -> None:
        for parameter, value in zip(module.parameters(), values, strict=True):
            parameter.data.copy_(value)

    def work() -> None:
        while not stop.is_set():
            infer(module, x)

    stale = rounds = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stop.clear()
        worker = threading.Thread(target=work)
        worker.start()
        for _ in range(5):
            swap(b)
            swap(a)
        stop.set()
        worker.join()
        stale += not torch.equal(infer(module, x), expected)
        rounds += 1
        if stale:
            fused_rnn.free_memory()
    return stale, rounds


@pytest.mark.parametrize("seconds", (2, pytest.param(30, marks=pytest.mark.slow)))
def test_weights_that_change_while_they_are_packed(seconds: float) -> None:
    stale, rounds = stale_rounds(seconds)
    assert rounds > 3
    assert stale == 0


# --- many small matrices ---

MANY = """
import json, torch, fused_rnn
from fused_rnn import _backend
cells = [fused_rnn.GRUCell(1, 1) for _ in range({count})]
x = torch.randn(17, 1)
with torch.no_grad():
    first = [cell(x) for cell in cells]
    cache = _backend.extension.weight_cache()
    again = [cell(x) for cell in cells[-100:]]
assert all(torch.equal(a, b) for a, b in zip(first[-100:], again))
print(json.dumps([cache, _backend.extension.weight_cache()]))
"""


@pytest.mark.parametrize("count", (300, pytest.param(10000, marks=pytest.mark.slow)))
def test_many_small_matrices(count: int) -> None:
    """Their number is bounded, what is kept about them counts as memory, and each is found again."""
    done = subprocess.run([sys.executable, "-c", MANY.format(count=count)], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    assert before["matrices"] == min(2 * count, 16384)
    assert before["bytes"] >= 200 * before["matrices"]
    assert after["panels_found"] - before["panels_found"] >= 200
    assert after["panels_packed"] == before["panels_packed"]
