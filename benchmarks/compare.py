"""Tables and plots from result lines: ``python benchmarks/compare.py benchmarks/results/FILE.jsonl [--plots FOLDER]``.

For every device, thread count, mode and baseline a table in Markdown (ratio > 1: fused_rnn is faster; on a CPU also the time
over the least possible and the products' share of the machine's peak), then what is below 1.
With --plots (needs matplotlib) pictures for each device and thread count: the ratio of every case to torch.nn; microseconds
per step against H, with the floor where there is one; and, of cases that differ in B and H alone (the presets cells and
steps), a map of their ratios over both. Of a case that was measured more than once the last counts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

Line = dict[str, Any]
COLOURS = {
    "LSTM": "tab:blue", "GRU": "tab:orange", "RNN": "tab:green",
    "LSTMCell": "tab:purple", "GRUCell": "tab:red", "RNNCell": "tab:olive",
}  # fmt: skip
CELLS = tuple(COLOURS)
MOST_NAMES = 400  # bars of a picture that are named


def read(paths: list[Path]) -> list[Line]:
    """The result lines of the files, in order; of a case that comes again only the last."""
    latest: dict[tuple, Line] = {}
    for path in paths:
        for number, text in enumerate(path.read_text().splitlines(), 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                key = (*place(line), line["mode"], line["baseline"], line["cell"], name_of(line))
            except (json.JSONDecodeError, KeyError) as error:
                raise SystemExit(f"{path}:{number}: not a result line ({error!r})") from error
            latest.pop(key, None)
            latest[key] = line
    return list(latest.values())


def place(line: Line) -> tuple:
    """Where a line was measured: device, threads, versions. What lies at different places is never mixed."""
    return tuple(
        line.get(field)
        for field in ("device", "threads", "instruction_set", "driver", "torch", "cuda", "cudnn", "tf32", "commit")
    )


def name_of(line: Line) -> str:
    """A case's short name: sizes, then what is out of the ordinary."""
    name = f"{line['T']}x{line['B']}x{line['I']}x{line['H']} {line['dtype']}"
    name += f" {line['layers']} layers" * (line["layers"] > 1) + " bidirectional" * line["bidirectional"]
    return name + " ragged" * (line["lengths"] == "ragged")


def describe(line: Line) -> str:
    threads, cudnn = line.get("threads"), line.get("cudnn")
    parts = [line["device"], f"{threads} thread(s)" if threads else "", f"torch {line['torch']}"]
    parts += [f"cuDNN {cudnn}" if cudnn else "", line["date"], line["commit"]]
    return ", ".join(part for part in parts if part)


def tables(lines: list[Line]) -> str:
    """Markdown: a table of cases by cells for every place, mode and baseline, the geometric means of each
    dtype, and what is below 1."""
    groups: dict[tuple, list[Line]] = defaultdict(list)
    for line in lines:
        groups[(*place(line), line["mode"], line["baseline"])].append(line)
    parts = []
    for group in groups.values():
        cells = [cell for cell in CELLS if any(line["cell"] == cell for line in group)]
        rows: dict[str, dict[str, Line]] = defaultdict(dict)
        for line in group:
            rows[name_of(line)][line["cell"]] = line
        parts.append(f"### {group[0]['mode']} against {group[0]['baseline']}: {describe(group[0])}\n")
        parts.append("| T x B x I x H | " + " | ".join(cells) + " |")
        parts.append("|---" * (len(cells) + 1) + "|")
        for name, by_cell in rows.items():
            texts = [figures_of(line) if line else "" for line in (by_cell.get(cell) for cell in cells)]
            parts.append(f"| {name} | " + " | ".join(texts) + " |")
        for dtype in dict.fromkeys(line["dtype"] for line in group):
            ratios = [[line["ratio"] for line in group if (line["cell"], line["dtype"]) == (c, dtype)] for c in cells]
            means = [f"**{statistics.geometric_mean(of_cell):.2f}**" if of_cell else "" for of_cell in ratios]
            parts.append(f"| **geometric mean {dtype}** | " + " | ".join(means) + " |")
        parts.append("")
        memory = [line["peak_bytes"] / line["baseline_peak_bytes"] for line in group if line.get("baseline_peak_bytes")]
        if memory:
            worst = max(memory)
            parts.append(f"Memory, share of the baseline's: median {statistics.median(memory):.0%}, most {worst:.0%}.\n")
        over = [(times_floor(line), f"{line['cell']} {name_of(line)}") for line in group if line["floor_us_per_step"]]
        if over:
            most, name = max(over)
            parts.append(f"Times the floor: median {statistics.median(t for t, _ in over):.2f}, most {most:.2f} ({name}).\n")
        below = sorted((line["ratio"], f"{line['cell']} {name_of(line)}") for line in group if line["ratio"] < 1)
        if below:
            parts.append("Below 1: " + ", ".join(f"{name} {ratio:.2f}" for ratio, name in below) + ".\n")
    return "\n".join(parts)


def figures_of(line: Line) -> str:
    """The ratio with its quartiles; of a CPU's line also the time over the floor, and the products' share of the peak."""
    text = f"{line['ratio']:.2f} ({line['ratio_p25']:.2f}-{line['ratio_p75']:.2f})"
    if line.get("peak_gflops"):
        text += f", {times_floor(line):.2f} floors, {line['gflops'] / line['peak_gflops']:.0%} of peak"
    return text


def times_floor(line: Line) -> float:
    return line["us_per_step"] / line["floor_us_per_step"]


def plots(lines: list[Line], folder: Path, stem: str) -> list[Path]:
    """Writes STEM_ratio.png, STEM_us_per_step.png and, where there is one, STEM_grid.png for each place (numbered from the
    second on); returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    places: dict[tuple, list[Line]] = defaultdict(list)
    for line in lines:
        if line["baseline"] == "torch.nn":
            places[place(line)].append(line)
    paths = []
    for number, group in enumerate(places.values(), 1):
        for kind, draw in (("ratio", draw_ratios), ("us_per_step", draw_steps), ("grid", draw_grid)):
            figure = draw(plt, group)
            if figure is None:
                continue
            figure.suptitle(describe(group[0]))
            paths.append(folder / f"{stem}{f'_{number}' if number > 1 else ''}_{kind}.png")
            figure.savefig(paths[-1], dpi=110, bbox_inches="tight")
            plt.close(figure)
    return paths


def modes_of(lines: list[Line]) -> list[str]:
    return list(dict.fromkeys(line["mode"] for line in lines))


def draw_ratios(plt: Any, lines: list[Line]) -> Any:
    """A panel a mode: a bar a case, smallest first, with the quartiles."""
    most = max(sum(line["mode"] == mode for line in lines) for mode in modes_of(lines))
    size = (max(6.0, 0.16 * min(most, MOST_NAMES)) * len(modes_of(lines)), 6)
    figure, panels = plt.subplots(1, len(modes_of(lines)), figsize=size, squeeze=False)
    for axes, mode in zip(panels[0], modes_of(lines), strict=True):
        ordered = sorted((line for line in lines if line["mode"] == mode), key=lambda line: line["ratio"])
        ratios = [line["ratio"] for line in ordered]
        spread = [[max(0.0, line["ratio"] - line["ratio_p25"]) for line in ordered]]
        spread.append([max(0.0, line["ratio_p75"] - line["ratio"]) for line in ordered])
        axes.bar(range(len(ordered)), ratios, color=[COLOURS[line["cell"]] for line in ordered])
        axes.errorbar(range(len(ordered)), ratios, yerr=spread, fmt="none", ecolor="black", elinewidth=0.6)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_ylabel("times faster than torch.nn")
        if len(ordered) <= MOST_NAMES:
            names = [f"{line['cell']} {name_of(line)}" for line in ordered]
            axes.set_xticks(range(len(ordered)), names, rotation=90, fontsize=6)
        axes.margins(x=0.01)
        axes.set_title(f"{mode}: geometric mean {statistics.geometric_mean(ratios):.2f}")
        present = [cell for cell in CELLS if any(line["cell"] == cell for line in ordered)]
        axes.legend(handles=[plt.Rectangle((0, 0), 1, 1, color=COLOURS[cell], label=cell) for cell in present])
    return figure


def draw_grid(plt: Any, lines: list[Line]) -> Any:
    """A column a cell, a row for each mode, dtype and T: a map of ratios over B and H, red below 1; None without a grid."""
    maps: dict[tuple, dict[tuple[int, int], float]] = defaultdict(dict)
    for line in lines:
        if line["I"] == line["H"] and (line["layers"], line["bidirectional"], line["lengths"]) == (1, False, "dense"):
            maps[line["mode"], line["dtype"], line["T"], line["cell"]][line["B"], line["H"]] = line["ratio"]
    maps = {key: ratios for key, ratios in maps.items() if all(len({place[i] for place in ratios}) > 1 for i in (0, 1))}
    if not maps:
        return None
    rows = list(dict.fromkeys(key[:3] for key in maps))
    cells = [cell for cell in CELLS if any(key[3] == cell for key in maps)]
    size = (4 * len(cells), 3 * len(rows))
    figure, panels = plt.subplots(len(rows), len(cells), figsize=size, squeeze=False, layout="constrained")
    for (mode, dtype, steps), of_row in zip(rows, panels, strict=True):
        for cell, axes in zip(cells, of_row, strict=True):
            ratios = maps.get((mode, dtype, steps, cell))
            if ratios is None:
                axes.axis("off")
                continue
            batches, sizes = (sorted({place[i] for place in ratios}) for i in (0, 1))
            table = [[ratios.get((b, h), math.nan) for h in sizes] for b in batches]
            logs = [[math.log2(ratio) for ratio in row] for row in table]
            axes.imshow(logs, cmap="RdYlGn", vmin=-1, vmax=1, aspect="auto")
            for y, row in enumerate(table):
                for x, ratio in enumerate(row):
                    axes.text(x, y, "" if math.isnan(ratio) else f"{ratio:.2f}", ha="center", va="center", fontsize=7)
            axes.set_xticks(range(len(sizes)), [str(h) for h in sizes])
            axes.set_yticks(range(len(batches)), [str(b) for b in batches])
            axes.set(xlabel="H", ylabel="B", title=f"{cell} {dtype} {mode} T={steps}")
    return figure


def draw_steps(plt: Any, lines: list[Line]) -> Any:
    """A panel a mode: microseconds of a step against H, both sides, and the floor of the same cases."""
    figure, panels = plt.subplots(1, len(modes_of(lines)), figsize=(6 * len(modes_of(lines)), 4.5), squeeze=False)
    for axes, mode in zip(panels[0], modes_of(lines), strict=True):
        chosen = [line for line in lines if line["mode"] == mode and line["T"] > 1]
        for cell, colour in COLOURS.items():
            mine = [line for line in chosen if line["cell"] == cell]
            if not mine:
                continue
            sizes = [line["H"] for line in mine]
            theirs = [line["baseline_ms"] * 1e3 / (line["T"] * line["layers"]) for line in mine]
            axes.scatter(sizes, [line["us_per_step"] for line in mine], marker="o", color=colour, alpha=0.6, label=cell)
            axes.scatter(sizes, theirs, marker="x", color=colour, alpha=0.6, label=f"{cell}, torch.nn")
            floors: dict[int, float] = {}
            for line in mine:
                if line["floor_us_per_step"] is not None:
                    floors[line["H"]] = min(line["floor_us_per_step"], floors.get(line["H"], float("inf")))
            if floors:
                points = sorted(floors.items())
                axes.plot([h for h, _ in points], [us for _, us in points], color=colour, label=f"{cell}, least possible")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("hidden size H")
        axes.set_ylabel("microseconds per step and layer")
        axes.set_title(mode)
        if chosen:
            axes.legend(fontsize="small")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="result files, a JSON object a line")
    parser.add_argument("--plots", type=Path, help="write pictures into this folder")
    options = parser.parse_args(arguments)
    lines = read(options.files)
    print(tables(lines))
    if options.plots:
        for path in plots(lines, options.plots, options.files[0].stem):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
