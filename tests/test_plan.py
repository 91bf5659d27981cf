"""The planner on device descriptions: no GPU is needed."""

from __future__ import annotations

from typing import Any

import pytest

from fused_rnn._explain import DEVICES
from fused_rnn._kinds import KINDS

C = pytest.importorskip("fused_rnn._C", reason="the extension is not built")

KIB = 1024

DTYPES = ("float64", "float32", "float16", "bfloat16")
SIZES = ((1, 1), (1, 7), (3, 33), (8, 129), (16, 768), (32, 1134), (64, 1024), (512, 256), (4096, 2048))


def plan(name: str = "H100", **kwargs: Any) -> dict[str, Any]:
    problem = {"cell": "lstm", "dtype": "float16", "T": 10, "B": 8, "I": 32, "H": 64}
    return C.plan(device=DEVICES[name], **{**problem, **kwargs})


def kernel(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(k for k in result["kernels"] if k["name"] == name)


@pytest.mark.parametrize("name", DEVICES)
def test_every_plan_fits_its_device(name: str) -> None:
    limits = DEVICES[name]
    for cell in (kind.name for kind in KINDS):
        for dtype in DTYPES:
            for batch, hidden in SIZES:
                for backward in (False, True):
                    for steps, tf32, directions in ((1, True, 1), (100, False, 2), (100, True, 1)):
                        result = plan(
                            name, cell=cell, dtype=dtype, T=steps, B=batch, H=hidden, D=directions, allow_tf32=tf32,
                            backward=backward, training=True,
                        )  # fmt: skip
                        assert result["us_per_step"] > 0
                        for k in result["kernels"]:
                            assert 0 < k["smem_bytes"] <= limits["smem_per_block"], (result["text"], k)
                            assert k["threads"] <= 1024 and 2 <= k["stages"] <= 8
                            x, y, z = k["grid"]
                            assert (x - 1) * k["batch"] < batch <= x * k["batch"] and z == directions
                            assert (y - 1) * k["units"] < hidden <= y * k["units"] and y <= 65535


def test_family() -> None:
    assert plan(T=1)["family"] == "single"
    assert plan(T=2)["family"] == "step"
    assert plan(T=2)["rejected"]["single"] == "serves one time step, not 2"
    assert "step" in plan(T=1)["rejected"]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("steps", [1, 10])
def test_modified_steps(steps: int, backward: bool) -> None:
    """The family step alone has kernels of them; with zoneout of h an LSTM's backward carries two gradients."""
    result, plain = (plan(T=steps, backward=backward, modified=modified, preferred="cluster") for modified in (True, False))
    assert result["family"] == "step"
    names = ["state_grad", "backward_modified"] if backward else ["forward_modified"]
    assert [k["name"] for k in result["kernels"]] == names
    for family in ("single", "grid", "cluster"):
        assert result["rejected"][family].startswith("has no kernels with zoneout")
        assert not plain["rejected"].get(family, "").startswith("has no kernels with zoneout")
    if backward:
        carry = 4 * 8 * 64
        assert result["workspace_bytes"] == 2 * carry
    with pytest.raises(
        ValueError, match="kernel family cluster cannot serve this layer: cluster has no kernels with zoneout"
    ):
        plan(T=steps, backward=backward, modified=True, forced="cluster")


@pytest.mark.parametrize("proj", [None, 16])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("steps", [1, 10])
def test_plans_of_tangents_and_dual_numbers(steps: int, backward: bool, proj: int | None) -> None:
    """The family step alone has kernels of them; a tile holds the values and the tangents of half as many batch rows."""
    result = plan(dtype="float32", T=steps, B=9, P=proj, backward=backward, training=True, dual=True, modified=True)
    assert result["family"] == "step"
    names = ["dual_state_grad", "dual_backward"] if backward else ["tangents", "project_tangents"][: 1 + (proj is not None)]
    assert [k["name"] for k in result["kernels"]] == names
    for k in result["kernels"]:
        assert k["grid"][0] == -(-9 * (1 + backward) // k["batch"])
    for family in ("single", "grid", "cluster", "block"):
        assert result["rejected"][family] == "has no kernels of tangents"
    carry, hidden = 4 * 9 * 64, 4 * 9 * 64
    assert result["workspace_bytes"] == (2 * carry if backward else carry + (hidden if proj else 0))


def test_forced_family() -> None:
    assert plan(T=1, forced="step")["family"] == "step"
    assert plan(T=1, forced="step")["rejected"] == dict.fromkeys(
        ["single", "grid", "cluster", "block", "gemm"], "step is forced"
    )
    with pytest.raises(ValueError, match="kernel family single cannot serve this layer: single serves one time step, not 9"):
        plan(T=9, forced="single")
    for unknown in ("fast", "cell", ""):  # "cell" is the former name of "single"
        families = "single, step, grid, cluster, block, gemm, cudnn, and cheapest of them"
        text = f"unknown kernel family '{unknown}'; known are: {families}"
        with pytest.raises(ValueError, match=text):
            plan(forced=unknown)


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({}, ["forward"]),
        ({"T": 1}, ["forward_input"]),
        ({"P": 16}, ["forward", "project"]),
        ({"T": 1, "P": 16}, ["forward_input", "project"]),
        ({"backward": True}, ["state_grad", "backward"]),
    ],
)
def test_kernels(kwargs: dict[str, Any], names: list[str]) -> None:
    assert [k["name"] for k in plan(**kwargs)["kernels"]] == names


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "math"),
    [
        ("H100", "float32", True, "tf32"),
        ("H100", "float32", False, "fp32"),
        ("H100", "float64", True, "fp64"),
        ("H100", "bfloat16", False, "bf16"),
        ("H100", "float16", True, "fp16"),
        ("T4", "float32", True, "fp32"),  # no TF32 before sm_80
        ("A100", "float32", True, "tf32"),
    ],
)
def test_arithmetic(name: str, dtype: str, tf32: bool, math: str) -> None:
    for k in plan(name, dtype=dtype, allow_tf32=tf32, backward=True)["kernels"]:
        assert k["math"] == math


def test_tiles_follow_the_batch() -> None:
    """Few rows: no tile with more of them than needed. Many: larger tiles, which read the weights less often."""
    assert kernel(plan(B=1, H=1024), "forward")["batch"] == 8
    assert kernel(plan(B=8, H=1024), "forward")["batch"] == 8
    assert kernel(plan(B=4096, H=1024), "forward")["tile"] == "large"
    # The large tile is for tensor cores only.
    assert kernel(plan(B=4096, H=1024, dtype="float32"), "forward")["tile"] == "medium"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["A100", "H100"])
def test_weights_beyond_l2_come_from_memory(name: str, backward: bool) -> None:
    """Every step reads them again: 4 * 4096 * 4096 weights of 2 bytes are 134 MB, more than any L2 of the two."""
    small, large = (plan(name, H=H, dtype="bfloat16", backward=backward)["us_per_step"] for H in (1024, 4096))
    microseconds = 4 * 4096 * 4096 * 2 / (DEVICES[name]["dram_gb_per_s"] * 1e3)
    assert small < 16 < microseconds <= large < microseconds + 10
    unknown = {key: value for key, value in DEVICES[name].items() if key != "dram_gb_per_s"}
    kwargs = {"cell": "lstm", "dtype": "bfloat16", "T": 10, "B": 8, "I": 32, "H": 4096, "backward": backward}
    assert C.plan(device=unknown, **kwargs)["us_per_step"] < large
    cudnn = C.plan(device=DEVICES[name], forced="cudnn", **kwargs)["us_per_step"]
    assert cudnn == pytest.approx(microseconds)
    grid = plan(name, H=1024, dtype="bfloat16", backward=backward, forced="grid")["us_per_step"]
    assert grid < 16  # weights in registers and shared memory


def test_small_shared_memory_excludes_tiles() -> None:
    """On sm_75 a block has 64 KiB: two stages, and what does not fit is named."""
    for k in plan("T4", B=4096, H=1024)["kernels"]:
        assert k["stages"] == 2
    tiny = {**DEVICES["T4"], "smem_per_block": 40 * KIB}
    text = C.plan(cell="lstm", dtype="float16", T=2, B=4096, I=8, H=64, device=tiny)["reason"]
    assert "needs" in text and "bytes of shared memory" in text
    nothing = {**DEVICES["T4"], "smem_per_block": 4 * KIB}
    with pytest.raises(ValueError, match="forward: .*needs .* bytes of shared memory"):
        C.plan(cell="lstm", dtype="float16", T=2, B=8, I=8, H=64, device=nothing)


def test_overlapped_launches_from_hopper_on() -> None:
    for name, limits in DEVICES.items():
        assert plan(name)["overlapped_launches"] == (limits["compute_capability"] >= 90)
    # Two blocks of a kernel, of this step and of the next, share an SM.
    deep = kernel(plan("H100", H=1024), "forward")
    assert deep["stages"] > 3 and 2 * (deep["smem_bytes"] + KIB) <= DEVICES["H100"]["smem_per_sm"]


def test_workspace() -> None:
    rows = 2 * 5 * 33  # D, B, H
    padded = -(-rows * 4 // 256) * 256
    sizes = {"B": 5, "H": 33, "D": 2}
    assert plan(**sizes)["workspace_bytes"] == padded  # running c
    assert plan(**sizes, P=7)["workspace_bytes"] == padded + -(-rows * 2 // 256) * 256  # and h before the projection
    assert plan(**sizes, cell="gru")["workspace_bytes"] == 0
    assert plan(**sizes, cell="gru", backward=True)["workspace_bytes"] == padded
    assert plan(**sizes, cell="rnn_relu", backward=True)["workspace_bytes"] == 0
    assert plan(**sizes, dtype="float64")["workspace_bytes"] == -(-rows * 8 // 256) * 256


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"T": 0}, "needs T, B, H, P >= 1"),
        ({"B": 0}, "needs T, B, H, P >= 1"),
        ({"D": 3}, "1 or 2 directions"),
        ({"cell": "gru", "P": 3}, "P: expected H = 64 for gru, which has no projection, got 3"),
        ({"P": 65}, "smaller than the hidden size"),
        ({"cell": "elman"}, "unknown cell 'elman'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
    ],
)
def test_bad_problems(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**kwargs)


def test_old_device() -> None:
    old = {**DEVICES["T4"], "compute_capability": 70}
    with pytest.raises(ValueError, match=r"compute capability 7\.0 is older than 7\.5"):
        C.plan(cell="lstm", dtype="float16", T=2, B=8, I=8, H=64, device=old)


# Which code a device runs: a binary of its own major version (of an architecture-specific target, 9.0a, on that alone), else
# a PTX that is not newer (and not architecture-specific), translated by the driver.
@pytest.mark.parametrize(
    ("name", "compiled_for", "families"),
    [
        ("H100", 90, {"step", "grid", "cluster", "block", "gemm"}),  # 9.0a, or 9.0
        ("H100", 80, {"step", "grid", "block", "gemm"}),  # PTX of 8.0
        ("H100", 75, {"step", "gemm"}),
        ("B200", 100, {"step", "grid", "cluster", "block", "gemm"}),
        ("B200", 90, {"step", "grid", "cluster", "block", "gemm"}),  # PTX of 9.0
        ("B200", 80, {"step", "grid", "block", "gemm"}),  # 8.0+PTX and 9.0a, which does not run there
        ("RTX 5090", 80, {"step", "grid", "block", "gemm"}),
        ("RTX 4090", 80, {"step", "grid", "block", "gemm"}),  # the binary of 8.0
        ("A100", 75, {"step", "gemm"}),
        ("T4", 75, {"step", "gemm"}),
        ("T4", 0, set()),  # 8.0+PTX and 9.0a
        ("B200", 0, set()),  # 9.0a alone
    ],
)
def test_code_for_the_device(name: str, compiled_for: int, families: set[str]) -> None:
    """A family whose code the device does not have is rejected, with what to do about it; all are where there is none."""
    device = {**DEVICES[name], "compiled_for": compiled_for}
    problem = {"cell": "lstm", "dtype": "float16", "T": 10, "B": 8, "I": 32, "H": 64, "device": device}
    capability = device["compute_capability"] / 10
    if not families:
        text = rf"not compiled for compute capability {capability}, .* add it to TORCH_CUDA_ARCH_LIST and build again"
        for forced in (None, "single", "step", "grid", "cluster", "block", "gemm"):
            with pytest.raises(ValueError, match=text):
                C.plan(**problem, forced=forced)
        return
    result = C.plan(**problem)
    assert set(result["candidates"]) == families
    for family, needed in (("grid", 80), ("cluster", 90), ("block", 80)):
        if family in families:
            assert C.plan(**problem, forced=family)["family"] == family
        elif device["compute_capability"] >= needed:
            reason = (
                f"needs code for compute capability {needed / 10}, this build's for the device is for {compiled_for / 10}: "
                f"add {capability} to TORCH_CUDA_ARCH_LIST and build again"
            )
            assert result["rejected"][family] == reason and f"not {family}: {reason}" in result["text"]
            with pytest.raises(ValueError, match=f"kernel family {family} cannot serve this layer: {family} {reason}"):
                C.plan(**problem, forced=family)


def test_older_code_is_planned_as_such() -> None:
    """What a newer device could do but its code does not: launches that overlap, asynchronous copies, TF32, bf16 by mma."""
    problem = {"cell": "lstm", "T": 10, "B": 256, "I": 32, "H": 512, "allow_tf32": True}
    for name in ("A100", "H100", "B200"):
        for code in (75, 80, 90):
            device = {**DEVICES[name], "compiled_for": min(code, DEVICES[name]["compute_capability"])}
            code = device["compiled_for"]
            result = C.plan(**problem, dtype="float32", device=device)
            assert result["overlapped_launches"] == (code >= 90)
            (forward,) = result["kernels"]
            assert forward["math"] == ("fp32" if code < 80 else "tf32")
            assert forward["stages"] <= {75: 2, 80: 4, 90: 8}[code]
            bf16 = C.plan(**problem, dtype="bfloat16", device=device)["us_per_step"]
            fp16 = C.plan(**problem, dtype="float16", device=device)["us_per_step"]
            assert (bf16 > fp16) == (code < 80)


def test_text() -> None:
    text = plan(P=16, H=128)["text"]
    for part in ("family step", "model, not measured", "forward: fp16", "project: fp16", "because", "not single"):
        assert part in text
