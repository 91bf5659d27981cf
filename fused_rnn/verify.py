"""Check every kernel family on a GPU against float64: each in a child process with a time limit, once a driver and build."""

from __future__ import annotations

import argparse

import torch

from fused_rnn import _backend
from fused_rnn.tuning import here
from fused_rnn.tuning.verification import State

OURS = tuple(family for family in here.FAMILIES if family != "cudnn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verify command."""
    parser.add_argument("--family", choices=OURS, nargs="+", default=OURS, help="only these")
    parser.add_argument("--device", type=int, default=0, help="number of the GPU (0)")


def main(args: argparse.Namespace) -> None:
    """Prints the state of each family; what is known already is not run again.

    Raises:
        SystemExit: there is no GPU, or no kernel for one; or a family did not pass.
    """
    if not torch.cuda.is_available():
        raise SystemExit("verify: needs a GPU, and torch sees none here (torch.cuda.is_available() is False)")
    if not _backend.has_cuda_kernels():
        raise SystemExit(f"verify: {_backend.why_not_native('cuda')}; python -m fused_rnn info says how to mend it")
    record = here.record_of(args.device)
    verifier = here.verifier_of(record, args.device)
    print(f"{record.scope.device}, record {record.path}")
    failed = []
    for family in args.family:
        state = verifier.verify(family)
        verdict = record.verdict(family)
        print(f"{family:10} {state.value}" + (f": {verdict.reason}" if verdict and verdict.reason else ""), flush=True)
        failed += [family] if state is State.EXCLUDED else []
    if failed:
        raise SystemExit(f"verify: {', '.join(failed)} did not pass")
