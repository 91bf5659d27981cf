"""Plans of the persistent families on device descriptions: no GPU is needed."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
from test_families import every_kernel, kernels, plans
from test_plan import DEVICES, C, plan

F16, BF16, F32, F64 = "float16", "bfloat16", "float32", "float64"


# device, family, cell, batch, hidden, dtype, backward: launches, groups, blocks of a group, units of a block, row tiles
FITS = [
    ("H100", "grid", "lstm", 8, 512, BF16, False, (1, 1, 32, 16, 1)),
    ("H100", "grid", "lstm", 64, 512, BF16, False, (1, 4, 32, 16, 2)),
    ("H100", "grid", "lstm", 8, 2048, BF16, False, (1, 1, 128, 16, 1)),
    ("H100", "grid", "lstm", 8, 1024, F32, False, (1, 1, 64, 16, 1)),
    ("H100", "grid", "gru", 8, 768, BF16, True, (1, 1, 48, 16, 1)),
    ("H100", "grid", "lstm", 4096, 1024, BF16, False, (32, 2, 64, 16, 8)),
    ("A100", "grid", "lstm", 8, 1024, BF16, True, (1, 1, 64, 16, 1)),
    ("A100", "grid", "lstm", 8, 1024, BF16, False, (1, 1, 64, 16, 1)),
    ("RTX 4090", "grid", "lstm", 8, 1024, BF16, False, (1, 1, 64, 16, 1)),
    ("H200", "cluster", "lstm", 8, 256, BF16, False, (1, 1, 16, 16, 1)),
    ("H100", "cluster", "lstm", 128, 256, BF16, False, (1, 16, 6, 48, 1)),
    ("H100", "cluster", "lstm", 512, 128, F16, False, (1, 32, 3, 48, 2)),
    ("H100", "cluster", "lstm", 8, 512, BF16, False, (1, 1, 16, 32, 1)),
    ("H100", "cluster", "lstm", 8, 512, BF16, True, (1, 1, 16, 32, 1)),
    ("H100", "cluster", "rnn_tanh", 8, 768, BF16, False, (1, 1, 16, 48, 1)),
    ("H100", "cluster", "lstm", 16, 768, F16, False, (1, 2, 16, 48, 1)),
    ("H100", "cluster", "lstm", 16, 768, F16, True, (1, 2, 16, 48, 1)),
    ("H200", "cluster", "gru", 16, 768, F16, True, (1, 2, 16, 48, 1)),
    ("H100", "cluster", "lstm", 8, 512, F32, True, (1, 1, 16, 32, 1)),
    ("RTX 5090", "cluster", "lstm", 8, 128, BF16, False, (1, 1, 8, 16, 1)),
    ("B200", "cluster", "gru", 8, 100, BF16, False, (1, 1, 7, 16, 1)),
    ("B200", "grid", "gru", 8, 2048, BF16, False, (1, 1, 128, 16, 1)),
    ("H100", "block", "lstm", 16, 64, F16, False, (1, 4, 1, 64, 1)),
    ("H100", "block", "gru", 3, 50, BF16, True, (1, 1, 1, 64, 1)),
    ("A100", "block", "lstm", 64, 128, F32, True, (1, 16, 1, 128, 1)),
    ("RTX 4090", "block", "rnn_tanh", 5, 256, F16, False, (1, 2, 1, 256, 1)),
]


@pytest.mark.parametrize("row", FITS, ids=lambda row: "-".join(map(str, row[:7])))
def test_fits(row: tuple[Any, ...]) -> None:
    name, family, cell, batch, hidden, dtype, backward, expected = row
    result = plan(name, cell=cell, B=batch, H=hidden, dtype=dtype, backward=backward, allow_tf32=True, forced=family)
    p = result["persistent"]
    assert tuple(p[key] for key in ("launches", "groups", "blocks", "units", "row_tiles")) == expected, result["text"]
    assert p["smem_bytes"] <= DEVICES[name]["smem_per_block"]
    assert f"{family} is forced; it has run in the simulator only, never on a GPU" in result["text"]


def test_gpu_tests_run_every_kernel() -> None:
    """The cases of test_families.test_every_kernel on an H100: all that are compiled, most also on several row tiles."""
    one_tile, several = set(), set()
    for case, family, tf32 in every_kernel():
        if family not in ("step", "gemm"):
            for backward, made in enumerate(plans(case, family, DEVICES["H100"], tf32)):
                [(math, units, has_several, *_)] = kernels(made)
                (several if has_several else one_tile).add((family, case.cell, math, units, backward))
    of_family = {("grid", 16), ("cluster", 16), ("cluster", 32), ("cluster", 48), ("block", 0)}
    combinations = itertools.product(("LSTM", "GRU", "RNN_TANH"), ("fp32", "tf32", "fp16", "bf16"), of_family, (0, 1))
    compiled = {(family, cell, math, units, backward) for cell, math, (family, units), backward in combinations}
    assert one_tile == compiled
    # Blocks of 16 units form clusters of which so many run at once that larger blocks serve large batches better.
    assert {kernel for kernel in compiled if kernel[0] == "grid" or kernel[3] > 16} <= several


# device, family, hidden, dtype, further arguments: what the reason says
REFUSED = [
    ("H100", "grid", 64, F64, {}, "grid has no fp64 kernels"),
    ("H100", "cluster", 64, F64, {}, "cluster has no fp64 kernels"),
    ("H100", "grid", 64, BF16, {"P": 32}, "grid has no projection"),
    ("H100", "cluster", 64, BF16, {"P": 32}, "cluster has no projection"),
    ("H100", "grid", 2128, BF16, {}, "needs 133 SMs at once, one for every 16 hidden units; the device has 132"),
    ("H100", "grid", 2048, F32, {}, "bytes of shared memory each beside the registers, the device has 232448"),
    ("T4", "grid", 64, F16, {}, "grid needs compute capability 8.0"),
    ("A100", "cluster", 64, BF16, {}, "cluster needs compute capability 9.0"),
    ("RTX 4090", "cluster", 64, BF16, {}, "cluster needs compute capability 9.0"),
    ("RTX 4090", "grid", 2048, BF16, {}, "bytes of shared memory each beside the registers, the device has 101376"),
    ("H200", "cluster", 1024, BF16, {}, "needs a cluster of 22 blocks of 48 units, the device has clusters of 16"),
    ("H100", "grid", 64, BF16, {"T": 2**28 - 8, "B": 8}, "numbers the rows of all steps with 32 bits"),
    ("H100", "cluster", 64, BF16, {"T": 1, "B": 2**31}, "numbers the rows of all steps with 32 bits"),
    ("H100", "block", 64, F64, {}, "block has no fp64 kernels"),
    ("H100", "block", 64, BF16, {"P": 32}, "block has no projection"),
    ("H100", "block", 130, BF16, {}, "block has up to 128 hidden units in a block"),
    ("H100", "block", 33, BF16, {}, "block takes even numbers of hidden units"),
    ("T4", "block", 64, F16, {}, "block needs compute capability 8.0"),
    ("RTX 4090", "block", 128, F32, {}, "bytes of shared memory beside the registers, the device has 101376"),
    ("H100", "block", 64, BF16, {"T": 2**28 - 8, "B": 8}, "numbers the rows of all steps with 32 bits"),
]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: "-".join(map(str, row[:5])))
def test_refused(row: tuple[Any, ...]) -> None:
    name, family, hidden, dtype, more, reason = row
    with pytest.raises(ValueError, match=f"kernel family {family} cannot serve this layer: ") as error:
        plan(name, H=hidden, dtype=dtype, forced=family, **more)
    assert reason in str(error.value)


@pytest.mark.parametrize("family", ["grid", "cluster", "block"])
def test_most_steps(family: str) -> None:
    """32 bits number the rows of the steps and of some beyond the last."""
    assert plan(T=2**28 - 9, B=8, H=64, dtype=BF16, forced=family)["family"] == family


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("backward", [False, True])
def test_never_chosen_unforced(name: str, backward: bool) -> None:
    result = plan(name, B=8, H=256, dtype=F16, backward=backward, training=True)
    assert result["family"] == "step"
    for family, since in (("grid", 80), ("cluster", 90)):
        if DEVICES[name]["compute_capability"] < since:
            assert "needs compute capability" in result["rejected"][family]
        else:
            assert result["rejected"][family] == (
                f"never run on a GPU yet, so it is taken only when asked for (FUSED_RNN_PLAN={family} or cheapest)"
            )


def test_both_directions_in_one_launch() -> None:
    both = plan(H=1024, D=2, forced="grid")["persistent"]
    assert (both["launches"], both["directions"]) == (1, 2)
    in_turn = plan(H=2048, D=2, forced="grid")["persistent"]
    assert (in_turn["launches"], in_turn["directions"]) == (2, 1)


def test_every_plan_fits_its_device() -> None:
    """All blocks of a `grid` launch run at once; every block's shared memory fits; all rows are covered."""
    for name, limits in DEVICES.items():
        for family in ("grid", "cluster", "block"):
            for cell in ("rnn_tanh", "lstm", "gru"):
                for dtype, tf32 in ((F16, False), (F32, False), (F32, True)):
                    for batch, hidden in ((1, 1), (3, 33), (5, 128), (16, 768), (64, 1024), (512, 256), (4096, 512)):
                        for backward in (False, True):
                            problem = {"cell": cell, "dtype": dtype, "allow_tf32": tf32, "B": batch, "H": hidden, "D": 2}
                            try:
                                p = plan(name, **problem, backward=backward, training=True, forced=family)["persistent"]
                            except ValueError:
                                continue
                            blocks = p["blocks"] * p["groups"] * p["directions"]
                            assert family != "grid" or blocks <= limits["sm_count"]
                            assert p["blocks"] <= {"grid": blocks, "cluster": limits["max_cluster"], "block": 1}[family]
                            assert p["smem_bytes"] <= limits["smem_per_block"]
                            assert (p["blocks"] - 1) * p["units"] < hidden <= p["blocks"] * p["units"]
                            launched = p["launches"] * p["directions"] // 2 * p["groups"] * p["rows"]
                            assert launched >= batch
    assert C


def asked(sms: int, counts: dict[int, int], like: str = "H100") -> dict[str, Any]:
    """A device that has been asked how many clusters of a size (the key) run at once; of other sizes none do."""
    clusters = [{1: sms, **counts}.get(blocks, 0) for blocks in range(17)]
    return {**DEVICES[like], "sm_count": sms, "max_cluster": max(counts, default=1), "active_clusters": clusters}


# What might be found on real cards; the figures are made up.
ASKED = {
    "clusters of at most 8": asked(132, {2: 66, 3: 40, 4: 32, 5: 24, 6: 20, 7: 17, 8: 15}),
    "3 of 16 at once": asked(114, {2: 57, 4: 27, 8: 12, 11: 7, 16: 3}),
    "MIG slice": asked(16, {2: 8, 3: 5, 4: 4, 6: 2, 8: 2, 16: 1}),
    "MIG slice, two groups of SMs": asked(14, {2: 7, 3: 4, 4: 3, 6: 2, 7: 2}),
    "none at all": asked(132, {}),
}


# device, cell, dtype, batch, hidden, directions: groups, blocks, units, row tiles, turns of the clusters; or the reason
ON_ASKED = [
    ("clusters of at most 8", "lstm", F16, 8, 384, 1, (1, 8, 48, 1, 1)),
    ("clusters of at most 8", "lstm", F16, 8, 512, 1, "a cluster of 11 blocks of 48 units, the device has clusters of 8"),
    ("3 of 16 at once", "lstm", F16, 24, 768, 1, (3, 16, 48, 1, 1)),
    ("3 of 16 at once", "lstm", F16, 64, 768, 1, (8, 16, 48, 1, 3)),
    ("3 of 16 at once", "lstm", F16, 64, 768, 2, (4, 16, 48, 2, 3)),
    ("3 of 16 at once", "gru", F16, 8, 640, 1, "a cluster of 14 blocks of 48 units, the device cannot run one of that size"),
    ("MIG slice", "lstm", F16, 8, 768, 2, (1, 16, 48, 1, 2)),
    ("MIG slice", "lstm", F16, 64, 256, 1, (2, 8, 32, 4, 1)),
    ("MIG slice", "lstm", F16, 64, 128, 1, (4, 3, 48, 2, 1)),
    (
        "MIG slice, two groups of SMs",
        "lstm",
        F16,
        8,
        512,
        1,
        "a cluster of 11 blocks of 48 units, the device has clusters of 7",
    ),
    ("MIG slice, two groups of SMs", "gru", F16, 8, 128, 1, (1, 4, 32, 1, 1)),
    ("none at all", "lstm", F16, 8, 128, 1, "a cluster of 3 blocks of 48 units, the device has clusters of 1"),
    ("none at all", "lstm", F16, 8, 48, 1, (1, 1, 48, 1, 1)),
]


@pytest.mark.parametrize("row", ON_ASKED, ids=lambda row: "-".join(map(str, row[:6])))
def test_device_that_was_asked_for_its_clusters(row: tuple[Any, ...]) -> None:
    name, cell, dtype, batch, hidden, directions, expected = row
    problem = {"cell": cell, "dtype": dtype, "T": 10, "B": batch, "I": 32, "H": hidden, "D": directions}
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"cluster cannot serve this layer: cluster needs {expected}$"):
            C.plan(**problem, device=ASKED[name], forced="cluster")
        return
    result = C.plan(**problem, device=ASKED[name], forced="cluster")
    p = result["persistent"]
    at_once = ASKED[name]["active_clusters"][p["blocks"]]
    turns = -(-p["groups"] * directions // at_once)
    assert (*(p[key] for key in ("groups", "blocks", "units", "row_tiles")), turns) == expected, result["text"]
    # The model counts the turns: on a device that runs all clusters at once the same plan takes one.
    alone = C.plan(**{**problem, "B": 8 * p["row_tiles"], "D": 1}, device=asked(132, {p["blocks"]: 1}), forced="cluster")
    assert [alone["persistent"][key] for key in ("blocks", "row_tiles")] == [p["blocks"], p["row_tiles"]]
    assert result["us_per_step"] == pytest.approx(turns * alone["us_per_step"])


def test_device_that_was_not_asked_for_its_clusters() -> None:
    """The estimate never has more blocks at once than there are SMs, and at least one cluster of up to that many."""
    slice_ = {**DEVICES["H100"], "sm_count": 14}
    problem = {"cell": "lstm", "dtype": F16, "T": 10, "B": 16, "I": 32}
    assert C.plan(**problem, H=672, device=slice_, forced="cluster")["persistent"]["blocks"] == 14
    with pytest.raises(ValueError, match="a cluster of 15 blocks of 48 units, the device cannot run one of that size"):
        C.plan(**problem, H=720, device=slice_, forced="cluster")
    with pytest.raises(ValueError, match="active_clusters: expected 17 numbers, got 2"):
        C.plan(**problem, H=64, device={**slice_, "active_clusters": [0, 14]})


def test_weights_of_cudnns_persistent_box() -> None:
    """LSTM, H=768, 16 bit: 288 KiB of weights in each of 16 blocks, more than the shared memory holds."""
    for backward, in_smem in ((False, 120), (True, 144)):
        p = plan("H100", B=16, H=768, dtype=F16, backward=backward, forced="cluster")["persistent"]
        assert p["weight_bytes_in_registers"] + p["weight_bytes_in_smem"] == 288 * 1024
        assert p["weight_bytes_in_smem"] == in_smem * 1024
        assert p["weight_registers"] == 288 - in_smem


# device, cell, dtype, batch, hidden, backward: family -> us per step that the model expects; None: cannot serve it
EXPECTED = [
    ("A100", "lstm", F16, 8, 256, False, {"step": 3.2, "grid": 1.34, "gemm": 5.92}, "grid"),
    ("A100", "lstm", F16, 8, 256, True, {"step": 3.4, "grid": 1.9, "gemm": 5.93}, "grid"),
    ("A100", "lstm", F16, 16, 768, True, {"step": 5.61, "grid": 3.41, "gemm": 6.04}, "grid"),
    ("A100", "lstm", F32, 64, 512, False, {"step": 5.28, "grid": 4.21, "gemm": 7.75}, "grid"),
    ("A100", "lstm", F32, 64, 512, True, {"step": 9.0, "grid": 10.99, "gemm": 7.82}, "gemm"),
    ("A100", "gru", BF16, 64, 1024, False, {"step": 7.06, "grid": 9.97, "gemm": 6.75}, "gemm"),
    ("H100", "lstm", F16, 8, 256, False, {"step": 2.4, "grid": 1.34, "cluster": 0.82, "gemm": 5.92}, "cluster"),
    ("H100", "lstm", F16, 8, 256, True, {"step": 2.4, "grid": 1.9, "cluster": 0.79, "gemm": 5.92}, "cluster"),
    ("H100", "lstm", F16, 16, 768, True, {"step": 4.26, "grid": 3.41, "cluster": 1.85, "gemm": 5.99}, "cluster"),
    ("H100", "lstm", F32, 64, 512, False, {"step": 3.99, "grid": 3.06, "cluster": 3.67, "gemm": 7.5}, "grid"),
    ("H100", "lstm", F32, 64, 512, True, {"step": 6.62, "grid": 7.57, "cluster": 3.06, "gemm": 7.54}, "cluster"),
    ("H100", "gru", BF16, 64, 1024, False, {"step": 5.41, "grid": 5.36, "gemm": 6.3}, "step"),
    ("H200", "lstm", F16, 8, 256, False, {"step": 2.4, "grid": 1.34, "cluster": 0.82, "gemm": 5.92}, "cluster"),
    ("H200", "lstm", F16, 8, 256, True, {"step": 2.4, "grid": 1.9, "cluster": 0.79, "gemm": 5.92}, "cluster"),
    ("H200", "lstm", F16, 16, 768, True, {"step": 4.26, "grid": 3.41, "cluster": 1.85, "gemm": 5.98}, "cluster"),
    ("H200", "lstm", F32, 64, 512, False, {"step": 3.99, "grid": 3.06, "cluster": 3.67, "gemm": 7.47}, "grid"),
    ("H200", "lstm", F32, 64, 512, True, {"step": 6.62, "grid": 7.57, "cluster": 3.06, "gemm": 7.43}, "cluster"),
    ("H200", "gru", BF16, 64, 1024, False, {"step": 5.41, "grid": 5.36, "gemm": 6.3}, "step"),
    ("RTX 4090", "lstm", F16, 8, 256, False, {"step": 3.2, "grid": 1.34, "gemm": 7.15}, "grid"),
    ("RTX 4090", "lstm", F16, 8, 256, True, {"step": 3.8, "grid": 1.9, "gemm": 7.15}, "grid"),
    ("RTX 4090", "lstm", F16, 16, 768, True, {"step": 6.2, "grid": 3.41, "gemm": 7.38}, "grid"),
    ("RTX 4090", "lstm", F32, 64, 512, False, {"step": 5.01, "grid": 3.06, "gemm": 10.82}, "grid"),
    ("RTX 4090", "lstm", F32, 64, 512, True, {"step": 11.64, "grid": 7.57, "gemm": 10.95}, "grid"),
    ("RTX 4090", "gru", BF16, 64, 1024, False, {"step": 6.36, "grid": 5.36, "gemm": 8.15}, "grid"),
    ("B200", "lstm", F16, 8, 256, False, {"step": 2.4, "grid": 1.34, "cluster": 0.82, "gemm": 5.92}, "cluster"),
    ("B200", "lstm", F16, 8, 256, True, {"step": 2.4, "grid": 1.9, "cluster": 0.79, "gemm": 5.92}, "cluster"),
    ("B200", "lstm", F16, 16, 768, True, {"step": 4.0, "grid": 3.41, "cluster": 1.85, "gemm": 5.97}, "cluster"),
    ("B200", "lstm", F32, 64, 512, False, {"step": 3.75, "grid": 3.06, "cluster": 1.84, "gemm": 7.44}, "cluster"),
    ("B200", "lstm", F32, 64, 512, True, {"step": 6.62, "grid": 7.57, "cluster": 1.74, "gemm": 7.39}, "cluster"),
    ("B200", "gru", BF16, 64, 1024, False, {"step": 5.06, "grid": 5.36, "gemm": 6.21}, "step"),
]


# Small layers: us per step of `block`, the next best of our families and cuDNN, whose figures are published ones
# (csrc/plan/cudnn.cpp); forward and backward.
SMALL = [
    ("H100", "lstm", F16, 16, 64, (0.35, 0.78, 0.66), (0.43, 0.73, 0.98)),
    ("H100", "gru", F16, 16, 64, (0.31, 0.82, 0.66), (0.38, 0.72, 0.98)),
    ("H100", "gru", BF16, 64, 96, (0.51, 0.83, 0.91), (0.62, 0.73, 1.37)),
    ("H100", "rnn_tanh", F16, 16, 128, (0.36, 0.74, 0.66), (0.42, 0.74, 0.98)),
    ("H100", "lstm", F32, 16, 64, (0.41, 0.79, 0.66), (0.51, 0.77, 0.98)),
    ("A100", "lstm", F16, 16, 64, (0.37, 1.34, 0.66), (0.43, 1.34, 0.98)),
    ("A100", "lstm", F16, 64, 128, (0.78, 1.34, 1.27), (0.87, 1.53, 1.91)),
    ("A100", "gru", F16, 16, 128, (0.64, 1.29, 1.27), (0.72, 1.43, 1.91)),
    ("A100", "rnn_tanh", F16, 16, 256, (0.75, 1.34, 1.27), (0.84, 1.34, 1.91)),
]


@pytest.mark.parametrize("row", SMALL, ids=lambda row: "-".join(map(str, row[:5])))
def test_expected_microseconds_of_small_layers(row: tuple[Any, ...]) -> None:
    """One block that holds a layer is expected to take less than any other family, and than cuDNN's small-H algorithm."""
    name, cell, dtype, batch, hidden, *expected = row
    problem = {"cell": cell, "dtype": dtype, "T": 100, "B": batch, "H": hidden, "training": True, "allow_tf32": True}
    for backward, want in enumerate(expected):
        result = plan(name, **problem, backward=bool(backward))
        found = {family: entry["us_per_step"] for family, entry in result["candidates"].items()}
        others = min(us for family, us in found.items() if family != "block")
        cudnn = plan(name, **problem, backward=bool(backward), forced="cudnn")["us_per_step"]
        assert tuple(round(us, 2) for us in (found["block"], others, cudnn)) == want, result["text"]
        assert result["cheapest"] == "block" and found["block"] < min(others, cudnn), result["text"]


@pytest.mark.parametrize("row", EXPECTED, ids=lambda row: "-".join(map(str, row[:6])))
def test_expected_microseconds(row: tuple[Any, ...]) -> None:
    """Frozen outputs of the cost model: a change of its constants or of a layout shows here. Not measurements."""
    name, cell, dtype, batch, hidden, backward, expected, cheapest = row
    problem = {"cell": cell, "dtype": dtype, "T": 100, "B": batch, "H": hidden, "backward": backward, "allow_tf32": True}
    result = plan(name, training=True, **problem)
    found = {family: round(entry["us_per_step"], 2) for family, entry in result["candidates"].items()}
    assert found == expected, result["text"]
    assert result["cheapest"] == cheapest and f"cheapest: {cheapest}\n" in result["text"]
    assert result["family"] == "step"
    # What is no candidate has a reason of its own; what is one but not taken says that it has not run.
    for family in {"single", "step", "grid", "cluster"} - {"step"}:
        never_run = "never run on a GPU yet" in result["rejected"][family]
        assert never_run == (family in found)
    asked_for = plan(name, training=True, forced="cheapest", **problem)
    assert asked_for["family"] == cheapest and asked_for["candidates"] == result["candidates"]


def test_cheapest_says_why() -> None:
    result = plan(B=8, H=256, T=100, forced="cheapest")
    us = {family: f"{entry['us']:.1f}" for family, entry in result["candidates"].items()}
    assert result["family"] == "cluster"
    assert result["reason"] == "cluster is the cheapest by the cost model; it has run in the simulator only, never on a GPU"
    assert result["rejected"] == {
        "single": "serves one time step, not 100",
        "step": f"{us['step']} us expected for the layer, cluster takes {us['cluster']}",
        "grid": f"{us['grid']} us expected for the layer, cluster takes {us['cluster']}",
        "block": "has up to 128 hidden units in a block",
        "gemm": f"{us['gemm']} us expected for the layer, cluster takes {us['cluster']}",
    }
    assert plan("T4", H=256, forced="cheapest")["reason"].startswith(
        "step is the cheapest by the cost model; forward (units x"
    )


@pytest.mark.parametrize("name", [*DEVICES, *ASKED])
def test_cheapest_serves_what_some_family_can(name: str) -> None:
    """The least of what each family forced would take; an error where all raise."""
    device = DEVICES.get(name) or ASKED[name]
    tiny = {**device, "smem_per_block": 4096}
    served = 0
    for cell, dtype, (steps, batch, hidden), more, limits in itertools.product(
        ("rnn_tanh", "gru", "lstm"),
        (F16, F32, F64, BF16),
        ((1, 1, 33), (1, 64, 512), (90, 8, 64), (2, 8, 256), (40, 8, 768), (1000, 600, 2048)),
        ({}, {"P": 20}, {"backward": True, "D": 2}),
        (device, tiny),
    ):
        if "P" in more and cell != "lstm":
            continue
        problem = {"cell": cell, "dtype": dtype, "T": steps, "B": batch, "I": 77, "H": hidden, "training": True, **more}
        made = {}
        for family in ("single", "step", "grid", "cluster", "block", "gemm"):
            with contextlib.suppress(ValueError):
                made[family] = C.plan(**problem, device=limits, forced=family)
        if not made:
            with pytest.raises(
                ValueError, match="no kernel family can serve this layer: single .*: step .*: grid .*: cluster "
            ):
                C.plan(**problem, device=limits, forced="cheapest")
            continue
        served += 1
        result = C.plan(**problem, device=limits, forced="cheapest")
        least = min(made, key=lambda family: made[family]["us"])
        assert result["family"] == result["cheapest"] == least, result["text"]
        assert {**made[least], "reason": "", "rejected": "", "text": ""} == {
            **result,
            "reason": "",
            "rejected": "",
            "text": "",
        }
    assert served > 80


def test_cheapest_depends_on_the_number_of_steps() -> None:
    """Persistent families load their weights first; for one step only `single` needs no launch of its own for the input."""
    families = [plan(B=8, H=512, I=512, T=steps, forced="cheapest")["family"] for steps in (1, 2, 4, 8, 100)]
    assert families[0] == "single" and families[-1] == "cluster" and sorted(families, key=families.index) == families
    for family in ("step", "grid", "cluster"):
        problem = {"B": 8, "H": 512, "backward": True, "forced": family}
        short, long = (plan(T=steps, **problem) for steps in (10, 110))
        assert long["us"] - short["us"] == pytest.approx(100 * short["us_per_step"])
        once = short["us"] - 10 * short["us_per_step"]
        weights = short.get("persistent", {}).get("weight_bytes_in_registers", 0)
        # Launches of 2.1 us, `grid` clears its exchange in one; 25.6 bytes a clock of 1.7 GHz at least.
        assert once == pytest.approx({"step": 0, "grid": 4.2, "cluster": 2.1}[family] + weights / 43.52e3, abs=1e-9)


def test_blocks_that_run_at_once() -> None:
    """What the device says of its blocks counts, not how many SMs it has."""
    problem = {"cell": "lstm", "dtype": F16, "T": 10, "B": 16, "I": 32, "H": 256}
    asked_for = C.plan(**problem, device={**DEVICES["H100"], "resident_blocks": 20}, forced="grid")["persistent"]
    assert asked_for["blocks"] * asked_for["groups"] * asked_for["directions"] <= 20
    free = C.plan(**problem, device=DEVICES["H100"], forced="grid")["persistent"]
    assert free["blocks"] * free["groups"] > 20
    for resident, shown in ((10, 10), (-1, 0)):
        with pytest.raises(ValueError, match=f"needs 16 SMs at once, .*; the device has {shown} for its blocks"):
            C.plan(**problem, device={**DEVICES["H100"], "resident_blocks": resident}, forced="grid")
