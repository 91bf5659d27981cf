"""The record of kernel families: damaged and read-only files, processes that write at once, children that hang or die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

import fused_rnn
from fused_rnn import _explain, _settings, tune
from fused_rnn.__main__ import main
from fused_rnn._kinds import number_of
from fused_rnn.bench.cases import DTYPES, PRESETS
from fused_rnn.tuning import here, record, serve, verification
from fused_rnn.tuning.cases import cases
from fused_rnn.tuning.record import Choice, Record, Scope, Verdict, entries_of
from fused_rnn.tuning.verification import Finding, State, Verifier, judge, run_child

SCOPE = Scope("H100", "580.1", "abc")
NAMES = ("cudnn", "step", "grid", "cluster")
CHOICE = Choice("lstm H=3", "grid", {"grid": 1.5, "cudnn": 2.0}, {"cluster": "lstm H=3: error 7"})
FASTEST = Choice("gru H=3", "cudnn", {"cudnn": 2.0})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "H100.txt"


def opened(path: Path) -> Record:
    return Record(path, SCOPE, NAMES)


DAMAGE = {
    "cut off": lambda text: text[:-30],
    "a byte changed": lambda text: text.replace('"grid": 1.5', '"grid": l.5'),
    "a family renamed": lambda text: text.replace('"grid"', '"gria"'),
    "a time that is none": lambda text: text.replace("1.5", "NaN"),
    "a negative time": lambda text: text.replace("1.5", "-1.5"),
    "an excluded family chosen": lambda text: text.replace('{"cluster"', '{"grid"'),
    "another type": lambda text: text.replace('"cluster": "lstm H=3: error 7"', '"cluster": 7'),
    "no object": lambda text: text + "[1, 2]\n",
    "not JSON": lambda text: "\0\xff}{" + text,
    "deep": lambda text: text + "[" * 100_000 + "\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_lines(path: Path, damage: str) -> None:
    opened(path).add(FASTEST, CHOICE)
    path.write_text(DAMAGE[damage](path.read_text()), errors="replace")
    with pytest.warns(RuntimeWarning) as caught:
        damaged = opened(path)
        damaged.reload()
        damaged.add(Verdict("grid", True))
    assert len(caught) == 1 and "1 damaged lines are ignored" in str(caught[0].message)
    left = [choice for choice in (FASTEST, CHOICE) if damaged.choice(choice.problem) == choice]
    assert 1 <= len(left) <= 2 and all(damaged.choice(c.problem) is None for c in (FASTEST, CHOICE) if c not in left)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is whole again
        assert len(opened(path).entries()) == len(left) + 1


@pytest.mark.parametrize("what", ["a folder", "random bytes", "empty"])
def test_no_record_at_all(path: Path, what: str) -> None:
    path.parent.mkdir()
    if what == "a folder":
        path.mkdir()
    else:
        path.write_bytes(os.urandom(5000) if what == "random bytes" else b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if what != "empty" else "error")
        found = opened(path)
        assert found.entries() == []
        found.add(CHOICE)
        assert found.choice(CHOICE.problem) == CHOICE
    assert what == "a folder" or [entry for _, entry in entries_of(path)] == [CHOICE]


def test_read_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(path).add(Verdict("step", True))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(record.tempfile, "mkstemp", refuse)  # as root, a folder's mode forbids nothing
    with pytest.warns(RuntimeWarning) as caught:
        mine = opened(path)
        mine.add(CHOICE)
        mine.add(Verdict("grid", False, "hangs"))
    assert len(caught) == 1 and "cannot be written" in str(caught[0].message)
    assert mine.choice(CHOICE.problem) == CHOICE and mine.verdict("grid") == Verdict("grid", False, "hangs")
    assert [entry for _, entry in entries_of(path)] == [Verdict("step", True)]
    monkeypatch.undo()
    mine.add(Verdict("cluster", True))
    assert len(entries_of(path)) == 4, "what could not be written before is written then"


def test_a_writer_that_dies(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is the old one or the new one, and no temporary file is left."""
    opened(path).add(FASTEST)
    monkeypatch.setattr(record.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.warns(RuntimeWarning, match="No space left"):
        opened(path).add(CHOICE)
    assert [entry for _, entry in entries_of(path)] == [FASTEST]
    assert sorted(p.name for p in path.parent.iterdir()) == ["H100.txt", "H100.txt.lock"]


# Without torch, whose import takes seconds.
ALONE = f"""
import sys, importlib.util as u
spec = u.spec_from_file_location("tuning", {str(Path(record.__file__).parent)!r} + "/__init__.py")
sys.modules["tuning"] = module = u.module_from_spec(spec)
spec.loader.exec_module(module)
"""
RACER = """
from pathlib import Path
from tuning.record import Choice, Record, Scope, Verdict
number, path = int(sys.argv[1]), Path(sys.argv[2])
mine = Record(path, Scope("H100", "580.1", "abc"), ("step", "grid", "cluster"))
print("ready", flush=True)
sys.stdin.readline()
for i in range(25):
    mine.add(Choice(f"problem {number} {i}", "grid", {"grid": 1.0 + number}, {}))
    excluded = {} if i % 2 == number else {"cluster" if number else "step": "wrong"}
    mine.add(Choice("shared", None if excluded else "grid", {"grid": 1.0}, excluded))
mine.add(Verdict("grid", number == 0, "" if number == 0 else "hangs"))
"""


def test_two_processes_race(path: Path) -> None:
    command = [sys.executable, "-c", ALONE + RACER]
    processes = [
        subprocess.Popen([*command, str(n), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    found = opened(path)
    for number in range(2):
        for i in range(25):
            assert found.choice(f"problem {number} {i}") is not None, "no line is lost"
    shared = found.choice("shared")
    assert shared is not None and set(shared.excluded) == {"step", "cluster"}, "what either excluded stays excluded"
    assert found.verdict("grid") == Verdict("grid", False, "hangs")


def test_lock_that_another_process_keeps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "LOCK_SECONDS", 0.05)
    mine = opened(path)
    path.parent.mkdir(exist_ok=True)
    with open(f"{path}.lock", "a") as file:
        assert record.take_lock(file, 1)
        mine.add(CHOICE)
        assert not path.exists() and mine.choice(CHOICE.problem) == CHOICE
    mine.add(FASTEST)
    assert {entry.problem for _, entry in entries_of(path) if isinstance(entry, Choice)} == {CHOICE.problem, FASTEST.problem}


def test_reload_sees_other_processes(path: Path) -> None:
    mine, other = opened(path), opened(path)
    other.add(CHOICE)
    assert mine.choice(CHOICE.problem) is None
    mine.reload()
    assert mine.choice(CHOICE.problem) == CHOICE


def test_size_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MOST_LINES", 5)
    mine = opened(path)
    mine.add(*(Choice(f"problem {i}", "grid") for i in range(9)))
    assert [entry.problem for _, entry in entries_of(path) if isinstance(entry, Choice)] == [
        f"problem {i}" for i in range(4, 9)
    ]


# --- children ---

BEGIN = '{"case": "lstm H=3"}\n'
ENDED = '{"case": "lstm H=3", "error": 0.5}\n'


@pytest.mark.parametrize(
    ("output", "status", "verified", "reason"),
    [
        (BEGIN + ENDED + '{"end": 1}', 0, True, ""),
        ("noise\n" + BEGIN + ENDED + '[3]\n{"end": 1}', 0, True, ""),
        (BEGIN + '{"case": "lstm H=3", "error": 1.5}\n', None, False, "case lstm H=3 is wrong: its error is 1.5 times"),
        (BEGIN + '{"case": "lstm H=3", "error": NaN}\n{"end": 1}', 0, False, "case lstm H=3 is wrong: its error is nan"),
        (BEGIN + '{"case": "lstm H=3", "raised": "illegal address"}', 1, False, "case lstm H=3 raised illegal address"),
        (BEGIN + ENDED + BEGIN, None, False, "hangs: no answer within 20 s in case lstm H=3"),
        (BEGIN, -11, False, "its process ended with signal 11 in case lstm H=3"),
        (BEGIN + ENDED, 0, None, "its process ended with exit status 0 in no case"),
        ("", None, None, "hangs: no answer within 20 s in no case"),
        ("", 1, None, "its process ended with exit status 1 in no case: ImportError"),
        ('{"cannot": "no GPU is visible"}', 0, None, "no GPU is visible"),
        ('{"end": 0}', 0, None, "no case of it can run here"),
        (BEGIN + ENDED + '{"end": 1}', -6, None, "its process ended with signal 6 in no case"),
    ],
)
def test_judge(output: str, status: int | None, verified: bool | None, reason: str) -> None:
    finding = judge(output, status, 20, "ImportError" if status == 1 and not output else "")
    assert finding.verified is verified and finding.reason.startswith(reason)


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]  # starts in milliseconds


HANGS = f"import time, subprocess; print('''{BEGIN}''', flush=True); subprocess.run(['sleep', '100'])"
PASSES = f"print('''{BEGIN}{ENDED}'''); print('{{\"end\": 1}}')"


def test_hanging_child(path: Path) -> None:
    start = time.monotonic()
    finding = run_child(python(HANGS), 1.5, {})
    assert time.monotonic() - start < 10
    assert finding == Finding(False, "hangs: no answer within 1.5 s in case lstm H=3")


def test_slow_child_that_goes_on(path: Path) -> None:
    """The limit is for each line: many cases may take longer."""
    code = f"import time\nfor _ in range(5): print('''{BEGIN}{ENDED}''', flush=True); time.sleep(0.5)\n{PASSES}"
    assert run_child(python(code), 2.0, {}) == Finding(True, "")


def test_verifier(path: Path) -> None:
    commands = {
        "grid": PASSES,
        "cluster": HANGS,
        "step": "import os; assert os.environ['FUSED_RNN_TUNE'] == 'off'; print('{\"cannot\": \"no GPU\"}')",
    }
    verifier = Verifier(opened(path), lambda family: python(commands[family]), 1.5, {"FUSED_RNN_TUNE": "off"})
    assert verifier.state("grid") is State.UNKNOWN
    assert verifier.request("grid") is State.RUNNING
    assert verifier.verify("grid") is State.VERIFIED
    with pytest.warns(RuntimeWarning, match="cluster is excluded on this device: hangs: .* in case lstm H=3"):
        assert verifier.verify("cluster") is State.EXCLUDED
    with pytest.warns(RuntimeWarning, match="step cannot be verified here, so it serves only where .*: no GPU"):
        assert verifier.verify("step") is State.IMPOSSIBLE
    known = {entry.family: entry.verified for _, entry in entries_of(path) if isinstance(entry, Verdict)}
    assert known == {"grid": True, "cluster": False}, "what could not be verified is tried again by the next process"
    again = Verifier(opened(path), lambda family: pytest.fail("is known"))
    assert again.verify("cluster") is State.EXCLUDED and again.request("grid") is State.VERIFIED


def test_command_that_is_not_there(path: Path) -> None:
    verifier = Verifier(opened(path), lambda family: ["/no/such/program"])
    with pytest.warns(RuntimeWarning, match="its child process could not be started"):
        assert verifier.verify("grid") is State.IMPOSSIBLE


def test_two_verifiers_run_one_child(path: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"import time; open({str(log)!r}, 'a').write('x'); time.sleep(0.3)\n{PASSES}"
    verifiers = [Verifier(opened(path), lambda family: python(code)) for _ in range(2)]
    threads = [threading.Thread(target=verifier.verify, args=("grid",)) for verifier in verifiers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [v.state("grid") for v in verifiers] == [State.VERIFIED] * 2 and log.read_text() == "x"


# --- commands and settings ---


def test_verify_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="verify: needs a GPU, and torch sees none here"):
        main(["verify"])


def test_child_without_a_gpu() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "fused_rnn.tuning.cases", "grid", "cuda:0"]
    assert run_child(command, verification.CASE_SECONDS, environment) == Finding(None, "no GPU is visible")


def test_list(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened(path).add(Verdict("grid", True), Verdict("cluster", False, "hangs"), CHOICE)
    with _settings.use("FUSED_RNN_TUNE_FILE", str(path)):
        assert here.files() == [path]
        main(["tune", "--list"])
        assert capsys.readouterr().out.splitlines() == [
            str(path),
            "  H100, driver 580.1, build abc",
            "    grid verified",
            "    cluster excluded: hangs",
            "    lstm H=3: grid (us a step: grid 1.5, cudnn 2)",
            "      not cluster: lstm H=3: error 7",
        ]
        main(["tune", "--forget"])
        main(["tune", "--list"])
        assert "nothing is recorded" in capsys.readouterr().out


def test_tune_first_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="tune: --first needs a GPU, and torch sees none here"):
        main(["tune", "--first"])


def test_calls_until_a_family_is_chosen(path: Path) -> None:
    """Another process's choice counts too, and what is wrong is said; a problem that stays open ends with the time."""
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            opened(path).add(Choice(CHOICE.problem, None, {}, CHOICE.excluded))
        elif calls == 5:
            opened(path).add(CHOICE)

    text = tune.tuned(call, opened(path), CHOICE.problem, 60)
    assert calls == 5 and text.startswith("grid (5 calls, ")
    assert text.endswith(" s; us a step: grid 1.5, cudnn 2; not cluster: lstm H=3: error 7)")
    assert tune.tuned(call, opened(path), CHOICE.problem, 60).startswith("grid (0 calls, ")
    assert tune.tuned(lambda: time.sleep(0.01), opened(path), "another", 0.05).startswith("not chosen yet (")


@pytest.mark.skipif(_settings.extension is None, reason="needs the planner")
def test_the_tuner_s_problem_of_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key under which a choice is recorded is the one that `tune --first` waits for."""
    asked: list[str] = []
    monkeypatch.setattr(serve, "explained", lambda question: (asked.append(serve._problem(question).key), ("step", ""))[1])
    for case in PRESETS["first"].cases():
        options = {"num_layers": case.layers, "bidirectional": case.bidirectional, "dtype": DTYPES[case.dtype]}
        module = getattr(fused_rnn, case.cell)(case.I, case.H, device="meta", **options)
        x = case.inputs("cpu")[0] if case.lengths == "ragged" else torch.empty(case.T, case.B, case.I, device="meta")
        sizes, _ = _explain._sizes(module, x)
        call = _explain._Call(
            cell=number_of(module), backend="cuda", dtype=DTYPES[case.dtype], device=_explain.DEVICES["H100"],
            packed=case.lengths == "ragged", training=case.mode != "inference", forced=None,
        )  # fmt: skip
        _explain._recorded(module, 0, call, sizes)
        assert asked[-1] == tune.problem_of(case).key


def test_settings() -> None:
    with pytest.raises(ValueError, match="FUSED_RNN_TUNE: expected one of off, use, first, got 'always'"):
        with _settings.use("FUSED_RNN_TUNE", "always"):
            pass
    code = "from fused_rnn import _settings as s; print(s.value('FUSED_RNN_TUNE'), s.value('FUSED_RNN_TUNE_FILE'))"
    environment = {**os.environ, "FUSED_RNN_TUNE": "use", "FUSED_RNN_TUNE_FILE": "/a"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout == "use /a\n"


def test_default_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    name = "NVIDIA H100 80GB HBM3 132 SMs"
    assert record.default_path(name) == Path("/cache/fused_rnn/NVIDIA-H100-80GB-HBM3-132-SMs.txt")


@pytest.mark.skipif(_settings.extension is None, reason="needs the planner")
@pytest.mark.parametrize("gpu", ["H100", "T4"])
def test_cases_have_each_kernel(gpu: str) -> None:
    from fused_rnn._explain import DEVICES

    found = {family: list(cases(family, DEVICES[gpu])) for family in here.FAMILIES if family != "cudnn"}
    assert all(
        (24 if f == "block" else 50) <= len(cases_) <= 160 for f, cases_ in found.items() if f == "step" or gpu == "H100"
    ), found
    assert gpu == "H100" or not found["cluster"]


def test_families_are_the_planner_s() -> None:
    if _settings.extension is None:
        pytest.skip("needs the planner")
    with pytest.raises(ValueError) as error:
        _settings.extension.set_setting("FUSED_RNN_PLAN", "nothing")
    assert all(f"{family}, " in str(error.value) for family in here.FAMILIES)
    assert sorted(_settings.extension.families) == sorted(here.FAMILIES)


def test_a_line_is_json(path: Path) -> None:
    opened(path).add(CHOICE)
    line = json.loads(path.read_text())
    assert line["driver"] == "580.1" and line["us"] == {"grid": 1.5, "cudnn": 2.0}
