"""Runs the benchmark from a checkout: the same as ``python -m fused_rnn bench``, whose options it takes.

On a GPU another process measures. An error of a kernel can end its CUDA context, and a kernel that hangs is ended with its
process: then one more process goes on with the case after it, so that one case costs one case.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from fused_rnn.__main__ import main, parser  # noqa: E402


def measure_all(command: list[str], budget: float) -> int:
    """Runs the command until one run of it has come to the end, each from the case after the one that ended the run before.

    Returns:
        0, or the exit status of a run that failed.
    """
    deadline, first, status = time.monotonic() + budget, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        begun = Path(folder) / "begun"
        while True:
            begun.unlink(missing_ok=True)
            options = ["--first", str(first), "--begun", str(begun), "--budget", str(max(deadline - time.monotonic(), 0.0))]
            run = subprocess.run([*command, *options], cwd=ROOT)
            status = run.returncode or status
            last = begun.read_text() if begun.exists() else "end"
            if last == "end":
                return status
            print(f"case {last} ended the process with status {run.returncode}; the next one begins another", flush=True)
            first = int(last) + 1


if __name__ == "__main__":
    arguments = ["bench", *sys.argv[1:]]
    options = parser().parse_args(arguments)
    if options.device == "cpu":
        main(arguments)
    else:
        sys.exit(measure_all([sys.executable, "-m", "fused_rnn", *arguments], options.budget))
