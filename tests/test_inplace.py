"""Tensors that are written in place between forward and backward: allowed wherever torch.nn allows it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from module_pairs import assert_close
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn
from fused_rnn import functional, use_backend

CLASSES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
LAYERS, CELL_CLASSES = CLASSES[:3], CLASSES[3:]
Edit = Callable[[Tensor], Tensor]


def _index(y: Tensor) -> Tensor:
    y[..., 1] = 0
    return y


def _unrecorded(y: Tensor) -> Tensor:
    with torch.no_grad():
        y.mul_(0.5)
    return y


def _view(y: Tensor) -> Tensor:
    y[..., ::2].neg_()
    return y


# The edit, and the same without writing in place.
EDITS: dict[str, tuple[Edit, Edit]] = {
    "relu_": (lambda y: y.relu_(), lambda y: y.relu()),
    "mul_": (lambda y: y.mul_(3), lambda y: y * 3),
    "iadd": (lambda y: y.__iadd__(torch.ones_like(y)), lambda y: y + 1),
    "index": (_index, lambda y: y * (torch.arange(y.shape[-1], device=y.device) != 1)),
    "no_grad": (_unrecorded, lambda y: y + (y * 0.5 - y).detach()),
    "view": (_view, lambda y: y * (2 * (torch.arange(y.shape[-1], device=y.device) % 2) - 1)),
}


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def output_of(result: object) -> Tensor:
    while not isinstance(result, (Tensor, PackedSequence)):
        result = result[0]
    return result.data if isinstance(result, PackedSequence) else result


def skip_what_torch_refuses(kind: str, backend: str) -> None:
    if (kind, backend) == ("RNNCell", "reference"):
        pytest.skip("torch's tanh and relu keep their output, so that torch.nn.RNNCell and the reference refuse")


def make(kind: str, backend: str, dtype: torch.dtype, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return getattr(fused_rnn, kind)(4, 6, **options).to(device_of(backend), dtype)


def example(kind: str, backend: str, dtype: torch.dtype, packed: bool = False) -> Tensor | PackedSequence:
    shape = (3, 4) if kind.endswith("Cell") else (5, 3, 4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device_of(backend), dtype)
    return pack_padded_sequence(x, torch.tensor([5, 3, 1])) if packed else x


def gradients(module: nn.Module, x: Tensor | PackedSequence, edit: Edit) -> list[Tensor]:
    data = (x.data if isinstance(x, PackedSequence) else x).clone().requires_grad_()
    y = output_of(module(x._replace(data=data) if isinstance(x, PackedSequence) else data))
    edit(y).square().sum().backward()
    found = [data.grad, *(p.grad for p in module.parameters())]
    module.zero_grad()
    return found


VARIANTS = [
    *((kind, {}, False) for kind in CLASSES),
    *((kind, {"bidirectional": True, "num_layers": 2}, packed) for kind in LAYERS for packed in (False, True)),
    *((kind, {"batch_first": True, "num_layers": 2}, False) for kind in LAYERS),
    ("LSTM", {"proj_size": 3}, False),
    ("RNN", {"nonlinearity": "relu"}, False),
    ("RNN", {"nonlinearity": "identity"}, True),
]


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("kind", "options", "packed"), VARIANTS, ids=lambda v: str(v))
def test_output_written_in_place(
    kind: str, options: dict[str, object], packed: bool, dtype: torch.dtype, name: str, backend: str
) -> None:
    skip_what_torch_refuses(kind, backend)
    module, x = make(kind, backend, dtype, **options), example(kind, backend, dtype, packed)
    edit, same = EDITS[name]
    with use_backend(backend):
        found, expected = gradients(module, x, edit), gradients(module, x, same)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", CLASSES)
def test_final_state_written_in_place(kind: str, backend: str) -> None:
    skip_what_torch_refuses(kind, backend)
    module, x = make(kind, backend, torch.float64), example(kind, backend, torch.float64)

    def loss(edits: bool) -> Tensor:
        result = module(x)
        states = result if kind.endswith("Cell") else result[1]
        states = [states] if isinstance(states, Tensor) else states
        return sum((h.mul_(2) if edits else h * 2).sum() for h in states)

    with use_backend(backend):
        assert_close(
            torch.autograd.grad(loss(True), list(module.parameters())),
            torch.autograd.grad(loss(False), list(module.parameters())),
        )


@pytest.mark.parametrize("kind", CELL_CLASSES)
def test_state_reset_between_steps(kind: str, backend: str) -> None:
    """The loop of reinforcement learning: rows whose episode ended start again from zeros, written into the state."""
    skip_what_torch_refuses(kind, backend)
    module = make(kind, backend, torch.float64)
    torch_module = getattr(nn, kind)(4, 6, dtype=torch.float64, device=device_of(backend))
    torch_module.load_state_dict(module.state_dict())
    generator = torch.Generator().manual_seed(2)
    xs = torch.randn(4, 3, 4, dtype=torch.float64, generator=generator).to(device_of(backend))
    done = (torch.rand(4, 3, generator=generator) < 0.4).to(device_of(backend))

    def run(cell: nn.Module, edits: bool) -> list[Tensor]:
        state, total = None, 0
        for x, ended in zip(xs, done, strict=True):
            state = cell(x, state)
            parts = list(state) if isinstance(state, tuple) else [state]
            for i, part in enumerate(parts):
                if edits:
                    part[ended] = 0
                else:
                    parts[i] = part * ~ended.unsqueeze(1)
            state = tuple(parts) if isinstance(state, tuple) else parts[0]
            total = total + parts[0].square().sum()
        return list(torch.autograd.grad(total, list(cell.parameters())))

    with use_backend(backend):
        assert_close(run(module, True), run(torch_module, False))


def refuses(module: nn.Module, x: Tensor, write: Callable[[nn.Module, Tensor], None], requires: bool) -> bool:
    """Whether backward raises after `write`, with x or the weights requiring gradients."""
    for p in module.parameters():
        p.requires_grad_(not requires)
    x = x.clone().requires_grad_(requires)
    y = output_of(module(x))
    with torch.no_grad():
        write(module, x)
    try:
        y.sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return True
    return False


WRITES: dict[str, Callable[[nn.Module, Tensor], None]] = {
    "input": lambda module, x: x.zero_(),
    "input weight": lambda module, x: next(p for n, p in module.named_parameters() if "weight_ih" in n).zero_(),
    "recurrent weight": lambda module, x: next(p for n, p in module.named_parameters() if "weight_hh" in n).zero_(),
    "bias": lambda module, x: [p.zero_() for n, p in module.named_parameters() if "bias" in n],
}


@pytest.mark.parametrize("requires", (True, False), ids=("dx", "dW"))
@pytest.mark.parametrize("what", WRITES)
@pytest.mark.parametrize("kind", CLASSES)
def test_argument_written_in_place(kind: str, what: str, requires: bool, device: str) -> None:
    """Only an argument that a gradient depends on makes backward refuse: nothing is refused that torch.nn allows."""
    x = example(kind, device, torch.float64)
    module = make(kind, device, torch.float64)
    torch_module = getattr(nn, kind)(4, 6, dtype=torch.float64, device=device)
    torch_module.load_state_dict(module.state_dict())
    ours, theirs = (refuses(m, x, WRITES[what], requires) for m in (module, torch_module))
    assert theirs or not ours


def test_written_output_needs_its_arguments(device: str) -> None:
    """An output that was written is made again of the arguments, so that these must be as they were."""
    module, x = make("GRU", device, torch.float64), example("GRU", device, torch.float64).requires_grad_()
    y = module(x)[0]
    y.mul_(2)
    with torch.no_grad():
        module.bias_ih_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_buffers_of_lengths_and_resets_are_used_again(backend: str) -> None:
    device = device_of(backend)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64).to(device)
    weights = [p.detach().requires_grad_() for p in make("GRU", backend, torch.float64).parameters()]
    lengths, resets = torch.tensor([5, 2, 3], device=device), torch.zeros(5, 3, dtype=torch.bool, device=device)
    resets[2] = True

    def run(write: bool) -> tuple[Tensor, ...]:
        mine = lengths.clone(), resets.clone()
        y = functional.gru(x, weights, lengths=mine[0], resets=mine[1])[0]
        if write:
            mine[0].zero_()
            mine[1].fill_(True)
        return torch.autograd.grad(y.square().sum(), weights)

    with use_backend(backend):
        assert_close(run(True), run(False))


def saved_bytes(run: Callable[[], object]) -> int:
    """Bytes of the distinct storages that a forward keeps for backward."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return sum(storages.values())


@pytest.mark.parametrize(("kind", "slots"), (("RNN", 0), ("GRU", 4), ("LSTM", 5)))
def test_memory_kept_for_backward(kind: str, slots: int, device: str) -> None:
    """Input, weights, the output once and the slots of csrc/core/params.h; an output that nobody writes is not copied."""
    module, x = make(kind, device, torch.float32), torch.randn(50, 8, 4, device=device)
    weights = sum(p.numel() for p in module.parameters())
    expected = 4 * (x.numel() + weights + 50 * 8 * 6 * (1 + slots))
    assert saved_bytes(lambda: module(x)) <= expected * 1.02


@pytest.mark.parametrize("kind", ("GRUCell", "LSTMCell"))
def test_cells_do_not_keep_their_output(kind: str, device: str) -> None:
    module, x = make(kind, device, torch.float32), torch.randn(64, 4, device=device)
    slots = 4 if kind == "GRUCell" else 5
    weights = sum(p.numel() for p in module.parameters())
    assert saved_bytes(lambda: module(x)) <= 4 * (x.numel() + weights + 64 * 6 * slots) * 1.02


@pytest.mark.parametrize("kind", CLASSES)
def test_hooks_on_saved_tensors_and_checkpoints(kind: str, device: str) -> None:
    """A checkpoint runs forward, and with it the edit, once more for the tensors that backward asks for."""
    from torch.utils.checkpoint import checkpoint

    module, x = make(kind, device, torch.float64), example(kind, device, torch.float64).requires_grad_()
    parameters = [x, *module.parameters()]

    def edited(x: Tensor) -> Tensor:
        return output_of(module(x)).mul_(2).relu_()

    expected = torch.autograd.grad((output_of(module(x)) * 2).relu().sum(), parameters)
    assert_close(torch.autograd.grad(checkpoint(edited, x, use_reentrant=False).sum(), parameters), expected)
    with torch.autograd.graph.save_on_cpu():
        y = edited(x)
    assert_close(torch.autograd.grad(y.sum(), parameters), expected)


def test_compiled_edit(device: str) -> None:
    weights = [p.detach().requires_grad_() for p in make("GRU", device, torch.float64).parameters()]
    x = example("GRU", device, torch.float64)

    def loss(x: Tensor) -> Tensor:
        return functional.gru(x, weights)[0].relu_().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_close(torch.autograd.grad(compiled(x), weights), torch.autograd.grad(loss(x), weights))


@pytest.mark.parametrize("kind", CLASSES)
def test_second_derivative_after_an_edit(kind: str, device: str) -> None:
    module, x = make(kind, device, torch.float64), example(kind, device, torch.float64).requires_grad_()

    def penalty(edit: Edit) -> tuple[Tensor, ...]:
        (g,) = torch.autograd.grad(edit(output_of(module(x))).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [x, *module.parameters()], allow_unused=True, materialize_grads=True)

    assert_close(penalty(lambda y: y.mul_(2)), penalty(lambda y: y * 2))
