"""Python names of the C++ ops, and the parts of their registration that are Python: fake kernels and double backward."""

from __future__ import annotations

from fused_rnn._backend import _C

if _C is not None:
    import torch

    rnn = torch.ops.fused_rnn.rnn.default
    cell = torch.ops.fused_rnn.cell.default
else:

    def rnn(*args):  # type: ignore[no-untyped-def]
        raise RuntimeError("the compiled extension is missing")  # uses_ops() never lets a call come here

    cell = rnn
