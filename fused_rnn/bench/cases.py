"""What is measured: the cases of the CPU and of the GPU, their modules and their inputs."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fused_rnn
from fused_rnn._kinds import KINDS, TORCH_LAYERS, number_of_torch_layer

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CELLS = tuple(TORCH_LAYERS)
LOOPED = tuple(f"{cell}Cell" for cell in CELLS)  # modules of one step, called T times in a loop
MODES = ("inference", "training_forward", "training")
GATES = {cell: KINDS[number_of_torch_layer(cell)].gates for cell in CELLS + LOOPED}
# (T, B, I, H): streaming, forecasting, small training, speech, large models, long single sequences.
CPU_SHAPES = (
    (1, 1, 128, 128),
    (35, 32, 28, 256),
    (100, 1, 64, 64),
    (128, 16, 128, 128),
    (128, 64, 256, 256),
    (256, 32, 512, 512),
    (64, 8, 1024, 1024),
    (512, 1, 256, 256),
)
# (B, H), T=256, I=H.
GPU_SIZES = (
    (1, 128), (1, 512), (8, 256), (16, 768), (32, 128), (64, 256), (64, 512), (64, 1024), (128, 512), (256, 256), (32, 2048),
)  # fmt: skip
ROTATED_BYTES = 128_000_000  # inputs to rotate over on a GPU: beyond the L2 cache of every one


@dataclasses.dataclass(frozen=True)
class BenchCase:
    """One measured configuration; ``mode`` "training" is forward and backward, "training_forward" forward with grad.

    A ``cell`` of LOOPED makes its T steps in a loop over x [T, B, I]; backward then has a gradient of every step's h.
    """

    cell: str
    dtype: str
    mode: str
    T: int
    B: int
    I: int  # noqa: E741  (the field's name in results)
    H: int
    layers: int = 1
    bidirectional: bool = False
    lengths: str = "dense"

    def __str__(self) -> str:
        name = f"{self.cell} {self.dtype} {self.mode} T={self.T} B={self.B} I={self.I} H={self.H}"
        name += f" L={self.layers}" * (self.layers > 1) + " bidirectional" * self.bidirectional
        return name + " ragged" * (self.lengths == "ragged")

    @property
    def loops(self) -> bool:
        return self.cell in LOOPED

    @property
    def directions(self) -> int:
        return 1 + self.bidirectional

    @property
    def rows(self) -> int:
        """Steps of all rows of the batch, without padding."""
        return self.T * self.B if self.lengths == "dense" else int(self.row_lengths().sum())

    def row_lengths(self) -> Tensor:
        """Steps of each row where they are ragged: int64 (B,), the first T, the others uniform in 1 to T."""
        lengths = torch.randint(1, self.T + 1, (self.B,), generator=torch.Generator().manual_seed(2))
        lengths[0] = self.T
        return lengths

    @property
    def flops(self) -> int:
        """Of the matrix products of one call without those of padding, a multiply-add as two."""
        per_row = 0
        for layer in range(self.layers):
            inputs = self.I if layer == 0 else self.directions * self.H
            per_row += 2 * GATES[self.cell] * self.H * (inputs + self.H) * self.directions
        return self.rows * per_row * (3 if self.mode == "training" else 1)

    def modules(self, device: str) -> tuple[torch.nn.Module, torch.nn.Module]:
        """(fused_rnn's, torch.nn's) with the same weights; torch.nn's contiguous in memory, as cuDNN likes them best."""
        torch.manual_seed(0)
        options: dict[str, Any] = {"device": device, "dtype": DTYPES[self.dtype]}
        if not self.loops:
            options |= {"num_layers": self.layers, "bidirectional": self.bidirectional}
        theirs = getattr(torch.nn, self.cell)(self.I, self.H, **options)
        ours = getattr(fused_rnn, self.cell)(self.I, self.H, **options)
        ours.load_state_dict(theirs.state_dict())
        if device == "cuda" and not self.loops:
            theirs.flatten_parameters()
        for module in (ours, theirs):
            module.train(self.mode != "inference")
        return ours, theirs

    def inputs(self, device: str) -> list[Any]:
        """Inputs to rotate over: enough of them to leave a GPU's L2 cache between two uses, at most 8."""
        bytes_each = self.T * self.B * self.I * DTYPES[self.dtype].itemsize
        count = 1 if device == "cpu" else max(1, min(8, -(-ROTATED_BYTES // max(1, bytes_each))))
        generator = torch.Generator(device).manual_seed(1)
        lengths = self.row_lengths()
        made: list[Any] = []
        for _ in range(count):
            x = torch.randn(self.T, self.B, self.I, generator=generator, device=device).to(DTYPES[self.dtype])
            x.requires_grad_(self.mode != "inference")
            ragged = self.lengths == "ragged"
            made.append(torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False) if ragged else x)
        return made


def cpu_cases() -> Iterator[BenchCase]:
    """The eight shapes of the CPU goals, every cell and mode; what torch.nn serves worst; the eight shapes in bf16."""
    for (t, b, i, h), cell, mode in itertools.product(CPU_SHAPES, CELLS, MODES):
        yield BenchCase(cell, "fp32", mode, t, b, i, h)
    for cell, mode in itertools.product(CELLS, ("inference", "training")):
        yield BenchCase(cell, "fp32", mode, 128, 16, 128, 128, lengths="ragged")
        yield BenchCase(cell, "fp32", mode, 64, 16, 64, 128, layers=2, bidirectional=True)
        yield BenchCase(cell, "fp32", mode, 50, 7, 33, 100)
    for (t, b, i, h), cell, mode in itertools.product(CPU_SHAPES, CELLS, ("inference", "training")):
        yield BenchCase(cell, "bf16", mode, t, b, i, h)


def gpu_cases() -> Iterator[BenchCase]:
    """The grid of the GPU goals, then stacked, bidirectional, ragged, odd and single-step cases."""
    modes = ("inference", "training")
    for cell, dtype, (b, h), mode in itertools.product(CELLS, ("fp32", "fp16", "bf16"), GPU_SIZES, modes):
        yield BenchCase(cell, dtype, mode, 256, b, h, h)
    for cell, mode in itertools.product(CELLS, modes):
        for dtype in ("fp32", "bf16"):
            yield BenchCase(cell, dtype, mode, 256, 32, 256, 256, layers=2)
            yield BenchCase(cell, dtype, mode, 256, 32, 256, 256, layers=4)
            yield BenchCase(cell, dtype, mode, 256, 32, 256, 256, bidirectional=True)
            yield BenchCase(cell, dtype, mode, 256, 32, 256, 256, lengths="ragged")
            yield BenchCase(cell, dtype, mode, 1, 1, 256, 256)
            yield BenchCase(cell, dtype, mode, 256, 7, 100, 100)
            yield BenchCase(cell, dtype, mode, 256, 33, 300, 300)


def cell_cases() -> Iterator[BenchCase]:
    """Cells in a loop of 10 steps: batch and hidden sizes, all modes, fp32."""
    for cell, mode in itertools.product(LOOPED, MODES):
        for h, b in itertools.product((64, 128, 256, 512, 1024), (1, 2, 8, 32, 64, 128)):
            yield BenchCase(cell, "fp32", mode, 10, b, h, h)


def step_cases() -> Iterator[BenchCase]:
    """Inference of few steps, as a server makes them: layers of 1 to 8 steps, and one step of the cells."""
    for cell, dtype in itertools.product(CELLS + LOOPED, ("fp32", "bf16", "fp16")):
        for t, h in itertools.product((1, 2, 4, 8) if cell in CELLS else (1,), (64, 128, 256, 512, 1024, 2048)):
            for b in (1, 2, 4, 8, 16, 32, 64, 256):
                yield BenchCase(cell, dtype, "inference", t, b, h, h)


def first_cases() -> Iterator[BenchCase]:
    """The 40 cases of the first minutes on a GPU, under torch's default switches: small H first, then odd sizes, single
    steps, middle sizes and large batches."""
    small = (
        ("LSTM", "fp32", "training", 256, 16, 64), ("LSTM", "fp32", "inference", 256, 16, 64),
        ("LSTM", "fp16", "training", 256, 16, 64), ("LSTM", "bf16", "inference", 256, 1, 32),
        ("GRU", "fp32", "training", 256, 16, 64), ("RNN", "fp32", "training", 256, 16, 64),
        ("LSTM", "fp32", "training", 100, 256, 64), ("LSTM", "fp32", "inference", 512, 1, 128),
        ("LSTM", "fp32", "training", 256, 32, 128), ("LSTM", "bf16", "training", 256, 32, 128),
        ("GRU", "fp32", "training", 256, 64, 128), ("GRU", "fp16", "inference", 256, 1, 128),
        ("RNN", "fp32", "training", 256, 32, 256), ("RNN", "bf16", "inference", 256, 1, 256),
    )  # fmt: skip
    for cell, dtype, mode, t, b, h in small:
        yield BenchCase(cell, dtype, mode, t, b, h, h)
    yield BenchCase("LSTM", "fp32", "training", 50, 7, 33, 100)
    yield BenchCase("LSTM", "bf16", "training", 50, 7, 33, 100)
    yield BenchCase("GRU", "fp32", "training", 256, 33, 300, 300)
    yield BenchCase("RNN", "bf16", "inference", 256, 5, 17, 129)
    yield BenchCase("LSTM", "fp16", "training", 100, 20, 40, 130)
    yield BenchCase("LSTM", "fp32", "training", 128, 16, 128, 200, lengths="ragged")
    yield BenchCase("LSTM", "fp32", "inference", 1, 1, 256, 256)
    yield BenchCase("LSTM", "bf16", "inference", 1, 1, 1024, 1024)
    yield BenchCase("GRU", "fp32", "inference", 1, 64, 512, 512)
    yield BenchCase("LSTM", "fp32", "training", 1, 8, 256, 256)
    yield BenchCase("RNN", "fp16", "inference", 1, 1, 128, 128)
    yield BenchCase("LSTM", "fp32", "training", 256, 8, 256, 256)
    yield BenchCase("LSTM", "fp32", "inference", 256, 1, 512, 512)
    yield BenchCase("LSTM", "bf16", "training", 256, 64, 512, 512)
    yield BenchCase("GRU", "bf16", "training", 256, 64, 512, 512)
    yield BenchCase("LSTM", "fp16", "training", 256, 16, 768, 768)
    yield BenchCase("LSTM", "bf16", "training", 256, 32, 256, 256, layers=4)
    yield BenchCase("GRU", "fp32", "training", 256, 32, 256, 256, bidirectional=True)
    yield BenchCase("LSTM", "fp32", "training", 256, 64, 1024, 1024)
    yield BenchCase("LSTM", "bf16", "training", 256, 64, 1024, 1024)
    yield BenchCase("LSTM", "bf16", "inference", 64, 32, 2048, 2048)
    yield BenchCase("LSTM", "bf16", "training", 64, 256, 1024, 1024)
    yield BenchCase("LSTM", "fp32", "training", 64, 512, 512, 512)
    yield BenchCase("GRU", "fp16", "training", 64, 1024, 512, 512)
    yield BenchCase("GRU", "fp32", "inference", 64, 1024, 256, 256)
    yield BenchCase("RNN", "fp32", "training", 128, 512, 512, 512)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A grid of cases, and the numbers of threads of a CPU that it is meant for."""

    cases: Callable[[], Iterator[BenchCase]]
    threads: tuple[int, ...]


PRESETS = {"cells": Preset(cell_cases, (1,)), "steps": Preset(step_cases, (1, 2)), "first": Preset(first_cases, (1,))}


def thinned(cases: list[BenchCase], limit: int | None) -> list[BenchCase]:
    """At most so many of the cases, in their order: a sample from all over the grid, the same in every run."""
    if limit is None or limit >= len(cases):
        return cases
    return [cases[index] for index in sorted(random.Random(0).sample(range(len(cases)), limit))]
