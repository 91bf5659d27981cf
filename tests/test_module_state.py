"""What code does to modules besides calling them: pickling, copying, moving, hooks, and everything that replaces weights."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from module_pairs import CELLS, CLASSES, LAYERS, assert_close, device_of, gradients, make_pair, raised, random_state
from torch import nn
from torch.nn.utils import parametrize, prune

import fused_rnn
from fused_rnn import use_backend

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated", "ignore:`torch.jit")


def example(module: nn.Module, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[torch.Tensor, Any]:
    """(input, hx) for a layer or a cell."""
    g, kwargs = torch.Generator().manual_seed(0), {"dtype": dtype, "device": device}
    sizes = (2, module.input_size) if isinstance(module, nn.RNNCellBase) else (5, 2, module.input_size)
    x = torch.randn(sizes, generator=g, dtype=torch.float64).to(**kwargs)
    return x, random_state(module, 2, g, **kwargs)


def named(name: str, weight: str) -> str:
    return weight if name in CELLS else f"{weight}_l0"


# --- pickles ---


@pytest.mark.parametrize("name", CLASSES)
def test_pickle_and_torch_save(backend: str, name: str) -> None:
    ours, _ = make_pair(name, 4, 6, dtype=torch.float64)
    ours.eval()
    ours.note = "kept"
    x, hx = example(ours, dtype=torch.float64)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False), copy.deepcopy(ours)]
    with use_backend("reference"):
        for clone in copies:
            assert type(clone) is type(ours) and clone.note == "kept" and not clone.training
            assert_close(clone(x, hx), ours(x, hx))
            with torch.no_grad():
                getattr(clone, named(name, "weight_hh")).add_(1)
            assert not torch.equal(clone(x, hx)[0], ours(x, hx)[0])


@pytest.mark.parametrize("kwargs", [{}, {"bias": False}, {"bidirectional": True, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_old_pickles(name: str, kwargs: dict[str, Any]) -> None:
    """States as older versions of torch.nn wrote them, some with fields missing, go through __setstate__."""
    theirs = getattr(nn, name)(4, 6, **kwargs, dtype=torch.float64)
    x, hx = example(theirs, dtype=torch.float64)
    now = theirs.__getstate__()

    def without(*keys: str) -> dict[str, Any]:
        return {key: value for key, value in now.items() if key not in keys}

    old_lists = [[getattr(theirs, weight) for weight in group] for group in theirs._all_weights]
    states = {
        "as now": now,
        "with _flat_weight_refs": {**now, "_flat_weight_refs": []},
        "no proj_size": without("proj_size"),
        "no _flat_weights": without("proj_size", "_flat_weights", "_flat_weights_names"),
        "all_weights by name": {
            **without("proj_size", "_flat_weights", "_flat_weights_names", "_all_weights"),
            "all_weights": theirs._all_weights,
            "_data_ptrs": [],
        },
        "all_weights are Parameters": {
            **without("proj_size", "_flat_weights", "_flat_weights_names", "_all_weights"),
            "all_weights": old_lists,
        },
    }
    for version, state in states.items():
        cls = getattr(fused_rnn, name)
        module = cls.__new__(cls)
        module.__setstate__(copy.deepcopy(state))
        with use_backend("reference"):
            assert_close(module(x, hx), theirs(x, hx), version)
        assert module.proj_size == 0 and len(module.all_weights) == len(theirs.all_weights), version
        assert repr(module) == repr(theirs), version
        assert "_flat_weights" not in module.__dict__
        module.double().float()
        assert pickle.loads(pickle.dumps(module)).weight_hh_l0.dtype == torch.float32


@pytest.mark.parametrize("name", CLASSES)
def test_torchs_pickle_loads_as_ours_while_patched(name: str) -> None:
    theirs = getattr(nn, name)(4, 6)
    blob = pickle.dumps(theirs)
    with fused_rnn.patched():
        ours = pickle.loads(blob)
    assert type(ours) is getattr(fused_rnn, name) and type(pickle.loads(blob)) is type(theirs)
    x, hx = example(ours)
    with use_backend("reference"):
        assert_close(ours(x, hx), theirs(x, hx))


# --- moving and converting ---


@pytest.mark.parametrize("name", CLASSES)
def test_dtypes_and_meta(backend: str, name: str) -> None:
    device = device_of(backend)
    with use_backend(backend):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            ours, theirs = make_pair(name, 4, 6)
            ours = ours.to(device=device, dtype=dtype)
            theirs = theirs.to(device=device, dtype=dtype).double()
            x, hx = example(ours, device=device, dtype=dtype)
            wide = tuple(h.double() for h in hx) if isinstance(hx, tuple) else hx.double()
            expected = theirs(x.double(), wide)
            output = ours(x, hx)
            assert_close(output, _cast(expected, dtype))
        assert ours.half() is ours and next(ours.parameters()).dtype == torch.float16
    with use_backend(None if backend == "cuda" else backend if backend == "reference" else None):
        meta = getattr(fused_rnn, name)(4, 6, device="meta")
        x, hx = example(meta, device="meta")
        out = meta(x, hx)
        first = out if isinstance(out, torch.Tensor) else out[0]
        assert first.is_meta and first.shape == (*x.shape[:-1], 6)
        real = meta.to_empty(device=device)
        real.reset_parameters()
        x, hx = example(real, device=device)
        real(x, hx)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) else tuple(_cast(v, dtype) for v in value)


@pytest.mark.parametrize("name", LAYERS)
def test_moving_never_leaves_old_weights_behind(name: str) -> None:
    ours, _ = make_pair(name, 4, 6)
    for change in (nn.Module.double, nn.Module.half, nn.Module.float):
        change(ours)
        assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
    ours.weight_hh_l0 = nn.Parameter(torch.zeros(ours.weight_hh_l0.shape))
    assert ours._flat_weights[1] is ours.weight_hh_l0
    old, new = ours.weight_ih_l0, nn.Parameter(torch.zeros(ours.weight_ih_l0.shape))
    torch.utils.swap_tensors(old, new)  # torch.nn refuses: it holds weak references to its weights
    with use_backend("reference"):
        y = ours(torch.ones(2, 1, 4))[0]
        assert_close(y, ours(torch.zeros(2, 1, 4))[0])


@pytest.mark.parametrize("name", CLASSES)
def test_autocast_gives_the_autocast_dtype(backend: str, name: str) -> None:
    """For every class; torch.nn's GRU, LSTMCell and GRUCell return float32 under CPU autocast."""
    device = device_of(backend)
    with use_backend(backend):
        for dtype in (torch.bfloat16, torch.float16):
            ours, theirs = make_pair(name, 4, 6, device=device)
            x, hx = example(ours, device=device)
            for args in ((x,), (x, hx), (x.to(dtype), hx), (x.to(dtype), _cast(hx, dtype))):
                with torch.autocast(device, dtype=dtype):
                    out = ours(*args)
                tensors = out if isinstance(out, torch.Tensor) else (out[0], out[1])
                flat = [
                    t
                    for t in (tensors if isinstance(tensors, tuple) else (tensors,))
                    for t in ([t] if isinstance(t, torch.Tensor) else t)
                ]
                assert all(t.dtype == dtype for t in flat)
            assert_close(out, _cast(theirs(x, hx), dtype))
            flat[0].sum().backward()
            assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
            with torch.autocast(device, dtype=dtype), torch.autocast(device, enabled=False):
                narrow = x.to(dtype)
                assert raised(lambda m=ours, v=narrow: m(v))[0] in (ValueError, RuntimeError)


# --- what replaces weights ---


@pytest.mark.parametrize("name", CLASSES)
def test_functional_call(backend: str, name: str) -> None:
    device = device_of(backend)
    with use_backend(backend):
        ours, theirs = make_pair(name, 4, 6, dtype=torch.float64, device=device)
        x, hx = example(ours, dtype=torch.float64, device=device)
        before = ours(x, hx)
        other = {key: (value * 2).detach().requires_grad_() for key, value in ours.named_parameters()}
        output = torch.func.functional_call(ours, other, (x, hx))
        assert_close(output, torch.func.functional_call(theirs, other, (x, hx)))
        first = output if isinstance(output, torch.Tensor) else output[0]
        first.sum().backward()
        assert all(value.grad is not None for value in other.values())
        assert all(p.grad is None for p in ours.parameters())
        assert_close(ours(x, hx), before)
        partial = {key: other[key] for key in list(other)[:1]}
        assert_close(
            torch.func.functional_call(ours, partial, (x, hx)), torch.func.functional_call(theirs, partial, (x, hx))
        )


@pytest.mark.parametrize(
    "how", ["old weight_norm", "weight_norm", "spectral_norm", "old spectral_norm", "orthogonal", "prune"]
)
@pytest.mark.parametrize("name", CLASSES)
def test_reparametrizations(backend: str, name: str, how: str) -> None:
    if how == "old spectral_norm" and device_of(backend) == "cuda":
        pytest.skip("its power iteration is not bitwise the same twice on a GPU")
    apply = {
        "old weight_norm": nn.utils.weight_norm,
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "spectral_norm": nn.utils.parametrizations.spectral_norm,
        "old spectral_norm": nn.utils.spectral_norm,
        "orthogonal": nn.utils.parametrizations.orthogonal,
        "prune": lambda m, weight: prune.l1_unstructured(m, weight, amount=0.3),
    }[how]
    device = device_of(backend)
    with use_backend(backend):
        pair = make_pair(name, 4, 6, dtype=torch.float64, device=device)
        results = []
        for module in pair:
            x, hx = example(module, dtype=torch.float64, device=device)
            torch.manual_seed(3)
            apply(module, named(name, "weight_hh"))
            if how == "spectral_norm":  # torch.nn reads a parametrized weight several times a call: as many power iterations
                module.eval()
            first = module(x, hx)
            grads = gradients(module, first, [])
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(1.25)
            results.append((first, grads, module(x, hx), module.eval()(x, hx), list(module.parameters())))
        assert_close(results[0], results[1])
        if how in ("weight_norm", "spectral_norm", "orthogonal"):
            ours = pair[0]
            assert isinstance(ours, getattr(fused_rnn, name)) and parametrize.is_parametrized(ours)
            clone = copy.deepcopy(ours)
            assert_close(clone(x, hx), results[0][3])
            parametrize.remove_parametrizations(ours, named(name, "weight_hh"))
            assert type(ours) is getattr(fused_rnn, name)
            assert_close(ours(x, hx), results[0][3])
        elif how == "old weight_norm":
            nn.utils.remove_weight_norm(pair[0], named(name, "weight_hh"))
            assert_close(pair[0](x, hx), results[0][3])
        elif how == "prune":
            prune.remove(pair[0], named(name, "weight_hh"))
            assert_close(pair[0](x, hx), results[0][3])


# --- hooks, replicas, tracing ---


@pytest.mark.parametrize("name", CLASSES)
def test_hooks(backend: str, name: str) -> None:
    device, events = device_of(backend), []
    with use_backend(backend):
        ours, _ = make_pair(name, 4, 6, device=device)
        x, hx = example(ours, device=device)
        ours.register_forward_pre_hook(lambda m, args: events.append("pre"))
        ours.register_forward_hook(lambda m, args, out: events.append("post"))
        ours.register_full_backward_hook(lambda m, gi, go: events.append("backward"))
        getattr(ours, named(name, "weight_hh")).register_hook(lambda g: events.append("weight"))
        out = ours(x.requires_grad_(), hx)
        (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()
        assert sorted(events) == ["backward", "post", "pre", "weight"]


@pytest.mark.parametrize("name", CLASSES)
def test_data_parallel_replica(name: str) -> None:
    """Replicas hold plain tensors under the names of the parameters."""
    ours, _ = make_pair(name, 4, 6)
    x, hx = example(ours)
    replica = ours._replicate_for_data_parallel()
    for key, value in ours.named_parameters():
        setattr(replica, key, value * 2)
    assert not list(replica.parameters())
    other = {key: value * 2 for key, value in ours.named_parameters()}
    with use_backend("reference"):
        assert_close(replica(x, hx), torch.func.functional_call(ours, other, (x, hx)))


@pytest.mark.parametrize("name", CLASSES)
def test_jit(backend: str, name: str) -> None:
    """torch.jit.script says what it cannot do and leaves the model as it was; torch.jit.trace works."""
    device = device_of(backend)
    model = nn.Sequential(getattr(fused_rnn, name)(4, 6, device=device))
    with pytest.raises(NotImplementedError, match=f"cannot compile fused_rnn.{name}: use torch.jit.trace"):
        torch.jit.script(model)
    assert type(model[0]) is getattr(fused_rnn, name)
    with use_backend(backend):
        x, hx = example(model[0], device=device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # the checks of shapes, as in torch.nn
            traced = torch.jit.trace(model[0], (x, hx))
        y = torch.randn_like(x)
        assert_close(traced(y, hx), model[0](y, hx))


@pytest.mark.parametrize("name", CLASSES)
def test_submodule_of_a_model(name: str) -> None:
    """Names in a state_dict, strict loading from torch.nn's, zero_grad, requires_grad_."""
    theirs = nn.ModuleDict({"rnn": getattr(nn, name)(4, 6), "out": nn.Linear(6, 2)})
    ours = nn.ModuleDict({"rnn": getattr(fused_rnn, name)(4, 6), "out": nn.Linear(6, 2)})
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    ours.requires_grad_(False)
    x, hx = example(ours["rnn"])
    with use_backend("reference"):
        out = ours["rnn"](x, hx)
    assert not (out if isinstance(out, torch.Tensor) else out[0]).requires_grad
    assert str(ours.to(torch.float64)["rnn"]) == str(theirs["rnn"])
