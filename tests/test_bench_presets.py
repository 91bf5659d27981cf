"""The benchmark's presets: grids of cells in a loop and of few steps."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import ROOT, TINY, load_compare, made_up_line

from fused_rnn import _backend, bench
from fused_rnn.__main__ import main, parser
from fused_rnn._explain import DEVICES
from fused_rnn.bench import timing
from fused_rnn.bench.cases import CELLS, LOOPED, MODES, PRESETS, BenchCase, thinned
from fused_rnn.bench.sides import make_sides


def test_the_presets_are_the_grids() -> None:
    cells, steps = (list(PRESETS[name].cases()) for name in ("cells", "steps"))
    sizes = itertools.product(LOOPED, MODES, (1, 2, 8, 32, 64, 128), (64, 128, 256, 512, 1024))
    assert len(set(cells)) == len(cells)
    assert set(cells) == {BenchCase(cell, "fp32", mode, 10, b, h, h) for cell, mode, b, h in sizes}
    sizes = itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64, 256), (64, 128, 256, 512, 1024, 2048))
    grid = itertools.product(sizes, CELLS + LOOPED, ("fp32", "bf16", "fp16"))
    assert len(set(steps)) == len(steps)
    # One step of the cells: all their steps are alike.
    assert set(steps) == {BenchCase(c, d, "inference", t, b, h, h) for (t, b, h), c, d in grid if c in CELLS or t == 1}
    assert {name: preset.threads for name, preset in PRESETS.items()} == {"cells": (1,), "steps": (1, 2), "first": (1,)}


def test_the_first_cases_on_a_gpu() -> None:
    """40 of them, small H first; odd sizes, single steps, large batches, every dtype under torch's default switches."""
    cases = list(PRESETS["first"].cases())
    assert len(cases) == len(set(cases)) == 40 and all(case.H <= 256 for case in cases[:14])
    assert {case.cell for case in cases} == set(CELLS) and {case.dtype for case in cases} == {"fp32", "fp16", "bf16"}
    counts = {
        "small H": [c for c in cases if max(c.H, c.I) <= 128], "odd": [c for c in cases if c.H % 16],
        "one step": [c for c in cases if c.T == 1], "large batch": [c for c in cases if c.B * c.H >= 256 * 1024],
        "training": [c for c in cases if c.mode == "training"], "inference": [c for c in cases if c.mode == "inference"],
        "ragged": [c for c in cases if c.lengths == "ragged"], "stack": [c for c in cases if c.layers > 1],
        "bidirectional": [c for c in cases if c.bidirectional], "B=1": [c for c in cases if c.B == 1],
    }  # fmt: skip
    least = {"small H": 12, "odd": 5, "one step": 5, "large batch": 4, "training": 20, "inference": 10, "B=1": 5}
    assert all(len(found) >= least.get(what, 1) for what, found in counts.items())


@pytest.fixture(scope="module")
def first_plans() -> Any:
    spec = importlib.util.spec_from_file_location("first_plans", ROOT / "benchmarks" / "first_plans.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_device_descriptions_are_those_of_the_sheets(first_plans: Any) -> None:
    for name, sheet in first_plans.SHEETS.items():
        assert DEVICES[name]["sm_count"] == sheet.sms and DEVICES[name]["l2_bytes"] == sheet.l2_mb << 20
        assert DEVICES[name]["dram_gb_per_s"] == sheet.gb_per_s >= 1000
        assert 1000 < sheet.clock_mhz < 3000 and sheet.source


@pytest.mark.skipif(not _backend.has_cpu_kernels(), reason="needs the compiled extension, which plans")
@pytest.mark.parametrize("gpu", ["H100", "H200", "A100", "RTX 4090", "B200"])
def test_plans_of_the_first_cases(first_plans: Any, gpu: str) -> None:
    """Every row can be made: cuDNN serves by default, and the family once verified is no slower by the model."""
    table = (ROOT / "benchmarks" / "results" / "first_plans.md").read_text().split(f"## {gpu}\n")[1].split("\n## ")[0]
    families = set()
    for case in PRESETS["first"].cases():
        able, unable = first_plans.expected(case, gpu)
        us = {one.family: one.us for one in able}
        assert {*us, *unable} == {"single", "step", "grid", "cluster", "block", "gemm", "cudnn"}
        assert us[able[0].family] <= us["cudnn"] and ("cluster" in unable) >= (gpu in ("A100", "RTX 4090"))
        families.add(able[0].family)
        cells = [cell.strip() for cell in first_plans.row(case, gpu).strip("| ").split(" | ")]
        assert cells[0] == str(case) and len(cells) == 6 and cells[3] == f"**{able[0].family}**"
        assert f"| {case} |" in table, "benchmarks/first_plans.py writes the table again"
    assert len(table.strip().split("\n")) == 2 + 40 and {"cudnn", "single"} <= families


def test_a_thinned_preset() -> None:
    """A sample of the selected cases in their order, the same each time, from all over the grid."""

    def cases(*options: str) -> list[BenchCase]:
        return bench.selected(parser().parse_args(["bench", "--device", "cpu", "--preset", "cells", *options]))

    everything, some = cases(), cases("--limit", "60")
    assert len(some) == 60 and some == cases("--limit", "60") and some == [case for case in everything if case in some]
    assert {(case.cell, case.mode) for case in some} == set(itertools.product(LOOPED, MODES))
    assert cases("--limit", "100000") == everything == thinned(everything, None)
    few = cases("--batch", "8", "64", "--cell", "GRUCell", "--limit", "3")
    assert len(few) == 3 and all(case.cell == "GRUCell" and case.B in (8, 64) for case in few)


@pytest.mark.parametrize("limit", ["0", "-1", "1.5", "some"])
def test_a_limit_that_is_none(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["bench", f"--limit={limit}"])
    assert f"argument --limit: expected a positive integer, got '{limit}'" in capsys.readouterr().err


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", LOOPED)
def test_a_loop_of_a_cell(cell: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides make every step from the state before it, and backward has every parameter and the whole input."""
    case = BenchCase(cell, "fp32", mode, 3, 2, 5, 4)
    seen: list[tuple[torch.Tensor, ...]] = []
    grad = torch.autograd.grad

    def recorded(outputs: Any, leaves: Any, gradients: Any) -> Any:
        seen.append(grad(outputs, leaves, [torch.ones_like(g) for g in gradients]))
        return seen[-1]

    monkeypatch.setattr(torch.autograd, "grad", recorded)
    sides, refused, (module, x) = make_sides(case, "cpu", ["torch.nn", "onnxruntime", "openvino"], 1)
    steps: list[int] = []
    module.register_forward_hook(lambda *_: steps.append(1))
    assert [side.name for side in sides] == ["fused_rnn", "torch.nn"] and x.shape == (2, 5)
    assert refused == dict.fromkeys(("onnxruntime", "openvino"), "only layers, no cells in a loop")
    for side in sides:
        with side.active():
            side.run()
    assert len(steps) == 3
    if mode != "training":
        assert not seen
        return
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert [g.shape for g in seen[0]] == [(3, 2, 5), *(p.shape for p in module.parameters())]


def test_result_lines_of_presets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The lines of today, of a cell too; the threads are the preset's unless others are asked for."""
    case = dataclasses.replace(TINY, cell="LSTMCell")
    monkeypatch.setattr(timing, "MOST_ROUNDS", timing.FEWEST_ROUNDS)
    monkeypatch.setitem(PRESETS, "steps", dataclasses.replace(PRESETS["steps"], cases=lambda: iter([case])))
    output = tmp_path / "results.jsonl"
    main(["bench", "--device", "cpu", "--baseline", "torch.nn", "--preset", "steps", "--output", str(output)])
    lines = [json.loads(text) for text in output.read_text().splitlines()]
    assert [line["threads"] for line in lines] == [1, 2]
    assert all(tuple(line)[: len(bench.FIELDS)] == bench.FIELDS and line["cell"] == "LSTMCell" for line in lines)
    assert case.flops == 3 * 4 * 2 * 2 * 4 * 5 * (3 + 5)
    options = ["bench", "--device", "cpu", "--preset", "steps", "--no-memory", "--baseline", "torch.nn"]
    lines = bench.main(parser().parse_args([*options, "--threads", "1"]))
    assert [line["threads"] for line in lines] == [1]


def test_the_map_of_a_grid(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    compare = load_compare()
    lines = [
        made_up_line(cell=cell, T=1, B=b, H=h, I=h, ratio=b / 8 + (cell == "GRUCell"), ratio_p25=0.1, ratio_p75=9.0)
        for cell, b, h in itertools.product(("LSTMCell", "GRUCell"), (1, 8), (64, 128))
    ]
    path = tmp_path / "grid.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))  # one case was not measured
    compare.main([str(path), "--plots", str(tmp_path)])
    assert (tmp_path / "grid_grid.png").exists()
    import matplotlib.pyplot as plt

    figure = compare.draw_grid(plt, compare.read([path]))
    assert [axes.get_title() for axes in figure.axes] == [f"{c} fp16 training T=1" for c in ("LSTMCell", "GRUCell")]
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [
        ["0.12", "0.12", "1.00", "1.00"], ["1.12", "1.12", "2.00", ""],
    ]  # fmt: skip
    plt.close("all")
