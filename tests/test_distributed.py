"""Two processes train as one does: DDP, FSDP2, tensor parallelism, DTensors, checkpoints that another number of ranks loads.

The batch of one process is shared out over the ranks; after some steps the weights are the same to 1e-6.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import WORLD, Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn import functional
from fused_rnn._backend import has_cpu_kernels

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo")

needs_kernels = pytest.mark.skipif(not has_cpu_kernels(), reason="needs the compiled extension, whose ops gather DTensors")

I, H, O, T, B = 6, 8, 3, 7, 4  # noqa: E741
KINDS = ["LSTM", "GRU", "RNN", "cells"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.stop(kill=True)


# --- what is trained ---


class Model(nn.Module):
    """Linear, a recurrence, Linear: [B, T, I] -> [B, T, O]."""

    def __init__(self, kind: str = "LSTM", checkpointed: bool = False) -> None:
        super().__init__()
        self.kind, self.checkpointed = kind, checkpointed
        self.before = nn.Linear(I, I)
        self.rnn: nn.Module
        if kind == "cells":
            self.rnn = fused_rnn.LSTMCell(I, H)
        elif kind == "own":
            self.rnn = fused_rnn.Layer(fused_rnn.zoo.LiGRU(), I, H, 2, batch_first=True, bidirectional=True)
        else:
            self.rnn = getattr(fused_rnn, kind)(I, H, 2, batch_first=True, bidirectional=True)
        self.after = nn.Linear(H if kind == "cells" else 2 * H, O)

    def recurrence(self, x: Tensor) -> Tensor:
        if self.kind != "cells":
            return self.rnn(x)[0]
        outputs, state = [], None
        for step in x.unbind(1):
            state = self.rnn(step, state)
            outputs.append(state[0])
        return torch.stack(outputs, 1)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.before(x)
        if lengths is not None:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.after(pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=T)[0])
        if self.checkpointed:
            return self.after(checkpoint(self.recurrence, x, use_reentrant=False))
        return self.after(self.recurrence(x))


def model_of(kind: str = "LSTM", checkpointed: bool = False) -> Model:
    torch.manual_seed(0)
    return Model(kind, checkpointed)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, T, I, generator=generator), torch.randn(B, T, O, generator=generator)


def own_rows(rank: int, *tensors: Tensor) -> list[Tensor]:
    return [tensor.chunk(WORLD)[rank] for tensor in tensors]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def train(model: nn.Module, x: Any, y: Any, steps: int = 3, optimizer: Any = None, **more: Any) -> None:
    optimizer = optimizer or optimizer_of(model)
    for _ in range(steps):
        loss = ((model(x, **more) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    start = dict(model_of(expected.kind).named_parameters())  # type: ignore[arg-type]
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(ours), theirs, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert (theirs - start[name]).abs().max() > 1e-4, f"{name} has not been trained"


def trained_alone(kind: str = "LSTM", **more: Any) -> Model:
    model = model_of(kind)
    train(model, *data(), **more)
    return model


def sharded(model: Model, layers: bool = True, **more: Any) -> Model:
    """layers: the recurrence is a shard of its own, gathered by hooks of its own; else the model's hooks gather it."""
    mesh = init_device_mesh("cpu", (WORLD,))
    if layers:
        fully_shard(model.rnn, mesh=mesh, **more)
    return fully_shard(model, mesh=mesh, **more)


# --- DDP ---


def ddp(rank: int, kind: str, checkpointed: bool, options: dict[str, bool]) -> None:
    model = model_of(kind, checkpointed)
    train(DistributedDataParallel(model, **options), *own_rows(rank, *data()))
    assert_same(model, trained_alone(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_ddp(ranks: Ranks, kind: str) -> None:
    ranks(ddp, kind, False, {})


@pytest.mark.slow
def test_ddp_own_cell(ranks: Ranks) -> None:
    ranks(ddp, "own", False, {})


@pytest.mark.parametrize("option", ["static_graph", "find_unused_parameters", "gradient_as_bucket_view"])
def test_ddp_with_checkpointing(ranks: Ranks, option: str) -> None:
    ranks(ddp, "LSTM", True, {option: True})


def ddp_packed(rank: int) -> None:
    lengths = torch.tensor([7, 2, 5, 7])
    model = model_of("GRU")
    train(DistributedDataParallel(model), *own_rows(rank, *data()), lengths=lengths.chunk(WORLD)[rank])
    assert_same(model, trained_alone("GRU", lengths=lengths))


def test_ddp_packed(ranks: Ranks) -> None:
    ranks(ddp_packed)


def ddp_converted(rank: int) -> None:
    model = fused_rnn.revert(model_of())
    wrapped = DistributedDataParallel(model)
    fused_rnn.convert(wrapped)
    assert type(model.rnn) is fused_rnn.LSTM
    train(wrapped, *own_rows(rank, *data()))
    assert_same(model, trained_alone())


def test_convert_after_ddp(ranks: Ranks) -> None:
    ranks(ddp_converted)


# --- FSDP2 ---


def fsdp(rank: int, kind: str, checkpointed: bool, reshard: bool, layers: bool = True) -> None:
    model = sharded(model_of(kind, checkpointed), layers, reshard_after_forward=reshard)
    x, y = data()
    optimizer, expected = optimizer_of(model), model_of(kind)
    expected_optimizer = optimizer_of(expected)
    # Inference between the steps: packed weights that were kept from before a step must not serve after it.
    for _ in range(3):
        train(model, *own_rows(rank, x, y), steps=1, optimizer=optimizer)
        train(expected, x, y, steps=1, optimizer=expected_optimizer)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected(x), rtol=0, atol=1e-6)
    assert_same(model, expected)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_fsdp(ranks: Ranks, kind: str, reshard: bool) -> None:
    ranks(fsdp, kind, False, reshard)


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp_of_the_model_alone(ranks: Ranks, reshard: bool) -> None:
    """Then the layer has no hooks, and plain CPU tensors take the call that passes nn.Module's by."""
    ranks(fsdp, "LSTM", False, reshard, False)


@pytest.mark.slow
def test_fsdp_own_cell(ranks: Ranks) -> None:
    ranks(fsdp, "own", False, True)


def test_fsdp_with_checkpointing(ranks: Ranks) -> None:
    ranks(fsdp, "GRU", True, True)


def fsdp_bfloat16(rank: int) -> None:
    """Weights and activations of 16 bits, gradients summed in float32: as one process that casts by hand."""
    x, y = data()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, expected = sharded(model_of(), mp_policy=policy), model_of()
    train(model, *own_rows(rank, x, y))
    optimizer = optimizer_of(expected)
    for _ in range(3):
        optimizer.zero_grad()
        for of_rank in range(WORLD):
            part = copy.deepcopy(expected).bfloat16()
            part.zero_grad()
            own_x, own_y = own_rows(of_rank, x, y)
            ((part(own_x.bfloat16()) - own_y) ** 2).mean().backward()
            for p, cast in zip(expected.parameters(), part.parameters(), strict=True):
                share = cast.grad.float() / WORLD
                p.grad = share if p.grad is None else p.grad + share
        optimizer.step()
    assert_same(model, expected)


def test_fsdp_mixed_precision(ranks: Ranks) -> None:
    ranks(fsdp_bfloat16)


def fsdp_from_meta(rank: int) -> None:
    with torch.device("meta"):
        model = Model()
    sharded(model).to_empty(device="cpu")
    for p, start in zip(model.parameters(), model_of().parameters(), strict=True):
        with torch.no_grad():
            p.copy_(distribute_tensor(start.data, p.device_mesh, p.placements))
    train(model, *own_rows(rank, *data()))
    assert_same(model, trained_alone())


def test_fsdp_from_meta_device(ranks: Ranks) -> None:
    ranks(fsdp_from_meta)


def sharded_then_converted(rank: int, subclasses: bool) -> str:
    model = sharded(fused_rnn.revert(model_of()))
    with pytest.warns(UserWarning) as caught:
        fused_rnn.convert(model, subclasses=subclasses)
    assert not isinstance(model.rnn, fused_rnn.LSTM)
    return str(caught[0].message)


@pytest.mark.parametrize("subclasses", [False, True])
def test_convert_after_fully_shard_says_why_not(ranks: Ranks, subclasses: bool) -> None:
    for message in ranks(sharded_then_converted, subclasses):
        assert "rnn (FSDPLSTM: sharded by fully_shard; convert first, then shard)" in message


# --- tensor parallelism: the recurrence is a replica, the layers around it are sharded ---


def tensor_parallel(rank: int, kind: str) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    plan = {"before": ColwiseParallel(output_layouts=Replicate()), "after": RowwiseParallel(input_layouts=Replicate())}
    model = parallelize_module(model_of(kind), mesh, plan)
    train(model, *data())
    assert_same(model, trained_alone(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_parallel(ranks: Ranks, kind: str) -> None:
    ranks(tensor_parallel, kind)


def two_dimensions(rank: int, shape: tuple[int, int]) -> None:
    """A mesh of data parallel and tensor parallel ranks: fully_shard over the first, the plan above over the second."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    plan = {"before": ColwiseParallel(output_layouts=Replicate()), "after": RowwiseParallel(input_layouts=Replicate())}
    model = parallelize_module(model_of(), mesh["tp"], plan)
    fully_shard(model.rnn, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    train(model, *(t.chunk(shape[0])[mesh["dp"].get_local_rank()] for t in data()))
    assert_same(model, trained_alone())


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_fsdp_and_tensor_parallel(ranks: Ranks, shape: tuple[int, int]) -> None:
    ranks(two_dimensions, shape)


def dtensors(rank: int, kind: str, placement: Any, weights: Any) -> None:
    """All tensors of the model are DTensors: its weights in one placement, its data in another."""
    mesh = init_device_mesh("cpu", (WORLD,))

    def distribute(name: str, module: nn.Module, mesh: Any) -> None:
        for key, p in module.named_parameters(recurse=False):
            placed = weights if p.shape[0] % WORLD == 0 and module.__class__ is not nn.Linear else Replicate()
            module.register_parameter(key, nn.Parameter(distribute_tensor(p.data, mesh, [placed])))

    model = distribute_module(model_of(kind), mesh, distribute)
    train(model, *(distribute_tensor(t, mesh, [placement]) for t in data()))
    assert_same(model, trained_alone(kind))


@needs_kernels
@pytest.mark.parametrize("weights", [Replicate(), Shard(0)], ids=repr)
@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(1)], ids=repr)
def test_dtensors(ranks: Ranks, placement: Any, weights: Any) -> None:
    """Same data on every rank, other rows, other steps."""
    ranks(dtensors, "LSTM", placement, weights)


@needs_kernels
@pytest.mark.parametrize("kind", ["GRU", "cells", pytest.param("own", marks=pytest.mark.slow)])
def test_dtensors_of_every_op(ranks: Ranks, kind: str) -> None:
    ranks(dtensors, kind, Shard(0), Replicate())


def dtensor_rows(rank: int, batch: int) -> None:
    """lengths and resets, plain or distributed, go with the rows. Of an odd number, rank 0 has one more."""
    mesh = init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(2)
    shapes = [(T, batch, I), (1, batch, H), (3 * H, I), (3 * H, H), (3 * H,), (3 * H,)]
    placed = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    lengths, resets = torch.tensor([7, 0, 3, 5][:batch]), torch.rand(T, batch, generator=generator) < 0.3
    leaves = [t.clone().requires_grad_() for t in placed]
    y, last = functional.gru(leaves[0], leaves[2:], leaves[1], lengths=lengths, resets=resets)
    (y.sin().sum() + last.sum()).backward()
    for own in (True, False):
        where = [Shard(1), Shard(1), *[Replicate()] * 4]
        spread = [distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in zip(placed, where, strict=True)]
        rows = (distribute_tensor(lengths, mesh, [Shard(0)]), distribute_tensor(resets, mesh, [Shard(1)]))
        given = rows if own else (lengths, resets)
        got, got_last = functional.gru(spread[0], spread[2:], spread[1], lengths=given[0], resets=given[1])
        (got.sin().sum() + got_last.sum()).backward()
        torch.testing.assert_close(got.full_tensor(), y, rtol=0, atol=1e-12)
        torch.testing.assert_close(got_last.full_tensor(), last, rtol=0, atol=1e-12)
        for leaf, tensor in zip(leaves, spread, strict=True):
            torch.testing.assert_close(tensor.grad.full_tensor(), leaf.grad, rtol=0, atol=1e-12)


@needs_kernels
@pytest.mark.parametrize("batch", [4, 3, 1])
def test_dtensors_with_lengths_and_resets(ranks: Ranks, batch: int) -> None:
    ranks(dtensor_rows, batch)


def dtensor_wrong_lengths(rank: int) -> str:
    """Every rank looks at all of them: each raises the same error, and none waits for another."""
    mesh = init_device_mesh("cpu", (WORLD,))
    x, *weights = (distribute_tensor(t, mesh, [Replicate()]) for t in (torch.randn(T, B, I), *nn.GRU(I, H).parameters()))
    lengths = distribute_tensor(torch.tensor([1, 2, 3, T + 1]), mesh, [Shard(0)])
    with pytest.raises(ValueError) as caught:
        functional.gru(x, weights, lengths=lengths)
    return str(caught.value)


@needs_kernels
def test_dtensors_with_wrong_lengths(ranks: Ranks) -> None:
    for message in ranks(dtensor_wrong_lengths):
        assert message == f"lengths: expected values from 0 to {T}, got [1, 2, 3, {T + 1}]"


def dtensor_mixtures(rank: int) -> list[str]:
    mesh = init_device_mesh("cpu", (WORLD,))
    local, x = fused_rnn.LSTM(I, H), torch.randn(T, B, I)
    spread = distribute_module(fused_rnn.LSTM(I, H), mesh)
    messages = []
    for layer, input in ((spread, x), (local, distribute_tensor(x, mesh, [Replicate()]))):
        with pytest.raises(TypeError) as caught:
            layer(input)
        messages.append(str(caught.value))
    return messages


@needs_kernels
def test_dtensors_and_tensors_together_are_an_error(ranks: Ranks) -> None:
    for first, second in ranks(dtensor_mixtures):
        assert first.startswith("input: expected a DTensor as another tensor of the call is one, got Tensor")
        assert second.startswith("weights[0]: expected a DTensor as another tensor of the call is one, got ")


# --- options on DTensors ---

NUMBERS: dict[str, Any] = {"zoneout": 0.3, "recurrent_dropout": 0.2, "state_clip": 0.2}


def with_options(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
    if kind == "own":
        return fused_rnn.Layer(fused_rnn.zoo.LSTM(), 4, 6, **sizes, **options)
    made: nn.Module = getattr(fused_rnn, kind)(4, 6, **sizes, **options)
    return made


def placed(module: nn.Module, mesh: Any, x: Tensor, placement: Any) -> Any:
    """Its weights replicated, the input [T, B, I] in this placement."""

    def distribute(name: str, module: nn.Module, mesh: Any) -> None:
        for key, p in module.named_parameters(recurse=False):
            module.register_parameter(key, nn.Parameter(distribute_tensor(p.data, mesh, [Replicate()])))

    return distribute_module(module, mesh, distribute), distribute_tensor(x, mesh, [placement])


def options_of_dtensors(rank: int, kind: str, placement: Any, options: dict[str, Any], training: bool) -> None:
    """Numbers among the options, of eval mode and state_clip, are those of one process."""
    mesh, x = (
        init_device_mesh("cpu", (WORLD,)),
        3 * torch.randn(5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5)),
    )
    alone = with_options(kind, **options).train(training)
    module, given = placed(with_options(kind, **options).train(training), mesh, x, placement)
    results = []
    for m, t in ((alone, x), (module, given)):
        y = m(t)[0]
        y.square().sum().backward()
        results.append([whole(y.detach()), *(whole(p.grad) for p in m.parameters())])
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@needs_kernels
@pytest.mark.parametrize("placement", [Replicate(), Shard(1)], ids=repr)
@pytest.mark.parametrize(
    ("options", "training"),
    [(NUMBERS, False), ({"state_clip": 0.2}, True), ({"checkpoint": 2}, True), ({"checkpoint": 2, "state_clip": 0.2}, True)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "own"])
def test_options_of_dtensors(ranks: Ranks, kind: str, options: dict[str, Any], training: bool, placement: Any) -> None:
    ranks(options_of_dtensors, kind, placement, options, training)


def masks_of_dtensors(rank: int, kind: str, options: dict[str, Any]) -> str:
    module, x = placed(
        with_options(kind, **options), init_device_mesh("cpu", (WORLD,)), torch.randn(5, 4, 4).double(), Shard(1)
    )
    with pytest.raises((NotImplementedError, TypeError, RuntimeError)) as caught:
        module(x)
    return f"{type(caught.value).__name__}: {caught.value}"


@needs_kernels
@pytest.mark.parametrize("more", [{}, {"checkpoint": 2}], ids=["", "checkpoint"])
@pytest.mark.parametrize("options", [{"zoneout": 0.3}, {"recurrent_dropout": 0.3}], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "own"])
def test_masks_of_dtensors_are_refused(ranks: Ranks, kind: str, options: dict[str, Any], more: dict[str, Any]) -> None:
    for message in ranks(masks_of_dtensors, kind, {**options, **more}):
        assert message.startswith("NotImplementedError: a mask of zoneout or recurrent_dropout (in training): has no rule")


@needs_kernels
@pytest.mark.parametrize("kind", ["LSTM", "own"])
def test_masked_weights_of_dtensors_are_refused(ranks: Ranks, kind: str) -> None:
    for message in ranks(masks_of_dtensors, kind, {"weight_dropout": 0.3}):
        assert message.startswith("NotImplementedError: weight_dropout in training")


# --- checkpoints (torch.distributed.checkpoint) ---


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    loaded = states(model, optimizer)
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])


def save_and_resume(rank: int, folder: Path) -> None:
    rows = own_rows(rank, *data())
    model = sharded(model_of())
    optimizer = optimizer_of(model)
    train(model, *rows, steps=2, optimizer=optimizer)
    dcp.save(states(model, optimizer), checkpoint_id=folder)

    torch.manual_seed(5)
    other = sharded(Model())
    other_optimizer = optimizer_of(other)
    load(other, other_optimizer, folder)
    train(other, *rows, steps=1, optimizer=other_optimizer)
    assert_same(other, trained_alone())


def test_checkpoint_resumes_on_two_ranks_and_on_one(ranks: Ranks, tmp_path: Path) -> None:
    ranks(save_and_resume, tmp_path)
    model = Model()
    optimizer = optimizer_of(model)
    load(model, optimizer, tmp_path)
    train(model, *data(), steps=1, optimizer=optimizer)
    assert_same(model, trained_alone())
