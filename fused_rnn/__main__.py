"""python -m fused_rnn COMMAND."""

from __future__ import annotations

import sys

USAGE = """usage: python -m fused_rnn COMMAND [options]

commands:
  info   what was built, what serves CPU and CUDA tensors, what is missing and the command that mends it
  demo   train a character language model and compare with torch.nn (options: demo --help)
"""


def main(arguments: list[str]) -> int:
    command, *rest = arguments or [""]
    if command == "info":
        from fused_rnn import info

        info.main(rest)
    elif command == "demo":
        from fused_rnn import demo

        demo.main(rest)
    elif command in ("-h", "--help"):
        print(USAGE, end="")
    else:
        print(USAGE, end="", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
