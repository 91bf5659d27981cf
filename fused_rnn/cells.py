"""Drop-in torch.nn.RNNCell, LSTMCell and GRUCell: one step of one layer as one functional call.

Every class is a subclass of torch.nn's own and keeps its constructor. What differs from torch.nn: RNNCell has a third
nonlinearity, "identity", and refuses an unknown one at construction; an integer input [B] or [] is ids of input_size
classes, each standing for its one-hot row; every class gives the autocast dtype under autocast; ``torch.jit.script`` is not
supported (``torch.jit.trace`` is). Constructors take, by keyword alone, zoneout, weight_dropout, state_clip and
forget_bias as :class:`fused_rnn.LSTM`'s; masks are of a call, that is of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_rnn import _checks, _extras, _ids, _opacus
from fused_rnn._kinds import GRU, LSTM, NUMBER_OF_NONLINEARITY, kind_of, name_of_class
from fused_rnn._module_checks import check_layout, check_like, check_nonlinearity, check_parameters, type_name
from fused_rnn._quick_call import QuickCall, watch
from fused_rnn._recipe import Recipe, Rows
from fused_rnn._regularisation import Regularisation, Regularised, Sizes, Target, options_of, target_of_kind
from fused_rnn.functional import autocast_on, run_cell, run_rnn
from fused_rnn.modules import refuse_scripting

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]

_WITH_BIASES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Cell(QuickCall, Regularised, nn.RNNCellBase):
    """What the cells share: the options, where the weights come from, the checks, and the call."""

    _cell_number: int  # of each class, its number in _kinds.KINDS

    def _target_of_options(self) -> Target:
        return target_of_kind(type(self).__name__, kind_of(self), bool(self.bias), is_cell=True)

    __prepare_scriptable__ = refuse_scripting
    ft_compute_sample_grad = _opacus.ft_compute_sample_grad

    def _weights(self) -> list[Tensor]:
        """[w_ih, w_hh] or [w_ih, w_hh, b_ih, b_hh] as they are now: parameters, or what replaces them by name.

        One bias that is None counts as zeros, as in torch.nn's cells.
        """
        parameters = self.__dict__["_parameters"]
        try:
            weights = [parameters[name] for name in _WITH_BIASES]
        except KeyError:
            weights = [getattr(self, name) for name in _WITH_BIASES]
        if weights[2] is None or weights[3] is None:
            bias = weights[3] if weights[2] is None else weights[2]
            if bias is None:
                return weights[:2]
            weights = [torch.zeros_like(bias) if weight is None else weight for weight in weights]
        return weights

    def _begin(self, input: Tensor, states: list[Tensor], resets: Any, reset_state: Any) -> list[Tensor]:
        """The states that the step begins from: those given, with what resets replace."""
        if resets is None and reset_state is None:
            return states
        if input.dtype is torch.int64:
            input = _ids.stand_in(input, self._weights())
        names = ("h", "c")[: kind_of(self).states]
        call = names, self.hidden_size, autocast_on(input.device.type)
        shape = (*input.shape[:-1], self.hidden_size)
        with _checks.sizes_known():
            _checks.check_states([f"hx[{name}]" for name in names], states, shape, shape)
        return _extras.begin_of_step(states, resets, reset_state, input, call)

    def _run(self, input: Tensor, states: list[Tensor]) -> list[Tensor]:
        """Checks and runs one step of input [B, I] or [I], which has been checked to be one of them: the states after it."""
        if input.layout is not torch.strided or input.is_nested:
            check_layout(input, "input")
        unbatched = input.dim() == 1
        if unbatched:
            input, states = input.unsqueeze(0), [state.unsqueeze(0) for state in states]
        weights = self._weights()
        shown = _ids.stand_in(input, weights) if input.dtype is torch.int64 else input
        if torch._C._get_tracing_state() is None:
            self._check(shown, states, weights)
        else:
            with _checks.untraced():
                self._check(shown, states, weights)
        recipe = Recipe(self._cell_number, has_biases=len(weights) == 4)
        options = options_of(self)
        if options is not None:
            last = self._regularised(options, recipe, input, shown, states, weights)
        else:
            last = run_cell(recipe, input, states, weights)
        return [state.squeeze(0) for state in last] if unbatched else last

    def _regularised(
        self,
        of: Regularisation,
        recipe: Recipe,
        input: Tensor,
        shown: Tensor,
        states: list[Tensor],
        weights: list[Tensor],
    ) -> list[Tensor]:
        """A step with options: a layer's of one step. shown: what stands for an input of ids."""
        weights = of.dropped(weights, len(weights), self.training)
        batch, hidden = input.shape[0], self.hidden_size
        options = of.step_options(shown, Sizes(1, batch, batch, hidden, hidden), self.training)
        if not options.any():
            return run_cell(recipe, input, states, weights)
        lifted = [state.unsqueeze(0) for state in states]
        _, last = run_rnn(recipe, input.unsqueeze(0), lifted, weights, None, Rows(options=options))
        return [state.squeeze(0) for state in last]

    def _check(self, input: Tensor, states: list[Tensor], weights: list[Tensor]) -> None:
        """Tests all in one expression; only if it fails are the checks made one by one, in torch.nn's order, to raise."""
        fields = self.__dict__
        size, dtype, device = input.shape, input.dtype, input.device
        state_size = (size[0], fields["hidden_size"])
        if not (
            size[1] == fields["input_size"]
            and all(state.shape == state_size for state in states)
            and _checks.fit(weights, dtype, device)
            and _checks.fit(states, dtype, device)
        ):
            self._raise_torchs_error(input, weights, states)

    def _raise_torchs_error(self, input: Tensor, weights: list[Tensor], states: list[Tensor]) -> None:
        """Raises what torch.nn (2.15) raises first; returns where nothing is wrong (dtypes that differ under autocast)."""
        batch, hidden = input.size(0), self.hidden_size
        if input.size(1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {self.input_size}")
        for index, state in enumerate(states):
            if state.size() == (batch, hidden):
                continue
            if state.dim() != 2:
                raise RuntimeError(f"Expected 2D hidden{index} (batch x hidden_size), but got {state.dim()}D tensor")
            if state.size(0) != batch:
                raise RuntimeError(f"Input batch size {batch} doesn't match hidden{index} batch size {state.size(0)}")
            raise RuntimeError(f"hidden{index} has inconsistent hidden_size: got {state.size(1)}, expected {hidden}")
        alike = len({None if weight is None else weight.dtype for weight in weights}) == 1
        if alike and input.dtype != weights[0].dtype and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(
                f"mat1 and mat2 must have the same dtype, but got {type_name(input)} and {type_name(weights[0])}"
            )
        check_parameters(input, _WITH_BIASES[: len(weights)], weights)
        for index, state in enumerate(states):
            check_layout(state, "hidden")
            check_like(input, state, "hidden", wide=index == 1)

    def _run_single_state(self, input: Tensor, hx: Tensor | None, resets: Any = None, reset_state: Any = None) -> Tensor:
        input = _ids.lifted(input)
        dim = input.dim()
        if dim != 2 and dim != 1:
            raise ValueError(f"{name_of_class(self)}: Expected input to be 1D or 2D, got {dim}D instead")
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"{name_of_class(self)}: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        return self._run(input, self._begin(input, [] if hx is None else [hx], resets, reset_state))[0]


class RNNCell(_Cell, nn.RNNCell):
    """torch.nn.RNNCell in one kernel, with a third nonlinearity, "identity"; else as torch.nn.RNNCell."""

    @property
    def _cell_number(self) -> int:  # type: ignore[override]
        number = NUMBER_OF_NONLINEARITY.get(self.nonlinearity)
        if number is None:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return number

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        check_nonlinearity(nonlinearity)
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype, **options)

    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> Tensor:
        """input [B, I] or [I], hx [B, H] or [H] or None -> h' [B, H] or [H].

        resets: bool [B] (or []): where True the step begins from zeros, or from reset_state [1 or B, H] ([H]), not hx.
        """
        return self._run_single_state(input, hx, resets, reset_state)


class LSTMCell(_Cell, nn.LSTMCell):
    """torch.nn.LSTMCell in one kernel."""

    _cell_number = LSTM

    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        resets: Tensor | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """input [B, I] or [I], hx (h, c), each [B, H] or [H], or None -> (h', c'). c' is float32 where c is.

        resets: bool [B] (or []): where True the step begins from zeros, or from reset_state, a pair of [1 or B, H] ([H]),
            instead of hx.
        """
        input = _ids.lifted(input)
        dim = input.dim()
        if dim != 2 and dim != 1:
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {dim}D instead")
        if hx is None:
            h, c = self._run(input, self._begin(input, [], resets, reset_state))
            return h, c
        for index, value in enumerate(hx):
            if value.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {value.dim()}D instead")
        if isinstance(hx, Tensor):
            raise TypeError("lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
        if len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        h, c = self._run(input, self._begin(input, [*hx], resets, reset_state))
        return h, c


class GRUCell(_Cell, nn.GRUCell):
    """torch.nn.GRUCell in one kernel."""

    _cell_number = GRU

    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        resets: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> Tensor:
        """input [B, I] or [I], hx [B, H] or [H] or None -> h' [B, H] or [H].

        resets: bool [B] (or []): where True the step begins from zeros, or from reset_state [1 or B, H] ([H]), not hx.
        """
        return self._run_single_state(input, hx, resets, reset_state)


watch(LSTMCell, GRUCell, RNNCell)
