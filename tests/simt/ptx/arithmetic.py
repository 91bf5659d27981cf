"""Instructions that only compute: patterns of opcodes with the C++ of their result."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from .operands import TYPES, Operands, is_float, size_of

# Opcode pattern; type of the result; types of the operands; C++ with {0}, {1}, ... for the operands. Types may name groups
# of the pattern as \1, \2.
_FORMS: list[tuple[str, str, list[str], str]] = [
    (r"add\.[su](16|32|64)", r"u\1", [r"u\1"] * 2, "{0} + {1}"),
    (r"sub\.[su](16|32|64)", r"u\1", [r"u\1"] * 2, "{0} - {1}"),
    (r"mul\.lo\.[su]16", "u16", ["u16"] * 2, "uint32_t({0}) * {1}"),
    (r"mul\.lo\.[su](32|64)", r"u\1", [r"u\1"] * 2, "{0} * {1}"),
    (r"mad\.lo\.[su](32|64)", r"u\1", [r"u\1"] * 3, "{0} * {1} + {2}"),
    (r"mul\.wide\.([su])16", r"\g<1>32", [r"\g<1>16"] * 2, "{0} * {1}"),
    (r"mul\.wide\.([su])32", r"\g<1>64", [r"\g<1>32"] * 2, r"\g<1>64({0}) * {1}"),
    (r"mad\.wide\.([su])32", r"u64", [r"\g<1>32", r"\g<1>32", "u64"], r"u64(\g<1>64({0}) * {1}) + {2}"),
    (r"mul\.hi\.([su])32", r"\g<1>32", [r"\g<1>32"] * 2, r"\g<1>64(\g<1>64({0}) * {1}) >> 32"),
    (r"mul\.hi\.s64", "s64", ["s64"] * 2, "__int128({0}) * {1} >> 64"),
    (r"mul\.hi\.u64", "u64", ["u64"] * 2, "static_cast<unsigned __int128>({0}) * {1} >> 64"),
    (r"div\.([su](?:16|32|64))", r"\1", [r"\1"] * 2, "{0} / {1}"),
    (r"rem\.([su](?:16|32|64))", r"\1", [r"\1"] * 2, "{0} % {1}"),
    (r"(min|max)\.([su](?:16|32|64))", r"\2", [r"\2"] * 2, r"std::\1({0}, {1})"),
    (r"(min|max)\.(f32|f64)", r"\2", [r"\2"] * 2, r"std::f\1({0}, {1})"),
    (r"neg\.s(16|32|64)", r"u\1", [r"u\1"], "0 - {0}"),
    (r"abs\.s(32|64)", r"u\1", [r"s\1"], r"{0} < 0 ? 0 - u\1({0}) : u\1({0})"),
    (r"and\.(pred|b16|b32|b64)", r"\1", [r"\1"] * 2, "{0} & {1}"),
    (r"or\.(pred|b16|b32|b64)", r"\1", [r"\1"] * 2, "{0} | {1}"),
    (r"xor\.(pred|b16|b32|b64)", r"\1", [r"\1"] * 2, "{0} ^ {1}"),
    (r"not\.pred", "pred", ["pred"], "!{0}"),
    (r"not\.(b16|b32|b64)", r"\1", [r"\1"], "~{0}"),
    (r"cnot\.(b16|b32|b64)", r"\1", [r"\1"], "{0} == 0"),
    (r"shl\.(b16|b32|b64)", r"\1", [r"\1", "u32"], r"simt_ptx::shift_left<\1>({0}, {1})"),
    (r"shr\.([bsu](?:16|32|64))", r"\1", [r"\1", "u32"], r"simt_ptx::shift_right<\1>({0}, {1})"),
    (r"bfi\.(b32|b64)", r"\1", [r"\1", r"\1", "u32", "u32"], r"simt_ptx::insert_bits<\1>({0}, {1}, {2}, {3})"),
    (r"bfe\.([su](?:32|64))", r"\1", [r"\1", "u32", "u32"], r"simt_ptx::extract_bits<\1>({0}, {1}, {2})"),
    (r"prmt\.b32", "b32", ["b32"] * 3, "simt_ptx::permute({0}, {1}, {2})"),
    (r"shf\.l\.wrap\.b32", "b32", ["b32"] * 3, "simt_ptx::funnel_shift(true, true, {0}, {1}, {2})"),
    (r"shf\.r\.wrap\.b32", "b32", ["b32"] * 3, "simt_ptx::funnel_shift(false, true, {0}, {1}, {2})"),
    (r"shf\.l\.clamp\.b32", "b32", ["b32"] * 3, "simt_ptx::funnel_shift(true, false, {0}, {1}, {2})"),
    (r"shf\.r\.clamp\.b32", "b32", ["b32"] * 3, "simt_ptx::funnel_shift(false, false, {0}, {1}, {2})"),
    (r"popc\.b32", "u32", ["b32"], "__builtin_popcount({0})"),
    (r"add(?:\.rn)?\.(f32|f64)", r"\1", [r"\1"] * 2, "{0} + {1}"),
    (r"sub(?:\.rn)?\.(f32|f64)", r"\1", [r"\1"] * 2, "{0} - {1}"),
    (r"mul(?:\.rn)?\.(f32|f64)", r"\1", [r"\1"] * 2, "{0} * {1}"),
    (r"div\.rn\.(f32|f64)", r"\1", [r"\1"] * 2, "{0} / {1}"),
    (r"rcp\.rn\.(f32|f64)", r"\1", [r"\1"], r"\1(1) / {0}"),
    (r"sqrt\.rn\.(f32|f64)", r"\1", [r"\1"], "std::sqrt({0})"),
    (r"fma\.rn\.f32", "f32", ["f32"] * 3, "__builtin_fmaf({0}, {1}, {2})"),
    (r"fma\.rm\.f32", "f32", ["f32"] * 3, "simt_ptx::fma_down({0}, {1}, {2})"),
    (r"fma\.rn\.f64", "f64", ["f64"] * 3, "__builtin_fma({0}, {1}, {2})"),
    (r"abs\.(f32|f64)", r"\1", [r"\1"], "std::fabs({0})"),
    (r"neg\.(f32|f64)", r"\1", [r"\1"], "-{0}"),
    # The sign of the first, the rest of the second.
    (r"copysign\.(f32|f64)", r"\1", [r"\1"] * 2, "std::copysign({1}, {0})"),
    (r"ex2\.approx\.ftz\.f32", "f32", ["f32"], "simt_ptx::exp2({0})"),
    (r"rcp\.approx\.ftz\.(f32|f64)", r"\1", [r"\1"], "simt_ptx::reciprocal({0})"),
    (r"cvt\.rn\.bf16\.f32", "b16", ["f32"], "simt_host::float_to_bfloat16({0})"),
    (r"cvt\.rn\.f16\.f32", "b16", ["f32"], "simt_host::float_to_half({0})"),
    (r"cvt\.f32\.f16", "f32", ["b16"], "simt_host::half_to_float({0})"),
    (r"cvt\.f32\.bf16", "f32", ["b16"], "simt_host::bfloat16_to_float({0})"),
    (r"cvt\.rna\.tf32\.f32", "b32", ["f32"], "simt_host::float_to_tf32({0})"),
    (r"cvt\.([su](?:8|16|32|64))\.([su](?:8|16|32|64))", r"\1", [r"\2"], r"\1({0})"),
    (r"cvt\.sat\.f32\.f32", "f32", ["f32"], "simt_ptx::saturate({0})"),
    (r"cvt\.rn\.f32\.f64", "f32", ["f64"], "float({0})"),
    (r"cvt\.f64\.f32", "f64", ["f32"], "double({0})"),
    (r"cvt\.rn\.(f32|f64)\.([su](?:16|32|64))", r"\1", [r"\2"], r"\1({0})"),
    (r"cvt\.rzi\.([su](?:32|64))\.(f32|f64)", r"\1", [r"\2"], r"simt_ptx::to_integer<\1>(std::trunc({0}))"),
    (r"cvt\.rni\.([su](?:32|64))\.(f32|f64)", r"\1", [r"\2"], r"simt_ptx::to_integer<\1>(std::nearbyint({0}))"),
    (r"cvt\.rmi\.(f32|f64)\.(f32|f64)", r"\1", [r"\2"], "std::floor({0})"),
    (r"cvt\.rni\.(f32|f64)\.(f32|f64)", r"\1", [r"\2"], "std::nearbyint({0})"),
    (r"cvt\.rzi\.(f32|f64)\.(f32|f64)", r"\1", [r"\2"], "std::trunc({0})"),
    (r"selp\.([bsu](?:16|32|64)|f32|f64)", r"\1", [r"\1", r"\1", "pred"], "{2} ? {0} : {1}"),
]
_COMPILED = [(re.compile(pattern), result, operands, code) for pattern, result, operands, code in _FORMS]
_TYPE_NAME = re.compile(r"\b([busf](?:8|16|32|64))(?=[(>])")

_ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_OPPOSITE = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
_SETP = re.compile(r"setp\.(\w+)(?:\.(and|or|xor))?\.([bsuf](?:16|32|64))")


@cache
def _form_of(opcode: str) -> tuple[str, list[str], str] | None:
    """The types of the result and of the operands, and the C++; None where no pattern fits."""
    for pattern, result, operands, code in _COMPILED:
        if found := pattern.fullmatch(opcode):
            # Types in the C++ text are the C++ ones.
            text = _TYPE_NAME.sub(lambda m: TYPES[m[1]], found.expand(code))
            return found.expand(result), [found.expand(kind) for kind in operands], text
    return None


def _form(o: Operands) -> str | None:
    form = _form_of(o.instruction.opcode)
    if form is None:
        return None
    result, kinds, text = form
    o.expect(1 + len(kinds))
    return o.target(result, text.format(*(o.source(i + 1, kind) for i, kind in enumerate(kinds))))


def comparison(relation: str, kind: str, a: str, b: str) -> str | None:
    """The C++ condition; None where the type has no such relation."""
    if is_float(kind):
        either = f"({a} < {b} || {a} > {b})"
        if relation == "num":
            return f"({a} == {a} && {b} == {b})"
        if relation == "nan":
            return f"({a} != {a} || {b} != {b})"
        if relation == "equ":  # or one is NaN
            return f"!{either}"
        if relation == "ne":  # and none is NaN
            return either
        if relation in _OPPOSITE:
            return f"!({a} {_ORDERED[_OPPOSITE[relation]]} {b})"
        return f"({a} {_ORDERED[relation]} {b})" if relation in _ORDERED else None
    if kind[0] == "b" and relation not in ("eq", "ne"):
        return None
    sign = _ORDERED.get(relation) or (_UNSIGNED.get(relation) if kind[0] == "u" else None)
    return f"({a} {sign} {b})" if sign else None


def _compare(o: Operands) -> str | None:
    found = _SETP.fullmatch(o.instruction.opcode)
    if not found:
        return None
    relation, combine, kind = found.groups()
    o.expect(4 if combine else 3)
    condition = comparison(relation, kind, o.source(1, kind), o.source(2, kind))
    if condition is None:
        return None
    if combine:
        condition = f"{condition} {dict(zip(('and', 'or', 'xor'), '&|^', strict=True))[combine]} {o.source(3, 'pred')}"
    if "|" not in o[0]:
        return o.target("pred", condition)
    first, second = o[0].split("|")
    if combine:
        raise o.error("two results of a combined comparison are not translated")
    return o.write(first, "pred", condition) + o.write(second, "pred", f"!({condition})")


def _move(o: Operands) -> str | None:
    found = re.fullmatch(r"mov\.(pred|[bsu](?:16|32|64)|f32|f64)", o.instruction.opcode)
    if not found:
        return None
    o.expect(2)
    kind = found[1]
    if not o[0].startswith("{") and not o[1].startswith("{"):
        return o.target(kind, o.source(1, kind))
    names = o.vector(0 if o[0].startswith("{") else 1)
    width = 8 * size_of(kind) // len(names)
    part = f"b{width}"
    if part not in TYPES:
        raise o.error(f"{len(names)} parts of a .{kind}")
    if o[0].startswith("{"):
        whole = f"const {TYPES[kind]} whole = {o.source(1, kind)};"
        return whole + "".join(o.write(n, part, f"{TYPES[part]}(whole >> {width * i})") for i, n in enumerate(names))
    return o.target(kind, " | ".join(f"{TYPES[kind]}({o.read(n, part)}) << {width * i}" for i, n in enumerate(names)))


RULES: list[Callable[[Operands], str | None]] = [_form, _compare, _move]
