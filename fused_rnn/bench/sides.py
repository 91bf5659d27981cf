"""What is timed: fused_rnn and the baselines, each as a function without arguments that does one call of a case."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn import _settings
from fused_rnn._kinds import LSTM, number_of_torch_layer
from fused_rnn._onnx import OPERATORS
from fused_rnn.bench.cases import BenchCase
from fused_rnn.explanation import Explanation

OURS = "fused_rnn"
BASELINES = {"cuda": ("torch.nn", "step", "flashrnn"), "cpu": ("torch.nn", "onnxruntime", "openvino")}
_NEEDS = {"flashrnn": ("flashrnn",), "onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
_ONNX_TOLERANCE = 1e-3  # of outputs below 1 in size, fp32: a wrong gate order is off by tenths


class CannotServe(Exception):
    """A baseline cannot run the case; the message says why."""


@dataclasses.dataclass
class Side:
    """One competitor: ``run`` makes one call, ``plan`` is its FUSED_RNN_PLAN if it has one, ``gradients`` says whether its
    calls record a graph."""

    name: str
    run: Callable[[], None]
    plan: str | None = None
    gradients: bool = True

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Goes around any number of runs: entering torch.no_grad in each would cost a third of a small call."""
        with forced_plan(self.plan), torch.set_grad_enabled(self.gradients):
            yield


@contextlib.contextmanager
def forced_plan(plan: str | None) -> Iterator[None]:
    """FUSED_RNN_PLAN inside a block; None leaves it as it is."""
    with _settings.use("FUSED_RNN_PLAN", _settings.value("FUSED_RNN_PLAN") if plan is None else plan):
        yield


def explained(module: torch.nn.Module, x: Any, mode: str, plan: str | None) -> Explanation:
    """The explanation under this FUSED_RNN_PLAN.

    Raises:
        CannotServe: no kernel family that it allows can serve the case; the message is the planner's reason.
    """
    try:
        with forced_plan(plan):
            return fused_rnn.explain(module, x, training=mode != "inference", show=False)
    except ValueError as reason:
        raise CannotServe(str(reason)) from None


def missing(baseline: str) -> str | None:
    """The package that a baseline needs and that is not installed, or None."""
    return next((name for name in _NEEDS.get(baseline, ()) if importlib.util.find_spec(name) is None), None)


def make_sides(
    case: BenchCase, device: str, baselines: list[str], threads: int, plan: str = "auto"
) -> tuple[list[Side], dict[str, str], Any]:
    """(fused_rnn's side, then one a baseline; why others cannot; our module and the input of its first call).

    plan: "auto" (what a call would take by itself) or a value of FUSED_RNN_PLAN.
    """
    ours, theirs = case.modules(device)
    inputs = case.inputs(device)
    asked_for = None if plan == "auto" else plan
    first = inputs[0][0] if case.loops else inputs[0]  # of a call
    explained(ours, first, case.mode, asked_for)
    gradients = case.mode != "inference"
    with forced_plan(asked_for):
        sides, refused = [Side(OURS, module_run(ours, inputs, case.mode), asked_for, gradients)], {}
    for name in baselines:
        try:
            if name == "torch.nn":
                sides.append(Side(name, module_run(theirs, inputs, case.mode), None, gradients))
            elif name == "step":
                sides.append(Side(name, module_run(ours, inputs, case.mode), "step", gradients))
            elif name == "flashrnn":
                sides.append(Side(name, flashrnn_run(case, theirs, inputs), None, gradients))
            else:
                sides.append(Side(name, onnx_run(name, case, theirs, inputs, threads)))
        except CannotServe as reason:
            refused[name] = str(reason)
    return sides, refused, (ours, first)


def module_run(call: Callable[[Any], Any], inputs: list[Any], mode: str) -> Callable[[], None]:
    """One call of a module-like function in the case's mode, its inputs taken in turn; for Side.active().

    Of a cell "one call" is its loop over the steps of an input.
    """
    rotation = itertools.cycle(inputs)
    parameters = list(call.parameters()) if isinstance(call, torch.nn.Module) else list(getattr(call, "weights", ()))
    loops = isinstance(call, torch.nn.RNNCellBase)

    def loop(x: Tensor) -> list[Tensor]:
        states, hx = [], None
        for step in x.unbind():
            hx = call(step, hx)  # type: ignore[call-arg]
            states.append(hx[0] if isinstance(hx, tuple) else hx)
        return states

    def outputs_of(x: Any) -> list[Tensor]:
        if loops:
            return loop(x)
        y = call(x)[0]
        return [y.data if isinstance(x, PackedSequence) else y]

    forward_of = loop if loops else call

    def forward() -> None:
        forward_of(next(rotation))

    def training() -> None:
        x = next(rotation)
        leaves = parameters if isinstance(x, PackedSequence) else [x, *parameters]
        torch.autograd.grad(outputs_of(x), leaves, gradients)

    gradients: list[Tensor] = []
    if mode == "training":
        with torch.no_grad():
            gradients = [torch.randn_like(y) for y in outputs_of(inputs[0])]
    return training if mode == "training" else forward


# --- flashrnn: a package of CUDA kernels for one layer, which compiles itself for each size ---


def flashrnn_run(
    case: BenchCase, theirs: torch.nn.Module, inputs: list[Any], backend: str = "cuda_fused"
) -> Callable[[], None]:
    """An LSTM of flashrnn with torch.nn's weights: the input product by torch.matmul, then its kernel."""
    if (
        number_of_torch_layer(case.cell) != LSTM
        or case.loops
        or case.layers > 1
        or case.bidirectional
        or case.lengths == "ragged"
    ):
        raise CannotServe("only one dense LSTM layer in one direction")
    if (package := missing("flashrnn")) is not None:
        raise CannotServe(f"{package} is not installed")
    from flashrnn import flashrnn

    w_ih, w_hh, b_ih, b_hh = (p.detach().requires_grad_(case.mode != "inference") for p in theirs.parameters())
    name = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}.get(case.dtype)
    if name is None:
        raise CannotServe(f"no {case.dtype}")

    def call(x: Tensor) -> tuple[Tensor]:
        steps, batch = x.shape[:2]
        wx = torch.nn.functional.linear(x, w_ih, b_ih).view(steps, batch, 4, 1, case.H).transpose(0, 1)
        states, _ = flashrnn(
            wx, w_hh.view(4, 1, case.H, case.H), b_hh.view(4, 1, case.H), function="lstm", backend=backend, dtype=name
        )
        return (states[0].view(batch, steps, case.H).transpose(0, 1),)

    call.weights = [w_ih, w_hh, b_ih, b_hh]  # type: ignore[attr-defined]
    try:
        with torch.no_grad():
            y, expected = call(inputs[0])[0], theirs(inputs[0])[0]
    except Exception as error:  # it asserts, or fails to compile, where it lacks a size
        raise CannotServe(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    tolerance = 5e-2 if case.dtype != "fp32" else 5e-3
    if not torch.allclose(y.float(), expected.float(), atol=tolerance):
        raise CannotServe(f"its result differs by {float((y - expected).abs().max()):.2g}")
    return module_run(call, inputs, case.mode)


# --- onnxruntime and OpenVINO: inference of an ONNX model on a CPU ---


def onnx_model(case: BenchCase, module: torch.nn.Module) -> bytes:
    """The module as an ONNX model x [T, B, I] -> y [T, B, D*H], with the standard's own recurrent operators."""
    from onnx import TensorProto, helper, numpy_helper

    operator, directions = OPERATORS[number_of_torch_layer(case.cell)], case.directions
    nodes, weights, name = [], [], "x"
    parameters = dict(module.named_parameters())
    squeeze = numpy_helper.from_array(torch.tensor([0, 0, -1]).numpy(), "merged")
    weights.append(squeeze)
    for layer in range(case.layers):
        stacked: dict[str, list[Tensor]] = {"w": [], "r": [], "b": []}
        for suffix in ("", "_reverse")[:directions]:
            parts = [parameters[f"{kind}_l{layer}{suffix}"].detach() for kind in _KINDS]
            w, r, b_ih, b_hh = (operator.in_order(p) for p in parts)
            stacked["w"].append(w)
            stacked["r"].append(r)
            stacked["b"].append(torch.cat([b_ih, b_hh]))
        for kind, tensors in stacked.items():
            weights.append(numpy_helper.from_array(torch.stack(tensors).numpy(), f"{kind}{layer}"))
        options: dict[str, Any] = {"hidden_size": case.H, "direction": "bidirectional" if directions == 2 else "forward"}
        options |= operator.attributes_of(directions)
        inputs = [name, f"w{layer}", f"r{layer}", f"b{layer}"]
        nodes.append(helper.make_node(operator.name, inputs, [f"all{layer}"], **options))
        # [T, D, B, H] -> [T, B, D*H]
        nodes.append(helper.make_node("Transpose", [f"all{layer}"], [f"turned{layer}"], perm=[0, 2, 1, 3]))
        name = f"y{layer}"
        nodes.append(helper.make_node("Reshape", [f"turned{layer}", "merged"], [name]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [case.T, case.B, case.I])
    y = helper.make_tensor_value_info(name, TensorProto.FLOAT, [case.T, case.B, directions * case.H])
    graph = helper.make_graph(nodes, "layers", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def onnx_run(name: str, case: BenchCase, theirs: torch.nn.Module, inputs: list[Any], threads: int) -> Callable[[], None]:
    """One inference by onnxruntime or OpenVINO on so many threads, in fp32, with its result compared once."""
    if case.loops:
        raise CannotServe("only layers, no cells in a loop")
    if case.mode != "inference" or case.dtype != "fp32" or case.lengths == "ragged":
        raise CannotServe("only dense fp32 inference")
    if (package := missing(name)) is not None:
        raise CannotServe(f"{package} is not installed")
    model, x = onnx_model(case, theirs), inputs[0].detach().numpy()
    if name == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads must not disturb the others
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        def infer() -> Any:
            return session.run(None, {"x": x})[0]
    else:
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        core = openvino.Core()
        request = core.compile_model(core.read_model(model), "CPU", options).create_infer_request()

        def infer() -> Any:
            return request.infer({0: x}, share_inputs=True, share_outputs=True)[0]

    with torch.no_grad():
        expected = theirs(inputs[0])[0]
    difference = float((torch.as_tensor(infer()) - expected).abs().max())
    if not difference < _ONNX_TOLERANCE:
        raise RuntimeError(f"{name}: its result differs from torch.nn's by {difference}: the model is wrong")

    def run() -> None:
        infer()

    return run
