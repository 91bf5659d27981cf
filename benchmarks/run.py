"""Runs the benchmark from a checkout: the same as ``python -m fused_rnn bench``, whose options it takes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fused_rnn.__main__ import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
