"""Stacks of layers as wavefronts (csrc/plan_overlap.h) on the simulated device, tasks in any order that the plan allows."""

from __future__ import annotations

import ctypes
import dataclasses
import random
from ctypes import byref, c_float, c_int64

import pytest
import torch
from cases import Case, make_data
from layers import Layer, LayerRun, structure
from simulator import Simulator
from torch import Tensor

OverlapTask = structure("OverlapTask", "plan_overlap.h")


def layers_of(case: Case) -> list[Layer]:
    """The layers of a stack; the input of those above the first is not theirs yet."""
    layers = []
    for number in range(case.layers):
        size = case.input_size if number == 0 else case.directions * case.output
        one = dataclasses.replace(case, layers=1, input_size=size)
        layers.append(Layer.of(one, make_data(one, seed=number)))
    return layers


def with_input(layer: Layer, x: Tensor) -> Layer:
    return dataclasses.replace(layer, data=dataclasses.replace(layer.data, input=x.reshape(layer.data.input.shape)))


def tasks_of(sim: Simulator, case: Case, chunk_steps: int, concurrent: int) -> list[OverlapTask]:
    tasks = (OverlapTask * 1000)()
    make = sim.lib.simt_overlap_tasks
    make.argtypes = [ctypes.c_int, ctypes.c_int, c_int64, c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    return list(tasks[: make(case.layers, case.directions, case.steps, chunk_steps, concurrent, tasks, len(tasks))])


def any_order(tasks: list[OverlapTask], seed: int) -> list[OverlapTask]:
    """One of the orders in which the device may begin the tasks: each stream in its order, none before what it waits for."""
    choose, done, order = random.Random(seed), set(), []
    while len(order) < len(tasks):
        streams = {task.stream: number for number, task in reversed([*enumerate(tasks)]) if number not in done}
        number = choose.choice([n for n in sorted(streams.values()) if tasks[n].after < 0 or tasks[n].after in done])
        done.add(number)
        order.append(tasks[number])
    return order


class StackRun:
    """The memory of all layers, and one task after the other."""

    def __init__(self, sim: Simulator, layers: list[Layer], family: str, seed: int) -> None:
        sim.reset(seed)
        self.sim = sim
        self.runs = [LayerRun(sim, layer, seed=seed, family=family) for layer in layers]
        self.params, self.plans, self.carries = [], [], []
        for run in self.runs:
            case = run.layer.case
            params, problem = run.arguments(projected=False)
            self.plans.append(run.plan(problem))
            params.workspace = sim.out("workspace", sim.lib.simt_plan_workspace(self.plans[-1]))
            self.params.append(params)
            size = case.directions * case.batch * case.hidden * ctypes.sizeof(c_float)
            self.carries.append(sim.out("carry", size))

    def run(self, task: OverlapTask) -> None:
        if task.project:
            self.project(task)
        else:
            bounds = (c_int64 * 2)(task.first, task.end)
            params, plan, carry = (part[task.layer] for part in (self.params, self.plans, self.carries))
            self.sim.check(self.sim.lib.simt_forward_steps(byref(params), plan, bounds, 1, carry))

    def project(self, task: OverlapTask) -> None:
        """As csrc/overlap_cuda.cpp: rows of the chunk's steps, for each direction, from what the layer below has left."""
        run = self.runs[task.layer]
        case, layer = run.layer.case, run.layer
        x = layer.data.input
        if task.layer > 0:
            address, shape = self.runs[task.layer - 1].outputs["y"]
            x = self.sim.get(address, shape, case.dtype)
        projection = run.projection(x)
        address = self.params[task.layer].gates
        shape = (case.directions, layer.rows, layer.slots, case.hidden)
        gates = self.sim.get(address, shape, case.dtype)
        for d in range(case.directions):
            first, end = (case.steps - task.end, case.steps - task.first) if d else (task.first, task.end)
            rows = slice(first * case.batch, end * case.batch)
            gates[d, rows, : layer.gates] = projection[d, rows]
        ctypes.memmove(address, gates.data_ptr(), gates.nbytes)

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
]


@pytest.mark.parametrize("family", ["grid", "cluster"])
@pytest.mark.parametrize(("case", "chunk_steps", "concurrent"), CASES, ids=str)
def test_any_order_gives_what_layers_in_turn_give(
    sim: Simulator, case: Case, chunk_steps: int, concurrent: int, family: str
) -> None:
    layers, want = layers_of(case), []
    for number, layer in enumerate(layers):
        done = layer if number == 0 else with_input(layer, want[-1]["y"])
        want.append(LayerRun(sim, done, family=family).forward())
    tasks = tasks_of(sim, case, chunk_steps, concurrent)
    for seed in range(4):
        stack = StackRun(sim, layers, family, seed)
        for task in any_order(tasks, seed):
            stack.run(task)
        for number, run in enumerate(stack.runs):
            for name, tensor in run.results().items():
                same = torch.equal(tensor.view(torch.uint8), want[number][name].view(torch.uint8))
                assert same, f"{name} of layer {number}, order {seed}"
        stack.free()


def test_a_task_that_does_not_wait_is_seen(sim: Simulator) -> None:
    """Without its `after` a projection may read rows that are not there yet."""
    case, chunk_steps, concurrent = CASES[1]
    tasks = tasks_of(sim, case, chunk_steps, concurrent)
    for task in tasks:
        task.after = -1 if task.project else task.after
    layers = layers_of(case)
    stack = StackRun(sim, layers, "cluster", seed=0)
    with pytest.raises(AssertionError, match="poison in output"):
        for task in any_order(tasks, seed=1):
            stack.run(task)
        for run in stack.runs:
            run.results()
    stack.free()
