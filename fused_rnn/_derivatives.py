"""Derivatives of the ops that are not kernels by themselves: of backward, once more, and tangents (forward-mode AD).

Composites: they consist of torch's ops and of ours. csrc/torch/second_order.cpp has the second derivatives that kernels
serve and the tangents, fused_rnn/_tangents.py those by torch's ops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_rnn import _tangents, reference
from fused_rnn._recipe import HAS_RESET_STATES, Rows, rows_of, unpacked


def layer_backward_differentiable(
    dy: Tensor | None,
    dlast: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    saved: Sequence[Tensor],
    recipe: int,
    mask: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The same gradients as fused_rnn::layer_backward, as a differentiable function of everything they depend on.

    Runs the reference again and differentiates it. What forward saved is not read: it follows from the other arguments.
    """
    of_call = rows_of(rows, recipe)
    given = [*states, *of_call.reset_states]
    own, first = 1 + len(states), 1 + len(given)

    def run(args: Sequence[Tensor]) -> list[Tensor]:
        given_rows = of_call._replace(reset_states=tuple(args[own:first]))
        y, last = reference.layer(args[0], args[1:own], args[first:], given_rows, unpacked(recipe))
        return [y, *last]

    asked = [mask[0], *[mask[1]] * len(given), *[mask[2]] * len(params)]
    grads = differentiated(run, [x, *given, *params], asked, [dy, *dlast])
    return grads[0], grads[1:first], grads[first:]


def differentiated(
    run: Callable[[Sequence[Tensor]], list[Tensor]],
    given: Sequence[Tensor],
    asked: Sequence[bool],
    result_grads: Sequence[Tensor | None],
) -> list[Tensor]:
    """Gradients of ``run(given)`` as differentiable functions of everything they depend on; [0] where not asked for.

    result_grads: of run's results; None or a tensor of shape [0] for none, and there may be fewer.
    """
    places = [place for place, wanted in enumerate(asked) if wanted]
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _differentiated_by_func(run, given, places, result_grads)
    with torch.enable_grad():
        # An alias for every use, so that a tensor that comes in twice gets two gradients, not twice their sum.
        def alias(t: Tensor) -> Tensor:
            return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

        args = [alias(t) if wanted else t for t, wanted in zip(given, asked, strict=True)]
        pairs = [
            (out, grad)
            for out, grad in zip(run(args), result_grads, strict=False)
            if grad is not None and grad.shape != (0,)
        ]
        inputs = [t for t, wanted in zip(args, asked, strict=True) if wanted]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs],
                inputs,
                [grad for _, grad in pairs],
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            if inputs and pairs
            else [torch.zeros_like(t) for t in inputs]
        )
    return [next(found) if wanted else _none(given) for wanted in asked]


def _none(given: Sequence[Tensor]) -> Tensor:
    """[0] in the layer's dtype. given: a layer's tensors, of which an input of ids is of another."""
    return (given[0] if given[0].is_floating_point() else given[-1]).new_empty(0)


def _differentiated_by_func(
    run: Callable[[Sequence[Tensor]], list[Tensor]],
    given: Sequence[Tensor],
    places: Sequence[int],
    result_grads: Sequence[Tensor | None],
) -> list[Tensor]:
    """The same inside of a torch.func transform, which refuses requires_grad_. places: of those asked for."""
    used = [place for place, grad in enumerate(result_grads) if grad is not None and grad.shape != (0,)]

    def of_asked(*tensors: Tensor) -> tuple[Tensor, ...]:
        args = list(given)
        for place, tensor in zip(places, tensors, strict=True):
            args[place] = tensor
        results = run(args)
        return tuple(results[place] for place in used)

    found = [_none(given)] * len(given)
    if places and used:
        pull = torch.func.vjp(of_asked, *(given[place] for place in places))[1]
        for place, gradient in zip(places, pull(tuple(result_grads[place] for place in used)), strict=True):
            found[place] = gradient
    else:
        for place in places:
            found[place] = torch.zeros_like(given[place])
    return found


def _numbers(call: Sequence[int]) -> tuple[int, tuple[bool, ...], int, list[bool]]:
    """Recipe, mask, samples, and which gradients are asked for, of a schema's ``call`` (csrc/torch/ops.h)."""
    return call[0], tuple(map(bool, call[1:4])), call[4], list(map(bool, call[5:]))


def _layer_double_backward(
    grads: Sequence[Tensor],
    dy: Tensor | None,
    dlast: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    saved: Sequence[Tensor],
    call: Sequence[int],
) -> list[Tensor]:
    """Gradients of the arguments of fused_rnn::layer_backward, or with samples layer_backward_samples, from its results'.

    Of dy, dlast, x, states, reset states and params, where the flags at the end of ``call`` say so, else [0]. By the kernels
    where these have the derivative, else by differentiating the reference twice.
    """
    return _double_backward(grads, (dy, dlast, x, states, params, rows, saved), call, by_kernels=True)


def _layer_double_backward_batched(
    grads: Sequence[Tensor],
    dy: Tensor | None,
    dlast: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    saved: Sequence[Tensor],
    call: Sequence[int],
) -> list[Tensor]:
    """The same of batched ``grads``, as of torch.autograd.functional.hessian(vectorize=True), by the reference."""
    return _double_backward(grads, (dy, dlast, x, states, params, rows, saved), call, by_kernels=False)


def _double_backward(
    grads: Sequence[Tensor], arguments: Sequence[Any], numbers: Sequence[int], by_kernels: bool
) -> list[Tensor]:
    dy, dlast, x, states, params, rows, saved = arguments
    recipe, mask, samples, needed = _numbers(numbers)
    of_call = rows_of(rows, recipe)
    masks = rows[: len(rows) - len(of_call.reset_states)]
    none = params[0].new_empty(0)
    given = [none if dy is None else dy, *dlast, x, *states, *of_call.reset_states, *params]
    counts = (len(dlast), len(states), len(params), len(masks), len(saved), len(grads))
    first = 1 + len(dlast)
    last = first + 1 + len(states) + len(of_call.reset_states)
    wanted = (needed[first], any(needed[first + 1 : last]), any(needed[last:]))
    call = _BackwardCall(recipe, mask, samples, wanted, dy is not None, *counts)
    kernels = by_kernels and not samples and _has_second_order(x, of_call)
    if by_kernels and (torch._C._functorch.peek_interpreter_stack() is not None or (kernels and _is_differentiated())):
        with above_transforms():
            found = _SecondOrder.apply(call, kernels, *masks, *saved, *grads, *given)
    else:
        found = None
        if kernels:
            try:
                found = call.by_kernels(masks, saved, grads, given)
            except (RuntimeError, ValueError):
                if _tangents.kernels_serve(x):
                    raise
                # The device has just refused the kernels.
        if found is None:
            found = call.derivatives(masks, grads, given, needed)
    return [t if asked else none for t, asked in zip(found, needed, strict=True)]


def _is_differentiated() -> bool:
    """Whether autograd, forward-mode AD or a torch.func transform may have a part in what is computed now."""
    forward = torch.autograd.forward_ad._current_level >= 0
    return torch.is_grad_enabled() or forward or torch._C._functorch.peek_interpreter_stack() is not None


def _has_second_order(x: Tensor, rows: Rows) -> bool:
    """Whether fused_rnn::layer_second_order serves a layer."""
    known = x.device.type in _tangents.DEVICES and x.dtype in (torch.float32, torch.float64)
    return known and x.numel() > 0 and not rows.options.any() and _tangents.kernels_serve(x)


@contextlib.contextmanager
def above_transforms() -> Iterator[None]:
    """Inside of an op's kernel calls go past the torch.func transform that called it; in this block, through it again.

    torch.autograd.Function.apply wants that where a transform is at work.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        yield
        return
    front = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode
    with torch._C._PreserveDispatchKeyGuard():
        torch._C._dispatch_tls_set_dispatch_key_excluded(front, False)
        torch._C._dispatch_tls_set_dispatch_key_included(front, True)
        yield


class _BackwardCall(NamedTuple):
    """What a call of a backward op is made of, beside its tensors. Those that its results may be differentiated by are
    ``given``: dy ([0]: none), dlast, x, states, reset states and params."""

    recipe: int
    mask: tuple[bool, ...]
    samples: int
    wanted: tuple[bool, bool, bool]  # of x, states, params: whether these are to have a gradient
    has_dy: bool
    # Numbers of tensors; masks: of ``rows``, but for reset states; grads: of its results.
    lasts: int
    states: int
    params: int
    masks: int
    saved: int
    grads: int

    def derivatives(
        self, masks: Sequence[Tensor], grads: Sequence[Tensor], given: Sequence[Tensor], needed: Sequence[bool]
    ) -> list[Tensor]:
        """Gradients of ``given`` from those of the results, by differentiating the reference twice; [0] for none."""
        first = 1 + self.lasts

        def results(given: Sequence[Tensor]) -> list[Tensor]:
            states, own = given[first + 1 : first + 1 + self.states], given[first + 1 + self.states :]
            resets = unpacked(self.recipe).kind.states if self.recipe & HAS_RESET_STATES else 0
            rows = [*masks, *own[:resets]]
            dy, no_saved = given[0] if self.has_dy else None, list[Tensor]()
            call = (dy, given[1:first], given[first], states, own[resets:], rows, no_saved)
            if self.samples:
                made = _samples_differentiable(call, self.recipe, self.mask, self.samples)
            else:
                made = layer_backward_differentiable(*call, self.recipe, self.mask)
            return [made[0], *made[1], *made[2]]

        # What is [0] stands for none.
        asked = [wanted and t.shape != (0,) for wanted, t in zip(needed, given, strict=True)]
        return differentiated(results, given, asked, grads)

    def made(self, given: Sequence[Tensor]) -> list[bool]:
        """Of which of ``given`` there are gradients: of what is wanted, and of all of dy and dlast that are there."""
        x, states, params = self.wanted
        before = len(given) - self.params - self.lasts - 2
        made = [True] * (1 + self.lasts) + [x] + [states] * before + [params] * self.params
        return [one and t.shape != (0,) for t, one in zip(given, made, strict=True)]

    def by_kernels(
        self, masks: Sequence[Tensor], saved: Sequence[Tensor], grads: Sequence[Tensor], given: Sequence[Tensor]
    ) -> list[Tensor]:
        """The same of what is wanted, and of all of dy and dlast."""
        first = 1 + self.lasts
        states, own = given[first + 1 : first + 1 + self.states], given[first + 1 + self.states :]
        resets = unpacked(self.recipe).kind.states if self.recipe & HAS_RESET_STATES else 0
        found: list[Tensor] = torch.ops.fused_rnn.layer_second_order(
            grads,
            given[0] if self.has_dy else None,
            given[1:first],
            given[first],
            states,
            own[resets:],
            [*masks, *own[:resets]],
            saved,
            [self.recipe, *self.wanted],
        )
        layer = unpacked(self.recipe)
        count = 1 + layer.kind.states + (layer.all_states and layer.kind.has_c)  # of y and the last states
        found = [found[0], *found[1:count][: self.lasts], *found[count:]]
        none = given[0].new_empty(0)
        return [none if t.shape == (0,) else one for t, one in zip(given, found, strict=True)]


class _SecondOrder(torch.autograd.Function):
    """_BackwardCall.by_kernels, or the same by the reference; differentiable by the reference.

    Transforms of torch.func call ``forward`` below all of them, where the reference can be differentiated: inside of an op's
    kernel that a transform calls, no other transform can run.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(call: _BackwardCall, kernels: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        """tensors: masks, saved, gradients of the results, and what these were made from."""
        masks, saved, grads, given = _SecondOrder._parts(call, tensors)
        if kernels:
            return tuple(call.by_kernels(masks, saved, grads, given))
        return tuple(call.derivatives(masks, grads, given, call.made(given)))

    @staticmethod
    def _parts(call: _BackwardCall, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        parts = []
        for count in (call.masks, call.saved, call.grads):
            parts.append(tensors[:count])
            tensors = tensors[count:]
        return [*parts, tensors]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        call, tensors = ctx.call, ctx.saved_tensors
        masks, saved, grads, given = _SecondOrder._parts(call, tensors)
        known = call.made(given)

        def run(args: Sequence[Tensor]) -> list[Tensor]:
            found = call.derivatives(masks, args[: call.grads], args[call.grads :], known)
            return [t for t, one in zip(found, known, strict=True) if one]

        inputs, first = [*grads, *given], 2 + len(masks) + len(saved)
        of_results = [g for g, one in zip(gradients, known, strict=True) if one]
        asked = [wanted and t.shape != (0,) for wanted, t in zip(ctx.needs_input_grad[first:], inputs, strict=True)]
        found = differentiated(run, inputs, asked, of_results)
        return *[None] * first, *(t if wanted else None for t, wanted in zip(found, asked, strict=True))


def _of_sample(t: Any, index: int, samples: int, place: int) -> Any:
    """Rows of a sample, along dimension ``place`` from the end; what stands for none as it is."""
    if t is None or t.shape == (0,):
        return t
    return t.unflatten(place, (t.shape[place] // samples, samples)).select(place, index)


# dy, dlast, x, states, params, rows, saved
_CallArguments = tuple[Any, Any, Any, Any, Any, Any, Any]


def _calls_of_samples(call: Sequence[Any], recipe: int, samples: int) -> Iterator[_CallArguments]:
    """call: dy, dlast, x, states, params, rows and saved of a folded batch. The same for each of its samples."""
    dy, dlast, x, states, params, rows, saved = call
    of_call = rows_of(rows, recipe)
    offsets = None if of_call.offsets is None else of_call.offsets // samples
    batch = states[0].shape[1] if states else x.shape[1]
    for index in range(samples):

        def own(t: Any, place: int = -2, index: int = index) -> Any:
            return _of_sample(t, index, samples, place)

        resets = tuple(own(t) if t.shape[-2] == batch else t for t in of_call.reset_states)
        of_rows = Rows(own(of_call.lengths, -1), offsets, own(of_call.resets, -1), resets)
        of_saved = [own(t, -3 if t.dim() == 4 else -2) for t in saved]
        lasts, before = ([own(t) for t in of_states] for of_states in (dlast, states))
        yield own(dy), lasts, own(x), before, params, of_rows.given(), of_saved


def _joined_samples(
    made: Sequence[tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients by rows and of params [samples, ...] from those of each sample; [0] where nobody asked."""

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return parts[0] if parts[0].dim() == 1 else torch.stack(tuple(parts), -2).flatten(-3, -2)

    dx = joined([result[0] for result in made])
    dstates = [joined(parts) for parts in zip(*(result[1] for result in made), strict=True)]
    params = zip(*(result[2] for result in made), strict=True)
    return dx, dstates, [parts[0] if parts[0].shape == (0,) else torch.stack(parts) for parts in params]


def _samples_differentiable(
    call: Sequence[Any], recipe: int, mask: Sequence[bool], samples: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """fused_rnn::layer_backward_samples as a differentiable function of its arguments: each sample by itself."""
    return _joined_samples(
        [layer_backward_differentiable(*own, recipe, mask) for own in _calls_of_samples(call, recipe, samples)]
    )


def _layer_tangents(
    tangents: Sequence[Tensor],
    y: Tensor,
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    saved: Sequence[Tensor],
    recipe: int,
) -> list[Tensor]:
    """Tangents of y and of the last states, from those of x, states, reset states and params ([0]: none).

    Raises:
        NotImplementedError: what _tangents does not serve; functions and modules take the reference for it.
    """
    of_call, layer = rows_of(rows, recipe), unpacked(recipe)
    if _tangents.by_kernels(x, of_call, layer):
        found: list[Tensor] = torch.ops.fused_rnn.layer_jvp(tangents, x, states, params, rows, [*saved, y], [recipe, 0])
        return found
    if not _tangents.by_scan(x, len(params) // layer.directions, of_call, layer):
        raise NotImplementedError(f"fused_rnn::layer has no jvp of such a call: {_tangents.SERVED}")
    given = {"x": x, "states": list(states), "params": list(params), "rows": of_call, "recipe": layer}
    return _tangents.tangents(_tangents.call_of(given, tangents), y)


def _layer_backward_tangents(
    tangents: Sequence[Tensor],
    dy: Tensor | None,
    dlast: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    saved: Sequence[Tensor],
    call: Sequence[int],
) -> list[Tensor]:
    """Tangents of the results of fused_rnn::layer_backward, from those of dy, dlast, x, states, reset states and params.

    The gradients are linear in dy and dlast, and those of one function of the others: its second derivative is symmetric.
    """
    recipe, mask, samples, _ = _numbers(call)
    first = 1 + len(dlast)
    resets = len(rows_of(rows, recipe).reset_states)
    if samples and mask[2]:
        return _sample_tangents(tangents, (dy, dlast, x, states, params, rows, saved), recipe, mask, samples)
    asked = [mask[0], *[mask[1]] * (len(states) + resets), *[mask[2]] * len(params)]
    found: list[Any] = [None] * len(asked)
    if any(t.shape != (0,) for t in tangents[first:]):
        needed = [*[False] * first, *asked]
        found = _layer_double_backward(
            tangents[first:], dy, dlast, x, states, params, rows, saved, [recipe, True, True, True, 0, *needed]
        )[first:]
    if any(t.shape != (0,) for t in tangents[:first]):
        of_dy = None if tangents[0].shape == (0,) else tangents[0]
        dx, dstates, dparams = torch.ops.fused_rnn.layer_backward(
            of_dy, tangents[1:first], x, states, params, rows, saved, recipe, mask
        )
        linear = [dx, *dstates, *dparams]
        found = [
            more if one is None or not wanted else one + more for one, more, wanted in zip(found, linear, asked, strict=True)
        ]
    return found


def _sample_tangents(
    tangents: Sequence[Tensor], call: Sequence[Any], recipe: int, mask: Sequence[bool], samples: int
) -> list[Tensor]:
    """The same where each sample has gradients of the weights: each sample by itself."""
    count, states, params = len(call[1]), len(call[3]), len(call[4])
    by_rows, of_params = tangents[: len(tangents) - params], tangents[len(tangents) - params :]
    batch = call[3][0].shape[1] if states else call[2].shape[1]
    made = []
    for index, own in enumerate(_calls_of_samples(call, recipe, samples)):
        # Of reset states that all rows share the tangents are those of every sample.
        own_tangents = [
            t if place > 1 + count + states and t.shape[-2:-1] not in ((), (batch,)) else _of_sample(t, index, samples, -2)
            for place, t in enumerate(by_rows)
        ]
        found = _layer_backward_tangents([*own_tangents, *of_params], *own, [recipe, *mask, 0])
        made.append((found[0], found[1 : len(found) - params], found[len(found) - params :]))
    dx, dstates, dparams = _joined_samples(made)
    return [dx, *dstates, *dparams]


def register(library: Any) -> None:
    """Makes the ops' schemas know these functions; once."""
    for function in (layer_backward_differentiable, _layer_double_backward, _layer_tangents, _layer_backward_tangents):
        name = function.__name__.removeprefix("_")
        library.impl(name, function, "CompositeImplicitAutograd")
        library.impl(name, function, "FuncTorchBatched")
    # torch's first vmap, of autograd.grad(is_grads_batched=True) and jacobian(vectorize=True).
    library.impl("layer_tangents", _layer_tangents, "Batched")
    library.impl("layer_double_backward", _layer_double_backward_batched, "Batched")
