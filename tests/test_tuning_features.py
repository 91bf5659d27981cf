"""Verification of what only some calls have: a family that is wrong with an option alone does not serve calls with it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from fused_rnn.tuning import record
from fused_rnn.tuning.choice import EXACT, Circumstances, Offer, Problem, Tuner
from fused_rnn.tuning.record import Choice, Record, Scope, Verdict, entries_of
from fused_rnn.tuning.verification import FEATURES, Finding, State, Verifier, judge

NAMES = ("cudnn", "step", "gemm")


def case(*features: str, error: float | str = 0.5, name: str = "") -> str:
    """The lines of a case."""
    name = name or f"lstm {' '.join(features)}"
    begin = {"case": name, **({"features": features} if features else {})}
    return f"{json.dumps(begin)}\n" + f'{{"case": "{name}", "error": {error}}}\n'


def begin(*features: str) -> str:
    """The first line of one that does not end."""
    return case(*features).splitlines()[0] + "\n"


END = '{"end": 2}\n'
PLAIN = case(name="lstm H=3")


def wrong(name: str, error: str = "3") -> str:
    return f"case {name} is wrong: its error is {error} times the allowed one"


@pytest.mark.parametrize(
    ("output", "status", "features", "ended"),
    [
        (case("zoneout") + END, 0, {"zoneout": ""}, True),
        (case("zoneout", error=3) + END, 0, {"zoneout": wrong("lstm zoneout")}, True),
        (
            case("zoneout", "reset_state") + case("zoneout", error=3) + END,
            0, {"zoneout": wrong("lstm zoneout"), "reset_state": ""}, True,
        ),
        (case("zoneout", error="NaN") + case("zoneout") + END, 0, {"zoneout": wrong("lstm zoneout", "nan")}, True),
        (
            case("zoneout") + begin("zoneout", "every_c"), None,
            dict.fromkeys(("zoneout", "every_c"), "hangs: no answer within 20 s in case lstm zoneout every_c"), False,
        ),
        (
            case("every_c") + case("state_clip", error=3) + begin("zoneout") + '{"case": "b", "raised": "no"}', 0,
            {"state_clip": wrong("lstm state_clip"), "zoneout": "case b raised no"}, False,
        ),
        (begin("zoneout"), -11, {"zoneout": "its process ended with signal 11 in case lstm zoneout"}, False),
    ],
)  # fmt: skip
def test_judge(output: str, status: int | None, features: dict[str, str], ended: bool) -> None:
    assert judge(PLAIN + output, status, 20) == Finding(True, "", features, ended)
    of_all = judge(PLAIN.replace("0.5", "2") + output, status, 20)
    assert of_all == Finding(False, wrong("lstm H=3", "2")), "a family that is wrong without an option serves nothing"


def opened(path: Path) -> Record:
    return Record(path, Scope("H100", "580.1", "abc"), NAMES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "H100.txt"


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]  # starts in milliseconds


def test_wrong_only_with_an_option(path: Path) -> None:
    lines = PLAIN + case("projection") + case("zoneout", error=7) + case("reset_state") + END
    verifier = Verifier(opened(path), lambda family: python(f"print({lines!r})"))
    reason = wrong("lstm zoneout", "7")
    with pytest.warns(RuntimeWarning, match=f"step is excluded on this device for calls with zoneout: {reason}"):
        assert verifier.verify("step") is State.VERIFIED
    assert verifier.state("step", ("zoneout",)) is verifier.state("step", ("projection", "zoneout")) is State.EXCLUDED
    assert verifier.state("step", ("projection", "reset_state")) is State.VERIFIED
    assert verifier.state("step", ("every_c",)) is State.EXCLUDED, "no case had it"
    assert verifier.lacking("step") == ["zoneout", "recurrent_dropout", "state_clip", "every_c", "second_order"]
    again = Verifier(opened(path), lambda family: pytest.fail("is known"))
    assert again.verify("step") is State.VERIFIED and again.lacking("step") == verifier.lacking("step")
    (verdict,) = (entry for _, entry in entries_of(path) if isinstance(entry, Verdict))
    assert record.lines_of_entry(verdict) == ["step verified", f"  not with zoneout: {reason}"]


@pytest.mark.parametrize("end", ["hangs", "dies"])
def test_successor_of_a_child(path: Path, end: str) -> None:
    """A case with an option that no child survives: another one runs the cases of the options that are left."""
    code = f"""
import json, os, sys, time
left = sys.argv[1:]
if not left:
    print({PLAIN!r}, flush=True)
for feature in left or {FEATURES!r}:
    print(json.dumps({{"case": feature, "features": [feature]}}), flush=True)
    if feature in ("zoneout", "every_c"):
        {"time.sleep(100)" if end == "hangs" else "os.abort()"}
    print(json.dumps({{"case": feature, "error": 2 if feature == "state_clip" else 0}}), flush=True)
print({END!r})
"""
    verifier = Verifier(opened(path), lambda family: python(code), 2.0)
    with pytest.warns(RuntimeWarning) as caught:
        assert verifier.verify("step") is State.VERIFIED
    assert verifier.lacking("step") == ["zoneout", "state_clip", "every_c"]
    why = "hangs: no answer within 2 s in case" if end == "hangs" else "its process ended with signal 6 in case"
    assert {str(one.message).partition("with ")[2] for one in caught} == {
        f"zoneout: {why} zoneout", f"every_c: {why} every_c", f"state_clip: {wrong('state_clip', '2')}",
    }  # fmt: skip


def test_a_successor_that_finds_no_gpu(path: Path) -> None:
    """What is left then stays unproven: no call with it is served by default."""
    code = 'import os, sys\nif len(sys.argv) > 1: print(\'{"cannot": "no GPU"}\'); sys.exit()\n'
    code += f"print({PLAIN + begin('zoneout')!r}, flush=True); os.abort()"
    verifier = Verifier(opened(path), lambda family: python(code))
    with pytest.warns(
        RuntimeWarning, match="cannot be verified here for calls with projection, recurrent_dropout, .*: no GPU"
    ):
        assert verifier.verify("step") is State.VERIFIED
    assert verifier.lacking("step") == list(FEATURES) and verifier.state("step") is State.VERIFIED


def test_two_processes_of_different_opinion(path: Path) -> None:
    first, second = opened(path), opened(path)
    first.add(Verdict("step", True, "", {"zoneout": "case a", "projection": ""}))
    second.add(Verdict("step", True, "", {"zoneout": "", "reset_state": ""}))
    first.reload()
    for one in (first, second, opened(path)):
        verdict = one.verdict("step")
        assert verdict is not None and verdict.features == {"zoneout": "case a", "projection": "", "reset_state": ""}
    second.add(Verdict("step", False, "case b"))
    assert opened(path).verdict("step") == Verdict("step", False, "case b")


@pytest.mark.parametrize("damage", ['{"zoneout": 1}', "[]", "7"])
def test_damaged_features(path: Path, damage: str) -> None:
    opened(path).add(Verdict("step", True, "", {"zoneout": ""}))
    path.write_text(path.read_text().replace('{"zoneout": ""}', damage))
    with pytest.warns(RuntimeWarning, match="1 damaged lines are ignored"):
        assert opened(path).verdict("step") is None, "it is verified again"


@pytest.mark.parametrize("mode", ["use", "first"])
def test_projection_by_families_that_have_passed_with_it(path: Path, mode: str) -> None:
    known = opened(path)
    known.add(Verdict("step", True, "", {"projection": "case a"}), Verdict("gemm", True, "", {"projection": ""}))
    verifier = Verifier(known, lambda family: pytest.fail("is known"))
    tuner = Tuner(known, verifier, lambda _: 1.0, lambda _: 0.0, mode)
    plain = Problem("lstm", "float16", False, 9, 16, 64, 256, 256, 1, 1, training=False)
    projected = dataclasses.replace(plain, P=128)
    now = Circumstances(may_time=False)
    for offer, of_plain, of_projected in (
        (Offer(None, ("step", "gemm")), "step", "gemm"),
        (Offer(None, ("step",)), "step", EXACT),
        (Offer("cudnn", ("step",)), "cudnn", "cudnn"),
    ):
        assert tuner.turn(plain, offer, now).family == of_plain
        assert tuner.turn(projected, offer, now).family == of_projected
    if mode == "first":  # nor has the other one its turns
        turns = {tuner.turn(projected, Offer("cudnn", ("step", "gemm"))).beside for _ in range(20)}
        assert turns == {"gemm", None}
    assert all(not isinstance(entry, Choice) for entry in known.entries())
