"""A GRU learns to add, on any number of processes: sharded by FSDP2, saved as it goes, resumed after a crash.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1    # without it torchrun's second run finds the addresses of the first one
    python examples/distributed.py                                                     # one process
    torchrun --nproc-per-node=2 --max-restarts=3 examples/distributed.py               # two on this machine
    torchrun --nnodes=2 --nproc-per-node=8 --max-restarts=3 --rdzv-backend=c10d --rdzv-endpoint=HOST:29400 \\
        examples/distributed.py --folder /a/folder/that/all/machines/see               # the same on each of 2 machines

The task (Hochreiter and Schmidhuber 1997): of a sequence of random numbers two are marked, and the answer is their sum. The
batch of a step is made of the step's number, and each process takes its rows of it. So neither the number of processes nor a
restart changes what is learnt: the losses are the same up to rounding. A checkpoint (torch.distributed.checkpoint) has
the weights, the optimizer's state and the step; processes that torchrun starts again go on from the newest one, also
if there are more or fewer of them.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fused_rnn

STEPS_IN_SEQUENCE, HIDDEN = 20, 32


class Adder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = fused_rnn.GRU(2, HIDDEN)
        self.read_out = torch.nn.Linear(HIDDEN, 1)

    def forward(self, x):
        """x [T, B, 2] (a number, whether it is marked) -> the sum [B, 1]."""
        _, h_n = self.gru(x)
        return self.read_out(h_n[-1])


def batch_of(step, rows):
    """Inputs [T, rows, 2] and sums [rows, 1]: the same whenever and wherever they are made."""
    generator = torch.Generator().manual_seed(step)
    numbers = torch.rand(STEPS_IN_SEQUENCE, rows, generator=generator)
    marked = torch.rand(STEPS_IN_SEQUENCE, rows, generator=generator).topk(2, dim=0).indices
    mask = torch.zeros(STEPS_IN_SEQUENCE, rows).scatter(0, marked, 1.0)
    return torch.stack([numbers, mask], dim=-1), (numbers * mask).sum(0).unsqueeze(-1)


def newest(folder):
    """The last step that was saved, 0 without one. A folder without .metadata was being written when a process died."""
    return max((int(path.parent.name) for path in Path(folder).glob("*/.metadata")), default=0)


def train(folder, steps, rows, save_every, after_step):
    """Trains from the newest checkpoint in the folder to the last step: the losses of the steps it made, by step."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)  # every process starts with the same weights
    model = Adder().to(device)
    mesh = init_device_mesh(device.type, (processes,))
    fully_shard(model.gru, mesh=mesh)  # a layer is gathered when it runs
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    start = newest(folder)
    if start:
        weights, of_optimizer = get_state_dict(model, optimizer)
        saved = {"weights": weights, "optimizer": of_optimizer}
        dcp.load(saved, checkpoint_id=Path(folder, str(start)))
        set_state_dict(model, optimizer, model_state_dict=saved["weights"], optim_state_dict=saved["optimizer"])

    losses = {}
    for step in range(start + 1, steps + 1):
        x, sums = batch_of(step, rows)
        own = slice(rank * rows // processes, (rank + 1) * rows // processes)
        # FSDP averages the gradients of the processes: each takes its share of the mean over all rows.
        errors = (model(x[:, own].to(device)) - sums[own].to(device)) ** 2
        loss = errors.sum() * processes / rows
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses[step] = mean.item() / processes
        if step % save_every == 0 or step == steps:
            weights, of_optimizer = get_state_dict(model, optimizer)
            dcp.save({"weights": weights, "optimizer": of_optimizer}, checkpoint_id=Path(folder, str(step)))
            if rank == 0:
                print(f"step {step:4}: loss {losses[step]:.4f}, saved", flush=True)
        after_step(step, losses[step])
    return losses


def main(folder="checkpoints", steps=300, rows=64, save_every=50, after_step=lambda step, loss: None):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        os.environ.setdefault(name, str(value))  # one process, without torchrun
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        return train(folder, steps, rows, save_every, after_step)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default="checkpoints", help="of the checkpoints; one that has some is resumed")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=64, help="of a batch, shared out over the processes")
    parser.add_argument("--save-every", type=int, default=50)
    main(**vars(parser.parse_args()))
