"""The verified choice, beside checks.py: which family serves a user's calls, on the simulated device by a made-up clock."""

from __future__ import annotations

import ctypes
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

# isort: off
from checks import EXTENSION, calls  # builds the extension, before fused_rnn is imported

# isort: on
from cases import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE
from cudnn_checks import cudnn_calls
from cudnn_checks import cudnn_enabled as cudnn_enabled
from settings import Setting
from settings import setting as setting
from test_layers import assert_near

import fused_rnn
from fused_rnn import _explain, _settings, use_backend
from fused_rnn.tuning import choice as choice_module
from fused_rnn.tuning import here, serve
from fused_rnn.tuning.record import Choice, Record, Scope, Verdict
from fused_rnn.tuning.verification import State, Verifier

SCOPE = Scope("simulated", "1", "a")
OURS = ("step", "grid", "cluster")  # of an odd number of units, as block takes even ones; gemm is hopeless at such sizes
# Microseconds of a call's forward and backward.
US = {
    "cudnn": (10.0, 20.0), "single": (70.0, 90.0), "step": (40.0, 50.0), "grid": (8.0, 15.0), "cluster": (6.0, 12.0),
    "block": (4.0, 8.0), "gemm": (30.0, 40.0),
}  # fmt: skip
Fault = Callable[[str, Sequence[Tensor], bool], Sequence[Tensor]]  # family, tensors, whether they are gradients


class Verified:
    """In the place of Verifier: states that the test sets."""

    def __init__(self) -> None:
        self.states = dict.fromkeys(here.FAMILIES, State.VERIFIED)
        self.outcomes = dict(self.states)  # of verifications that are waited for

    def state(self, family: str) -> State:
        return self.states[family]

    request = state

    def verify(self, family: str) -> State:
        self.states[family] = self.outcomes[family]
        return self.states[family]


class MadeUpClock:
    """Advances by US of each family that runs; numbers are there at once."""

    def __init__(self) -> None:
        self.time, self.us_of, self.asked = 0.0, dict(US), 0

    def now(self) -> float:
        return self.time

    def us(self, first: float, last: float) -> float:
        return last - first

    def later(self, number: Tensor) -> float:
        assert number.dtype == torch.float64 and not number.requires_grad
        return float(number)

    def read(self, handle: float) -> float:
        return handle


class Bench:
    """The simulated device with its record; what the families do to results and gradients."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.clock, self.verifier = path, MadeUpClock(), Verified()
        self.fault: Fault = lambda family, tensors, backward: tensors
        self.asked, self.served = 0, ""  # how often a family was asked for, and which one ran by the chooser's order
        self.made_by: dict[int, tuple[str, Tensor]] = {}  # of each output
        by, backward, answer = serve.Call.by, serve._Made.backward, serve.answer

        def run(call: serve.Call, family: str | None) -> serve.Results:
            self.served = family or ""
            y, last = by(call, family)
            if family is None:
                return y, last
            self.clock.time += self.clock.us_of.get(family, (1e5, 1e5))[0]
            y, *last = self.fault(family, [y, *last], False)
            self.made_by[id(y)] = family, y
            return y, last

        def run_backward(made: serve._Made, *args: Any, **options: Any) -> list[Tensor | None]:
            result = backward(made, *args, **options)
            family, _ = self.made_by.get(id(made.results[0]), ("", None))
            self.clock.time += self.clock.us_of.get(family, (1e5, 1e5))[1]
            return list(self.fault(family, result, True))  # type: ignore[arg-type]

        def ask(*args: Any) -> Any:
            self.asked += 1
            return answer(*args)

        monkeypatch.setattr(choice_module, "ROUNDS", 1)  # the simulator takes its time
        monkeypatch.setattr(serve.Call, "by", run)
        monkeypatch.setattr(serve._Made, "backward", run_backward)
        monkeypatch.setattr(serve, "answer", ask)
        monkeypatch.setattr(serve, "make_site", self.make_site)
        self.restart()

    def make_site(self, device: int, mode: str) -> serve.Site:
        return serve.Site(Record(self.path, SCOPE, here.FAMILIES), self.verifier, self.clock, mode)  # type: ignore[arg-type]

    def restart(self) -> None:
        """As if the process were a new one."""
        serve._sites.clear()
        EXTENSION.forget_choices()
        EXTENSION.exclude_families([], -1)

    @property
    def record(self) -> Record:
        return Record(self.path, SCOPE, here.FAMILIES)

    def settle(self, call: Callable[[], object], most: int = 100) -> int:
        """Calls until nobody is asked any more; returns how many."""
        for count in range(most):
            before = self.asked
            call()
            if self.asked == before:
                return count
        raise AssertionError("still asked")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made = Bench(tmp_path / "record.txt", monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        EXTENSION.set_chooser(fused_rnn._backend._choose)
        yield made
    EXTENSION.set_chooser(None)
    EXTENSION.exclude_families([], -1)
    serve._sites.clear()


@pytest.fixture(autouse=True)
def nothing_forced(setting: Setting, cudnn_enabled: None) -> None:
    setting("FUSED_RNN_TUNE", "first")
    torch.manual_seed(0)


def step_of(rnn: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs and gradients of one training step."""
    y, state = rnn(x)
    y = y.data if isinstance(y, PackedSequence) else y
    states = state if isinstance(state, tuple) else (state,)
    inputs = [*([x] if isinstance(x, Tensor) else []), *rnn.parameters()]
    loss = y.square().sum() + sum(s.sum() for s in states)
    return [y, *states, *torch.autograd.grad(loss, inputs)]


def products() -> int:
    """How many matrix products family `gemm` has asked for."""
    return ctypes.CDLL(EXTENSION.__file__).torch_host_library_products()


def counted(call: Callable[[], object]) -> tuple[int, int]:
    """How often cuDNN, and kernels of ours, ran in a call."""
    before = cudnn_calls()[:2], calls()
    call()
    after = cudnn_calls()[:2], calls()
    return sum(after[0]) - sum(before[0]), sum(after[1]) - sum(before[1])


@pytest.mark.parametrize("module", [fused_rnn.LSTM])
def test_fastest_family(bench: Bench, module: type) -> None:
    """On a user's own calls, all of which are right; afterwards nothing is asked, timed or run twice."""
    rnn, x = module(4, 21, num_layers=2), torch.randn(5, 3, 4, requires_grad=True)
    with use_backend("reference"):
        expected = step_of(rnn, x)

    def call() -> None:
        for actual, want in zip(step_of(rnn, x), expected, strict=True):
            assert_near("tensor", actual, want, GRADIENT_TOLERANCE[torch.float32])

    assert bench.settle(call) < 40
    (choice,) = [entry for entry in bench.record.entries() if isinstance(entry, Choice)]
    assert choice.family == "cluster" and set(choice.us) == {"cudnn", *OURS}
    assert choice.us["cluster"] == pytest.approx(18 / 5)
    assert counted(call) == (0, 4), "two layers, forward and backward, by cluster"
    bench.restart()
    before = bench.asked
    assert counted(call) == (0, 4) and bench.asked == before + 1, "the next process asks once"
    call()
    assert bench.asked == before + 1


def test_family_block_has_its_turns(bench: Bench) -> None:
    rnn, x = fused_rnn.GRU(4, 20), torch.randn(5, 3, 4, requires_grad=True)
    with use_backend("reference"):
        expected = step_of(rnn, x)

    def call() -> None:
        for actual, want in zip(step_of(rnn, x), expected, strict=True):
            assert_near("tensor", actual, want, GRADIENT_TOLERANCE[torch.float32])

    bench.settle(call)
    (choice,) = [entry for entry in bench.record.entries() if isinstance(entry, Choice)]
    assert choice.family == "block" and set(choice.us) == {"cudnn", "block", *OURS}
    assert counted(call) == (0, 2)


def test_family_gemm_has_its_turns(bench: Bench) -> None:
    """Where the model has no family of ours that is four times as fast."""
    bench.clock.us_of["gemm"] = (1.0, 2.0)
    bench.verifier.states.update(dict.fromkeys(("grid", "cluster", "block"), State.EXCLUDED))
    EXTENSION.exclude_families(["grid", "cluster", "block"], -1)
    rnn, x = fused_rnn.LSTM(4, 21, num_layers=2), torch.randn(5, 3, 4, requires_grad=True)
    with use_backend("reference"):
        expected = step_of(rnn, x)

    def call() -> None:
        for actual, want in zip(step_of(rnn, x), expected, strict=True):
            assert_near("tensor", actual, want, GRADIENT_TOLERANCE[torch.float32])

    bench.settle(call)
    (choice,) = [entry for entry in bench.record.entries() if isinstance(entry, Choice)]
    assert choice.family == "gemm" and set(choice.us) == {"cudnn", "step", "gemm"}
    before = products()
    assert counted(call) == (0, 4)
    assert products() - before == 2 * (4 + 4), "of five steps: none before the first one, whose state is zeros"


def test_second_derivatives_wait_for_the_proof(bench: Bench) -> None:
    x = torch.zeros(1)
    for state in (State.EXCLUDED, State.IMPOSSIBLE):
        bench.verifier.states["step"] = state
        assert not serve.prove_second_order(-1)
        assert not EXTENSION.second_order_serves(x)
    bench.verifier.states["step"] = State.UNKNOWN  # and VERIFIED once it is waited for
    assert serve.prove_second_order(-1)
    assert EXTENSION.second_order_serves(x)
    bench.verifier.states["step"] = State.EXCLUDED  # by what came later
    serve.site_of(-1).exclude(-1)
    assert not EXTENSION.second_order_serves(x)


def test_cudnn_serves_until_a_family_is_verified(bench: Bench) -> None:
    bench.verifier.states.update(dict.fromkeys(OURS, State.RUNNING))
    rnn, x = fused_rnn.GRU(4, 21), torch.randn(5, 3, 4, requires_grad=True)
    for _ in range(10):
        assert counted(lambda: step_of(rnn, x)) == (2, 0)
    others = {"cluster": State.IMPOSSIBLE, "gemm": State.IMPOSSIBLE}
    bench.verifier.states.update(grid=State.VERIFIED, step=State.EXCLUDED, **others)
    bench.settle(lambda: step_of(rnn, x))
    assert counted(lambda: step_of(rnn, x)) == (0, 2)
    choice = bench.record.choice("gru float32 T8 B3 I4 H21 P21 L1 D1 dense training")
    assert choice is not None and choice.family == "grid" and set(choice.us) == {"cudnn", "grid"}


@pytest.mark.parametrize("backward", [False, True])
def test_wrong_for_one_size(bench: Bench, backward: bool) -> None:
    def fault(family: str, tensors: Sequence[Tensor], gradients: bool) -> Sequence[Tensor]:
        wrong = family == "cluster" and gradients == backward and any(t is not None and 33 in t.shape for t in tensors)
        return [t if t is None else t + 0.01 * t.abs().max() for t in tensors] if wrong else tensors

    bench.fault = fault
    for hidden, family in ((21, "cluster"), (33, "grid")):
        rnn, x = fused_rnn.LSTM(4, hidden), torch.randn(5, 3, 4, requires_grad=True)
        with use_backend("reference"):
            expected = step_of(rnn, x)

        def call() -> None:
            for actual, want in zip(step_of(rnn, x), expected, strict=True):  # noqa: B023
                assert_near("tensor", actual, want, GRADIENT_TOLERANCE[torch.float32])

        if family == "grid":
            with pytest.warns(RuntimeWarning, match="cluster is wrong and does not serve lstm float32 .* H33"):
                bench.settle(call)
        else:
            bench.settle(call)
        chosen = [e for e in bench.record.entries() if isinstance(e, Choice) and f"H{hidden} " in e.problem]
        assert [c.family for c in chosen] == [family]


def test_slower_in_backward_only(bench: Bench) -> None:
    bench.clock.us_of["cluster"] = (1.0, 500.0)
    rnn, x = fused_rnn.LSTM(4, 21), torch.randn(5, 3, 4, requires_grad=True)
    bench.settle(lambda: step_of(rnn, x))
    with torch.no_grad():
        bench.settle(lambda: rnn(x))
    families = {e.problem.split()[-1]: e.family for e in bench.record.entries() if isinstance(e, Choice)}
    assert families == {"training": "grid", "inference": "cluster"}


def test_forward_and_backward_of_one_family(bench: Bench) -> None:
    """Backward runs long after forward, when another family serves."""
    rnn, x = fused_rnn.LSTM(4, 21), torch.randn(5, 3, 4, requires_grad=True)
    bench.settle(lambda: step_of(rnn, x))
    y = rnn(x)[0]
    before = cudnn_calls()
    bench.restart()
    bench.path.unlink()
    bench.verifier.states.update(dict.fromkeys(OURS, State.UNKNOWN))
    assert counted(lambda: y.sum().backward()) == (0, 1)
    y = rnn(x)[0]  # by cuDNN
    bench.verifier.states.update(dict.fromkeys(OURS, State.VERIFIED))
    assert counted(lambda: y.sum().backward()) == (1, 0)
    assert cudnn_calls()[0] == before[0] + 1


@pytest.mark.parametrize(
    ("module", "packed", "dropout"),
    [(fused_rnn.LSTM, False, 0.0), (fused_rnn.GRU, True, 0.4), (fused_rnn.RNN, False, 0.4)],
)
def test_watched_calls(bench: Bench, module: type, packed: bool, dropout: float) -> None:
    """Calls that are timed or compared are like others: masks from the seed, graphs used twice, second derivatives, results
    written in place, gradients in batches."""
    bench.clock.us_of = dict.fromkeys(US, (10.0, 20.0))
    rnn = module(4, 21, num_layers=2, dropout=dropout)
    data = torch.randn(3, 3, 4, requires_grad=True)

    def outputs() -> list[Tensor]:
        torch.manual_seed(5)
        y, state = rnn(pack_padded_sequence(data, torch.tensor([3, 2, 1])) if packed else data)
        return [y.data if packed else y, *(state if isinstance(state, tuple) else (state,))]

    inputs = [data, *rnn.parameters()]

    def several() -> list[Tensor]:
        results = outputs()
        loss = sum(r.square().sum() for r in results)
        made = list(torch.autograd.grad(loss, inputs, retain_graph=True))
        made += torch.autograd.grad(loss, inputs)
        results = outputs()
        first = torch.autograd.grad(sum(r.square().sum() for r in results), inputs, create_graph=True)
        made += torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results = outputs()
        made += torch.autograd.grad(sum(r.mul_(2).square().sum() for r in results), inputs)
        y = outputs()[0]
        grads = torch.ones(2, *y.shape)
        return made + [g[1] for g in torch.autograd.grad(y, inputs, grads, is_grads_batched=True)] + [torch.rand(3)]

    with _settings.use("FUSED_RNN_PLAN", "step"):
        expected = several()
    for _ in range(3):
        for index, (actual, want) in enumerate(zip(several(), expected, strict=True)):
            assert_near(f"tensor {index}", actual, want, 10 * GRADIENT_TOLERANCE[torch.float32])


def test_weights_written_in_place(bench: Bench) -> None:
    rnn = fused_rnn.GRU(4, 21)
    for _ in range(12):  # compared, timed, decided
        y = rnn(torch.randn(7, 3, 4))[0]
        with torch.no_grad():
            rnn.weight_hh_l0.mul_(1.01)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        step_of(rnn, torch.randn(7, 3, 4, requires_grad=True))


@pytest.mark.parametrize("what", ["lengths", "resets", "cell", "wide c"])
def test_what_cudnn_lacks(bench: Bench, what: str) -> None:
    """Compared with float64, which serves meanwhile; then by the fastest of ours."""
    dtype = torch.float16 if what == "wide c" else torch.float32
    rnn = fused_rnn.LSTMCell(4, 21, dtype=dtype) if what == "cell" else fused_rnn.LSTM(4, 21, dtype=dtype)
    weights = list(rnn.parameters())
    x = torch.randn((3, 4) if what == "cell" else (5, 3, 4), dtype=dtype)
    state = torch.zeros(1, 3, 21, dtype=dtype), torch.randn(1, 3, 21)
    functional = fused_rnn.functional.lstm

    def call() -> list[Tensor]:
        if what == "cell":
            results = list(rnn(x))
        else:
            options: dict[str, Any] = {
                "lengths": {"lengths": torch.tensor([5, 3, 1])}, "resets": {"resets": torch.ones(5, 3, dtype=torch.bool)},
                "wide c": {"hx": state},
            }[what]  # fmt: skip
            y, last = functional(x, weights, **options)
            results = [y, *last]
        return [*results, *torch.autograd.grad(sum(r.float().square().sum() for r in results), weights)]

    with use_backend("reference"):
        expected = call()
    for _ in range(20):
        for actual, want in zip(call(), expected, strict=True):
            assert actual.dtype == want.dtype
            assert_near("tensor", actual, want, GRADIENT_TOLERANCE[dtype])
    (choice,) = [entry for entry in bench.record.entries() if isinstance(entry, Choice)]
    assert choice.family == "cluster"
    assert "cudnn" not in choice.us and what in choice.problem
    assert counted(call) == (0, 2)


def test_all_of_ours_failed(bench: Bench) -> None:
    """Then float64 serves what cuDNN lacks; inside of a graph, where Python cannot, an error says it."""
    code = [sys.executable, "-c", 'print(\'{"case": "x"}\', flush=True); import time; time.sleep(60)']
    record = bench.record
    hanging = Verifier(record, lambda family: code, seconds=0.5)
    for family in ("single", *OURS):
        with pytest.warns(RuntimeWarning, match=f"{family} is excluded on this device: hangs: no answer within 0.5 s"):
            assert hanging.verify(family) is State.EXCLUDED
    bench.verifier = hanging  # type: ignore[assignment]
    x, rnn = torch.randn(5, 3, 4), fused_rnn.GRU(4, 21)
    weights = [p.detach() for p in rnn.parameters()]
    lengths = torch.tensor([5, 3, 1])
    with use_backend("reference"):
        expected = fused_rnn.functional.gru(x, weights, lengths=lengths)[0]
    before = calls()
    try:
        for _ in range(3):
            assert_near("y", fused_rnn.functional.gru(x, weights, lengths=lengths)[0], expected, OUTPUT_TOLERANCE[x.dtype])
        assert counted(lambda: step_of(rnn, x.requires_grad_())) == (2, 0)
        assert calls() == before
        os.environ["TORCH_HOST_CAPTURES"] = "1"
        assert counted(lambda: step_of(rnn, x)) == (2, 0)
    finally:
        os.environ.pop("TORCH_HOST_CAPTURES", None)
        EXTENSION.exclude_families([], -1)


def test_capture(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded, else cuDNN; nothing is timed or compared."""
    rnn, x = fused_rnn.LSTM(4, 21), torch.randn(5, 3, 4, requires_grad=True)
    monkeypatch.setenv("TORCH_HOST_CAPTURES", "1")
    for _ in range(5):
        assert counted(lambda: step_of(rnn, x)) == (2, 0)
    assert not bench.record.entries() and bench.served == ""
    monkeypatch.delenv("TORCH_HOST_CAPTURES")
    bench.settle(lambda: step_of(rnn, x))
    bench.restart()
    monkeypatch.setenv("TORCH_HOST_CAPTURES", "1")
    bench.served = ""
    assert counted(lambda: step_of(rnn, x)) == (0, 2) and bench.served == ""


def test_deterministic(bench: Bench) -> None:
    """Neither cuDNN nor timing: a verified family, else step, for the whole process."""
    rnn, x = fused_rnn.LSTM(4, 21), torch.randn(5, 3, 4, requires_grad=True)
    bench.verifier.states.update(dict.fromkeys(OURS, State.UNKNOWN))
    torch.use_deterministic_algorithms(True)
    try:
        assert counted(lambda: step_of(rnn, x)) == (0, 2)
        before = bench.asked
        bench.verifier.states.update(dict.fromkeys(OURS, State.VERIFIED))
        first = step_of(rnn, x)
        assert bench.asked == before and bench.served == ""
        assert all(torch.equal(a, b) for a, b in zip(first, step_of(rnn, x), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not bench.record.entries()


def test_off_and_use(bench: Bench, setting: Setting) -> None:
    rnn, x = fused_rnn.LSTM(4, 21), torch.randn(5, 3, 4, requires_grad=True)
    setting("FUSED_RNN_TUNE", "use")
    assert counted(lambda: step_of(rnn, x)) == (2, 0)
    setting("FUSED_RNN_TUNE", "first")
    bench.settle(lambda: step_of(rnn, x))
    for mode, expected in (("off", (2, 0)), ("use", (0, 2)), ("first", (0, 2))):
        setting("FUSED_RNN_TUNE", mode)
        before = bench.asked
        assert counted(lambda: step_of(rnn, x)) == expected
        step_of(rnn, x)
        assert bench.asked == before + 1
    setting("FUSED_RNN_PLAN", "grid")
    before = bench.asked
    assert counted(lambda: step_of(rnn, x)) == (0, 2) and bench.asked == before, "what is forced wins"


def test_damaged_file(bench: Bench) -> None:
    bench.path.write_bytes(b'{"device": "simulated", "driver": 7}\n\xff\x00garbage\n')
    rnn, x = fused_rnn.LSTM(4, 21), torch.randn(5, 3, 4, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="2 damaged lines are ignored"):
        bench.settle(lambda: step_of(rnn, x))
    assert [e.family for e in bench.record.entries() if isinstance(e, Choice)] == ["cluster"]


def test_file_that_cannot_be_written(bench: Bench) -> None:
    bench.path.mkdir()  # not a file: for root too
    (bench.path / "x").write_text("")
    rnn, x = fused_rnn.LSTM(4, 21), torch.randn(5, 3, 4, requires_grad=True)
    with pytest.warns(RuntimeWarning) as caught:
        bench.settle(lambda: step_of(rnn, x))
    assert len(caught) == 2 and {"cannot be read", "cannot be written"} == {
        next(part for part in ("cannot be read", "cannot be written") if part in str(w.message)) for w in caught
    }
    assert counted(lambda: step_of(rnn, x)) == (0, 2), "the process knows"
    assert stat.S_ISDIR(os.stat(bench.path).st_mode)


def test_two_processes(bench: Bench) -> None:
    """One begins, another one decides: the first takes that over when it begins a problem."""
    problem = "gru float32 T8 B3 I4 H21 P21 L1 D1 dense training"
    bench.record.add(Verdict("grid", True), Choice(problem, "grid", {"grid": 4.0}))
    rnn, x = fused_rnn.GRU(4, 21), torch.randn(5, 3, 4, requires_grad=True)
    bench.settle(lambda: step_of(rnn, x))
    choice = bench.record.choice(problem)
    assert choice is not None and choice.family == "cluster" and choice.us["grid"] == 4.0
    bench.record.add(Choice(choice.problem, "step", {"step": 1.0}, {"cluster": "seen by the other process"}))
    bench.restart()
    assert counted(lambda: step_of(rnn, x))[0] == 0
    later = bench.record.choice(choice.problem)
    assert later is not None and "cluster" in later.excluded and later.family != "cluster"


def test_cudnn_that_refuses(bench: Bench) -> None:
    """An error of cuDNN's own is no user's: the planner's family serves such calls, with one warning."""
    library = ctypes.CDLL(EXTENSION.__file__)
    library.torch_host_cudnn_refuses(1)
    rnn, x = fused_rnn.LSTM(4, 21), torch.randn(5, 3, 4, requires_grad=True)
    try:
        with pytest.warns(RuntimeWarning, match="cuDNN refuses calls like lstm"):
            step_of(rnn, x)
        bench.settle(lambda: step_of(rnn, x))
        assert counted(lambda: step_of(rnn, x)) == (0, 2)
        EXTENSION.set_chooser(None)
        with pytest.warns(UserWarning, match="step serves calls of this size .* which cuDNN refuses"):
            assert counted(lambda: step_of(rnn, x))[1] == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert counted(lambda: step_of(rnn, x)) == (0, 2)
    finally:
        library.torch_host_cudnn_refuses(0)
        EXTENSION.set_chooser(fused_rnn._backend._choose)


def test_compiled_calls_are_answered_once(bench: Bench) -> None:
    """A layer's op alone, as a compiled graph calls it: one family for forward and backward, asked for once."""
    rnn = fused_rnn.LSTM(4, 21)
    x = torch.randn(5, 3, 4, requires_grad=True)
    recipe = fused_rnn._recipe.Recipe(fused_rnn._kinds.NUMBER_OF_MODE["LSTM"]).packed
    bench.verifier.states.update(step=State.EXCLUDED)
    params = list(rnn.parameters())
    for asked in (1, 0):
        before = bench.asked
        assert counted(lambda: torch.ops.fused_rnn.layer(x, [], params, [], recipe, True)[0].sum().backward()) == (0, 2)
        assert bench.asked - before == asked


def test_compiled_training_waits_for_a_verified_family(bench: Bench) -> None:
    """A layer's op that trains is served by a family of ours alone: what cuDNN keeps is none of what the op saves."""
    rnn, x = fused_rnn.LSTM(4, 21), torch.randn(5, 3, 4, requires_grad=True)
    recipe = fused_rnn._recipe.Recipe(fused_rnn._kinds.NUMBER_OF_MODE["LSTM"]).packed
    bench.verifier.states.update(dict.fromkeys(OURS, State.UNKNOWN))
    bench.verifier.outcomes.update(step=State.EXCLUDED)
    y = torch.ops.fused_rnn.layer(x, [], list(rnn.parameters()), [], recipe, True)[0]
    assert bench.verifier.states["step"] is State.EXCLUDED and State.VERIFIED in bench.verifier.states.values()
    with use_backend("reference"):
        assert_near("y", y, rnn(x)[0], OUTPUT_TOLERANCE[torch.float32])


@pytest.mark.parametrize("module", [fused_rnn.LSTM, fused_rnn.GRU, fused_rnn.RNN])
def test_compiled_training_is_served_by_what_is_recorded(bench: Bench, module: type) -> None:
    """By cuDNN, since nothing is timed inside of a graph; where a choice is on record, by the family chosen."""
    rnn, x = module(4, 20, 2), torch.randn(5, 3, 4, requires_grad=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        graph = torch.compile(rnn, backend="aot_eager", fullgraph=True)
        for state in (State.RUNNING, State.VERIFIED):
            bench.restart()
            bench.verifier.states.update(dict.fromkeys(OURS, state))
            step_of(graph, x)
            before = bench.asked
            assert counted(lambda: step_of(graph, x)) == (2, 0) and bench.asked == before
        bench.settle(lambda: step_of(rnn, x))
        bench.restart()
        cudnn, ours = counted(lambda: step_of(graph, x))
        assert cudnn == 0 and ours > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("module", [fused_rnn.LSTM, fused_rnn.GRU, fused_rnn.RNN])
def test_compiled_inference_by_cudnn(bench: Bench, module: type) -> None:
    """A layer's op that keeps nothing for backward: by cuDNN until families are verified."""
    rnn, x = module(4, 21), torch.randn(5, 3, 4)
    number = fused_rnn._kinds.NUMBER_OF_MODE[{"RNN": "RNN_TANH"}.get(module.__name__, module.__name__)]
    recipe = fused_rnn._recipe.Recipe(number).packed
    bench.verifier.states.update(dict.fromkeys(OURS, State.RUNNING))
    with use_backend("reference"):
        expected, state = rnn(x)
    expected = [expected, *(state if isinstance(state, tuple) else (state,))]

    @torch.no_grad()
    def call() -> None:
        y, last, saved = torch.ops.fused_rnn.layer(x, [], list(rnn.parameters()), [], recipe, False)
        assert not saved and not y.requires_grad
        for actual, want in zip([y, *last], expected, strict=True):
            assert actual.shape == want.shape
            assert_near("result", actual, want, OUTPUT_TOLERANCE[torch.float32])

    assert counted(call) == counted(call) == (1, 0)
    resets = torch.zeros(5, 3, dtype=torch.bool)
    rows = fused_rnn._recipe.Rows(resets=resets)
    number = recipe | rows.bits
    with torch.no_grad():
        args = (x, [], list(rnn.parameters()), rows.given(), number, False)
        assert counted(lambda: torch.ops.fused_rnn.layer(*args)) == (0, 1)
    bench.verifier.states.update(dict.fromkeys(OURS, State.VERIFIED))
    assert counted(call) == (1, 0), "nothing is timed inside of a graph: cuDNN, until a record says otherwise"
    before = bench.asked
    assert counted(call) == (1, 0) and bench.asked == before
    EXTENSION.set_chooser(None)
    assert counted(call) == (1, 0)
    library = ctypes.CDLL(EXTENSION.__file__)
    library.torch_host_cudnn_refuses(1)
    try:
        assert counted(call)[1] == counted(call)[1] == 1  # after one warning, which ops that Python calls print
    finally:
        library.torch_host_cudnn_refuses(0)
        EXTENSION.set_chooser(fused_rnn._backend._choose)


def test_explained(bench: Bench, setting: Setting) -> None:
    """What explain says of a GPU that is there is what a call does."""
    rnn, x = fused_rnn.LSTM(4, 21), torch.randn(5, 3, 4, requires_grad=True)
    lstm = fused_rnn._kinds.NUMBER_OF_MODE["LSTM"]
    call = _explain._Call(lstm, "cuda", torch.float32, _explain.DEVICES["H100"], packed=False, training=True, forced=None)
    sizes = _explain._sizes(rnn, x)[0]

    def explained() -> tuple[str | None, str | None]:
        return _explain._recorded(rnn, -1, call, sizes)

    problem = "lstm float32 T8 B3 I4 H21 P21 L1 D1 dense training"
    assert explained() == ("cudnn", f"nothing is recorded of {problem} (the first calls try the verified families)")
    assert bench.asked == 0
    bench.settle(lambda: step_of(rnn, x))
    family, line = explained()
    assert family == "cluster" and line is not None
    assert line.startswith(f"{problem}: cluster (us a step: cluster 3.6, grid 4.6, cudnn 6, step 18)")
    assert line.endswith(f"({bench.path})")
    setting("FUSED_RNN_TUNE", "off")
    assert explained() == ("cudnn", "FUSED_RNN_TUNE=off: no record is read")
