"""Layer and Step: modules with torch.nn's parameters and forward for any cell.

Compiled kernels serve them where they can be made (serve.py), else the cell's ``step`` in a loop, under autograd.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import _checkpoint, _checks, _extras, _ids, _onnx, functional, reference
from fused_rnn._extras import Extras
from fused_rnn._recipe import Recipe, Rows, StepOptions
from fused_rnn._regularisation import HasOptions, Sizes, Target, options_of, taken_from
from fused_rnn.formula import checkpoint, ops, serve
from fused_rnn.formula.language import Cell
from fused_rnn.formula.options import Masks, change_of, changed, masks_of, rows_with, rows_with_values, target_of
from fused_rnn.formula.parameters import OWN_KIND, as_declared, empty, outputs_first, specs_of, step_function


class _Formula(HasOptions, nn.Module):
    """What Layer and Step share: the cell, the sizes, the start of the parameters, hx, the options."""

    _is_step = False

    def __init__(self, cell: Cell, input_size: int, hidden_size: int, bias: bool) -> None:
        super().__init__()
        if not isinstance(cell, Cell):
            hint = f"; write {cell.__name__}()" if isinstance(cell, type) and issubclass(cell, Cell) else ""
            raise TypeError(f"cell: expected a fused_rnn Cell, got {cell!r}{hint}")
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size)):
            _check_count(name, value)
        if hidden_size % cell.declaration.heads:
            raise ValueError(
                f"hidden_size: expected a multiple of the cell's {cell.declaration.heads} heads, got {hidden_size}"
            )
        if not isinstance(bias, bool):
            raise TypeError(f"bias: expected a bool, got {type(bias).__name__}")
        self._names: tuple[str, ...] = ()  # of the parameters, in order
        self.cell = cell
        self._derive()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias

    @property
    def formula(self) -> str:
        """The name among the compiled formulas of the cell that runs now: with the options in its formula."""
        return self._formulas[self.training]

    def _target_of_options(self) -> Target:
        return target_of(type(self).__name__, self.cell, self.bias, self._is_step)

    def _regularise(self, options: dict[str, Any]) -> None:
        super()._regularise(options)
        self._derive()

    def _derive(self) -> None:
        """Makes the cells that run, in training and without it, and makes them known in this process."""
        of, modes = options_of(self), (False, True)
        self._running = {training: changed(self.cell, change_of(self.cell, of, training)) for training in modes}
        self._formulas = {training: ops.remember(self._running[training]) for training in modes}

    def _dropped(self, weights: list[Tensor], groups: int) -> list[Tensor]:
        """The parameters, in order, weight_hh of each of so many groups under this call's mask."""
        of = options_of(self)
        return weights if of is None else of.dropped(weights, len(weights) // groups, self.training)

    def _masks(self, like: Tensor, sizes: Sizes) -> Masks:
        of = options_of(self)
        return Masks() if of is None or not self.training else masks_of(of, like, sizes)

    def _shown_options(self) -> str:
        of = options_of(self)
        return "" if of is None else of.shown()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What unpickling and copying do; the cell is made known in this process."""
        super().__setstate__(state)
        self._derive()

    def _states_of(self, hx: Any) -> list[Tensor]:
        """The states in hx, in the cell's order; none where it is None."""
        names = self.cell.declaration.states
        if hx is None:
            return []
        values = [hx] if len(names) == 1 and isinstance(hx, Tensor) else hx
        if not isinstance(values, (tuple, list)) or len(values) != len(names):
            wanted = "a Tensor" if len(names) == 1 else f"a tuple of {len(names)} Tensors ({', '.join(names)})"
            got = f"a {type(hx).__name__}" + (f" of {len(hx)}" if isinstance(hx, (tuple, list)) else "")
            raise TypeError(f"hx: expected {wanted}, got {got}")
        return list(values)

    def _form_of(self, states: Sequence[Tensor]) -> Any:
        """States as they are returned: a tensor, or a tuple where there are several."""
        return states[0] if len(states) == 1 else tuple(states)

    def _check_tensors(self, input: Tensor, states: Sequence[Any], weights: Sequence[Any], names: Sequence[str]) -> None:
        _checks.check_tensor("input", input)
        if input.dtype is torch.int64:  # as _ids.lifted has made them
            input = _ids.stand_in(input, weights)
        if input.dtype not in _checks.DTYPES:
            raise ValueError(
                f"input: expected dtype float64, float32, float16 or bfloat16, or int64 or int32 ids, got {input.dtype}"
            )
        if input.shape[-1:] != (self.input_size,):
            raise ValueError(f"input: expected {self.input_size} features in its last dimension, got {list(input.shape)}")
        autocast = functional.autocast_on(input.device.type)
        _checks.check_places(input, weights, names.__getitem__, autocast)
        _checks.check_places(input, states, self._name_of_state, autocast)

    def _name_of_state(self, index: int) -> str:
        return f"hx ({self.cell.declaration.states[index]})"


class Layer(_Formula):
    """Layers of a cell over time: torch.nn.LSTM's arguments, parameter names, start and forward, for any formula.

    Args:
        cell: the cell, an instance.
        input_size: I.
        hidden_size: H.
        num_layers: L.
        bias: whether the products have biases, bias_ih of the input's and bias_hh of the recurrent ones.
        batch_first: input and output are [B, T, .].
        dropout: probability of zeroing an element between layers, while training.
        bidirectional: D = 2.
        factory: device and dtype of the parameters, and by keyword:
            zoneout: probability that a unit keeps the value of its state (Krueger et al. 2016), in training; else the mean
                of both. Of all states, or a tuple of one for each.
            recurrent_dropout: probability of zeroing h where the recurrent product reads it, by a mask that is the same in
                all steps of a sequence (Gal and Ghahramani 2016), in training.
            weight_dropout: probability of zeroing an element of weight_hh for a call (Merity et al. 2017), in training.
            state_clip: bound of the states' absolute values, applied where a step makes the state: of all states, or a tuple
                with a number or None for each.
            checkpoint: k: states are kept every k steps, and backward makes what lies between them again, with the same
                bits; 0 keeps everything.

    Parameters, for layer k and, of the reverse direction, with the suffix _reverse (rows: of the gates with such a product):
    weight_ih_l{k} [G*H, I or D*H], weight_hh_l{k} [G*H, H] (of n heads [n, G*H/n, H/n]), bias_ih_l{k}, bias_hh_l{k} [G*H],
    <name>_l{k} of the cell's own vectors [H] and numbers [], weight_<name>_l{k} of its products [H, H] and norms [H].
    """

    checkpoint: int = 0

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__(cell, input_size, hidden_size, bias)
        options = taken_from(factory)
        every = factory.pop("checkpoint", 0)
        _checkpoint.check(every)
        if every:
            self.checkpoint = every
        _check_factory("Layer", factory)
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = dropout
        self.bidirectional = bidirectional
        _checks.check_recipe(self._recipe(batch_first))
        if dropout > 0 and num_layers == 1:
            warnings.warn(
                f"dropout={dropout} has no effect with num_layers=1: it acts between layers",
                stacklevel=2,
            )
        specs = self._specs()
        self._names = tuple(name for name, _ in specs)
        for name, spec in specs:
            self.register_parameter(name, empty(spec.shape, factory.get("device"), factory.get("dtype")))
        self.reset_parameters()
        self._regularise(options)

    def _recipe(self, batch_first: bool, all_states: bool = False) -> Recipe:
        stack = self.num_layers, self.bias, self.bidirectional, batch_first, self.training, self.dropout
        return Recipe(OWN_KIND, *stack, all_states=all_states)

    def _specs(self) -> list[tuple[str, Any]]:
        """(name, spec) of all parameters in order."""
        directions = 2 if self.bidirectional else 1
        return [
            (f"{spec.name}_l{layer}{'_reverse' if d else ''}", spec)
            for layer in range(self.num_layers)
            for d in range(directions)
            for spec in specs_of(
                self.cell, self.hidden_size * directions if layer else self.input_size, self.hidden_size, self.bias
            )
        ]

    def reset_parameters(self) -> None:
        """Fills all parameters anew: uniform within 1/sqrt(H), as torch.nn does, unless the cell says otherwise."""
        for name, spec in self._specs():
            with torch.no_grad():
                spec.start(getattr(self, name), self.hidden_size)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Any = None,
        resets: Tensor | None = None,
        reset_state: Any = None,
        return_all_states: bool = False,
    ) -> tuple[Any, ...]:
        """Runs the layers.

        Args:
            input: [T, B, I]; [B, T, I] with batch_first; [T, I] unbatched; or a PackedSequence. Of int64 or int32 without
                the last dimension: ids of I classes in place of one-hot rows (fused_rnn.functional.lstm explains).
            hx: the initial states, each [L*D, B, H] ([L*D, H] unbatched), in the order of the cell's states: a tensor if
                there is one, else a tuple; None for zeros.
            lengths: [B] integers: row b takes part in steps t < lengths[b]; its output is 0 after them. Not with packed
                input.
            resets: bool [T, B] ([B, T] with batch_first, [T] unbatched, [N] packed): the states are replaced before this
                step, by zeros or by reset_state.
            reset_state: in the form of hx, each [L*D, 1 or B, H] ([L*D, H] unbatched), or of every step [T, L*D, B, H]
                ([B, T, L*D, H] with batch_first, [T, L*D, H] unbatched). It gets gradients.
            return_all_states: whether there is a third result.

        Returns:
            output [T, B, D*H] in the input's form, and the last states in the form of hx. With return_all_states a third, a
            tuple of each state after every step [T, L*D, B, H]; [B, T, L*D, H] with batch_first, [T, L*D, H] unbatched,
            PackedSequence of [N, L*D, H] of packed input. Rows after their length are 0.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it.
        """
        states = self._states_of(hx)
        extras = Extras(lengths, resets, reset_state, return_all_states)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, states, extras)
        _checks.check_tensor("input", input)
        input = _ids.lifted(input)
        weights = self._checked_weights(input, states)
        if input.dim() not in (2, 3):
            raise ValueError(f"input: expected 2-D or 3-D, got {input.dim()}-D")
        unbatched, batch_dim = input.dim() == 2, 0 if self.batch_first else 1
        form = self._form(input, unbatched, None)
        if unbatched:
            input = input.unsqueeze(batch_dim)
            states = [state.unsqueeze(1) for state in states]
        batch, steps = input.shape[batch_dim], input.shape[1 - batch_dim]
        if steps == 0:
            raise ValueError("input: expected at least 1 time step, got 0")
        rows = _extras.rows_of(extras, form)
        y, last, every = self._run((input, states, weights), rows, self._recipe(self.batch_first, return_all_states), batch)
        if unbatched:
            y, last = y.squeeze(batch_dim), [state.squeeze(1) for state in last]
        return y, self._form_of(last), *([tuple(_extras.in_form(every, form))] if return_all_states else [])

    def _form(self, input: Tensor, unbatched: bool, batch_sizes: Tensor | None) -> _extras.Form:
        names = self.cell.declaration.states
        groups = self.num_layers * (2 if self.bidirectional else 1)
        batch_first, casts = self.batch_first and batch_sizes is None, functional.autocast_on(input.device.type)
        sizes = (self.hidden_size,) * len(names)
        if input.dtype is torch.int64:
            input = _ids.stand_in(input, [getattr(self, self._names[0])])
        return _extras.Form(input, batch_first, unbatched, batch_sizes, groups, tuple(names), sizes, casts)

    def _forward_packed(self, input: PackedSequence, states: list[Tensor], extras: Extras) -> tuple[Any, ...]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        data = _ids.lifted(data)
        weights = self._checked_weights(data, states)
        _checks.check_batch_sizes(batch_sizes, data)
        batch = int(batch_sizes[0])
        rows = _extras.rows_of(extras, self._form(data, False, batch_sizes), sorted_indices)
        rows = rows._replace(offsets=torch.cat([batch_sizes.new_zeros(1), batch_sizes.cumsum(0)]))
        if sorted_indices is not None:
            self._check_states(states, batch)
            states = [state.index_select(1, sorted_indices) for state in states]
        y, last, every = self._run((data, states, weights), rows, self._recipe(False, extras.return_all_states), batch)
        if unsorted_indices is not None:
            last = [state.index_select(1, unsorted_indices) for state in last]
        output, *others = (PackedSequence(t, batch_sizes, sorted_indices, unsorted_indices) for t in (y, *every))
        return output, self._form_of(last), *([tuple(others)] if others else [])

    def _checked_weights(self, input: Tensor, states: list[Tensor]) -> list[Tensor]:
        """The weights of a call, read once: a parametrization makes them at every look."""
        weights = [getattr(self, name) for name in self._names]
        self._check_tensors(input, states, weights, self._names)
        return weights

    def _check_states(self, states: list[Tensor], batch: int) -> None:
        shape = [self.num_layers * (2 if self.bidirectional else 1), batch, self.hidden_size]
        _checks.check_states([self._name_of_state(i) for i in range(len(states))], states, *[shape] * len(states))

    def _run(
        self, arguments: tuple[Tensor, list[Tensor], list[Tensor]], rows: Rows, recipe: Recipe, batch: int
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Batched or packed input, states and weights, checked: output, last states, and those of every step, in the cell's
        order."""
        input, states, weights = arguments
        self._check_states(states, batch)
        cell, formula = self._running[self.training], self._formulas[self.training]
        groups = self.num_layers * recipe.directions
        weights = self._dropped(weights, groups)
        device_type = input.device.type
        rows = rows.on(input.device)
        rows = rows._replace(reset_states=tuple(functional.autocast(device_type, input, rows.reset_states, [])[1]))
        input, states, weights = functional.autocast(device_type, input, states, weights)
        like = input
        if input.dtype is torch.int64:
            input, like = input.squeeze(-1), weights[0]
        masks = self._masks(like, _sizes_of_masks(input, rows, (groups, batch, self.hidden_size)))
        rows = rows_with(rows, masks, self.cell.declaration.recurrent)
        own, count = len(self.cell.declaration.states), len(cell.declaration.states)
        if states and masks.factors is not None:  # what the recurrent product reads is a state too
            states = [*states, masks.factors * states[self.cell.declaration.recurrent]]
        for_onnx = torch.compiler.is_exporting() and _onnx.exporting()
        compiled = not for_onnx and serve.has_kernels(formula, device_type, like.dtype)
        if not states and (not compiled or rows.offsets is not None):  # packed rows do not say the batch size
            states = [like.new_zeros(groups, batch, self.hidden_size) for _ in cell.declaration.states]
        keeps = compiled and self.checkpoint and checkpoint.applies(input, states, weights, rows)
        if not keeps:
            rows = rows_with_values(rows, input.transpose(0, 1) if recipe.batch_first else input, like.dtype)
        if compiled:
            layer: reference.LayerFunction = functools.partial(ops.layer, formula, every=self.checkpoint if keeps else 0)
            y, last = reference.rnn(input, states, weights, rows, recipe, layer)
            every = last[count:]
            return y, last[:own], as_declared(cell, every)[:own] if every else []
        if input.dtype is torch.int64:
            input = _ids.checked(input, self.input_size, rows.lengths, rows.offsets is not None, recipe.batch_first)
        layer = functools.partial(_onnx.own_layer if for_onnx else reference.layer, step=step_function(cell))
        if rows.reset_states:
            rows = rows._replace(reset_states=tuple(outputs_first(cell, rows.reset_states)))
        y, last = reference.rnn(input, outputs_first(cell, states), weights, rows, recipe, layer)
        every = last[count:]
        return y, as_declared(cell, last[:count])[:own], as_declared(cell, every)[:own] if every else []

    def extra_repr(self) -> str:
        """As torch.nn's, with the cell."""
        parts = [repr(self.cell), str(self.input_size), str(self.hidden_size)]
        for name, usual in (
            ("num_layers", 1),
            ("bias", True),
            ("batch_first", False),
            ("dropout", 0.0),
            ("bidirectional", False),
        ):
            if getattr(self, name) != usual:
                parts.append(f"{name}={getattr(self, name)}")
        return ", ".join(parts) + self._shown_options() + (f", checkpoint={self.checkpoint}" if self.checkpoint else "")


class Step(_Formula):
    """One step of a cell: torch.nn.LSTMCell's arguments, parameter names, start and forward, for any formula.

    Args:
        cell: the cell, an instance.
        input_size: I.
        hidden_size: H.
        bias: whether the products have biases.
        device, dtype: of the parameters.
        options: by keyword zoneout, weight_dropout and state_clip, as Layer's.

    Parameters: as Layer's, without suffix: weight_ih, weight_hh, bias_ih, bias_hh, and the cell's own by their names.
    """

    _is_step = True

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(cell, input_size, hidden_size, bias)
        given = taken_from(options)
        _check_factory("Step", options)
        specs = self._specs()
        self._names = tuple(spec.name for spec in specs)
        for spec in specs:
            if hasattr(self, spec.name):
                raise ValueError(f"cell: its parameter {spec.name} has the name of an attribute of the module")
            self.register_parameter(spec.name, empty(spec.shape, device, dtype))
        self.reset_parameters()
        self._regularise(given)

    def _specs(self) -> list[Any]:
        return specs_of(self.cell, self.input_size, self.hidden_size, self.bias)

    def reset_parameters(self) -> None:
        """Fills all parameters anew: uniform within 1/sqrt(H), as torch.nn does, unless the cell says otherwise."""
        for spec in self._specs():
            with torch.no_grad():
                spec.start(getattr(self, spec.name), self.hidden_size)

    def forward(self, input: Tensor, hx: Any = None, *, resets: Tensor | None = None, reset_state: Any = None) -> Any:
        """One step.

        Args:
            input: [B, I] or [I]; or ids of I classes, int64 or int32 [B] or [].
            hx: the states before, each [B, H] or [H], in the cell's order: a tensor if there is one, else a tuple; None
                for zeros.
            resets: bool [B] (or []): where True the step begins from zeros, or from reset_state, instead of hx.
            reset_state: in the form of hx, each [1 or B, H] ([H]).

        Returns:
            The states after, in the form of hx.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it.
        """
        states = self._states_of(hx)
        cell, formula = self._running[self.training], self._formulas[self.training]
        weights = [getattr(self, name) for name in self._names]
        _checks.check_tensor("input", input)
        input = _ids.lifted(input)
        self._check_tensors(input, states, weights, self._names)
        if input.dim() not in (1, 2):
            raise ValueError(f"input: expected 1-D or 2-D, got {input.dim()}-D")
        shape = [*input.shape[:-1], self.hidden_size]
        _checks.check_states([self._name_of_state(i) for i in range(len(states))], states, *[shape] * len(states))
        names, casts = self.cell.declaration.states, functional.autocast_on(input.device.type)
        shown = _ids.stand_in(input, weights) if input.dtype is torch.int64 else input
        states = _extras.begin_of_step(states, resets, reset_state, shown, (names, self.hidden_size, casts))
        input, states, weights = functional.autocast(input.device.type, input, states, self._dropped(weights, 1))
        like = input
        if input.dtype is torch.int64:
            input, like = input.squeeze(-1), weights[0]
        recipe = Recipe(OWN_KIND, has_biases=self.bias)
        batch = shape[0] if len(shape) > 1 else 1
        masks = self._masks(like, Sizes(1, batch, batch, self.hidden_size, self.hidden_size))
        options = StepOptions(values=None if masks.kept is None else masks.kept.to(like.dtype))
        for_onnx = torch.compiler.is_exporting() and _onnx.exporting()
        if for_onnx and masks.kept is not None:
            _onnx.refuse_masks()
        if not for_onnx and serve.has_kernels(formula, input.device.type, like.dtype):
            return self._form_of(self._run(input, states, weights, recipe, options))
        states = states or [like.new_zeros(shape) for _ in self.cell.declaration.states]
        if input.dtype is torch.int64:
            input = _ids.checked(input.reshape(1, -1), self.input_size, None, packed=False).reshape(input.shape)
        if options.values is not None:
            options = StepOptions(values=options.values[0] if len(shape) > 1 else options.values[0, 0])
        after = step_function(cell)(input, outputs_first(cell, states), weights, recipe, options)
        return self._form_of(as_declared(cell, after))

    def _run(
        self, input: Tensor, states: list[Tensor], weights: list[Tensor], recipe: Recipe, options: StepOptions
    ) -> list[Tensor]:
        """The states after a step on compiled kernels: a layer's call of one step."""
        batched = input.dim() == (1 if input.dtype is torch.int64 else 2)
        x = input.unsqueeze(0) if batched else input[None, None]
        first = [state.unsqueeze(0) if batched else state[None, None] for state in states]
        _, last = ops.layer(self.formula, x, first, weights, Rows(options=options), recipe)
        return [state.squeeze(0) if batched else state[0, 0] for state in last]

    def extra_repr(self) -> str:
        """As torch.nn's, with the cell."""
        bias = "" if self.bias else ", bias=False"
        return f"{self.cell!r}, {self.input_size}, {self.hidden_size}{bias}{self._shown_options()}"


def _sizes_of_masks(input: Tensor, rows: Rows, sizes: tuple[int, int, int]) -> Sizes:
    """Of a call of input [., ., I] or packed [N, I], or of ids without the last dimension. sizes: L*D, B and H."""
    groups, batch, hidden = sizes
    count = input.shape[0] if rows.offsets is not None else input.shape[0] * input.shape[1]
    return Sizes(groups, count, batch, hidden, hidden)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def _check_factory(who: str, factory: dict[str, Any]) -> None:
    unknown = sorted(set(factory) - {"device", "dtype"})
    if unknown:
        raise TypeError(f"{who}() got an unexpected keyword argument '{unknown[0]}'")
