"""The least time a step can take on a Hopper GPU, as far as it is known: what `floor_us_per_step` of a result is.

The recurrence alone, without the input product and the weight gradients. The largest of
* the table below: one forward or backward step of 8 batch rows with the weights held on the chip, that is one exchange of
  the state between the blocks that share them, the product and the pointwise part. It is given for LSTM weights of 16 bits
  and read at the same number of bytes for other cells and dtypes, between its rows linearly in the logarithm of the bytes;
* the arithmetic: multiply-adds over what all SMs can do at their datasheet rate;
* where the weights do not fit the chip: their bytes over what L2 delivers;
and the launch of a layer, spread over its steps. The figures are estimates from published latencies and rates for an H100
and none is a measurement: benchmarks/micro measures what they are made of. Those that the planner's cost model has too stand
in csrc/plan/machine.h alone; the compiled extension says them.
"""

from __future__ import annotations

import math
import warnings

from fused_rnn import _backend
from fused_rnn._explain import DEVICES
from fused_rnn.bench.cases import DTYPES, GATES, BenchCase

# KiB of recurrent weights -> microseconds of a step (forward, backward). Rows: LSTM at 16 bits, H = 128, 256, 512, 768,
# 1024, 2048. Where the design gives a range, its middle.
TABLE = {
    128: (0.30, 0.40),
    512: (0.40, 0.50),
    2048: (0.60, 0.75),
    4608: (0.80, 1.20),
    8192: (0.85, 1.35),
    32768: (1.20, 2.00),
}
SMS = DEVICES["H100"]["sm_count"]
CAPACITY_KIB = SMS * (128 + 190)  # registers and shared memory for weights, all SMs


def table_us(kib: float, backward: bool) -> float:
    """The table's time at so many KiB of weights; that of its first and last row outside of it."""
    sizes = list(TABLE)
    kib = min(max(kib, sizes[0]), sizes[-1])
    upper = next(i for i in range(1, len(sizes)) if kib <= sizes[i])
    low, high = sizes[upper - 1], sizes[upper]
    share = math.log(kib / low) / math.log(high / low)
    return TABLE[low][backward] * (1 - share) + TABLE[high][backward] * share


def floor_us_per_step(case: BenchCase, compute_capability: int, tf32: bool) -> float | None:
    """Microseconds per step and layer, forward or forward and backward by the case's mode.

    compute_capability: 10 * major + minor; tf32: whether fp32 may use it. None for other GPUs than Hopper's, and, with a
    RuntimeWarning, without the compiled extension.
    """
    if compute_capability != 90:
        return None
    if _backend.extension is None:
        text = "floor_us_per_step: the constants of csrc/plan/machine.h come from the compiled extension, which is missing"
        warnings.warn(f"{text}: {_backend.import_error}", RuntimeWarning, stacklevel=2)
        return None
    machine = _backend.extension.machine_constants()
    clocks_per_us = machine["clock_ghz"] * 1e3
    elements = GATES[case.cell] * case.H * case.H
    weight_bytes = elements * DTYPES[case.dtype].itemsize
    kind = "tf32" if case.dtype == "fp32" and tf32 else case.dtype
    total = 0.0
    for backward in (False, True) if case.mode == "training" else (False,):
        bounds = [table_us(weight_bytes / 1024, backward)]
        bounds.append(case.directions * case.B * elements / (SMS * clocks_per_us * machine["peak_math_rate"][kind]))
        if case.directions * weight_bytes > CAPACITY_KIB * 1024:
            l2_bytes_per_us = SMS * clocks_per_us * machine["shared_l2_bytes_per_clock"]
            bounds.append(case.directions * weight_bytes / l2_bytes_per_us)
        total += max(bounds) + machine["launch_us"] / case.T
    return total
