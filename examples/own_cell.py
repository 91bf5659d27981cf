"""A cell of one's own: a gated unit is written as a formula, trained on a memory task, and compared with its loop.

The task: each sequence has two marked numbers; the answer is their sum (Hochreiter and Schmidhuber 1997, "adding problem").

    python examples/own_cell.py                  # prints the loss; about half a minute
    python examples/own_cell.py --plot loss.png  # and draws it (needs matplotlib)
"""

import argparse
import time

import torch

import fused_rnn


class JANET(fused_rnn.Cell):
    """Van der Westhuizen and Lasenby 2018: an LSTM that kept only its forget gate; beta makes it remember longer."""

    gates = ("f", "g")
    states = ("h",)

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = beta

    def step(self, x, r, h):
        s = x.f + r.f
        f = torch.sigmoid(s)
        return f * h + (1 - torch.sigmoid(s - self.beta)) * torch.tanh(x.g + r.g)


def batch(steps: int, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [T, B, 2] (numbers, marks) and the sums of the marked numbers [B]."""
    numbers = torch.rand(steps, rows, generator=generator)
    marks = torch.zeros(steps, rows)
    half = steps // 2
    for first, last in ((0, half), (half, steps)):
        marks[torch.randint(first, last, (rows,), generator=generator), torch.arange(rows)] = 1
    return torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(0)


def main(updates: int = 400, steps: int = 30, hidden: int = 64, plot: str | None = None) -> dict[str, list[float]]:
    """Losses of all updates, and the seconds of forward and backward: of the kernels, and of the same step in a loop."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    layer, head = fused_rnn.Layer(JANET(), 2, hidden), torch.nn.Linear(hidden, 1)
    with torch.no_grad():
        layer.bias_ih_l0[:hidden] += 3.0  # the forget gate begins open
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=3e-3)

    def loss_of(x: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        output, _ = layer(x)
        return (head(output[-1]).squeeze(-1) - answer).square().mean()

    losses = []
    for update in range(updates):
        loss = loss_of(*batch(steps, 64, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if update % 50 == 0 or update + 1 == updates:
            print(f"update {update:4d}  loss {losses[-1]:.4f}   (0.17: always answering 1)")

    data = batch(steps, 64, generator)
    seconds = []
    for backend in (None, "reference"):
        with fused_rnn.use_backend(backend):
            loss_of(*data).backward()
            began = time.perf_counter()
            for _ in range(5):
                loss_of(*data).backward()
            seconds.append((time.perf_counter() - began) / 5)
    print(f"forward and backward: {1e3 * seconds[0]:.1f} ms; the same step in a loop: {1e3 * seconds[1]:.1f} ms")
    if plot:
        draw(losses, plot)
    return {"losses": losses, "seconds": seconds}


def draw(losses: list[float], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.semilogy(losses)
    pyplot.xlabel("update")
    pyplot.ylabel("mean squared error")
    pyplot.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--steps", type=int, default=30, help="length of a sequence")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--plot", help="file for a picture of the loss")
    main(**vars(parser.parse_args()))
