"""Loads, stores, copies and conversions of addresses."""

from __future__ import annotations

import re
from collections.abc import Callable

from .operands import TYPES, Operands, size_of

_ACCESS = re.compile(
    r"(ld|st)(?:\.(?P<order>weak|relaxed|acquire|release)(?:\.(?P<scope>cta|cluster|gpu|sys))?)?"
    r"(?:\.(?P<space>global|shared|shared::cta|local|param))?(?P<nc>\.nc)?(?:\.v(?P<count>[24]))?"
    r"\.(?P<kind>[bsuf](?:8|16|32|64))"
)
# Scopes that hold the blocks of a grid. What is strong within a block or cluster only, is weak for the blocks beyond.
_WIDE = ("gpu", "sys")


def _access(o: Operands) -> str | None:
    """ld, st: plain ones, and the strong ones of flags."""
    found = _ACCESS.fullmatch(o.instruction.opcode)
    if not found:
        return None
    o.expect(2)
    order, scope, space = (found[name] for name in ("order", "scope", "space"))
    if (order in (None, "weak")) != (scope is None) or order == ("release" if found[1] == "ld" else "acquire"):
        return None
    if found["nc"] and (found[1], space, order) != ("ld", "global", None):
        return None
    if found[1] == "st" and space == "param":
        return None
    strong = scope in _WIDE
    if strong and space != "global":
        return None
    count, kind = int(found["count"] or 1), found["kind"]
    if found[1] == "ld":
        return (_load_strong if strong else _load)(o, space or "generic", count, kind, order or "")
    return (_store_strong if strong else _store)(o, space or "generic", count, kind, order or "")


def _memory(o: Operands, space: str, index: int, size: int, access: str) -> str:
    """The host's pointer to so many bytes at the address in operand `index`, after the checks."""
    if space.startswith("shared"):
        return f"simt_ptx::shared_memory({o.address(index, 'u32')}, {size}, simt_host::{access}, {o.pc})"
    arguments = f"{o.address(index, 'u64')}, {size}, simt_host::{access}, {o.pc}"
    if space in ("global", "local"):
        known = "params, " if space == "local" else ""
        return f"simt_ptx::{space}_memory({known}{arguments})"
    return f"simt_ptx::generic_memory(params, {arguments})"


def _load(o: Operands, space: str, count: int, kind: str, _: str) -> str:
    names, size = o.vector(0, count), size_of(kind)
    base, offset = o.base_and_offset(1)
    if space == "param" and base == o.kernel.param:
        if not 0 <= offset <= o.kernel.param_bytes - size * count:
            raise o.error(f"beyond the {o.kernel.param_bytes} bytes of parameters")
        where = f"params.data + {offset}"
    else:
        where = _memory(o, space, 1, size * count, "kRead")
    loads = (o.write(name, kind, f"simt_ptx::load<{TYPES[kind]}>(p + {size * i})") for i, name in enumerate(names))
    return f"const unsigned char* const p = {where}; {' '.join(loads)}"


def _store(o: Operands, space: str, count: int, kind: str, _: str) -> str:
    names, size = o.vector(1, count), size_of(kind)
    stores = (f"simt_ptx::store<{TYPES[kind]}>(p + {size * i}, {o.read(name, kind)});" for i, name in enumerate(names))
    return f"unsigned char* const p = {_memory(o, space, 0, size * count, 'kWrite')}; {' '.join(stores)}"


def _load_strong(o: Operands, _: str, count: int, kind: str, order: str) -> str:
    names, size = o.vector(0, count), size_of(kind)
    acquire = "true" if order == "acquire" else "false"
    loads = f"simt_ptx::load_flags(v, {o.address(1, 'u64')}, {size}, {count}, {acquire}, {o.pc});"
    writes = (o.write(name, kind, f"v[{i}]") for i, name in enumerate(names))
    return f"{TYPES[kind]} v[{count}]; {loads} {' '.join(writes)}"


def _store_strong(o: Operands, _: str, count: int, kind: str, order: str) -> str:
    if count != 1:
        raise o.error("a flag's store of several words is not translated")
    release = "true" if order == "release" else "false"
    return (
        f"const {TYPES[kind]} v = {o.source(1, kind)}; "
        f"simt_ptx::store_flag({o.address(0, 'u64')}, &v, {size_of(kind)}, {release}, {o.pc});"
    )


def _convert_address(o: Operands) -> str | None:
    """cvta: generic addresses are the host's, as are those of all but shared memory."""
    found = re.fullmatch(r"cvta(\.to)?\.(global|shared|local|param)\.u64", o.instruction.opcode)
    if not found:
        return None
    o.expect(2)
    if found[2] != "shared":
        return o.target("u64", o.source(1, "u64"))
    return o.target("u64", f"simt_ptx::{'generic_to_shared' if found[1] else 'shared_to_generic'}({o.source(1, 'u64')})")


def _copy(o: Operands) -> str | None:
    """cp.async: [shared], [global], size, bytes to read."""
    found = re.fullmatch(r"cp\.async\.(cg|ca)\.shared(?:::cta)?\.global", o.instruction.opcode)
    if not found:
        return None
    o.expect(4)
    size = o.constant(2)
    if size not in ((16,) if found[1] == "cg" else (4, 8, 16)):
        raise o.error(f"cp.async.{found[1]} does not copy {size} bytes")
    return f"simt_ptx::copy_async({o.address(0, 'u32')}, {o.address(1, 'u64')}, {size}, {o.source(3, 'u32')}, {o.pc});"


def _copy_groups(o: Operands) -> str | None:
    if o.instruction.opcode == "cp.async.commit_group":
        o.expect(0)
        return "simt_host::copy_commit();"
    if o.instruction.opcode == "cp.async.wait_group":
        o.expect(1)
        return f"simt_host::copy_wait({o.constant(0)}, {o.pc});"
    return None


def _prefetch(o: Operands) -> str | None:
    if o.instruction.opcode not in ("prefetch.global.L2", "prefetch.global.L1"):
        return None
    o.expect(1)
    return f"simt_ptx::prefetch({o.address(0, 'u64')}, {o.pc});"


RULES: list[Callable[[Operands], str | None]] = [_access, _convert_address, _copy, _copy_groups, _prefetch]
