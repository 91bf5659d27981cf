"""List or clear the compiled formulas that are kept on disk."""

from __future__ import annotations

import argparse
import time

from fused_rnn.formula import store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="remove all of them")


def main(options: argparse.Namespace) -> None:
    where = store.cache_directory()
    if options.clear:
        print(f"{where}: {store.clear()} bytes freed")
        return
    found = store.entries()
    print(
        f"{where}: {len(found)} compiled formulas, {sum(entry.bytes for entry in found)} bytes of at most {store.MOST_BYTES}"
    )
    for entry in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        print(f"{used}  {entry.bytes:>8}  {entry.path.stem}")
