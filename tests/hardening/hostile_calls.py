"""The table of calls with arguments that lie: name, function, and what is to come of it. hostile.py makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from hostile_arguments import (
    ANYTHING,
    ERROR,
    HIDDEN,
    INPUTS,
    KEPT,
    META,
    ROWS,
    SPOILED,
    STEPS,
    Backward,
    Layer,
    flatten,
    freed,
    huge,
    layer,
    ops,
    packed,
    rand,
    right,
    zero,
)
from torch import Tensor

import fused_rnn
from fused_rnn import _backend
from fused_rnn._kinds import GRU, LSTM, RNN_RELU, RNN_TANH
from fused_rnn._recipe import Recipe


def calls() -> Iterator[tuple[str, Callable[[], Any], Any]]:
    """(name, call, what is to come of it)."""
    yield from layer_calls()
    yield from value_calls()
    yield from backward_calls()
    yield from composite_calls()
    yield from module_calls()


def layer_calls() -> Iterator[tuple[str, Callable[[], Any], Any]]:
    """Each tensor of a layer spoiled, by the op and, where the module asks for no more, by a module."""
    for cell in (LSTM, GRU, RNN_TANH):
        good = layer(cell)
        yield f"layer {cell} as it should be", good.run, right(good)
        tensors = {"x": good.x, "h0": good.h0} | ({"c0": good.c0} if cell == LSTM else {})
        for name, tensor in tensors.items():
            for how, spoil in SPOILED.items():
                optional = how == "none" and name != "x"
                # x of another number of steps is another call; the states then do not fit, or do.
                fits = name == "x" and how in ("one row more", "one row less")
                if optional:
                    continue
                yield (
                    f"layer {cell} {name} {how}",
                    lambda name=name, t=tensor, s=spoil, g=good: g.changed(**{name: s(t)}).run(),
                    right(good.changed(x=spoil(tensor))) if fits else META if (name, how) == ("x", "meta") else ERROR,
                )
            for how, keep in KEPT.items():
                yield (
                    f"layer {cell} {name} {how}",
                    lambda n=name, t=tensor, k=keep, g=good: g.changed(**{n: k(t)}).run(),
                    right(good),
                )
            yield (
                f"layer {cell} {name} efficient zeros",
                lambda name=name, t=tensor, g=good: g.changed(**{name: zero(t)}).run(),
                right(good.changed(**{name: torch.zeros_like(tensor)})),
            )
        for index, weight in enumerate(good.params):

            def with_weight(w: Any, at: int = index, g: Layer = good) -> Layer:
                return g.changed(params=[w if i == at else p for i, p in enumerate(g.params)])

            for how, spoil in SPOILED.items():
                yield f"layer {cell} weight {index} {how}", lambda w=weight, s=spoil, f=with_weight: f(s(w)).run(), ERROR
            for how, keep in KEPT.items():
                yield (
                    f"layer {cell} weight {index} {how}",
                    lambda w=weight, k=keep, f=with_weight: f(k(w)).run(),
                    right(good),
                )
            yield (
                f"layer {cell} weight {index} efficient zeros",
                lambda w=weight, f=with_weight: f(zero(w)).run(),
                right(with_weight(torch.zeros_like(weight))),
            )
        for count in (0, 1, 2, 3, 5, 8, 400):
            yield (
                f"layer {cell} {count} weights",
                lambda c=count, g=good: g.changed(params=(g.params * 100)[:c]).run(),
                ERROR,
            )
        yield f"layer {cell} huge x", lambda g=good: g.changed(x=huge(g.x)).run(), ERROR
        yield f"layer {cell} huge weight", lambda g=good: g.changed(params=[huge(p) for p in g.params]).run(), ERROR
        yield f"layer {cell} two directions of one's weights", lambda g=good: g.changed(bidirectional=True).run(), ERROR
        yield f"layer {cell} no biases with them", lambda g=good: g.changed(has_biases=False).run(), ERROR


def value_calls() -> Iterator[tuple[str, Callable[[], Any], Any]]:
    """Numbers that decide an address: kinds of cells, offsets, lengths, resets."""
    good = layer(LSTM)
    for cell in (-1, 5, 6, 255, 2**31, 2**32, 2**32 + 3, -(2**32) + 3, 2**63 - 1):
        yield f"cell {cell}", lambda c=cell: good.changed(cell=c).run(), ERROR
    yield "c0 given to a GRU", lambda: layer(GRU).changed(c0=rand(1, ROWS, HIDDEN)).run(), ERROR
    yield "c0 given to an RNN", lambda: layer(RNN_RELU).changed(c0=rand(1, ROWS, HIDDEN)).run(), ERROR
    yield "a large c0 given to a GRU", lambda: layer(GRU).changed(c0=rand(1, ROWS, 10000)).run(), ERROR
    yield "c0 of other rows given to a GRU", lambda: layer(GRU).changed(c0=rand(1, 1, 1)).run(), ERROR
    lies = {
        "beyond N": ([0, 3, 5, 100000], 7),
        "far beyond N": ([0, 2**40, 2**41, 2**41 + 1], 7),
        "the last below N": ([0, 2, 3, 4], 7),
        "the last above N": ([0, 3, 6, 8], 7),
        "negative": ([0, -3, -5, 7], 7),
        "very negative": ([0, -(2**40), 3, 7], 7),
        "not from 0": ([1, 3, 5, 7], 7),
        "from a negative number": ([-2, 1, 4, 7], 7),
        "growing": ([0, 1, 3, 6], 6),
        "growing late": ([0, 3, 4, 6], 6),
        "more rows than B": ([0, 5, 6, 7], 7),
        "falling": ([0, 3, 2, 7], 7),
        "overflowing": ([0, 2**63 - 1, -(2**63), 7], 7),
        "all 0": ([0, 0, 0, 0], 0),
        "no rows at last": ([0, 3, 3, 3], 3),
        "as they should be": ([0, 3, 5, 6], 6),
    }
    for cell in (GRU, LSTM):
        for how, (offsets, total) in lies.items():
            call = packed(offsets, total=total, cell=cell)
            fine = how in ("as they should be", "no rows at last", "all 0")
            yield (
                f"offsets {how}, cell {cell}",
                call.run,
                (right(call) if how == "as they should be" else ANYTHING) if fine else ERROR,
            )
            yield f"offsets {how}, cell {cell}, saving", call.changed(save=True).run, ANYTHING if fine else ERROR
            yield f"offsets {how} of a stack, cell {cell}", lambda c=call: stack(c), ANYTHING if fine else ERROR
    yield "offsets of one number", lambda: packed([0]).run(), ERROR
    yield "offsets of no number", lambda: packed([0, 3]).changed(offsets=torch.empty(0, dtype=torch.int64)).run(), ERROR
    yield "offsets in int32", lambda: packed([0, 3, 5]).changed(offsets=torch.tensor([0, 3, 5]).int()).run(), ERROR
    yield "offsets freed", lambda: packed([0, 3, 5]).changed(offsets=freed(torch.tensor([0, 3, 5]))).run(), ERROR
    yield "offsets on meta", lambda: packed([0, 3, 5]).changed(offsets=torch.tensor([0, 3, 5], device="meta")).run(), ERROR
    yield "offsets without h0", lambda: packed([0, 3, 5]).changed(h0=None).run(), ERROR
    yield "offsets with lengths", lambda: packed([0, 3, 5]).changed(lengths=torch.tensor([1, 1, 1])).run(), ERROR
    for how, lengths in {"beyond T": [2**40, 5, 4], "negative": [-1, -(2**40), 4]}.items():
        given = torch.tensor(lengths)
        yield f"lengths {how}", good.changed(lengths=given).run, right(good.changed(lengths=given.clamp(0, STEPS)))
    for how, given in {
        "of other rows": torch.tensor([1, 2]),
        "in float": torch.tensor([1.0, 2.0, 3.0]),
        "in int32": torch.tensor([1, 2, 3]).int(),
        "freed": freed(torch.tensor([1, 2, 3])),
        "on meta": torch.tensor([1, 2, 3], device="meta"),
        "sparse": torch.tensor([1, 2, 3]).to_sparse(),
    }.items():
        yield f"lengths {how}", good.changed(lengths=given).run, ERROR
    for how, given in {
        "of other steps": torch.zeros(STEPS - 1, ROWS, dtype=torch.bool),
        "flat": torch.zeros(STEPS * ROWS, dtype=torch.bool),
        "in float": torch.zeros(STEPS, ROWS),
        "in uint8": torch.zeros(STEPS, ROWS, dtype=torch.uint8),
        "freed": freed(torch.zeros(STEPS, ROWS, dtype=torch.bool)),
        "on meta": torch.zeros(STEPS, ROWS, dtype=torch.bool, device="meta"),
    }.items():
        yield f"resets {how}", good.changed(resets=given).run, ERROR
    bytes_ = torch.tensor([0, 1, 2, 255] * ROWS, dtype=torch.uint8).view(STEPS, ROWS)
    given = bytes_.view(torch.bool)
    yield "resets of other bytes than 0 and 1", good.changed(resets=given).run, right(good.changed(resets=bytes_ != 0))
    for rows, steps in ((0, STEPS), (ROWS, 0), (0, 0)):
        call = layer(LSTM, rows=rows, steps=steps)
        yield f"B={rows}, T={steps}", call.run, ERROR if steps == 0 else right(call)
    empty = good.changed(params=[p.new_empty(0, *p.shape[1:]) for p in good.params])
    yield "no hidden units", empty.run, ERROR
    wide = layer(GRU).changed(x=rand(STEPS, ROWS, 0), params=[rand(3 * HIDDEN, 0), *layer(GRU).params[1:]])
    yield "no inputs", wide.run, right(wide)


def backward_calls() -> Iterator[tuple[str, Callable[[], Any], Any]]:
    for cell in (LSTM, GRU, RNN_TANH):
        good = Backward(layer(cell))
        expected = Backward(layer(cell), "layer_backward_differentiable").run()
        flat = flatten(expected)
        yield f"backward {cell} as it should be", lambda g=good: flatten(g.run()), flat
        tensors = [n for n in ("dy", "dh_n", "dc_n", "x", "h0", "c0", "y", "gates", "cs") if good.values[n] is not None]
        for name in tensors:
            for how, spoil in SPOILED.items():
                if how == "none" and name not in ("x", "y", "gates", "cs"):
                    continue
                if how == "empty" and name in ("dh_n", "dc_n"):  # stands for none
                    continue
                # Another number of steps of x alone fits nothing else.
                yield (
                    f"backward {cell} {name} {how}",
                    lambda g=good, n=name, s=spoil: g.run(**{n: s(g.values[n])}),
                    ERROR,
                )
            for how, keep in KEPT.items():
                yield (
                    f"backward {cell} {name} {how}",
                    lambda g=good, n=name, k=keep: flatten(g.run(**{n: k(g.values[n])})),
                    flat,
                )
            zeroed = Backward(layer(cell), "layer_backward_differentiable")
            if name in ("dy", "dh_n", "dc_n"):
                result = flatten(zeroed.run(**{name: torch.zeros_like(zeroed.values[name])}))
                yield (
                    f"backward {cell} {name} efficient zeros",
                    lambda g=good, n=name: flatten(g.run(**{n: zero(g.values[n])})),
                    result,
                )
        for index in range(4):

            def spoiled(s: Callable[[Tensor], Any], at: int = index, g: Backward = good) -> Any:
                return g.run(params=[s(p) if i == at else p for i, p in enumerate(g.values["params"])])

            for how, spoil in SPOILED.items():
                yield f"backward {cell} weight {index} {how}", lambda s=spoil, f=spoiled: f(s), ERROR
        for mask in ([], [True], [True] * 2, [True] * 4):
            yield f"backward {cell} mask of {len(mask)}", lambda g=good, m=mask: g.run(mask=m), ERROR
        for other in (2**32 + cell, -1, 7):
            yield f"backward {cell} cell {other}", lambda g=good, c=other: g.run(cell=c), ERROR
    gru = Backward(layer(GRU))
    yield "backward of a GRU as an LSTM", lambda: gru.run(cell=LSTM), ERROR
    yield "backward of an LSTM as a GRU", lambda: Backward(layer(LSTM)).run(cell=GRU), ERROR
    yield "backward of a GRU with c0", lambda: gru.run(c0=rand(1, ROWS, HIDDEN)), ERROR
    fine = Backward(packed([0, 3, 5, 6]))
    for how, offsets in {
        "beyond N": [0, 3, 5, 100000],
        "negative": [0, -3, 5, 6],
        "growing": [0, 1, 3, 6],
        "not from 0": [1, 3, 5, 6],
        "more rows than B": [0, 4, 5, 6],
        "below N": [0, 2, 3, 4],
    }.items():
        yield f"backward with offsets {how}", lambda o=offsets: fine.run(offsets=torch.tensor(o)), ERROR
    lengths = Backward(layer(LSTM).changed(lengths=torch.tensor([4, 2, 0])))
    yield (
        "backward with lengths beyond T",
        lambda: lengths.run(lengths=torch.tensor([2**40, -5, 4])),
        ANYTHING,
    )


def stack(call: Layer, **changes: Any) -> Any:
    """fused_rnn::rnn of one layer."""
    a = call.changed(**changes)
    return ops.rnn(a.x, a.states, a.params, a.rows, a.recipe, 0.0)


def composite_calls() -> Iterator[tuple[str, Callable[[], Any], Any]]:
    """fused_rnn::rnn and cell, and the bindings of the same arguments."""
    good = layer(LSTM)
    C = _backend.extension
    assert C is not None
    one = layer(LSTM).changed(x=good.x[:1])
    rnn_arguments = {"x": good.x, "states": good.states, "params": good.params, "rows": [], "recipe": good.recipe}
    cell_arguments = {"x": good.x[0], "states": [t[0] for t in good.states], "params": good.params, "recipe": good.recipe}
    entries: list[tuple[str, Callable[..., Any], dict[str, Any], list[Tensor]]] = [
        ("ops.rnn", ops.rnn, {**rnn_arguments, "dropout": 0.0}, right(good)),
        ("_C.rnn", C.rnn, {**rnn_arguments, "dropout": 0.0}, right(good)),
        ("ops.cell", ops.cell, cell_arguments, [t[0] for t in right(one)[1:]]),
        ("_C.cell", C.cell, cell_arguments, [t[0] for t in right(one)[1:]]),
    ]
    for name, function, arguments, expected in entries:

        def with_arguments(f: Callable[..., Any] = function, a: dict[str, Any] = arguments, **changes: Any) -> Any:
            return f(*{**a, **changes}.values())

        yield f"{name} as it should be", lambda f=with_arguments: flatten(f()), expected
        for how, spoil in SPOILED.items():
            if not (how.startswith("one row") and name.endswith("rnn")):
                yield (
                    f"{name} input {how}",
                    lambda s=spoil, f=with_arguments, x=arguments["x"]: f(x=s(x)),
                    META if how == "meta" else ERROR,
                )
            for what in ("states", "params"):
                for index, tensor in enumerate(arguments[what]):
                    others = arguments[what]
                    yield (
                        f"{name} {what} {index} {how}",
                        lambda f=with_arguments, w=what, t=tensor, n=index, s=spoil, o=others: f(
                            **{w: [s(t) if i == n else other for i, other in enumerate(o)]}
                        ),
                        ERROR,
                    )
        for what in ("states", "params"):
            for how, value in {
                "a tuple": tuple(arguments[what]),
                "None": None,
                "a number": 3,
                "strings": ["a"] * 4,
                "too many": arguments[what] * 2,
            }.items():
                fine = how == "a tuple" and name.startswith("ops")
                yield (
                    f"{name} {what} {how}",
                    lambda w=what, v=value, f=with_arguments: f(**{w: v}),
                    ANYTHING if fine else ERROR,
                )
        yield f"{name} no weights", lambda f=with_arguments: f(params=[]), ERROR
        for recipe in (-1, 5, 0, 2**16 + 5, 2**32 + 3, 2**63 - 1, 2**64, "LSTM", None):
            yield f"{name} recipe {recipe!r}", lambda r=recipe, f=with_arguments: f(recipe=r), ERROR
        for count in range(len(arguments)):
            yield f"{name} of {count} arguments", lambda n=count, f=function, a=arguments: f(*[*a.values()][:n]), ERROR
        yield f"{name} of one argument more", lambda f=function, a=arguments: f(*a.values(), 1), ERROR
        if name.endswith("rnn"):
            for layers in (0, -1, 2, 3, 2**31 + 1, 2**40, -(2**40)):
                recipe = Recipe(LSTM, layers).packed
                yield f"{name} of {layers} layers", lambda r=recipe, f=with_arguments: f(recipe=r), ERROR
            for dropout in ("much", float("nan"), -1.0, 2.0):
                fine = not isinstance(dropout, str)  # without a second layer nothing is dropped
                yield (
                    f"{name} dropout {dropout}",
                    lambda v=dropout, f=with_arguments: f(dropout=v),
                    ANYTHING if fine else ERROR,
                )
            for how, rows in {"one": [good.x], "a tensor": good.x, "numbers": [1, 2, 3], "None": None}.items():
                yield f"{name} rows {how}", lambda r=rows, f=with_arguments: f(rows=r), ERROR
    for count in (0, 1, 4, 7):
        yield f"_C.call_module of {count} arguments", lambda n=count: [C.call_module(*[None] * n)], ANYTHING
    for value in (None, 3, "module", object(), torch.nn.Linear(2, 2), fused_rnn.LSTM):
        yield f"_C.call_module of {str(value)[:20]}", lambda v=value: [C.call_module(v, good.x)], ANYTHING
    for arguments in ((), (1,), (1, 2, 3), (type, (), (1,)), (type, (1,), ()), (None, None, None)):
        yield f"_C.watch_modules{arguments}", lambda a=arguments: C.watch_modules(*a), ERROR


def module_calls() -> Iterator[tuple[str, Callable[[], Any], Any]]:
    """Modules whose parameters or fields are not what they were."""

    def module(kind: str = "LSTM") -> torch.nn.Module:
        torch.manual_seed(0)
        return getattr(fused_rnn, kind)(INPUTS, HIDDEN)

    x = {False: rand(STEPS, ROWS, INPUTS), True: rand(ROWS, INPUTS)}
    for kind in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"):
        is_cell = kind.endswith("Cell")
        for how in ("freed", "shrunk", "meta", "float64", "one row more", "one row less", "sparse", "mkldnn", "complex"):
            for name in [n for n, _ in module(kind).named_parameters()]:

                def spoiled(name: str = name, how: str = how, kind: str = kind, is_cell: bool = is_cell) -> Any:
                    m = module(kind)
                    parameter = torch.nn.Parameter(SPOILED[how](getattr(m, name).detach()), requires_grad=False)
                    m._parameters[name] = parameter
                    with torch.no_grad():
                        return m(x[is_cell])

                yield f"{kind} {name} {how}", spoiled, ERROR
        for how in ("freed", "shrunk", "meta", "sparse", "mkldnn", "int64", "nested"):
            yield f"{kind} input {how}", lambda k=kind, c=is_cell, h=how: module(k)(SPOILED[h](x[c])), ERROR
        for how, keep in {**KEPT, "efficient zeros": zero}.items():

            def kept(keep: Callable[[Tensor], Tensor] = keep, kind: str = kind, is_cell: bool = is_cell) -> list[Any]:
                with torch.no_grad():
                    return flatten(module(kind)(keep(x[is_cell])))

            given = torch.zeros_like(x[is_cell]) if how == "efficient zeros" else x[is_cell]
            yield f"{kind} input {how} without gradients", kept, flatten(module(kind)(given))
        for field, value in (("hidden_size", 2**40), ("input_size", 2**62), ("num_layers", 2**40), ("proj_size", 7)):
            if is_cell and field in ("num_layers", "proj_size"):
                continue

            def changed(field: str = field, value: int = value, kind: str = kind, is_cell: bool = is_cell) -> Any:
                m = module(kind)
                setattr(m, field, value)
                return m(x[is_cell], *([] if kind.startswith("LSTM") else [rand(*([] if is_cell else [1]), ROWS, HIDDEN)]))

            yield f"{kind} {field}={value}", changed, ANYTHING
        # After forward, before backward.
        for name in [n for n, _ in module(kind).named_parameters() if "weight" in n]:

            def freed_later(name: str = name, kind: str = kind, is_cell: bool = is_cell) -> Any:
                m = module(kind)
                y = m(x[is_cell].clone().requires_grad_())
                y = y if isinstance(y, Tensor) else y[0]
                getattr(m, name).data.untyped_storage().resize_(0)
                y.sum().backward()

            yield f"{kind} {name} freed before backward", freed_later, ERROR
