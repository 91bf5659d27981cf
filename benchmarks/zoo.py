"""Times every cell of fused_rnn.zoo on a CPU against its own step in a loop, forward and backward, turn by turn.

python benchmarks/zoo.py                                 # a table of all cells
python benchmarks/zoo.py --cells LiGRU SLSTM --compiled  # and against the loop under torch.compile (minutes a cell)
python benchmarks/zoo.py --markdown results/zoo.md       # with the machine, for benchmarks/results
"""

from __future__ import annotations

import argparse
import inspect
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fused_rnn
from fused_rnn import zoo


def cells() -> dict[str, fused_rnn.Cell]:
    """Every cell of the zoo with its usual constants."""
    classes = {name: getattr(zoo, name) for name in zoo.__all__ if inspect.isclass(getattr(zoo, name))}
    return {name: value() for name, value in classes.items() if issubclass(value, fused_rnn.Cell)}


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(cell: fused_rnn.Cell, options: argparse.Namespace) -> dict[str, float | int | str]:
    """Milliseconds of both sides, the median of the ratios with quartiles, the first call's seconds, what is saved."""
    torch.manual_seed(0)
    layer = fused_rnn.Layer(cell, options.hidden, options.hidden)
    x = torch.randn(options.steps, options.batch, options.hidden, requires_grad=True)

    def step(module: Callable[..., tuple[torch.Tensor, object]] = layer) -> None:
        module(x)[0].sum().backward()

    def loop() -> None:
        with fused_rnn.use_backend("reference"):
            step()

    first = seconds(step)
    other = loop
    if options.compiled:
        with fused_rnn.use_backend("reference"):
            compiled = torch.compile(layer, dynamic=False)
            step(compiled)

        def other() -> None:
            with fused_rnn.use_backend("reference"):
                step(compiled)

    other()
    times = [(seconds(other), statistics.median(seconds(step) for _ in range(3))) for _ in range(options.rounds)]
    ratios = sorted(a / b for a, b in times)
    explanation = fused_rnn.explain(layer, x, show=False)
    saved = explanation.layers[0].saved_bytes or 0
    return {
        "backend": explanation.backend,
        "loop_ms": 1e3 * statistics.median(a for a, _ in times),
        "ours_ms": 1e3 * statistics.median(b for _, b in times),
        "ratio": statistics.median(ratios),
        "low": ratios[len(ratios) // 4],
        "high": ratios[-1 - len(ratios) // 4],
        "first_s": first,
        "saved": saved // (x.element_size() * options.steps * options.batch * options.hidden),
    }


def against_hand(options: argparse.Namespace) -> list[str]:
    """A table of the cells of fused_rnn itself: as formulas / by hand."""
    x = torch.randn(options.steps, options.batch, options.hidden, requires_grad=True)
    lines = ["| cell | mode | formula ms | by hand ms | formula / by hand | quartiles |", "|---|---|---|---|---|---|"]
    for name in ("LSTM", "GRU", "RNN"):
        formula = fused_rnn.Layer(getattr(zoo, name)(), options.hidden, options.hidden)
        hand = getattr(fused_rnn, name)(options.hidden, options.hidden)
        hand.load_state_dict(formula.state_dict())

        def infer(module: torch.nn.Module) -> None:
            with torch.no_grad():
                module(x)

        def train(module: torch.nn.Module) -> None:
            module(x)[0].sum().backward()

        for mode, run in (("inference", infer), ("forward and backward", train)):
            sides = (formula, hand)
            for side in sides:
                run(side)
            times = [
                tuple(statistics.median(seconds(lambda: run(side)) for _ in range(3)) for side in sides)  # noqa: B023
                for _ in range(3 * options.rounds)
            ]
            ratios = sorted(a / b for a, b in times)
            ours, theirs = (1e3 * statistics.median(side) for side in zip(*times, strict=True))
            lines.append(
                f"| {name} | {mode} | {ours:.2f} | {theirs:.2f} | {statistics.median(ratios):.2f} | "
                f"{ratios[len(ratios) // 4]:.2f} to {ratios[-1 - len(ratios) // 4]:.2f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", nargs="*", help="names; all by default")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="compare with the loop under torch.compile")
    parser.add_argument("--hand", action="store_true", help="only LSTM, GRU and RNN as formulas against those by hand")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    info = fused_rnn.build_info()
    if options.hand:
        print("\n".join(against_hand(options)))
        return
    sizes = f"T={options.steps} B={options.batch} I=H={options.hidden}"
    side = "step in a loop" + " under torch.compile" * options.compiled
    machine = platform.processor() or platform.machine()
    lines = [
        f"# The zoo, forward and backward, {sizes}, float32, {options.threads} thread(s)",
        "",
        f"{machine}, {info['cpu_instruction_set']}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}.",
        f"Ratio: {side} / kernels, the median of {options.rounds} rounds turn by turn, and their quartiles.",
        "First: the first call's seconds, with compiling where the cache had no library.",
        "Saved: numbers of a unit that forward keeps of each step, beside the output.",
        "",
        "| cell | loop ms | ours ms | ratio | quartiles | first s | saved |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    ratios = []
    for name, cell in cells().items():
        if options.cells and name not in options.cells:
            continue
        r = measure(cell, options)
        ratios.append(float(r["ratio"]))
        note = "" if r["backend"] == "cpu" else f" ({r['backend']})"
        lines.append(
            f"| {name}{note} | {r['loop_ms']:.1f} | {r['ours_ms']:.1f} | {r['ratio']:.2f} | "
            f"{r['low']:.2f} to {r['high']:.2f} | {r['first_s']:.2f} | {r['saved']} |"
        )
        print(lines[-1], flush=True)
    lines += [
        "",
        f"Geometric mean of {len(ratios)} cells: {statistics.geometric_mean(ratios):.2f}, least {min(ratios):.2f}.",
    ]
    print("\n".join(lines[-2:]))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
