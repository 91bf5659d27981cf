"""The least time a step can take on a Hopper GPU, as far as it is known: what `floor_us_per_step` of a result is.

The recurrence alone, without the input product and the weight gradients. The largest of
* the table below: one forward or backward step of 8 batch rows with the weights held on the chip, that is one exchange of
  the state between the blocks that share them, the product and the pointwise part. It is given for LSTM weights of 16 bits
  and read at the same number of bytes for other cells and dtypes, between its rows linearly in the logarithm of the bytes;
* the arithmetic: multiply-adds over what all SMs can do at their datasheet rate;
* where the weights do not fit the chip: their bytes over what L2 delivers;
and the launch of a layer, spread over its steps. The figures are estimates from published latencies and rates for an H100
and none is a measurement: benchmarks/micro measures what they are made of.
"""

from __future__ import annotations

import math

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
CAPACITY_KIB = 132 * (128 + 190)  # registers and shared memory for weights, all SMs
L2_BYTES_PER_US = 5.5e6
LAUNCH_US = 2.1
SMS, CLOCKS_PER_US = 132, 1700.0
MACS_PER_CLOCK = {"fp64": 64, "fp32": 128, "tf32": 1024, "fp16": 2048, "bf16": 2048}  # of one SM


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

    compute_capability: 10 * major + minor; tf32: whether fp32 may use it. None for other GPUs than Hopper's.
    """
    if compute_capability != 90:
        return None
    elements = GATES[case.cell] * case.H * case.H
    weight_bytes = elements * DTYPES[case.dtype].itemsize
    kind = "tf32" if case.dtype == "fp32" and tf32 else case.dtype
    total = 0.0
    for backward in (False, True) if case.mode == "training" else (False,):
        bounds = [table_us(weight_bytes / 1024, backward)]
        bounds.append(case.directions * case.B * elements / (SMS * CLOCKS_PER_US * MACS_PER_CLOCK[kind]))
        if case.directions * weight_bytes > CAPACITY_KIB * 1024:
            bounds.append(case.directions * weight_bytes / L2_BYTES_PER_US)
        total += max(bounds) + LAUNCH_US / case.T
    return total
