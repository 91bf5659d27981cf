"""Times every cell of fused_rnn.zoo on a CPU against its own step in a loop, forward and backward, turn by turn.

python benchmarks/zoo.py                                 # a table of all cells
python benchmarks/zoo.py --cells LiGRU SLSTM --compiled step  # and against the loop with its step under torch.compile
python benchmarks/zoo.py --markdown results/zoo.md       # with the machine, for benchmarks/results
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fused_rnn
from fused_rnn import zoo

_COMPILED = {
    None: "",
    "layer": " Compiled: the same layer under torch.compile, the whole loop in one graph.",
    "step": " Compiled: the same loop, its step under torch.compile.",
}


def cells() -> dict[str, fused_rnn.Cell]:
    """Every cell of the zoo with its usual constants."""
    classes = {name: getattr(zoo, name) for name in zoo.__all__ if inspect.isclass(getattr(zoo, name))}
    return {name: value() for name, value in classes.items() if issubclass(value, fused_rnn.Cell)}


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@dataclasses.dataclass
class Measured:
    """Milliseconds of each side, by its name, and the ratios to the kernels' time, sorted, of the rounds."""

    backend: str
    milliseconds: dict[str, float]
    ratios: dict[str, list[float]]
    first_seconds: dict[str, float]
    saved: int

    def ratio(self, side: str) -> float:
        return statistics.median(self.ratios[side])

    def quartiles(self, side: str) -> tuple[float, float]:
        ratios = self.ratios[side]
        return ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]


class LoopOfCompiledSteps:
    """A layer as a loop over its step under torch.compile."""

    def __init__(self, layer: fused_rnn.Layer) -> None:
        module = fused_rnn.Step(layer.cell, layer.input_size, layer.hidden_size)
        module.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
        self.step = torch.compile(module, dynamic=False)
        says = layer.cell.declaration
        self.states, self.output = len(says.states), says.output
        self.hidden = layer.hidden_size

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, object]:
        states = [x.new_zeros(x.shape[1], self.hidden) for _ in range(self.states)]
        outputs = []
        for of_step in x:
            made = self.step(of_step, states[0] if self.states == 1 else tuple(states))
            states = [made] if isinstance(made, torch.Tensor) else list(made)
            outputs.append(states[self.output])
        return torch.stack(outputs), states


def measure(cell: fused_rnn.Cell, options: argparse.Namespace) -> Measured:
    """All sides turn by turn: the loop, the loop under torch.compile if asked for, the kernels."""
    torch.manual_seed(0)
    layer = fused_rnn.Layer(cell, options.hidden, options.hidden)
    x = torch.randn(options.steps, options.batch, options.hidden, requires_grad=True)

    def step(module: Callable[..., tuple[torch.Tensor, object]] = layer) -> None:
        module(x)[0].sum().backward()

    def loop(module: Callable[..., tuple[torch.Tensor, object]] = layer) -> None:
        with fused_rnn.use_backend("reference"):
            step(module)

    sides: dict[str, Callable[[], None]] = {"loop": loop}
    if options.compiled:
        torch.compiler.reset()  # cells share the code of Layer and Step, and one code has a limited number of compilations
        compiled = torch.compile(layer, dynamic=False) if options.compiled == "layer" else LoopOfCompiledSteps(layer)
        sides["compiled"] = lambda: loop(compiled)
    first = {name: seconds(run) for name, run in (*sides.items(), ("ours", step))}
    for run in sides.values():
        run()
    rounds: dict[str, list[float]] = {name: [] for name in (*sides, "ours")}
    for _ in range(options.rounds):
        for name, run in sides.items():
            rounds[name].append(seconds(run))
        rounds["ours"].append(statistics.median(seconds(step) for _ in range(3)))
    explanation = fused_rnn.explain(layer, x, show=False)
    saved = explanation.layers[0].saved_bytes or 0
    return Measured(
        explanation.backend,
        {name: 1e3 * statistics.median(times) for name, times in rounds.items()},
        {name: sorted(a / b for a, b in zip(rounds[name], rounds["ours"], strict=True)) for name in sides},
        first,
        saved // (x.element_size() * options.steps * options.batch * options.hidden),
    )


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


def heading(options: argparse.Namespace) -> list[str]:
    sizes = f"T={options.steps} B={options.batch} I=H={options.hidden}"
    machine, isa = platform.processor() or platform.machine(), fused_rnn.build_info()["cpu_instruction_set"]
    return [
        f"# The zoo, forward and backward, {sizes}, float32, {options.threads} thread(s)",
        "",
        f"{machine}, {isa}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}.",
        f"Ratios of times: the median of {options.rounds} rounds turn by turn, and their quartiles.",
        "Loop: the cell's step in a loop." + _COMPILED[options.compiled],
        "First: the first call's seconds, with compiling where the cache had no library.",
        "Saved: numbers of a unit that forward keeps of each step, beside the output.",
        "",
    ]


def columns(compiled: bool) -> list[str]:
    names = ["cell", "ours ms", "first s", "saved", "loop ms", "loop / ours", "quartiles"]
    names += ["compiled ms", "compiled / ours", "quartiles", "first compiled s"] if compiled else []
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def row(name: str, measured: Measured) -> str:
    note = "" if measured.backend == "cpu" else f" ({measured.backend})"
    ours, first = measured.milliseconds["ours"], measured.first_seconds["ours"]
    texts = [name + note, f"{ours:.1f}", f"{first:.2f}", str(measured.saved)]
    for side in measured.ratios:
        low, high = measured.quartiles(side)
        texts += [f"{measured.milliseconds[side]:.1f}", f"{measured.ratio(side):.2f}", f"{low:.2f} to {high:.2f}"]
    texts += [f"{measured.first_seconds['compiled']:.0f}"] if "compiled" in measured.ratios else []
    return f"| {' | '.join(texts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", nargs="*", help="names; all by default")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--compiled",
        choices=("layer", "step"),
        help="also measure torch.compile of the whole loop (a graph of all steps: many minutes), or of a step in a loop",
    )
    parser.add_argument("--hand", action="store_true", help="only LSTM, GRU and RNN as formulas against those by hand")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.hand:
        print("\n".join(against_hand(options)))
        return
    lines = [*heading(options), *columns(bool(options.compiled))]
    print("\n".join(lines))
    all_measured = []
    for name, cell in cells().items():
        if options.cells and name not in options.cells:
            continue
        all_measured.append(measure(cell, options))
        lines.append(row(name, all_measured[-1]))
        print(lines[-1], flush=True)
    lines.append("")
    for side in all_measured[0].ratios:
        ratios = [measured.ratio(side) for measured in all_measured]
        mean = statistics.geometric_mean(ratios)
        lines.append(f"{side}: geometric mean of {len(ratios)} cells {mean:.2f}, least {min(ratios):.2f}.")
        print(lines[-1])
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
