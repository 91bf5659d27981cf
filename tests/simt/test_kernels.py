"""The CUDA kernels, executed on the simulated device: results against the fp64 reference, the same for every seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from cases import CELLS, DTYPES, GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Case, make_data
from layers import Layer, LayerRun, expected, gradients
from simulator import A100, H100, T4, TINY, DeviceInfo, Simulator
from torch import Tensor

# TF32 has the mantissa of fp16: products of operands rounded to 11 bits.
TF32_TOLERANCE = (OUTPUT_TOLERANCE[torch.float16], GRADIENT_TOLERANCE[torch.float16])


def assert_near(name: str, actual: Tensor, want: Tensor, tolerance: float, norm: float = math.inf) -> None:
    actual, want = actual.double().flatten(), want.double().flatten()
    assert actual.shape == want.shape, name
    if not want.numel():
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error = torch.linalg.vector_norm(actual - want, norm).item() / max(1.0, torch.linalg.vector_norm(want, norm).item())
    assert error <= tolerance, f"{name}: error {error:.3g}, tolerance {tolerance:.3g}"


def run(
    sim: Simulator, case: Case, seeds: int = 1, device: DeviceInfo = H100, family: str | None = None, tf32: bool = False
) -> None:
    """Forward (training and not) and backward under every seed: near the reference, and bitwise the same."""
    layer = Layer.of(case, make_data(case))
    want, want_grads = expected(layer)
    output_tolerance, gradient_tolerance = OUTPUT_TOLERANCE[case.dtype], GRADIENT_TOLERANCE[case.dtype]
    if tf32:
        output_tolerance, gradient_tolerance = TF32_TOLERANCE
    growth = max(1.0, math.sqrt(max(case.hidden, case.input_size) / 32))
    norm = 2 if case.cell == "RNN_RELU" and (tf32 or case.dtype.itemsize == 2) else math.inf
    first: dict[str, Tensor] = {}
    for seed in range(seeds):
        options = {"seed": seed, "device": device, "family": family, "tf32": tf32}
        inference = LayerRun(sim, layer, training=False, **options).forward()
        trainer = LayerRun(sim, layer, training=True, **options)
        saved = trainer.forward()
        grads = trainer.backward(saved)
        for name in inference:
            assert torch.equal(inference[name], saved[name]), f"{name} depends on training, seed {seed}"
        results = saved | grads
        if seed == 0:
            first = results
            for name, actual in zip(("y", "h_n", "c_n"), want, strict=False):
                assert_near(name, saved[name], actual, output_tolerance * growth)
            names = itertools.count()
            for actual, wanted in zip(gradients(layer, saved, grads), want_grads, strict=True):
                assert_near(f"gradient {next(names)}", actual, wanted, gradient_tolerance * growth, norm)
        for name, tensor in results.items():
            assert torch.equal(tensor.view(torch.uint8), first[name].view(torch.uint8)), f"{name} of seed {seed}"
