"""Stacks of layers as wavefronts (csrc/plan/overlap.h) on the simulated device, tasks in any order that the plan allows."""

from __future__ import annotations

import ctypes
import dataclasses
import random
from ctypes import c_bool, c_float, c_int, c_int64, c_void_p

import pytest
import torch
from cases import Case, make_data
from layers import Layer, LayerRun, structure
from simulator import Fault, Simulator
from torch import Tensor

OverlapTask = structure("OverlapTask", "plan/overlap.h")


def layers_of(case: Case) -> list[Layer]:
    """The layers of a stack; the input of those above the first is not theirs yet."""
    layers = []
    for number in range(case.layers):
        size = case.input_size if number == 0 else case.directions * case.output
        one = dataclasses.replace(case, layers=1, input_size=size)
        data = make_data(one)  # lengths are the same in all layers
        layers.append(Layer.of(one, dataclasses.replace(data, weights=make_data(one, seed=number).weights)))
    return layers


def with_input(layer: Layer, x: Tensor) -> Layer:
    return dataclasses.replace(layer, data=dataclasses.replace(layer.data, input=x.reshape(layer.data.input.shape)))


def tasks_of(sim: Simulator, case: Case, chunk_steps: int, concurrent: int, backward: bool = False) -> list[OverlapTask]:
    tasks = (OverlapTask * 1000)()
    make = sim.lib.simt_overlap_tasks
    make.argtypes = [c_int, c_int, c_bool, c_int64, c_int64, c_int, c_void_p, c_int]
    count = make(case.layers, case.directions, backward, case.steps, chunk_steps, concurrent, tasks, len(tasks))
    return list(tasks[:count])


def any_order(tasks: list[OverlapTask], seed: int) -> list[OverlapTask]:
    """One of the orders in which the device may begin the tasks: each stream in its order, none before what it waits for."""
    choose, done, order = random.Random(seed), set(), []
    while len(order) < len(tasks):
        streams = {task.stream: number for number, task in reversed([*enumerate(tasks)]) if number not in done}
        number = choose.choice([n for n in sorted(streams.values()) if tasks[n].after < 0 or tasks[n].after in done])
        done.add(number)
        order.append(tasks[number])
    return order


def masks_of(layers: list[Layer], dropout: float) -> list[Tensor] | None:
    """For each layer but the last, what its output is multiplied by: 0, or what keeps the mean."""
    if not dropout:
        return None
    draw = torch.Generator().manual_seed(11)
    shapes = [(layer.rows, layer.case.directions * layer.case.output) for layer in layers[:-1]]
    return [(torch.rand(shape, generator=draw) >= dropout).double() / (1 - dropout) for shape in shapes]


def dropped(t: Tensor, masks: list[Tensor] | None, below: int) -> Tensor:
    """An output of layer `below`, or its gradient, after dropout."""
    return t if masks is None else (t.double().reshape(masks[below].shape) * masks[below]).to(t.dtype)


class StackRun:
    """The memory of all layers, and one task after the other. saved: what forward left, for backward."""

    def __init__(
        self,
        sim: Simulator,
        layers: list[Layer],
        family: str,
        seed: int,
        saved: list[dict[str, Tensor]] | None = None,
        masks: list[Tensor] | None = None,
    ) -> None:
        sim.reset(seed)
        self.masks = masks
        self.sim, self.layers = sim, layers
        self.backward = saved is not None
        self.runs = [LayerRun(sim, layer, seed=seed, family=family) for layer in layers]
        self.params, self.plans, self.carries = [], [], []
        for number, run in enumerate(self.runs):
            case = run.layer.case
            if saved is None:
                params, problem = run.arguments(projected=False)
            else:
                params, problem = run.backward_arguments(saved[number])
                if number + 1 < len(layers):
                    params.dy = sim.inout("dy", torch.full_like(run.layer.data.dy, float("nan")))
            self.plans.append(run.plan(problem))
            params.workspace = sim.out("workspace", sim.lib.simt_plan_workspace(self.plans[-1]))
            self.params.append(params)
            size = 2 * case.directions * case.batch * case.hidden * ctypes.sizeof(c_float)
            self.carries.append(sim.out("carry", size))

    def run(self, task: OverlapTask) -> None:
        if not task.project:
            params, plan, carry = (part[task.layer] for part in (self.params, self.plans, self.carries))
            given = self.backward and task.layer == len(self.layers) - 1
            self.runs[task.layer].steps(params, plan, task.first, task.end, carry, given)
        elif not self.backward:
            self.project(task)
        else:
            self.project_back(task)

    def rows(self, layer: int, first: int, end: int) -> slice:
        """Of memory, those of times [first, end)."""
        one = self.layers[layer]
        at = one.case.batch * torch.arange(one.case.steps + 1) if one.offsets is None else one.offsets
        return slice(int(at[first]), int(at[end]))

    def output(self, layer: int, name: str) -> Tensor:
        return self.sim.get(*self.runs[layer].outputs[name], self.layers[layer].case.dtype)

    def change(self, address: int, shape: tuple[int, ...], rows: slice, direction: int | None, values: Tensor) -> None:
        """Rows of a tensor in device memory, [N, ...] or [D, N, ...]."""
        tensor = self.sim.get(address, shape, values.dtype)
        place = (rows,) if direction is None else (direction, rows)
        target = tensor[place]
        (target if direction is None else target[:, : values.shape[2]]).copy_(values[place])
        ctypes.memmove(address, tensor.data_ptr(), tensor.nbytes)

    def project(self, task: OverlapTask) -> None:
        """As csrc/torch/overlap_cuda.cpp: rows of the chunk's steps, for each direction, from the layer below."""
        number, layer = task.layer, self.layers[task.layer]
        x = dropped(self.output(number - 1, "y"), self.masks, number - 1) if number else layer.data.input
        projection, steps = self.runs[number].projection(x), layer.case.steps
        shape = (layer.case.directions, layer.rows, layer.slots, layer.case.hidden)
        for d in range(layer.case.directions):
            first, end = (steps - task.end, steps - task.first) if d else (task.first, task.end)
            self.change(self.params[number].gates, shape, self.rows(number, first, end), d, projection)

    def project_back(self, task: OverlapTask) -> None:
        """The rows of the chunk's steps of the gradient of the output, from what the layer above has left."""
        above, steps = task.layer + 1, self.layers[task.layer].case.steps
        dy = dropped(self.runs[above].input_gradient(self.output(above, "d_gates")), self.masks, task.layer)
        rows = self.rows(above, steps - task.end, steps - task.first)
        self.change(self.params[task.layer].dy, tuple(dy.shape), rows, None, dy)

    def check(self, want: list[dict[str, Tensor]], order: int) -> None:
        for number, run in enumerate(self.runs):
            for name, tensor in run.results().items():
                same = torch.equal(tensor.view(torch.uint8), want[number][name].view(torch.uint8))
                assert same, f"{name} of layer {number}, order {order}"

    def free(self) -> None:
        for plan in self.plans:
            self.sim.lib.simt_free_plan(plan)


CASES = [
    (Case("LSTM", 7, 3, 5, 21, layers=3, ragged="lengths", resets=True, dtype=torch.float16), 2, 3),
    (Case("LSTM", 7, 3, 5, 21, layers=3, dtype=torch.float16), 3, 2),
    (Case("GRU", 6, 9, 5, 20, layers=3, ragged="lengths", dtype=torch.float16), 3, 1),
    (Case("GRU", 5, 3, 5, 20, layers=2, bidirectional=True, ragged="lengths", dtype=torch.float16), 2, 1),
    (Case("RNN_TANH", 8, 3, 5, 20, layers=4, states=False, dtype=torch.bfloat16), 2, 4),
    (Case("LSTM", 5, 3, 5, 20, bidirectional=True, dtype=torch.float16), 1, 1),
    (Case("LSTM", 7, 9, 5, 21, layers=3, ragged="packed", resets=True, dtype=torch.float16), 2, 3),
    (Case("GRU", 5, 3, 5, 20, layers=2, bidirectional=True, ragged="packed", dtype=torch.float16), 2, 1),
]


def forward_in_turn(
    sim: Simulator, layers: list[Layer], family: str, masks: list[Tensor] | None = None
) -> list[dict[str, Tensor]]:
    results: list[dict[str, Tensor]] = []
    for number, layer in enumerate(layers):
        done = with_input(layer, dropped(results[-1]["y"], masks, number - 1)) if number else layer
        results.append(LayerRun(sim, done, family=family).forward())
    return results


def backward_in_turn(
    sim: Simulator, layers: list[Layer], saved: list[dict[str, Tensor]], family: str, masks: list[Tensor] | None = None
) -> list[dict[str, Tensor]]:
    results: list[dict[str, Tensor]] = []
    dy = layers[-1].data.dy
    for number, (layer, kept) in reversed([*enumerate(zip(layers, saved, strict=True))]):
        data = dataclasses.replace(layer.data, dy=dy.reshape(layer.data.dy.shape))
        run = LayerRun(sim, dataclasses.replace(layer, data=data), family=family)
        results.insert(0, run.backward(kept))
        dy = run.input_gradient(results[0]["d_gates"])
        dy = dropped(dy, masks, number - 1) if number else dy
    return results


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["grid", "cluster"])
@pytest.mark.parametrize(("case", "chunk_steps", "concurrent"), CASES, ids=str)
def test_any_order_gives_what_layers_in_turn_give(
    sim: Simulator, case: Case, chunk_steps: int, concurrent: int, family: str, dropout: float
) -> None:
    layers = layers_of(case)
    masks = masks_of(layers, dropout)
    want = forward_in_turn(sim, layers, family, masks)
    tasks = tasks_of(sim, case, chunk_steps, concurrent)
    for seed in range(4):
        stack = StackRun(sim, layers, family, seed, masks=masks)
        for task in any_order(tasks, seed):
            stack.run(task)
        stack.check(want, seed)
        stack.free()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["grid", "cluster"])
@pytest.mark.parametrize(
    ("case", "chunk_steps", "concurrent"), [c for c in CASES if c[0].layers > 1 and not c[0].bidirectional], ids=str
)
def test_any_order_backward(
    sim: Simulator, case: Case, chunk_steps: int, concurrent: int, family: str, dropout: float
) -> None:
    layers = layers_of(case)
    masks = masks_of(layers, dropout)
    saved = forward_in_turn(sim, layers, family, masks)
    want = backward_in_turn(sim, layers, saved, family, masks)
    tasks = tasks_of(sim, case, chunk_steps, concurrent, backward=True)
    for seed in range(4):
        stack = StackRun(sim, layers, family, seed, saved, masks)
        for task in any_order(tasks, seed):
            stack.run(task)
        stack.check(want, seed)
        stack.free()


@pytest.mark.parametrize("backward", [False, True])
def test_a_task_that_does_not_wait_is_seen(sim: Simulator, backward: bool) -> None:
    """Projections that do not wait for the layer before them: wrong results."""
    case, chunk_steps, concurrent = CASES[1]
    layers = layers_of(case)
    want = saved = forward_in_turn(sim, layers, "cluster")
    if backward:
        want = backward_in_turn(sim, layers, saved, "cluster")
    stack = StackRun(sim, layers, "cluster", 0, saved if backward else None)
    tasks = tasks_of(sim, case, chunk_steps, concurrent, backward)
    for task in sorted(tasks, key=lambda task: not task.project):
        stack.run(task)
    with pytest.raises(AssertionError):
        stack.check(want, 0)
    stack.free()


@pytest.mark.parametrize("backward", [False, True])
def test_reading_what_another_stream_writes_is_seen(sim: Simulator, backward: bool) -> None:
    """A launch of the first steps, while those from the second on are not its own yet."""
    case = CASES[1][0]
    layers = layers_of(case)[:1]
    stack = StackRun(sim, layers, "cluster", 0, forward_in_turn(sim, layers, "cluster") if backward else None)
    if not backward:
        stack.project(OverlapTask(True, 0, 0, case.steps))
    stack.runs[0].close_later(stack.params[0], backward, 1)
    with pytest.raises(Fault, match="data race: read of 2 bytes .* what another stream may be writing"):
        stack.runs[0].steps(stack.params[0], stack.plans[0], 0, 2, stack.carries[0])
    stack.free()
