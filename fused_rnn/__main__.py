"""python -m fused_rnn COMMAND."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fused_rnn import bench, cache, demo, info, tune, verify

COMMANDS = {
    "info": (info, "what was built, what serves CPU and CUDA tensors, what is missing and the command that mends it"),
    "demo": (demo, "train a character language model and compare it with torch.nn"),
    "cache": (cache, "list or clear the compiled formulas that are kept on disk"),
    "bench": (bench, "time fused_rnn against torch.nn"),
    "verify": (verify, "check every kernel family on this GPU against float64, each in a child process"),
    "tune": (tune, "show or forget what is known of the kernel families on GPUs"),
}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m fused_rnn", description="Recurrent layers on hand-written kernels.")
    commands = result.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=text, description=(module.__doc__ or "").splitlines()[0]))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    COMMANDS[options.command][0].main(options)


if __name__ == "__main__":
    main()
