"""Tables and plots from result lines: ``python benchmarks/compare.py benchmarks/results/FILE.jsonl [--plots FOLDER]``.

A table a mode, in Markdown (ratio > 1: fused_rnn is faster than torch.nn), and with --plots (needs matplotlib) two pictures:
the ratio of every case, and microseconds per step against H.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def read(paths: list[Path]) -> list[Line]:
    """All result lines of the files, in order."""
    return [json.loads(text) for path in paths for text in path.read_text().splitlines() if text.strip()]


def name_of(line: Line) -> str:
    """A case's short name: sizes, then what is out of the ordinary."""
    name = f"{line['T']}x{line['B']}x{line['I']}x{line['H']} {line['dtype']}"
    name += f" {line['layers']} layers" * (line["layers"] > 1) + " bidirectional" * line["bidirectional"]
    return name + " ragged" * (line["lengths"] == "ragged")


def tables(lines: list[Line]) -> str:
    """Markdown: for every device, thread count and mode a table of cases by cells, and the geometric means."""
    groups: dict[tuple, list[Line]] = defaultdict(list)
    for line in lines:
        groups[line["device"], line.get("threads"), line["mode"], line["torch"], line["commit"], line["date"]].append(line)
    parts = []
    for (device, threads, mode, torch, commit, date), group in groups.items():
        cells = [cell for cell in ("LSTM", "GRU", "RNN") if any(line["cell"] == cell for line in group)]
        rows: dict[str, dict[str, Line]] = defaultdict(dict)
        for line in group:
            rows[name_of(line)][line["cell"]] = line
        where = f"{device}{f', {threads} thread(s)' if threads else ''}, torch {torch}, {date}, {commit}"
        parts.append(f"### {mode}: {where}\n")
        parts.append("| T x B x I x H | " + " | ".join(cells) + " |")
        parts.append("|---" * (len(cells) + 1) + "|")
        for name, by_cell in rows.items():
            texts = [
                f"{line['ratio']:.2f} ({line['ratio_p25']:.2f}-{line['ratio_p75']:.2f})" if line else ""
                for line in (by_cell.get(cell) for cell in cells)
            ]
            parts.append(f"| {name} | " + " | ".join(texts) + " |")
        means = [statistics.geometric_mean(line["ratio"] for line in group if line["cell"] == cell) for cell in cells]
        parts.append("| **geometric mean** | " + " | ".join(f"**{mean:.2f}**" for mean in means) + " |\n")
    return "\n".join(parts)


def plots(lines: list[Line], folder: Path, stem: str) -> list[Path]:
    """Writes STEM_ratio.png and STEM_us_per_step.png; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(lines, key=lambda line: line["ratio"])
    figure, axes = plt.subplots(figsize=(10, 5))
    colours = {"LSTM": "tab:blue", "GRU": "tab:orange", "RNN": "tab:green"}
    axes.bar(range(len(ordered)), [line["ratio"] for line in ordered], color=[colours[line["cell"]] for line in ordered])
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylabel("times faster than torch.nn")
    axes.set_xlabel(f"{len(ordered)} cases, slowest first")
    axes.legend(handles=[plt.Rectangle((0, 0), 1, 1, color=c, label=cell) for cell, c in colours.items()])
    figure.suptitle(ordered[0]["device"])
    paths = [folder / f"{stem}_ratio.png", folder / f"{stem}_us_per_step.png"]
    figure.savefig(paths[0], dpi=110, bbox_inches="tight")

    figure, axes = plt.subplots(figsize=(10, 5))
    for side, marker, time in (("fused_rnn", "o", "ms"), ("torch.nn", "x", "baseline_ms")):
        for cell, colour in colours.items():
            chosen = [line for line in lines if line["cell"] == cell and line["T"] > 1]
            axes.scatter(
                [line["H"] for line in chosen],
                [line[time] * 1e3 / (line["T"] * line["layers"]) for line in chosen],
                marker=marker,
                color=colour,
                alpha=0.6,
                label=f"{cell}, {side}",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("hidden size H")
    axes.set_ylabel("microseconds per time step")
    axes.legend()
    figure.suptitle(ordered[0]["device"])
    figure.savefig(paths[1], dpi=110, bbox_inches="tight")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="result files, a JSON object a line")
    parser.add_argument("--plots", type=Path, help="write pictures into this folder")
    arguments = parser.parse_args()
    lines = read(arguments.files)
    print(tables(lines))
    if arguments.plots:
        for path in plots(lines, arguments.plots, arguments.files[0].stem):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
