"""Show or forget what is known of the kernel families on GPUs: which passed, and which is fastest for which problem."""

from __future__ import annotations

import argparse
from pathlib import Path

from fused_rnn.tuning import here
from fused_rnn.tuning.record import Choice, entries_of, lines_of_entry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the tune command."""
    options = parser.add_mutually_exclusive_group(required=True)
    options.add_argument("--list", action="store_true", help="print the records of all devices, drivers and builds")
    options.add_argument("--forget", action="store_true", help="remove them")


def main(args: argparse.Namespace) -> None:
    files = here.files()
    if not files:
        print("nothing is recorded")
    for path in files:
        if args.forget:
            path.unlink()
            print(f"removed {path}")
        else:
            print("\n".join(lines_of(path)))


def lines_of(path: Path) -> list[str]:
    """A record as text."""
    lines, scope_before = [str(path)], None
    for scope, entry in sorted(entries_of(path), key=lambda both: (str(both[0]), isinstance(both[1], Choice))):
        if scope != scope_before:
            lines.append(f"  {scope.device}, driver {scope.driver}, build {scope.build}")
            scope_before = scope
        lines += [f"    {line}" for line in lines_of_entry(entry)]
    return lines
