"""fused_rnn.tuning with made-up clocks, devices and families: which one serves, and what is recorded of it."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fused_rnn.tuning.choice import EXACT, PATIENCE, ROUNDS, Circumstances, Offer, Problem, Tuner, Turn
from fused_rnn.tuning.record import Choice, Record, Scope, Verdict
from fused_rnn.tuning.verification import State

SCOPE = Scope("H100", "580.1", "abc")
NAMES = ("cudnn", "step", "grid", "cluster")
PROBLEM = Problem("lstm", "float16", False, 100, 16, 64, 256, 256, 1, 1, training=True)
OFFER = Offer("cudnn", ("step", "grid", "cluster"))
# Microseconds of a call's forward and backward.
US = {"cudnn": (100.0, 200.0), "step": (400.0, 500.0), "grid": (80.0, 150.0), "cluster": (60.0, 120.0), EXACT: (1e5, 1e5)}


class Verified:
    """In the place of Verifier: states that the test sets."""

    def __init__(self, outcome: State = State.VERIFIED, **states: State) -> None:
        """outcome: of a verification that is waited for."""
        self.states = {name: states.get(name, State.VERIFIED) for name in NAMES}
        self.outcomes = dict.fromkeys(NAMES, outcome)
        self.requested: list[str] = []
        self.awaited: list[str] = []

    def state(self, family: str) -> State:
        return self.states[family]

    def request(self, family: str) -> State:
        if self.states[family] is State.UNKNOWN:
            self.requested.append(family)
            self.states[family] = State.RUNNING
        return self.states[family]

    def verify(self, family: str) -> State:
        self.awaited.append(family)
        self.states[family] = self.outcomes[family]
        return self.states[family]


class Machine:
    """A device: events are read `delay` calls after they were recorded."""

    def __init__(
        self,
        path: Path,
        verifier: Verified | None = None,
        us: dict[str, tuple[float, float]] = US,
        wrong: Callable[[str, Problem], float] = lambda family, problem: 0.3,
        delay: int = 3,
        mode: str = "first",
    ) -> None:
        self.record = Record(path, SCOPE, NAMES)
        self.verifier, self.us, self.wrong, self.delay, self.calls = verifier or Verified(), us, wrong, delay, 0
        self.tuner = Tuner(self.record, self.verifier, self.read, self.read, mode)  # type: ignore[arg-type]
        self.noise = itertools.cycle((1.0, 1.01, 0.99, 1.005))

    def read(self, handle: tuple[int, float]) -> float | None:
        recorded, value = handle
        return value if self.calls - recorded > self.delay else None

    def call(self, problem: Problem = PROBLEM, offer: Offer = OFFER, backward: bool = True, **now: bool) -> Turn:
        turn = self.tuner.turn(problem, offer, Circumstances(**now))
        self.calls += 1
        forward_us, backward_us = (t * next(self.noise) * problem.T / 100 for t in self.us[turn.family])
        passes = 1 + (backward and problem.training)
        if turn.beside is not None:
            turn.errors += [(self.calls, self.wrong(turn.beside, problem))] * passes
        if turn.timed:
            turn.forward = (self.calls, forward_us)
            turn.backward = (self.calls, backward_us) if passes == 2 else None
        return turn

    def settle(self, problem: Problem = PROBLEM, offer: Offer = OFFER, most: int = 100) -> tuple[str, list[Turn]]:
        """(the family that serves in the end, all calls until then)."""
        turns = []
        for _ in range(most):
            turns.append(self.call(problem, offer))
            choice = self.record.choice(problem.key)
            if choice is not None and choice.family is not None:
                return self.call(problem, offer).family, turns
        raise AssertionError("undecided")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "H100.txt"


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_fastest_family(path: Path) -> None:
    machine = Machine(path)
    family, turns = machine.settle()
    assert family == "cluster"
    beside = [turn.beside for turn in turns if turn.beside]
    assert sorted(beside) == ["cluster", "grid", "step"], "each is compared once"
    assert all(turn.family == "cudnn" for turn in turns if turn.beside), "what is compared does not serve"
    timed = [turn.family for turn in turns if turn.timed]
    assert all(timed.count(name) <= ROUNDS + 1 for name in NAMES)
    assert timed.count("step") < timed.count("cluster"), "a hopeless family has fewer turns"
    for name in OFFER.ours:
        first = next(i for i, turn in enumerate(turns) if turn.family == name)
        compared = next(i for i, turn in enumerate(turns) if turn.beside == name)
        assert first > compared + machine.delay, "a family serves once its comparison was read"
    later = [machine.call() for _ in range(5)]
    assert all(turn.beside is None and not turn.timed for turn in later), "nothing runs twice in steady state"
    choice = machine.record.choice(PROBLEM.key)
    assert choice is not None and choice.us["cluster"] == pytest.approx(1.8, rel=0.03), "per step, without the first"


def test_another_process_uses_what_is_recorded(path: Path) -> None:
    Machine(path).settle()
    for mode in ("first", "use"):
        turn = Machine(path, mode=mode).call()
        assert (turn.family, turn.beside, turn.timed) == ("cluster", None, False)
    assert Machine(path, mode="off").call().family == "cudnn"


def test_wrong_for_one_size(path: Path) -> None:
    other = replace(PROBLEM, H=512)
    machine = Machine(path, wrong=lambda family, p: 7.0 if (family, p.H) == ("cluster", 512) else 0.3)
    assert machine.settle()[0] == "cluster"
    with pytest.warns(RuntimeWarning, match="cluster is wrong and does not serve lstm float16 .* H512 .*: error 7 times"):
        family, turns = machine.settle(other)
    assert family == "grid"
    assert "cluster" not in {turn.family for turn in turns}
    again = Machine(path)  # the next process
    assert again.call(other).family == "grid" and again.call().family == "cluster"


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 1.5])
def test_wrong_everywhere(path: Path, error: float) -> None:
    machine = Machine(path, wrong=lambda family, p: error)
    with pytest.warns(RuntimeWarning, match="is wrong and does not serve"):
        family, turns = machine.settle()
    assert family == "cudnn" and {turn.family for turn in turns} == {"cudnn"}


def test_wrong_in_backward_only(path: Path) -> None:
    machine = Machine(path)
    with pytest.warns(RuntimeWarning, match="step is wrong"):
        for _ in range(60):
            turn = machine.tuner.turn(PROBLEM, OFFER)
            machine.calls += 1
            if turn.beside is not None:
                turn.errors += [(machine.calls, 0.1), (machine.calls, 9.0 if turn.beside == "step" else 0.1)]
            assert turn.family != "step"
            turn.forward, turn.backward = ((machine.calls, us) for us in US[turn.family])
    assert machine.call().family == "cluster"


def test_slow_in_backward_only(path: Path) -> None:
    machine = Machine(path, us={**US, "cluster": (10.0, 500.0)})
    assert machine.settle()[0] == "grid"
    assert machine.settle(replace(PROBLEM, training=False))[0] == "cluster"


def test_little_gain_is_none(path: Path) -> None:
    near = (99.0, 198.0)
    machine = Machine(path, us={**US, "grid": near, "cluster": near})
    assert machine.settle()[0] == "cudnn"


def test_steps_of_one_bucket(path: Path) -> None:
    """Numbers of steps differ from call to call: times count per step, and share one choice."""
    machine = Machine(path)
    for T in itertools.islice(itertools.cycle((70, 100, 128, 65)), 60):
        machine.call(replace(PROBLEM, T=T))
    assert machine.call().family == "cluster"
    keys = {replace(PROBLEM, T=T).key for T in (65, 128)}
    assert len(keys) == 1 and replace(PROBLEM, T=129).key not in keys
    assert len({replace(PROBLEM, T=T).key for T in (1, 2, 3, 5)}) == 4


def test_unverified_families_do_not_serve(path: Path) -> None:
    verifier = Verified(grid=State.EXCLUDED, cluster=State.UNKNOWN, step=State.IMPOSSIBLE)
    machine = Machine(path, verifier)
    served = {machine.call().family for _ in range(40)}
    assert served == {"cudnn"} and verifier.requested == ["cluster"]
    verifier.states["cluster"] = State.VERIFIED
    assert machine.settle()[0] == "cluster"


def test_hang_found_meanwhile(path: Path) -> None:
    verifier = Verified(cluster=State.UNKNOWN, step=State.IMPOSSIBLE)
    machine = Machine(path, verifier)
    assert "cluster" not in {machine.call().family for _ in range(40)}
    verifier.states["cluster"] = State.EXCLUDED
    assert machine.settle()[0] == "grid"


def test_without_a_reference(path: Path) -> None:
    """With resets, which cuDNN lacks: comparisons are with the exact result, which then serves."""
    offer = Offer(None, ("step", "grid", "cluster"))
    problem = replace(PROBLEM, rows="dense+resets")
    family, turns = Machine(path).settle(problem, offer)
    assert family == "cluster"
    assert all((turn.family == EXACT) == (turn.beside is not None) for turn in turns)
    nothing = Verified(**dict.fromkeys(OFFER.ours, State.EXCLUDED))
    assert Machine(path, nothing).call(problem, offer).family == EXACT, "what is known to be wrong serves nobody"
    impossible = Verified(**dict.fromkeys(OFFER.ours, State.IMPOSSIBLE))
    assert Machine(path.with_name("other.txt"), impossible).call(problem, offer).family == "step"


@pytest.mark.parametrize("state", [State.UNKNOWN, State.RUNNING])
@pytest.mark.parametrize("now", [{}, {"may_time": False}, {"deterministic": True}], ids=str)
def test_nothing_unverified_serves_where_nothing_trusted_can(path: Path, state: State, now: dict[str, bool]) -> None:
    """The first such call waits for one family, the next ones do not."""
    offer = OFFER if now.get("deterministic") else Offer(None, OFFER.ours)
    verifier = Verified(**dict.fromkeys(OFFER.ours, state))
    verifier.outcomes["step"] = State.EXCLUDED
    machine = Machine(path, verifier)
    served = [machine.call(offer=offer, **now).family for _ in range(3)]
    assert verifier.awaited == ["step", "grid"] and set(served) <= {"grid", EXACT}
    assert served[0] == ("grid" if now else EXACT), "EXACT: grid is compared beside it"


def test_nothing_waits_beside_a_trusted_one(path: Path) -> None:
    for mode in ("first", "use", "off"):
        verifier = Verified(**dict.fromkeys(OFFER.ours, State.UNKNOWN))
        machine = Machine(path, verifier, mode=mode)
        assert machine.call().family == machine.call(may_time=False).family == "cudnn"
        if mode != "first":
            machine.call(offer=Offer(None, OFFER.ours))  # never verifies
        assert not verifier.awaited


def test_settled(path: Path) -> None:
    verifier = Verified(cluster=State.RUNNING, step=State.IMPOSSIBLE)
    tuner = Machine(path, verifier).tuner
    assert not tuner.is_settled(OFFER) and tuner.is_settled(Offer("cudnn", ("step", "grid")))
    verifier.states["cluster"] = State.EXCLUDED
    assert tuner.is_settled(OFFER)


def test_capture(path: Path) -> None:
    machine = Machine(path)
    turn = machine.call(may_time=False)
    assert (turn.family, turn.timed, turn.beside) == ("cudnn", False, None)
    machine.settle()
    assert Machine(path).call(may_time=False).family == "cluster"
    assert Machine(path, Verified(cluster=State.EXCLUDED)).call(may_time=False).family == "cudnn"


def test_deterministic(path: Path) -> None:
    machine = Machine(path, us={**US, "cudnn": (1.0, 1.0)})
    assert machine.call(deterministic=True).family == "step"
    assert machine.settle()[0] == "cudnn"
    turn = machine.call(deterministic=True)
    assert (turn.family, turn.timed) == ("cluster", False), "the fastest of ours that were timed"
    assert Machine(path, Verified(**dict.fromkeys(OFFER.ours, State.UNKNOWN))).call(deterministic=True).family == "step"


def test_backward_is_never_called(path: Path) -> None:
    machine = Machine(path)
    with pytest.warns(RuntimeWarning, match="had no backward, so cudnn serves lstm"):
        for _ in range(10 * PATIENCE):
            machine.call(backward=False)
    assert machine.call().family == "cudnn" and machine.record.choice(PROBLEM.key) is None


def test_backward_is_called_sometimes(path: Path) -> None:
    machine = Machine(path)
    for call in range(40 * PATIENCE):
        machine.call(backward=call % 3 == 0)
    assert machine.call().family == "cluster"


def test_device_far_behind(path: Path) -> None:
    """The host is hundreds of calls ahead: it does not wait, and decides when the times are there."""
    assert Machine(path, delay=150).settle(most=2000)[0] == "cluster"


def test_later_exclusion_of_a_recorded_family(path: Path) -> None:
    Machine(path).settle()
    record = Record(path, SCOPE, NAMES)
    record.add(Choice(PROBLEM.key, None, {}, {"cluster": "elsewhere"}))
    assert Machine(path, mode="use").call().family == "cudnn"
    assert Machine(path).settle()[0] == "grid"


def test_arguments(path: Path) -> None:
    with pytest.raises(ValueError, match="mode: expected one of off, use, first, got 'on'"):
        Machine(path, mode="on")
    with pytest.raises(ValueError, match="offer: expected at least one family"):
        Machine(path).call(offer=Offer(None, ()))


def test_needs_no_torch() -> None:
    folder = Path(sys.modules[Tuner.__module__].__file__ or "").parent
    code = (
        "import sys, importlib.util as u; sys.modules['torch'] = None\n"
        f"spec = u.spec_from_file_location('tuning', {str(folder / '__init__.py')!r})\n"
        "sys.modules['tuning'] = module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "import tuning.choice, tuning.record, tuning.verification"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_verdicts_of_a_record(path: Path) -> None:
    record = Record(path, SCOPE, NAMES)
    record.add(Verdict("grid", True), Verdict("cluster", False, "hangs"))
    again = Record(path, SCOPE, NAMES)
    assert again.verdict("grid") == Verdict("grid", True) and again.verdict("cluster") == Verdict("cluster", False, "hangs")
    for other in (replace(SCOPE, driver="590"), replace(SCOPE, build="def"), replace(SCOPE, device="A100")):
        assert Record(path, other, NAMES).verdict("grid") is None
