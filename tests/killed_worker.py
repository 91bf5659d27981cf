"""Run by torchrun in tests/test_torchrun.py: trains examples/distributed.py, and one worker kills itself after a step, once.

    torchrun ... tests/killed_worker.py FOLDER STEPS SAVE_EVERY [STEP_OF_DEATH]

Rank 0 adds a line to FOLDER/losses.txt after every step: step, loss as float.hex, number of the run.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from distributed import main


def run(folder: Path, steps: int, save_every: int, death: int) -> None:
    restart, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])

    def after_step(step: int, loss: float) -> None:
        if rank == 0:
            with open(folder / "losses.txt", "a") as file:
                file.write(f"{step} {loss.hex()} {restart}\n")
        if step == death and restart == 0 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    main(folder / "checkpoints", steps, 16, save_every, after_step)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 0)
