"""Times what layers take beyond torch.nn's arguments and options, each against the plain layer, turn by turn on a CPU.

python benchmarks/features.py                                # a table of all features, as Markdown
python benchmarks/features.py --cells LSTM --features zoneout lengths
python benchmarks/features.py --steps 64 --batch 32 --hidden 256 --rounds 51
python benchmarks/features.py --samples --steps 32           # only per-sample gradients, by torch.func
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from fused_rnn import zoo

MODES = ("inference", "forward and backward")


class Sizes(NamedTuple):
    """T, B, and H, which is the input's size too."""

    steps: int
    batch: int
    hidden: int


class Feature(NamedTuple):
    """A layer and its arguments, whose time is divided by that of the plain layer on a dense input."""

    name: str
    layer: torch.nn.Module
    input: Any
    arguments: dict[str, Any] = {}
    share: float = 1.0  # of the plain layer's rows and steps, those that take part
    modes: tuple[str, ...] = MODES
    against: torch.nn.Module | None = None  # in place of the plain layer


def features(kind: str, sizes: Sizes) -> Iterator[Feature]:
    steps, batch, hidden = sizes
    has_c = kind == "LSTM"

    def layer(**options: Any) -> torch.nn.Module:
        made: torch.nn.Module = getattr(fused_rnn, kind)(hidden, hidden, **options)
        return made

    def states(rows: int) -> Any:
        h, c = (torch.randn(1, rows, hidden, requires_grad=True) for _ in range(2))
        return (h, c) if has_c else h

    plain, x = layer(), torch.randn(steps, batch, hidden, requires_grad=True)
    lengths = torch.randint(1, steps + 1, (batch,))
    share = lengths.sum().item() / (steps * batch)
    packed = pack_padded_sequence(x.detach(), lengths, enforce_sorted=False)
    packed = packed._replace(data=packed.data.requires_grad_())
    resets = torch.rand(steps, batch) < 0.02
    yield Feature("hx", plain, x, {"hx": states(batch)})
    yield Feature("lengths, all full", plain, x, {"lengths": torch.full((batch,), steps)})
    yield Feature("lengths, random", plain, x, {"lengths": lengths}, share)
    yield Feature("packed, the same lengths", plain, packed, {}, share)
    yield Feature("resets", plain, x, {"resets": resets})
    yield Feature("resets, reset_state that learns", plain, x, {"resets": resets, "reset_state": states(1)})
    yield Feature("return_all_states", plain, x, {"return_all_states": True})
    yield Feature("ids", plain, torch.randint(hidden, (steps, batch)))
    yield Feature("zoneout", layer(zoneout=0.1), x)
    yield Feature("recurrent_dropout, state", layer(recurrent_dropout=0.1), x)
    if kind != "RNN":
        candidate = layer(recurrent_dropout=0.1, recurrent_dropout_variant="candidate")
        yield Feature("recurrent_dropout, candidate", candidate, x)
    yield Feature("weight_dropout", layer(weight_dropout=0.1), x)
    yield Feature("state_clip", layer(state_clip=3.0), x)
    yield Feature("checkpoint=8", layer(checkpoint=8), x, modes=MODES[1:])
    formula, kept = (fused_rnn.Layer(getattr(zoo, kind)(), hidden, hidden, checkpoint=k) for k in (0, 8))
    yield Feature(f"as a formula, zoo.{kind}", formula, x)
    yield Feature("checkpoint=8 of the formula, against the formula", kept, x, modes=MODES[1:], against=formula)


def call_of(mode: str, layer: torch.nn.Module, input: Any, arguments: dict[str, Any]) -> Callable[[], None]:
    """A call in eval mode without gradients, or in training with those of all that has one."""
    training = mode != MODES[0]
    layer.train(training)

    def infer() -> None:
        with torch.no_grad():
            layer(input, **arguments)

    if not training:
        return infer
    given = [torch.ones_like(t) for t in results_of(layer(input, **arguments))]

    def train() -> None:
        torch.autograd.backward(results_of(layer(input, **arguments)), given)

    return train


def results_of(called: tuple[Any, ...]) -> list[Tensor]:
    """The output, and the states of all steps where they are asked for."""
    output, *every = called[0], *called[2:]
    flat = [state for states in every for state in (states if isinstance(states, tuple) else (states,))]
    return [output if isinstance(output, Tensor) else output.data, *flat]


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def row(kind: str, feature: Feature, mode: str, plain: torch.nn.Module, x: Tensor, rounds: int) -> str:
    ours, theirs = call_of(mode, feature.layer, feature.input, feature.arguments), call_of(mode, plain, x, {})
    for _ in range(3):
        theirs(), ours()
    # Medians of three, since a call right after another layer's finds its weights and workspaces outside of the caches.
    times = [[statistics.median(seconds(run) for _ in range(3)) for run in (ours, theirs)] for _ in range(rounds)]
    ratios = sorted(a / b for a, b in times)
    middle = statistics.median(ratios)
    low, high = ratios[rounds // 4], ratios[-1 - rounds // 4]
    ms = [f"{1e3 * statistics.median(side):.2f}" for side in zip(*times, strict=True)]
    share = "" if feature.share == 1 else f"{middle / feature.share:.2f} (of {feature.share:.2f})"
    return f"| {kind} | {feature.name} | {mode} | {' | '.join(ms)} | {middle:.2f} | {low:.2f} to {high:.2f} | {share} |"


def samples_row(kind: str, sizes: Sizes, rounds: int) -> str:
    """The gradients of the weights for each row of the batch, against those of their sum."""
    layer = getattr(fused_rnn, kind)(sizes.hidden, sizes.hidden)
    leaves, x = list(layer.parameters()), torch.randn(*sizes)
    weights = {name: value.detach() for name, value in layer.named_parameters()}
    loss = layer(x)[0].sum()

    def loss_of(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        total: Tensor = torch.func.functional_call(layer, weights, (x,))[0].sum()
        return total

    each = torch.func.vmap(torch.func.grad(loss_of), (None, 1))
    sides: tuple[Callable[[], object], ...] = (
        lambda: each(weights, x.unsqueeze(2)),
        lambda: torch.autograd.grad(layer(x)[0].sum(), leaves),
        lambda: torch.autograd.grad(loss, leaves, retain_graph=True),
    )
    for run in (*sides, *sides):
        run()
    times = [[statistics.median(seconds(run) for _ in range(5)) for run in sides] for _ in range(rounds)]
    texts = [f"{1e3 * statistics.median(side):.2f}" for side in zip(*times, strict=True)]
    for other in (1, 2):
        ratios = sorted(of_round[0] / of_round[other] for of_round in times)
        middle, low, high = statistics.median(ratios), ratios[rounds // 4], ratios[-1 - rounds // 4]
        texts.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
    return f"| {kind} | {' | '.join(texts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", choices=("LSTM", "GRU", "RNN"), default=["LSTM", "GRU", "RNN"])
    parser.add_argument("--features", nargs="*", default=[""], help="beginnings of names; all by default")
    parser.add_argument("--steps", type=int, default=128, help="T")
    parser.add_argument("--batch", type=int, default=16, help="B")
    parser.add_argument("--hidden", type=int, default=128, help="H, and the input's size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--samples", action="store_true", help="only per-sample gradients, against those of their sum")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = Sizes(options.steps, options.batch, options.hidden)
    isa = fused_rnn.build_info()["cpu_instruction_set"]
    print(f"T={sizes.steps} B={sizes.batch} I=H={sizes.hidden}, float32, {options.threads} thread(s), {isa},")
    print(f"{platform.machine()}, torch {torch.__version__}, {date.today()}")
    if options.samples:
        print("\n| cell | each sample's, ms | forward and backward, ms | backward, ms | each / both | each / backward |")
        print("|---" * 6 + "|")
        for kind in options.cells:
            torch.manual_seed(0)
            print(samples_row(kind, sizes, options.rounds), flush=True)
        return
    print("\n| cell | feature | mode | ms | plain, ms | feature / plain | quartiles | by the share that takes part |")
    print("|---" * 8 + "|")
    for kind in options.cells:
        torch.manual_seed(0)
        plain = getattr(fused_rnn, kind)(sizes.hidden, sizes.hidden)
        x = torch.randn(*sizes, requires_grad=True)
        for feature in features(kind, sizes):
            if feature.name.startswith(tuple(options.features)):
                for mode in feature.modes:
                    print(row(kind, feature, mode, feature.against or plain, x, options.rounds), flush=True)


if __name__ == "__main__":
    main()
