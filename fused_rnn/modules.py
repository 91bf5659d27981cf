"""Drop-in torch.nn.RNN, LSTM and GRU: the same constructors, parameters, state and errors; forward is one functional call.

Every class is a subclass of torch.nn's own and keeps its constructor. What differs from torch.nn:

* RNN has a third nonlinearity, "identity".
* Constructors take, by keyword alone, zoneout, recurrent_dropout, recurrent_dropout_variant, weight_dropout, state_clip and
  forget_bias (the class LSTM explains). Masks come from torch's generator of the input's device.
* The constructors take ``checkpoint`` (0), the number of steps between the states that are kept for backward, by keyword
  alone: fewer gigabytes, and more time, for the same bits (fused_rnn/_checkpoint.py).
* forward takes lengths, resets, reset_state and return_all_states, by keyword alone (fused_rnn.functional.lstm explains).
* An integer input is ids of input_size classes without the last dimension, [T, B] ([B, T], [T] unbatched, [N] packed): what
  their one-hot rows would give, which are never made (fused_rnn.functional.lstm explains).
* Weights are separate tensors, always: ``flatten_parameters`` does nothing, and ``_flat_weights`` is not a cache but is read
  from the parameters at each use, so it is never stale and holds nothing alive. Assigning it works as in torch.nn.
* Complex numbers run on the reference, with a warning. Tensors in another layout than torch.strided (sparse, nested, mkldnn)
  are errors.
* An LSTM of 16 bits takes a float32 ``c0`` and then returns ``c_n`` in float32. Inside a call c is float32 in any case,
  so that it is not rounded between the calls of a stream either. Under autocast states are cast as all tensors are.
* A packed input with a wrong ``hx`` is an error in every class.
* ``torch.jit.script`` is not supported (``torch.jit.trace`` is).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_exporting
from torch.nn.utils.rnn import PackedSequence

from fused_rnn import _checkpoint, _checks, _extras, _ids, _kinds, _onnx, _opacus
from fused_rnn._extras import Extras
from fused_rnn._flat_weights import FlatWeights
from fused_rnn._module_checks import check_layout, check_like, check_nonlinearity, check_parameters
from fused_rnn._quick_call import QuickCall, watch
from fused_rnn._recipe import Recipe, Rows
from fused_rnn._regularisation import Regularisation, Regularised, Sizes, Target, options_of, target_of_kind
from fused_rnn.functional import autocast_on, run_rnn

__all__ = ["GRU", "LSTM", "RNN"]

_NOTHING = Extras()
_ALL_ROWS = Rows()


def refuse_scripting(module: nn.Module) -> nn.Module:
    """``__prepare_scriptable__`` of every fused module: TorchScript compiles source and knows only torch.nn's layers.

    Handing it a torch.nn twin is no way out: torch.jit.script would put the twin into the caller's model.
    """
    raise NotImplementedError(
        f"torch.jit.script cannot compile fused_rnn.{type(module).__name__}: use torch.jit.trace or torch.export, or script "
        "the model after fused_rnn.revert(model)"
    )


class _Layer(QuickCall, Regularised, _checkpoint.Checkpointed, FlatWeights, nn.RNNBase):
    """What RNN, LSTM and GRU share: the options, and the checks before the call."""

    _cell_number: int  # of each class, its number in _kinds.KINDS

    def _target_of_options(self) -> Target:
        return target_of_kind(type(self).__name__, _kinds.kind_of(self), self.bias, projects=self.proj_size > 0)

    __prepare_scriptable__ = refuse_scripting
    ft_compute_sample_grad = _opacus.ft_compute_sample_grad

    # --- checks and the call ---

    def _run(
        self,
        input: Tensor,
        states: list[Tensor],
        batch_sizes: Tensor | None = None,
        sorted_indices: Tensor | None = None,
        extras: tuple[Extras, Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Checks a batched or packed input and runs the layers on it: (output, last states).

        extras: what the caller gave beside torch.nn's arguments, and input as it came; the states of every step, in the form
            of the third result, then follow the last ones.
        Reads the instance's fields from its __dict__: an attribute of an nn.Module takes three times as long.
        """
        fields = self.__dict__
        weights = self._weights()
        if batch_sizes is not None and is_exporting() and _onnx.exporting():
            _onnx.refuse_packed()
        shown = _ids.stand_in(input, weights) if input.dtype is torch.int64 else input
        if torch._C._get_tracing_state() is None:
            self._check(shown, states, weights, batch_sizes)
        else:
            with _checks.untraced():
                self._check(shown, states, weights, batch_sizes)
        if sorted_indices is not None:
            states = [state.index_select(1, sorted_indices) for state in states]
        recipe = Recipe(
            self._cell_number,
            fields["num_layers"],
            bool(fields["bias"]),
            bool(fields["bidirectional"]),
            bool(fields["batch_first"]) and batch_sizes is None,
            bool(fields["training"]),
            fields["dropout"],
        )
        rows = _ALL_ROWS
        options = options_of(self)
        if options is not None:
            weights, rows = self._regularised(options, recipe, shown, weights, batch_sizes)
        if extras is None:
            return run_rnn(recipe, input, states, weights, batch_sizes, rows, fields.get("checkpoint", 0))
        return self._run_with(extras, recipe, (input, states, weights), batch_sizes, sorted_indices, rows)

    def _regularised(
        self, of: Regularisation, recipe: Recipe, input: Tensor, weights: list[Tensor], batch_sizes: Tensor | None
    ) -> tuple[list[Tensor], Rows]:
        """The weights, and what modifies the steps, of a call with options."""
        groups = recipe.num_layers * recipe.directions
        if batch_sizes is None:
            steps, batch = input.shape[int(recipe.batch_first)], input.shape[1 - int(recipe.batch_first)]
            count = steps * batch
        else:
            count, batch = input.shape[0], int(batch_sizes[0])
        sizes = Sizes(groups, count, batch, self.proj_size or self.hidden_size, self.hidden_size)
        weights = of.dropped(weights, len(weights) // groups, recipe.training)
        options = of.step_options(input, sizes, recipe.training)
        return weights, Rows(options=options) if options.any() else _ALL_ROWS

    def _run_with(
        self,
        extras: tuple[Extras, Tensor],
        recipe: Recipe,
        arguments: tuple[Tensor, list[Tensor], list[Tensor]],
        batch_sizes: Tensor | None,
        sorted_indices: Tensor | None,
        regularised: Rows,
    ) -> tuple[Tensor, list[Tensor]]:
        """_run's call with more than torch.nn's arguments, after the checks of those."""
        given, caller_input = extras
        if caller_input.dtype is torch.int64:
            caller_input = _ids.stand_in(caller_input, arguments[2])
        unbatched = batch_sizes is None and caller_input.dim() == 2
        count, sizes = recipe.kind.states, (self.proj_size or self.hidden_size, self.hidden_size)
        casts = autocast_on(caller_input.device.type)
        groups, batch_first = recipe.num_layers * recipe.directions, bool(self.batch_first) and batch_sizes is None
        names = ("h", "c")[:count]
        form = _extras.Form(caller_input, batch_first, unbatched, batch_sizes, groups, names, sizes[:count], casts)
        with _checks.sizes_known():
            rows = _extras.rows_of(given, form, sorted_indices)._replace(options=regularised.options)
        recipe = recipe._replace(all_states=given.return_all_states)
        output, states = run_rnn(recipe, *arguments, batch_sizes, rows, self.checkpoint)
        return output, [*states[:count], *_extras.in_form(states[count:], form)]

    def _check(self, input: Tensor, states: list[Tensor], weights: list[Tensor], batch_sizes: Tensor | None) -> None:
        """All is tested in one expression; only if it fails are torch.nn's methods called, in torch.nn's order, to raise."""
        fields = self.__dict__
        hidden, num_layers = fields["hidden_size"], fields["num_layers"]
        if not (
            type(num_layers) is int
            and num_layers > 0
            and type(fields["bias"]) is type(fields["bidirectional"]) is type(fields["batch_first"]) is bool
            and type(fields["training"]) is bool
        ):
            self._check_fields()
        if input.layout is not torch.strided or input.is_nested:
            check_layout(input, "input")
        size, dtype, device = input.shape, input.dtype, input.device
        if batch_sizes is not None:
            _checks.check_batch_sizes(batch_sizes, input)
            batch, steps = int(batch_sizes[0]), 1
        else:
            batch, steps = (size[0], size[1]) if fields["batch_first"] else (size[1], size[0])
        rows = num_layers * 2 if fields["bidirectional"] else num_layers
        if not (
            steps > 0
            and size[-1] == fields["input_size"]
            and len(size) == (3 if batch_sizes is None else 2)
            and (not states or states[0].shape == (rows, batch, fields["proj_size"] or hidden))
            and (len(states) < 2 or states[1].shape == (rows, batch, hidden))
            and _checks.fit(weights, dtype, device)
            and _checks.fit(states, dtype, device)
        ):
            self._raise_torchs_error(input, weights, states, batch_sizes, (rows, batch, hidden), steps)

    def _check_fields(self) -> None:
        """Raises for a field that somebody has changed since the constructor checked it. 0 and 1 will do for a bool."""
        for field in ("bias", "bidirectional", "batch_first", "training"):
            value = getattr(self, field)
            if not isinstance(value, int) or value not in (0, 1):
                raise TypeError(f"{field}: expected a bool, got {type(value).__name__}")
        if type(self.num_layers) is not int:
            raise TypeError(f"num_layers: expected an int, got {type(self.num_layers).__name__}")
        if self.num_layers < 1:
            raise ValueError(f"num_layers: expected at least 1, got {self.num_layers}")

    def _raise_torchs_error(
        self,
        input: Tensor,
        weights: list[Tensor],
        states: list[Tensor],
        batch_sizes: Tensor | None,
        expected: tuple[int, int, int],
        steps: int,
    ) -> None:
        """Raises what torch.nn raises first; returns where nothing is wrong (dtypes that differ under autocast)."""
        if weights[0] is not None:  # torch.nn's check reads its dtype
            self.check_input(input, batch_sizes)
        sizes = ((*expected[:2], self.proj_size or self.hidden_size), expected)
        for index, (state, size) in enumerate(zip(states, sizes, strict=False)):
            which = f"[{index}]" if len(states) > 1 else ""
            self.check_hidden_size(state, size, f"Expected hidden{which} size {{}}, got {{}}")
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        check_parameters(input, self._flat_weights_names, weights)
        for index, state in enumerate(states):
            check_layout(state, "hidden")
            check_like(input, state, "hidden", wide=index == 1)

    def _forward_single_state(
        self, input: Tensor | PackedSequence, hx: Tensor | None, extras: Extras = _NOTHING
    ) -> tuple[Any, ...]:
        """Forward of the cells with one state (RNN, GRU)."""
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, extras)
        input = _ids.lifted(input)
        given = (extras, input) if extras.given() else None
        dim = input.dim()
        if dim == 2:
            if hx is not None:
                if hx.dim() != 2:
                    raise RuntimeError(f"For unbatched 2-D input, hx should also be 2-D but got {hx.dim()}-D tensor")
                hx = hx.unsqueeze(1)
            input = input.unsqueeze(0 if self.batch_first else 1)
        elif dim != 3:
            tensor = " tensor" if _kinds.kind_of(self).nonlinearity else ""  # torch.nn's RNN says it
            raise ValueError(f"{_kinds.name_of_class(self)}: Expected input to be 2D or 3D, got {dim}D{tensor} instead")
        elif hx is not None and hx.dim() != 3:
            raise RuntimeError(f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor")
        output, (h_n, *every) = self._run(input, [] if hx is None else [hx], extras=given)
        if dim == 2:
            return output.squeeze(0 if self.batch_first else 1), h_n.squeeze(1), *every
        return output, h_n, *every

    def _forward_packed(self, input: PackedSequence, hx: Any, extras: Extras) -> tuple[Any, ...]:
        """Forward of a packed sequence; hx and the returned state are in the caller's order of rows."""
        data, batch_sizes, sorted_indices, unsorted_indices = input
        data = _ids.lifted(data)
        count = _kinds.KINDS[self._cell_number].states
        states = [] if hx is None else [*_pair(hx)] if count == 2 else [hx]
        given = (extras, data) if extras.given() else None
        output, last = self._run(data, states, batch_sizes, sorted_indices, given)

        def packed(rows: Tensor) -> PackedSequence:
            return PackedSequence(rows, batch_sizes, sorted_indices, unsorted_indices)

        hidden: Any = tuple(last[:count]) if count > 1 else last[0]
        results = packed(output), self.permute_hidden(hidden, unsorted_indices)
        every = [packed(state) for state in last[count:]]
        return (*results, every[0] if count == 1 else tuple(every)) if every else results


def _pair(hx: Any) -> tuple[Tensor, Tensor]:
    if len(hx) < 2:
        hx[1]  # torch.nn's IndexError
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    return hx[0], hx[1]


class LSTM(_Layer, nn.LSTM):
    """torch.nn.LSTM on fused kernels; constructor, arguments, results and errors are torch.nn.LSTM's.

    Constructor options beyond torch.nn's, by keyword alone. Each is an attribute too, and may be assigned.

    Args:
        zoneout: the probability that a unit keeps its value over a step (Krueger et al. 2017): one number for h and c, or a
            pair. In training every step, row and unit has a mask of its own, and those of h and c are drawn apart; the new h
            is made of the new c before c's zoneout. In eval mode a state becomes ``p * before + (1 - p) * after``.
            Not with proj_size.
        recurrent_dropout: the probability with which, in training, a mask zeroes elements; the others are divided by 1 - p.
            A mask is of a call, a layer, a direction and a row, the same at all steps, also across resets.
        recurrent_dropout_variant: what it masks: "state", the h that is multiplied with weight_hh (Gal and Ghahramani 2016),
            or "candidate", g (Semeniuta et al. 2016).
        weight_dropout: the probability with which, in training, elements of weight_hh are zeroed; the others are divided by
            1 - p (Merity et al. 2018). A mask is of a call.
        state_clip: the new c is cut to [-state_clip, state_clip] at every step, before h is made of it and before zoneout.
            No gradient passes where it was cut. None: it is not.
        forget_bias: where ``reset_parameters`` puts the bias of the forget gate: its part of bias_ih becomes forget_bias,
            its part of bias_hh 0, in all layers and directions. None: as torch.nn.LSTM. Not with bias=False.

    Raises:
        TypeError, ValueError: an option is wrong or not to be had with another; the message names it.
    """

    _cell_number = _kinds.LSTM

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Any = None,
        resets: Tensor | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
        return_all_states: bool = False,
    ) -> Any:
        """input [T, B, I] ([B, T, I] with batch_first; [T, I]; PackedSequence), hx (h0 [L*D, B, P], c0 [L*D, B, H]) or None
        -> output [T, B, D*P] in the input's form, (h_n [L*D, B, P], c_n [L*D, B, H]).

        lengths, resets, reset_state and return_all_states: as :func:`fused_rnn.functional.lstm`'s; of a packed input resets
        are [N] as its data, and the third result is a pair of PackedSequence of [N, L*D, P] and [N, L*D, H].
        """
        extras = Extras(lengths, resets, reset_state, return_all_states)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, extras)
        input = _ids.lifted(input)
        dim = input.dim()
        if dim != 3 and dim != 2:
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {dim}D instead")
        states: list[Any] = []
        if hx is not None:
            h0, c0 = hx[0], hx[1]
            if h0.dim() != dim or c0.dim() != dim:
                raise RuntimeError(
                    f"For {'batched 3' if dim == 3 else 'unbatched 2'}-D input, hx and cx should "
                    f"also be {dim}-D but got ({h0.dim()}-D, {c0.dim()}-D) tensors"
                )
            states = [*_pair(hx)]
        given = (extras, input) if extras.given() else None
        if dim == 2:
            input = input.unsqueeze(0 if self.batch_first else 1)
            states = [state.unsqueeze(1) for state in states]
        output, (h_n, c_n, *every) = self._run(input, states, extras=given)
        if dim == 2:
            output, h_n, c_n = output.squeeze(0 if self.batch_first else 1), h_n.squeeze(1), c_n.squeeze(1)
        return (output, (h_n, c_n), tuple(every)) if every else (output, (h_n, c_n))


class GRU(_Layer, nn.GRU):
    """torch.nn.GRU on fused kernels; constructor, arguments, results and errors are torch.nn.GRU's.

    Options beyond torch.nn's: those of :class:`fused_rnn.LSTM` but forget_bias. zoneout is one number; the candidate of
    recurrent_dropout is n; state_clip cuts the new h.
    """

    _cell_number = _kinds.GRU

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Any = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
        return_all_states: bool = False,
    ) -> Any:
        """input [T, B, I] ([B, T, I] with batch_first; [T, I]; PackedSequence), hx [L*D, B, H] or None
        -> output [T, B, D*H] in the input's form, h_n [L*D, B, H].

        lengths, resets, reset_state and return_all_states: as :func:`fused_rnn.functional.gru`'s; of a packed input resets
        are [N] as its data, and the third result is a PackedSequence of [N, L*D, H].
        """
        extras = Extras(lengths, resets, reset_state, return_all_states)
        return self._forward_single_state(input, hx, extras)


class RNN(_Layer, nn.RNN):
    """torch.nn.RNN on fused kernels, with a third nonlinearity, "identity" (a linear recurrence); else as torch.nn.RNN.

    Options beyond torch.nn's: those of :class:`fused_rnn.LSTM` but forget_bias and the variant "candidate". zoneout is one
    number; state_clip cuts the new h.
    """

    @property
    def _cell_number(self) -> int:  # type: ignore[override]
        return _kinds.NUMBER_OF_MODE[self.mode]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        nonlinearity = args[3] if len(args) > 3 else kwargs.get("nonlinearity", "tanh")
        if "proj_size" not in kwargs:  # of which torch.nn complains first
            check_nonlinearity(nonlinearity)
        number = _kinds.NUMBER_OF_NONLINEARITY.get(nonlinearity)
        mode = None if number is None or nonlinearity in _kinds.TORCH_NONLINEARITIES else _kinds.KINDS[number].mode
        if mode is not None:  # torch.nn.RNN knows two: build as tanh, which has the same parameters
            if len(args) > 3:
                args = (*args[:3], "tanh", *args[4:])
            else:
                kwargs["nonlinearity"] = "tanh"
        super().__init__(*args, **kwargs)
        if mode is not None:
            self.nonlinearity, self.mode = nonlinearity, mode

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Any = None,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
        return_all_states: bool = False,
    ) -> Any:
        """input [T, B, I] ([B, T, I] with batch_first; [T, I]; PackedSequence), hx [L*D, B, H] or None
        -> output [T, B, D*H] in the input's form, h_n [L*D, B, H].

        lengths, resets, reset_state and return_all_states: as :func:`fused_rnn.functional.rnn`'s; of a packed input resets
        are [N] as its data, and the third result is a PackedSequence of [N, L*D, H].
        """
        extras = Extras(lengths, resets, reset_state, return_all_states)
        return self._forward_single_state(input, hx, extras)


watch(LSTM, GRU, RNN)
