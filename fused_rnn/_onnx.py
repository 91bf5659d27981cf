"""What the layers and cells are in a graph that ``torch.onnx.export(model, args, dynamo=True)`` captures.

Layers become ONNX's own LSTM, GRU and RNN, one node a layer with both directions, of any T and B. Cells become the products
and element-wise operations of their definition (fused_rnn/reference.py). What ONNX's operators lack (a projection, resets, a
further cell, zoneout and state_clip) becomes ONNX's Scan over the definition of a step. Options are exported as they are in
eval mode: weight_dropout and recurrent_dropout change nothing there, and zoneout is a mean. ONNX's attribute ``clip`` is not
state_clip: it bounds what the activations take.

ONNX: X [T, B, I], W [D, G*H, I], R [D, G*H, H], B [D, 2*G*H] (those of W, then those of R), sequence_lens [B], initial_h and
initial_c [D, B, H] -> Y [T, D, B, H], Y_h, Y_c [D, B, H]. Order of gates: LSTM i o f g, GRU z r n; torch's: i f g o, r z n.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn import reference
from fused_rnn._kinds import GRU, LSTM, RNN_IDENTITY, RNN_RELU, RNN_TANH
from fused_rnn._recipe import Recipe, Rows


class Operator(NamedTuple):
    """What computes a cell in ONNX."""

    name: str
    gates: tuple[int, ...]  # in ONNX's order, by the index in torch's
    of_direction: dict[str, Any] = {}  # attributes with a value for each direction
    of_node: dict[str, Any] = {}  # the other attributes

    def in_order(self, weight: Tensor) -> Tensor:
        """A weight [G*H, .] or bias [G*H] of torch's with its gates in ONNX's order."""
        blocks = weight.chunk(len(self.gates))
        return weight if len(blocks) == 1 else torch.cat([blocks[gate] for gate in self.gates])

    def attributes_of(self, directions: int) -> dict[str, Any]:
        """The attributes of a node, beside its sizes."""
        return {**self.of_node, **{name: [value] * directions for name, value in self.of_direction.items()}}


# By the number of the cell. Affine is activation_alpha * x + activation_beta.
OPERATORS = {
    LSTM: Operator("LSTM", (0, 3, 1, 2)),
    GRU: Operator("GRU", (1, 0, 2), of_node={"linear_before_reset": 1}),
    RNN_TANH: Operator("RNN", (0,), {"activations": "Tanh"}),
    RNN_RELU: Operator("RNN", (0,), {"activations": "Relu"}),
    RNN_IDENTITY: Operator("RNN", (0,), {"activations": "Affine", "activation_alpha": 1.0, "activation_beta": 0.0}),
}


def exporting() -> bool:
    """Whether torch.onnx is capturing a model. To be asked where ``torch.compiler.is_exporting()``.

    Reads what torch.onnx.is_in_onnx_export() returns, which imports parts of torch.onnx that need onnxscript, and which
    Dynamo takes for False.
    """
    flags = getattr(getattr(getattr(torch.onnx, "_internal", None), "exporter", None), "_flags", None)
    return flags is not None and flags._is_onnx_exporting


def refuse_packed() -> None:
    raise NotImplementedError("torch.onnx.export: a PackedSequence has no counterpart in ONNX; export with padded input")


def rnn(
    input: Tensor, states: Sequence[Tensor], weights: list[Tensor], rows: Rows, recipe: Recipe
) -> tuple[Tensor, list[Tensor]]:
    """Arguments and results of reference.rnn.

    Raises:
        NotImplementedError: packed, ids, reset_state, return_all_states, or masks of zoneout and recurrent_dropout.
    """
    _refuse(input, rows, recipe)
    num_layers, directions = recipe.num_layers, recipe.directions
    per_direction = len(weights) // (num_layers * directions)
    in_one_node = recipe.cell in OPERATORS and per_direction % 2 == 0 and rows.resets is None and not rows.options.any()
    y = input.transpose(0, 1) if recipe.batch_first else input
    if rows.resets is not None and recipe.batch_first:
        rows = rows._replace(resets=rows.resets.transpose(0, 1))
    last = []
    for layer in range(num_layers):
        of_layer = slice(layer * directions, (layer + 1) * directions)
        first = of_layer.start * per_direction
        params = weights[first : first + directions * per_direction]
        groups = [params[i : i + per_direction] for i in range(0, len(params), per_direction)]
        given = [state[of_layer] for state in states]
        y, states_after = (_node if in_one_node else _loops)(y, given, groups, rows, recipe)
        last.append(states_after)
        if recipe.dropout > 0 and recipe.training and layer + 1 < num_layers:
            y = torch.dropout(y, recipe.dropout, True)
    y = y.transpose(0, 1) if recipe.batch_first else y
    return y, [torch.cat(of_layers) for of_layers in zip(*last, strict=True)]


def own_layer(
    x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], rows: Rows, recipe: Recipe, step: reference.StepFunction
) -> tuple[Tensor, list[Tensor]]:
    """Arguments and results of reference.layer, of a cell that has this step; the states are given.

    Raises:
        NotImplementedError: as rnn.
    """
    _refuse(x, rows, recipe)
    per_direction = len(params) // recipe.directions
    groups = [list(params[i : i + per_direction]) for i in range(0, len(params), per_direction)]
    return _loops(x, list(states), groups, rows, recipe, step)


def refuse_masks() -> None:
    raise NotImplementedError(
        "torch.onnx.export: a mask of zoneout or recurrent_dropout has no counterpart in ONNX yet; export in eval mode"
    )


def _refuse(input: Tensor, rows: Rows, recipe: Recipe) -> None:
    if rows.offsets is not None:
        refuse_packed()
    for name, asked in (
        ("reset_state", rows.reset_states),
        ("return_all_states", recipe.all_states),
    ):
        if asked:
            raise NotImplementedError(f"torch.onnx.export: {name} has no counterpart in ONNX yet; export without it")
    if any(isinstance(option, Tensor) for option in rows.options):
        refuse_masks()
    if not input.is_floating_point():
        raise NotImplementedError("torch.onnx.export: an input of ids has no counterpart in ONNX; export with one-hot rows")


def _node(
    x: Tensor, states: list[Tensor], groups: list[list[Tensor]], rows: Rows, recipe: Recipe
) -> tuple[Tensor, list[Tensor]]:
    """A layer as one node: x [T, B, I] -> y [T, B, D*H], last states [D, B, H]."""
    operator, lengths, count = OPERATORS[recipe.cell], rows.lengths, recipe.kind.states
    (steps, batch), directions, hidden = x.shape[:2], len(groups), groups[0][1].shape[1]
    in_order = operator.in_order
    w, r = (torch.stack([in_order(group[i]) for group in groups]) for i in range(2))
    biases = None
    if len(groups[0]) == 4:
        biases = torch.stack([torch.cat([in_order(group[2]), in_order(group[3])]) for group in groups])
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": "bidirectional" if directions == 2 else "forward"}
    attributes |= operator.attributes_of(directions)
    state = [directions, batch, hidden]
    outputs = torch.onnx.ops.symbolic_multi_out(
        operator.name,
        [x, w, r, biases, None if lengths is None else lengths.to(torch.int32), *(states if states else [None] * count)],
        attributes,
        dtypes=[x.dtype] * (1 + count),
        shapes=[[steps, directions, batch, hidden], *[state] * count],
    )
    y = outputs[0].transpose(1, 2).flatten(2) if directions == 2 else outputs[0].squeeze(1)
    last = list(outputs[1:])
    if lengths is not None and states:  # rows of no steps keep their state; runtimes give zeros
        started = (lengths > 0).unsqueeze(-1)
        last = [torch.where(started, new, old) for new, old in zip(last, states, strict=True)]
    return y, last


def _loops(
    x: Tensor,
    states: list[Tensor],
    groups: list[list[Tensor]],
    rows: Rows,
    recipe: Recipe,
    step: reference.StepFunction = reference.step,
) -> tuple[Tensor, list[Tensor]]:
    """A layer as a loop for each direction: x [T, B, I] -> y [T, B, D*P], last states [D, B, .]."""
    y, last = [], []
    for direction, params in enumerate(groups):
        # Copies of given states: of views, torch.export took the batch size for a constant (torch 2.13).
        first = [s[direction].clone() for s in states] or reference.zero_states(x, x.shape[1], params, recipe)
        outputs, after = _loop(x, first, params, rows, functools.partial(step, recipe=recipe), reverse=direction == 1)
        y.append(outputs)
        last.append(after)
    return torch.cat(y, -1), [torch.stack(of_directions) for of_directions in zip(*last, strict=True)]


def _loop(
    x: Tensor, state: list[Tensor], params: list[Tensor], rows: Rows, cell: Callable[..., list[Tensor]], reverse: bool
) -> tuple[Tensor, list[Tensor]]:
    """reference._scan as torch's scan operator: (y [T, B, P], last states)."""
    from torch._higher_order_ops.scan import scan

    lengths, resets, options = rows.lengths, rows.resets, rows.options
    masks = []
    if lengths is not None:
        masks.append((torch.arange(x.shape[0], device=x.device).unsqueeze(1) < lengths).unsqueeze(-1))
        x = torch.where(masks[0], x, 0)
    if resets is not None:
        masks.append(resets.unsqueeze(-1))

    def step(old: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        x_t, *masks_t = inputs
        given = [torch.where(masks_t[-1], 0, t) for t in old] if resets is not None else old
        new = cell(x_t, given, params, options=options)
        shares = (options.zoneout_h, options.zoneout_c, *[None] * len(new))
        new = [reference.zoneout(*state) for state in zip(given, new, shares, strict=False)]
        if lengths is None:
            return new, new[0].clone()
        kept = [torch.where(masks_t[0], a, b) for a, b in zip(new, old, strict=True)]
        return kept, torch.where(masks_t[0], new[0], 0)

    last, y = scan(step, state, [x, *masks], reverse=reverse)
    return y, last
