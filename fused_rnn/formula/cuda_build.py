"""From a cell to CUDA kernels that serve: compiled for the devices that are there, compared with ``step``, kept on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from fused_rnn import _settings
from fused_rnn._backend import extension
from fused_rnn.formula import build, ops, store, verify
from fused_rnn.formula.cuda_compiler import Nvcc, Nvrtc, find_compiler
from fused_rnn.formula.language import Cell

SUFFIX = ".kernels"
_verified: set[tuple[str, int, int, str]] = set()  # formula, dtype, capability and persistent family that serves
_families: dict[tuple[str, int, int], tuple[str, ...]] = {}  # of which the kernels that are loaded are
FOLDERS = ("core", "plan", "cuda/device", "cuda/step", "cuda/formula", "cuda/formula/rtc")  # of headers


@functools.cache
def _headers_digest() -> str:
    digest = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((build.headers_directory() / folder).iterdir()):
            if path.suffix in (".h", ".cuh", ""):
                digest.update(path.name.encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def file_name(
    cell: Cell, dtype: torch.dtype, capability: int, compiler: Nvcc | Nvrtc, families: Sequence[str] = ("step",)
) -> str:
    """The kernels' name in the cache: everything that their code depends on is in its hash."""
    facts = (cell.identity, _headers_digest(), build.generator_digest(), compiler.identity, *families)
    return build.entry_name(cell, dtype, f"sm_{capability}", repr(facts))


def compile_kernels(
    cell: Cell,
    dtype: torch.dtype,
    capability: int,
    compiler: Nvcc | Nvrtc,
    folder: Path,
    families: Sequence[str] = ("step",),
) -> tuple[Path, Path]:
    """(file of kernels, source) in the folder.

    Raises:
        BuildError: the compiler fails, or the step has no C++.
    """
    from fused_rnn.formula import cuda  # networkx and torch's decompositions take a second to import
    from fused_rnn.formula.plan import make_plan

    source, code, kernels = folder / "cell.cu", folder / "cell.cubin", folder / f"cell{SUFFIX}"
    try:
        plan = make_plan(cell)
        source.write_text(cuda.translation_unit(plan, dtype, families))
    except NotImplementedError as error:
        raise build.BuildError(str(error)) from error
    except OSError as error:
        raise build.BuildError(f"nothing can be written to {folder} ({error})") from error
    compiler.compile(source, capability, code, f"{type(cell).__name__} for {dtype} on sm_{capability}")
    kernels.write_bytes(cuda.header_of(plan, dtype, capability, families) + code.read_bytes())
    return kernels, source


def capabilities() -> dict[int, int]:
    """Of the devices of this process: a device of each compute capability (90 of 9.0)."""
    found: dict[int, int] = {}
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        found.setdefault(10 * major + minor, device)
    return found


def batches_of(device: torch.device) -> tuple[int, int]:
    """Batch sizes of which the first makes the planner (csrc/plan/formula.cpp) take the small tile, the second, whose small
    tiles of 8 rows do not run all at once, the medium one."""
    return 3, 8 * torch.cuda.get_device_properties(device).multi_processor_count + 3


def prepare(formula: str, dtype: torch.dtype) -> None:
    """Makes the kernels of a cell (its name: ops.remember) for the dtype ready on all devices of this process.

    Raises:
        BuildError: they cannot be made.
        RuntimeError: they are there, but disagree with ``step``.
    """
    for capability, device in capabilities().items():
        prepare_on(formula, dtype, capability, torch.device("cuda", device))


def families_asked_for() -> tuple[str, ...]:
    """The families beside ``step`` that may serve: ``single`` unless FUSED_RNN_PLAN forces another one, and the persistent
    ones that it names. These have not run on a GPU yet and wait to be asked for."""
    setting = _settings.value("FUSED_RNN_PLAN")
    return ("single",) * (setting in ("", "single", "cheapest")) + _persistent_families()


def _persistent_families() -> tuple[str, ...]:
    setting = _settings.value("FUSED_RNN_PLAN")
    return tuple(family for family in ("cluster", "grid") if setting in (family, "cheapest"))


def prepare_on(formula: str, dtype: torch.dtype, capability: int, device: torch.device) -> None:
    """The same on devices of one compute capability; ``device`` is one of them."""
    _prepare_kernels(formula, dtype, capability, device)
    for family in _persistent_families():
        key = (formula, ops.dtype_number(dtype), capability, family)
        if key not in _verified:
            least = {"cluster": 90, "grid": 80}[family]  # of teams
            with _verifying(key) as force:
                for ranks in (1, 2)[: 1 + (capability >= least)]:  # a block alone, and teams of two
                    force(ranks)
                    verify.check_kernels(ops.cell_of(formula), formula, dtype, device)
            _verified.add(key)


@contextlib.contextmanager
def _verifying(key: tuple[str, int, int, str]) -> Iterator[Callable[[int], None]]:
    """While a family's kernels are compared with ``step``; then they serve, unless an exception says otherwise.

    Gives a function that lets the family serve wherever it can, with so many blocks of a team.
    """
    assert extension is not None
    try:
        yield lambda ranks: extension.set_formula_family(*key, 1, ranks)
    except BaseException:
        extension.set_formula_family(*key, 0)
        raise
    extension.set_formula_family(*key, 2)


def _prepare_kernels(formula: str, dtype: torch.dtype, capability: int, device: torch.device) -> None:
    """Those of the families that are asked for, in one file. ``step`` and ``single``, which serve by default, are compared
    before the file is kept."""
    assert extension is not None
    key = (formula, ops.dtype_number(dtype), capability)
    there = _families.get(key, ()) if extension.has_formula_on_device(*key) else ()
    asked = ("step", *families_asked_for())
    if there and set(asked) <= set(there):
        return
    asked = tuple(dict.fromkeys((*asked, *there)))
    for family in asked:
        _verified.discard((*key, family))
    if not (build.headers_directory() / "cuda" / "formula" / "formula_kernels.cuh").exists():
        raise build.BuildError(f"the headers of the kernels are missing ({build.headers_directory()})")
    cell, compiler = ops.cell_of(formula), find_compiler()
    name = file_name(cell, dtype, capability, compiler, asked)
    kept = store.find(name, SUFFIX)
    if kept is not None:
        try:
            extension.register_formula_on_device(formula, str(kept))
            if "single" in asked and not cell.declaration.given_gates:
                extension.set_formula_family(*key, "single", 2)
            _families[key] = asked
            return
        except RuntimeError:  # damaged: it is made anew
            store.remove(kept)
    with store.work_directory() as folder:
        kernels, source = compile_kernels(cell, dtype, capability, compiler, Path(folder), asked)
        extension.register_formula_on_device(formula, str(kernels))
        try:
            for batch in batches_of(device):
                verify.check_kernels(cell, formula, dtype, device, batch)
            if "single" in asked and not cell.declaration.given_gates:
                with _verifying((*key, "single")) as force:
                    force(0)
                    for batch in batches_of(device):
                        verify.check_kernels(cell, formula, dtype, device, batch, steps=1)
        except BaseException:
            extension.forget_formula_on_device(*key)
            raise
        _families[key] = asked
        store.keep(name, kernels, source)
