"""The least time a call can take on this CPU: what `floor_us_per_step` of a CPU's result is.

The sum of

* the matrix products, at the machine's peak for the dtype and the instruction set in use: a product whose operands lie in
  the nearest cache. A step's recurrent product takes at least what reading its weights takes, at the rate of the cache that
  holds them;
* the pointwise half of every step, at its rate on arrays in the cache.

What the first step reads is zero where the call has no `hx`, so its recurrent product counts nowhere. Packing weights,
converting dtypes, copies, threads that wait and calls themselves count nowhere either. All rates are measured when they are
first asked for, on as many threads at the same time as torch has.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from fused_rnn import _backend
from fused_rnn._kinds import KINDS, number_of_torch_layer
from fused_rnn.bench.cases import DTYPES, GATES, BenchCase

MOMENTS, PAUSE = 5, 0.02  # seconds between two


class CpuRates:
    """The rates of this machine with so many threads; each is measured once."""

    def __init__(self, threads: int) -> None:
        if _backend.extension is None:
            raise RuntimeError(f"rates of the CPU kernels: the compiled extension is missing: {_backend.import_error}")
        self._extension = _backend.extension
        self._pool = ThreadPoolExecutor(threads)
        self.threads = threads
        self.product = functools.cache(self._product)
        self.read = functools.cache(self._read)
        self.pointwise = functools.cache(self._pointwise)

    def _best(self, rate: Callable[[], float]) -> float:
        """The rates of all threads at the same time, added up: the best of some moments, as machines are shared."""
        best = 0.0
        for _ in range(MOMENTS):
            best = max(best, sum(future.result() for future in [self._pool.submit(rate) for _ in range(self.threads)]))
            time.sleep(PAUSE)
        return best

    def _product(self, dtype: str) -> float:
        """Floating-point operations a second of matrix products."""
        return self._best(functools.partial(self._extension.cpu_product_rate, _name(dtype)))

    def _read(self, size: int) -> float:
        """Bytes a second of `size` bytes of weights, an equal share of which each thread reads."""
        return self._best(functools.partial(self._extension.cpu_read_rate, max(1, size // self.threads)))

    def _pointwise(self, kind: str, dtype: str, pass_: str) -> float:
        """Seconds of the pointwise half of a step, a unit; kind: a name of _kinds.py; pass_: as cpu_pointwise_seconds'."""
        rows, hidden = 4, 128

        def units_per_second() -> float:
            return (
                rows
                * hidden
                / self._extension.cpu_pointwise_seconds(cell=kind, dtype=_name(dtype), pass_=pass_, rows=rows, H=hidden)
            )

        return 1 / self._best(units_per_second)


def _name(dtype: str) -> str:
    return str(DTYPES[dtype]).removeprefix("torch.")


def cpu_floor_us_per_step(case: BenchCase, rates: CpuRates) -> float:
    """Microseconds per step and layer, both directions; of the passes that the case's mode has."""
    gates = GATES[case.cell]
    kind = KINDS[number_of_torch_layer(case.cell)].name
    weights = gates * case.H * case.H  # of a recurrent product
    weight_bytes = weights * DTYPES[case.dtype].itemsize
    peak, read = rates.product(case.dtype), rates.read(_power_of_two(case.directions * weight_bytes))
    recurrent_rows = case.rows - case.B  # the first step of each reads zeros
    recurrent = recurrent_rows * 2 * weights / peak
    reading = (case.T - 1) * weight_bytes / read
    training = case.mode == "training"

    def pointwise(pass_: str) -> float:
        return case.rows * case.H * rates.pointwise(kind, case.dtype, pass_)

    seconds = 0.0
    for layer in range(case.layers):
        inputs = case.I if layer == 0 else case.directions * case.H
        product = case.rows * 2 * gates * case.H * inputs / peak
        of_layer = product + max(recurrent, reading) + pointwise("inference" if case.mode == "inference" else "training")
        if training:
            # Gradients of W_ih and W_hh, of the layer's input where it has one, and backward's recurrence.
            wants_input_gradient = layer > 0 or case.lengths == "dense"
            of_layer += product * (1 + wants_input_gradient) + recurrent + max(recurrent, reading) + pointwise("backward")
        seconds += case.directions * of_layer
    return seconds * 1e6 / (case.T * case.layers)


def _power_of_two(size: int) -> int:
    """The next one: cases share measurements."""
    return 1 << (size - 1).bit_length()
