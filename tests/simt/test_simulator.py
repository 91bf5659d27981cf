"""The simulator itself: little right kernels give the known answer, little wrong ones the right report."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import builder
import pytest
import torch
from simulator import A100, H100, DeviceInfo, Fault, Simulator
from torch import Tensor

SEEDS = range(6)
# Three SMs that hold 1024 threads each.
THREE = DeviceInfo(90, 3, 100 * 1024, 101 * 1024, 65536, 1024, 1 << 20, 16, 90)
KERNELS = Path(__file__).parent / "kernels"


def launch(
    sim: Simulator,
    name: str,
    data: Tensor | None = None,
    *,
    blocks: int = 2,
    threads: int = 64,
    smem: int = 256,
    cluster: int = 1,
    prepare: bool = False,
    seed: int = 0,
    device: DeviceInfo = H100,
    outputs: int | None = None,
) -> Tensor:
    n = blocks * threads
    data = torch.arange(n, dtype=torch.float32) if data is None else data
    outputs = n if outputs is None else outputs
    sim.reset(seed, device)
    source, out, scratch = sim.put("in", data), sim.out("out", outputs * 4), sim.out("scratch", n * 16)
    shape = (ctypes.c_int * 5)(blocks, threads, smem, cluster, prepare)
    pointers = [ctypes.c_void_p(p) for p in (source, out, scratch)]
    sim.check(sim.lib.simt_run_small(name.encode(), shape, *pointers))
    result = sim.get(out, (outputs,), torch.float32)
    sim.check_output("out", out, result)
    return result


def line_of(text: str, occurrence: int = 0) -> str:
    """small.cu:N of the line that holds the text."""
    lines = (KERNELS / "small.cu").read_text().splitlines()
    return f"small.cu:{[i for i, line in enumerate(lines, 1) if text in line][occurrence]}"


@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels(small: Simulator, seed: int) -> None:
    data = torch.arange(128, dtype=torch.float32)
    backwards = data.reshape(2, 64).flip(1).flatten()
    assert torch.equal(launch(small, "reverse", seed=seed), backwards)
    assert torch.equal(launch(small, "copy", seed=seed), backwards)
    assert torch.equal(launch(small, "chain", seed=seed), 2 * data + 1)
    assert torch.equal(launch(small, "own_copy", seed=seed), data * (data % 2))
    votes = torch.zeros(32)
    votes[[7, 9]] = 1
    assert torch.equal(launch(small, "flag", seed=seed), (data[:64] + 1).flip(0).repeat(2))
    words = 2 * torch.arange(64) + torch.arange(3)[:, None]
    assert torch.equal(launch(small, "tagged", blocks=3, seed=seed), words.flatten().float())
    named = launch(small, "named", torch.arange(128, dtype=torch.float32), seed=seed, **SHAPES["named"])
    assert torch.equal(named, backwards)
    pushed = launch(small, "push", blocks=8, threads=32, cluster=4, seed=seed)
    assert torch.equal(pushed, torch.full((256,), 16.0))
    pushed = launch(small, "push_then_barrier", blocks=2, threads=32, cluster=2, seed=seed)
    assert torch.equal(pushed, torch.tensor([0.0] * 32 + [12.0] * 32))
    assert torch.equal(launch(small, "vote", votes, blocks=1, threads=32, seed=seed), torch.full((32,), 7.0))


def matrices(k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers that every format holds: input of the kernel, A [16, k], B [k, 8]."""
    data = (torch.arange(24 * k) * 7 % 11 - 5).float()
    return data, data[: 16 * k].reshape(16, k), data[16 * k :]


def test_tensor_cores(small: Simulator) -> None:
    data, a, b = matrices(8)
    options = {"blocks": 1, "threads": 32, "outputs": 128}
    assert torch.equal(launch(small, "tf32", data, **options), (a @ b.reshape(8, 8)).flatten())
    wrong = launch(small, "tf32_swapped", data, **options)
    assert not torch.equal(wrong, (a @ b.reshape(8, 8)).flatten())
    data, a, b = matrices(16)
    for name in ("half", "bfloat16"):
        result = launch(small, name, data, smem=1024, **options)
        assert torch.equal(result, (a @ b.reshape(8, 16).T).flatten()), name


# kernel, kind of the report, what its text must hold
WRONG = [
    ("missing_sync", "data race", [r"shared memory of missing_sync block", line_of("= p.in[global_index()];")]),
    ("shared_past_end", "out of bounds", [r"0 bytes past the end of shared memory", line_of("kOffset];")]),
    ("partial_barrier", "partial barrier", [r"thread \d+ ended without reaching", line_of("sync_block();", 1)]),
    ("divergent_barrier", "divergent barrier", [line_of("sync_block();", 2), line_of("sync_block();", 3)]),
    ("deadlock", "deadlock", [r"threads 0-31 wait at barrier 1", r"barrier 2 has 32 of 64", line_of("simt::sync_named")]),
    ("divergent_warp", "divergent warp", [line_of("simt::shuffle_xor")]),
    ("write_past_end", "out of bounds", [r"write of 4 bytes .* past the end of out", line_of("write_past_end_kernel")]),
    ("prefetch_far", "out of bounds", [r"far from all memory of the device", line_of("simt::prefetch_l2")]),
    ("misaligned", "misaligned access", [r"read of 8 bytes", r"of in", line_of("simt::load_vec")]),
    ("hole", "poison in output", [r"out\[(5|69)\] was not written"]),
    ("poison", "poison in output", [r"poison was read by: poison block", line_of("void poison_kernel")]),
    ("block_race", "data race", [r"block \(0,0,0\).*block \(1,0,0\)|block \(1,0,0\).*block \(0,0,0\)", r"byte 0 of out"]),
    ("copy_no_wait", "data race", [r"asynchronous write", line_of("simt::cp_async<4>")]),
    ("copy_late_wait", "data race", [r"asynchronous write"]),
    ("copy_no_sync", "data race", [r"asynchronous write"]),
    ("own_copy_no_wait", "data race", [r"asynchronous write by own_copy_no_wait block \((\d),0,0\) thread (\d+) at"]),
    ("chain_no_wait", "data race", [r"of scratch", r"of launch 0"]),
    ("write_input", "data race", [r"of out"]),
    ("flag_relaxed", "data race", [r"of scratch", line_of("= p.scratch[n - 1 - i]")]),
    ("flag_early", "data race", [r"of scratch", line_of("= p.scratch[n - 1 - i]"), line_of("p.scratch[i] = p.in[i] + 1")]),
    ("flag_never", "deadlock", [r"\(1,0,0\): threads 0 wait at a flag that it polls", line_of("simt::load_acquire")]),
    ("tagged_never", "deadlock", [r"a flag that it polls", line_of("simt::load_tagged")]),
    (
        "plain_spin",
        "livelock",
        [r"block \(0,0,0\) thread 0", line_of("while (*flag == 0.0f)"), "without a scheduling point"],
    ),
    ("warp_spin", "deadlock", ["threads poll for what never comes", line_of("simt::load_tagged(pair, words);")]),
    ("wild", "out of bounds", [r"wild block \(\d,0,0\) thread \d+ at", line_of("void wild_kernel"), "which is no memory"]),
    ("named_other_warps", "data race", [r"shared memory of named_other_warps", line_of("tile()[pair * 64")]),
    ("ended_peer", "block ended", [r"the block of rank 0 has ended", line_of("simt::map_to_rank(slot, 0)")]),
    ("push_no_wait", "data race", [r"asynchronous write", line_of("sum += slots[r]")]),
    ("push_wrong_bytes", "deadlock", [r"wait at an mbarrier's phase", line_of("simt::mbarrier_wait(barrier, phase)")]),
    ("push_no_init_sync", "data race|bad mbarrier|block ended", [r"push_no_init_sync block"]),
    ("push_block_ends", "partial barrier|block ended|deadlock|out of bounds", [r"push_block_ends block"]),
    ("push_as_flag", "data race", [r"of scratch", line_of("p.scratch[0] = 5"), line_of("? p.scratch[0] +")]),
    ("push_other_wait", "data race", [r"asynchronous write by a push", line_of("static_cast<float>(slots[0])")]),
    ("push_no_slot_sync", "data race|bad mbarrier", [line_of("simt::store_async(simt::map_to_rank(slots + rank")]),
]
PAIR = {"blocks": 2, "threads": 32, "cluster": 2}
SHAPES = {
    "push": {"blocks": 8, "threads": 32, "cluster": 4},
    **dict.fromkeys(("push_as_flag", "push_other_wait", "ended_peer"), PAIR),
    "named": {"blocks": 1, "threads": 128, "smem": 512},
}


@pytest.mark.parametrize(("name", "kind", "words"), WRONG, ids=[w[0] for w in WRONG])
@pytest.mark.parametrize("seed", SEEDS)
def test_wrong_kernels(small: Simulator, name: str, kind: str, words: list[str], seed: int) -> None:
    with pytest.raises(Fault) as caught:
        launch(small, name, seed=seed, **SHAPES.get(name, SHAPES.get(name.split("_")[0], {})))
    assert re.fullmatch(kind, caught.value.kind), str(caught.value)
    for word in words:
        assert re.search(word, str(caught.value)), f"{word!r} is not in {caught.value}"


def test_a_push_needs_a_peer(small: Simulator) -> None:
    with pytest.raises(Fault, match="bad push: push block .* st.async is undefined in a cluster of one block"):
        launch(small, "push", blocks=1, threads=1, outputs=1)


def test_writing_an_input_is_reported(small: Simulator) -> None:
    with pytest.raises(Fault, match="input changed: in"):
        launch(small, "write_input", blocks=1, threads=1, smem=0, outputs=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threads": 1025}, "invalid configuration argument.*1024"),
        ({"blocks": 0}, "invalid configuration argument"),
        ({"smem": 49 * 1024}, "cudaFuncAttributeMaxDynamicSharedMemorySize"),
        ({"smem": 228 * 1024, "prepare": True}, "invalid argument.*232448"),
        ({"cluster": 2, "device": A100}, "clusters need sm_90"),
        ({"blocks": 3, "cluster": 2}, "invalid cluster size"),
        ({"blocks": 16, "cluster": 16}, "cudaFuncAttributeNonPortableClusterSizeAllowed"),
        ({"blocks": 32, "cluster": 32}, "invalid cluster size"),
        (
            {"blocks": 4, "cluster": 4, "threads": 1024, "smem": 4096, "device": THREE},
            "too many resources requested.*4 blocks of a cluster.*3 fit",
        ),
    ],
    ids=str,
)
def test_refused_launches(small: Simulator, options: dict, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        launch(small, "reverse", **options)


@pytest.mark.parametrize("threads", [1024, 512])
def test_cooperative_launch_beyond_the_device(small: Simulator, threads: int) -> None:
    fit = 3 * (1024 // threads)
    scratch = {"threads": threads, "device": THREE}
    with pytest.raises(RuntimeError, match=f"too many blocks in cooperative launch.*{fit + 1}, and {fit} fit"):
        launch(small, "flag", blocks=fit + 1, **scratch)
    launch(small, "flag", blocks=fit, **scratch)


@pytest.mark.parametrize("seed", SEEDS)
def test_fibres_of_other_machines(seed: int) -> None:
    """ucontext in the place of the assembly for x86-64: the same interleavings, results and reports."""
    other = Simulator(builder.build([KERNELS / "small.cu"], sanitize="ucontext"))
    test_right_kernels(other, seed)
    for name, kind, words in WRONG[:6]:
        test_wrong_kernels(other, name, kind, words, seed)


def test_large_shared_memory_after_prepare(small: Simulator) -> None:
    launch(small, "reverse", smem=49 * 1024, prepare=True)


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        (
            "simt::warp_matrix_thing(1);",
            r"simt::warp_matrix_thing is unknown.*Add its PTX wrapper to csrc/cuda/device/simt.cuh",
        ),
        ("__syncthreads();", r"__syncthreads is a CUDA name.*host twin to tests/simt/include/simt.cuh"),
        ("__shared__ float tile[32];", r"dynamic shared memory only, which simt::dynamic_smem\(\) gives"),
        ('asm volatile("bar.sync 0;");', r"PTX belongs into a wrapper in csrc/cuda/device/simt.cuh"),
    ],
)
def test_unknown_primitive(tmp_path: Path, body: str, hint: str) -> None:
    source = tmp_path / "unknown.cu"
    source.write_text(f"#include <simt.cuh>\nnamespace fused_rnn {{\n__global__ void kernel() {{\n  {body}\n}}\n}}\n")
    with pytest.raises(builder.BuildError, match=hint):
        builder.build([source])


SANITIZED = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from simulator import Simulator
from test_simulator import launch
sim = Simulator(Path({library!r}))
print(launch(sim, "reverse")[:2].tolist(), flush=True)
launch(sim, {name!r})
"""


@pytest.mark.parametrize(
    ("sanitize", "name", "report"),
    [
        ("asan", "write_past_end", r"AddressSanitizer: use-after-poison[\s\S]*small\.cu:\d+"),
        ("asan", "shared_past_end", r"AddressSanitizer: use-after-poison[\s\S]*small\.cu:\d+"),
        ("ubsan", "overflow", r"small\.cu:\d+:\d+: runtime error: signed integer overflow"),
    ],
)
def test_sanitized_builds(sanitize: str, name: str, report: str) -> None:
    library = builder.build([KERNELS / "small.cu"], sanitize=sanitize)
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    code = SANITIZED.format(paths=paths, library=str(library), name=name)
    find = [builder.CXX, f"-print-file-name=lib{sanitize}.so"]
    preload = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    env = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "[63.0, 62.0]" in result.stdout, result.stderr
    assert result.returncode != 0
    assert re.search(report, result.stderr), result.stderr
