"""examples/distributed.py under torchrun: one process and two learn the same, also if one of them is killed on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo")

STEPS, SAVE_EVERY, DEATH = 12, 5, 8


def torchrun(folder: Path, processes: int, *more: str) -> list[tuple[int, float, int]]:
    """(step, loss, number of the run) of every step that rank 0 made, in order."""
    folder.mkdir()
    worker = Path(__file__).with_name("killed_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["--max-restarts=1", "--monitor-interval=0.1", str(worker), str(folder), str(STEPS), str(SAVE_EVERY), *more]
    # torchrun of torch 2.13 has one store for all runs: the second one would find the dead workers' addresses in it.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in (folder / "losses.txt").read_text().splitlines()]
    return [(int(step), float.fromhex(loss), int(run)) for step, loss, run in lines]


@pytest.mark.slow
def test_a_killed_worker_continues_from_its_checkpoint(tmp_path: Path) -> None:
    undisturbed = torchrun(tmp_path / "undisturbed", 2)
    assert [step for step, _, _ in undisturbed] == list(range(1, STEPS + 1))

    killed = torchrun(tmp_path / "killed", 2, str(DEATH))
    first = [step for step, _, run in killed if run == 0]
    assert first in (list(range(1, DEATH + 1)), list(range(1, DEATH + 2)))  # rank 0 may have got further than rank 1
    again = [step for step, _, run in killed if run == 1]
    assert again == list(range(SAVE_EVERY + 1, STEPS + 1)), "the second run has to start from the checkpoint"
    expected = {step: loss for step, loss, _ in undisturbed}
    assert all(loss == expected[step] for step, loss, _ in killed), (killed, expected)

    alone = torchrun(tmp_path / "alone", 1)
    assert [loss for _, loss, _ in alone] == pytest.approx([expected[step] for step, _, _ in alone], abs=1e-6)
