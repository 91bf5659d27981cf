"""What :func:`fused_rnn.explain` returns: frozen dataclasses with the same fields for every backend.

A field is None, or an empty tuple, where a backend has nothing to say. ``str()`` of an Explanation is what explain prints;
``dataclasses.asdict`` makes plain values of it, which ``json.dumps`` takes.

Units: us are microseconds that the CUDA planner's cost model expects (published figures, no measurement), bytes are bytes.
Sizes as in :mod:`fused_rnn.functional`: T time steps, B batch rows, I input, H hidden, P output, D directions.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

__all__ = ["Candidate", "Explanation", "Kernel", "LayerPlan", "Overlap", "PassPlan", "Rejection", "Shares"]


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A backend or a kernel family that does not serve the call."""

    name: str  # "cuda", "cpu"; "single", "step", "grid", "cluster", "block", "gemm", "cudnn"
    reason: str  # a clause


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One CUDA kernel of a pass over one layer."""

    name: str  # its role: "forward", "project", "backward", ...; of a persistent family the family's name
    persistent: bool  # a launch covers many steps and holds the weights on the chip; else it covers one
    math: str  # arithmetic of its products: "fp64", "fp32", "tf32", "fp16", "bf16"
    grid: tuple[int, int, int]  # of a launch: batch tiles, unit tiles, directions; persistent: slices, groups, directions
    threads: int  # of a block
    units: int  # hidden units of a block
    rows: int  # batch rows of a block; persistent: of a group, which are those of each of its blocks
    launches: int  # of the pass; backward has one less where nobody asks for the gradient of h0
    stages: int | None  # of its ring of tiles in shared memory; None: it has none
    smem_bytes: int  # shared memory of a block
    weight_registers: int  # of a thread, that hold recurrent weights over all steps
    weight_bytes_in_registers: int  # of a block
    weight_bytes_in_smem: int  # of a block
    us: float | None  # of one launch; None for a persistent kernel, whose time is that of the pass

    @property
    def blocks(self) -> int:
        """Blocks of one launch."""
        x, y, z = self.grid
        return x * y * z


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A kernel family that could serve the pass, taken or not."""

    family: str
    us: float  # of the layer
    us_per_step: float  # of one step of its recurrence


@dataclasses.dataclass(frozen=True)
class Shares:
    """How the threads of a CPU call divide a layer: into directions x batch_rows x hidden_units shares."""

    directions: int  # 2: the directions run beside each other; 1: one after the other
    batch_rows: int
    hidden_units: int


@dataclasses.dataclass(frozen=True)
class PassPlan:
    """How forward or backward of one layer, all its directions, is carried out."""

    family: str | None = None  # CUDA: "single", "step", "grid", "cluster", "block", "gemm" or "cudnn"
    reason: str | None = None  # CUDA: why this family
    rejected: tuple[Rejection, ...] = ()  # CUDA: every other family
    candidates: tuple[Candidate, ...] = ()  # CUDA: the families that could serve it
    cheapest: str | None = None  # CUDA: the family of the candidates that takes least
    kernels: tuple[Kernel, ...] = ()  # CUDA: of a step in their order, or the one of a persistent family
    launches: int | None = None  # CUDA but cuDNN: of all kernels, without overlap of layers
    overlapped_launches: bool | None = None  # CUDA: a launch may begin before the one before it has ended
    threads: int | None = None  # CPU: of the call
    shares: Shares | None = None  # CPU
    weights: str | None = None  # CPU: how W_hh lies in memory while the call runs
    workspace_bytes: int | None = None  # CUDA: beside inputs, outputs and what is saved for backward
    us: float | None = None  # CUDA: of the layer
    us_per_step: float | None = None  # CUDA: of one step of its recurrence
    text: str = ""  # all this in words, a line or more


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One layer, all its directions. A cell is a layer of one step."""

    T: int
    B: int
    N: int  # rows in memory: T * B, fewer of a PackedSequence
    I: int  # noqa: E741
    H: int
    P: int
    D: int
    forward: PassPlan  # empty on the reference and where B is 0
    backward: PassPlan | None  # None without gradients
    # Of the tensors that forward makes for backward, beside the layer's input, output, weights and masks of its options;
    # None on the reference, and of cuDNN, which does not say.
    saved_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Whether the layers of a stack run beside each other in one pass."""

    chunks: int  # of the sequence; 1: the layers run in turn
    chunk_steps: int  # time steps of a chunk
    concurrent_layers: int  # recurrences that run at once
    sms_in_use: int  # multiprocessors that these take
    sms_idle: int  # multiprocessors that are left beside them
    us: float  # of the stack
    us_in_turn: float  # of the stack without overlap
    reason: str
    text: str  # all this in words


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """How the call of a module would be carried out."""

    module: str  # its class
    cell: str  # "lstm", "gru", "rnn_tanh", "rnn_relu" or "rnn_identity", or the class of your own cell
    dtype: str  # in which the call runs: "float32"
    packed: bool  # the input is a PackedSequence
    device: str  # explained for: "cpu", "cuda:0", "H100", "the given device"
    backend: str  # "cuda", "cpu" or "reference"
    reason: str  # why this backend, a clause
    rejected: tuple[Rejection, ...]  # the backends that come before it, and why each does not serve the call
    instruction_set: str | None  # CPU
    forced_family: str | None  # CUDA: FUSED_RNN_PLAN, a kernel family or "cheapest"; None: not set
    layers: tuple[LayerPlan, ...]  # in their order, the first reads the input
    forward_overlap: Overlap | None  # CUDA: of forward of the stack; None for a cell and an empty batch
    backward_overlap: Overlap | None  # CUDA: of backward, where forward's layers overlap
    family: str | None = None  # CUDA: what serves the call if nothing is forced; None: the planner's choice for each pass
    record: str | None = None  # why: what is recorded of such calls on a GPU that is there (python -m fused_rnn tune --list)

    def __repr__(self) -> str:
        return f"<fused_rnn.Explanation: {self.module} on {self.backend}, {len(self.layers)} layer(s)>"

    def __str__(self) -> str:
        return "\n".join([*self._lines_of_call(), *self._lines_of_layers()])

    def _overlaps(self) -> list[tuple[str, Overlap]]:
        named = (("forward", self.forward_overlap), ("backward", self.backward_overlap))
        return [(name, overlap) for name, overlap in named if overlap is not None]

    def _lines_of_call(self) -> Iterator[str]:
        first = self.layers[0]
        packed = f" packed into {first.N} rows" * self.packed
        on = f", {self.instruction_set}" if self.instruction_set else ""
        call = f"{self.module}, {self.dtype}, T={first.T} B={first.B}{packed}"
        yield f"{call}: {self.backend} backend{on} ({self.reason})"
        for other in self.rejected:
            yield f"not {other.name}: {other.reason}"
        if self.forced_family:
            yield f"FUSED_RNN_PLAN={self.forced_family}"
        if self.family:
            yield f"{self.family} serves: {self.record}"
        for name, overlap in self._overlaps():
            yield f"{name}: {overlap.text}"

    def _lines_of_layers(self) -> Iterator[str]:
        """Equal neighbours are told once."""
        overlaps = any(overlap.chunks > 1 for _, overlap in self._overlaps())
        alone = "; its times are those of its recurrence alone, without overlap" * overlaps
        number = 1
        for layer, group in itertools.groupby(self.layers):
            last = number + len(list(group)) - 1
            which = f"layer {number}" if last == number else f"layers {number} to {last}, each"
            sizes = f"I={layer.I} H={layer.H}" + (f" P={layer.P}" if layer.P != layer.H else "")
            yield f"{which}: {sizes}, {layer.D} direction{'s' * (layer.D > 1)}{alone}"
            if layer.B == 0:
                yield "  nothing to do: the batch is empty"
            for name, plan in (("forward", layer.forward), ("backward", layer.backward)):
                if plan is not None and plan.text:
                    yield f"  {name}: " + plan.text.replace("\n", "\n  ")
            if layer.backward is not None and layer.saved_bytes is not None:
                yield f"  saves {layer.saved_bytes} bytes for backward, beside input and output"
            number = last + 1
