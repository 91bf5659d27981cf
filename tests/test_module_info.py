"""PyTorch's own module tests: the inputs and error inputs of module_db for the six classes, run on ours and on torch.nn's.

Every sample is one case for every backend, dtype and mode. A case passes if construction and forward give torch.nn's result
(values, dtypes, shapes), gradients agree, the sample's own reference function agrees, and the module survives a pickle.
"""

from __future__ import annotations

import contextlib
import pickle
from typing import Any

import pytest
import torch
from module_pairs import CLASSES, assert_close, device_of, flatten, gradients
from torch import nn

import fused_rnn
from fused_rnn import use_backend

pytest.importorskip("expecttest", reason="needs expecttest, which torch.testing._internal imports")
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

# That import forbids every later change of torch.backends' flags in this process; other tests set them.
torch.backends.__allow_nonbracketed_mutation_flag = True

INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls in [getattr(nn, c) for c in CLASSES]}
DTYPES = (torch.float64, torch.float32)
COUNTS: dict[str, int] = {}


@pytest.fixture(scope="module", autouse=True)
def _print_counts(request: pytest.FixtureRequest) -> Any:
    """Prints how many cases passed, also where output is captured."""
    yield
    manager = request.config.pluginmanager.get_plugin("capturemanager")
    total = ", ".join(f"{count} {what}" for what, count in sorted(COUNTS.items()))
    with manager.global_and_fixture_disabled() if manager else contextlib.nullcontext():
        print(f"\nModuleInfo cases passed: {sum(COUNTS.values())} ({total})")


def test_all_six_are_there() -> None:
    assert sorted(INFOS) == sorted(CLASSES)


def samples(name: str, device: str, dtype: torch.dtype, training: bool) -> list[Any]:
    """Samples of a class; the packed ones too, which PyTorch keeps for tests of its own."""
    info = INFOS[name]
    kwargs = {"device": device, "dtype": dtype, "requires_grad": True, "training": training}
    found = list(info.module_inputs_func(info, **kwargs))
    if name in ("RNN", "GRU"):
        found += [
            sample
            for sample in info.module_inputs_func(info, with_packed_sequence=True, **kwargs)
            if isinstance(sample.forward_input.args[0], nn.utils.rnn.PackedSequence)
        ]
    return found


def leaves(args: tuple[Any, ...]) -> list[torch.Tensor]:
    return [t for t in flatten(list(args)) if t.requires_grad]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_forward(backend: str, name: str, dtype: torch.dtype, training: bool) -> None:
    device = device_of(backend)
    with use_backend(backend):
        for index, sample in enumerate(samples(name, device, dtype, training)):
            args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
            inputs, named = sample.forward_input.args, sample.forward_input.kwargs
            results, modules = [], []
            for namespace in (fused_rnn, nn):
                torch.manual_seed(index)
                module = getattr(namespace, name)(*args, **kwargs, device=device, dtype=dtype).train(training)
                output = module(*inputs, **named)
                results.append((output, gradients(module, output, leaves(inputs))))
                modules.append(module)
            what = f"{name} sample {index}: {args} {kwargs}"
            assert repr(modules[0]) == repr(modules[1])
            assert_close(*results, what)
            packed = isinstance(inputs[0], nn.utils.rnn.PackedSequence)
            if sample.reference_fn is not None and not packed:  # its reference knows dense inputs only
                assert_close(results[0][0], sample.reference_fn(modules[0], *inputs, **named), what)
            assert_close(pickle.loads(pickle.dumps(modules[0]))(*inputs, **named), results[0][0], what)
            COUNTS[f"{backend} forward"] = COUNTS.get(f"{backend} forward", 0) + 1


@pytest.mark.parametrize("name", CLASSES)
def test_gradcheck(backend: str, name: str) -> None:
    """PyTorch's test_grad and test_gradgrad: derivatives of every sample by finite differences, in float64."""
    device = device_of(backend)
    with use_backend(backend):
        for index, sample in enumerate(samples(name, device, torch.float64, True)):
            torch.manual_seed(index)
            cls = getattr(fused_rnn, name)
            args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
            module = cls(*args, **kwargs, device=device, dtype=torch.float64)
            names, weights = zip(*module.named_parameters(), strict=True)
            inputs = sample.forward_input.args
            found = leaves(inputs)
            if not found:  # packed samples hide their tensor
                continue

            def call(*tensors: torch.Tensor, f=found, m=module, k=names, a=inputs) -> tuple[torch.Tensor, ...]:
                n = len(f)
                values = iter(tensors[:n])
                args = [_refill(arg, values) for arg in a]
                return tuple(flatten(torch.func.functional_call(m, dict(zip(k, tensors[n:], strict=True)), tuple(args))))

            tensors = tuple(t.detach().clone().requires_grad_() for t in (*found, *weights))
            assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
            if index < 2:
                assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)
            COUNTS[f"{backend} gradcheck"] = COUNTS.get(f"{backend} gradcheck", 0) + 1


def _refill(arg: Any, values: Any) -> Any:
    if isinstance(arg, tuple) and not isinstance(arg, nn.utils.rnn.PackedSequence):
        return tuple(_refill(item, values) for item in arg)
    if isinstance(arg, nn.utils.rnn.PackedSequence):
        return nn.utils.rnn.PackedSequence(next(values), *arg[1:])
    return next(values) if isinstance(arg, torch.Tensor) and arg.requires_grad else arg


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_errors(backend: str, name: str, dtype: torch.dtype) -> None:
    """The error's type and text, as the sample demands them and as torch.nn gives them."""
    device, info = device_of(backend), INFOS[name]
    with use_backend(backend):
        found = info.module_error_inputs_func(info, device=device, dtype=dtype, requires_grad=False, training=False)
        for sample in found:
            build, run = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
            messages = []
            for namespace in (fused_rnn, nn):
                cls = getattr(namespace, name)
                with pytest.raises(sample.error_type, match=sample.error_regex) as caught:
                    if sample.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
                        cls(*build.args, **build.kwargs)
                    else:
                        module = cls(*build.args, **{"device": device, "dtype": dtype, **build.kwargs})
                        module(*run.args, **run.kwargs)
                messages.append((caught.type, str(caught.value)))
            assert messages[0] == messages[1]
            COUNTS[f"{backend} errors"] = COUNTS.get(f"{backend} errors", 0) + 1
    assert COUNTS.get(f"{backend} errors")
