"""From a cell to CUDA kernels that serve: compiled for the devices that are there, compared with ``step``, kept on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from fused_rnn import _settings
from fused_rnn._backend import extension
from fused_rnn.formula import build, ops, store, verify
from fused_rnn.formula.cuda_compiler import Nvcc, Nvrtc, find_compiler
from fused_rnn.formula.language import Cell

SUFFIX = ".kernels"
# Families with a kernel for forward and one for backward, which make all steps in one launch.
PERSISTENT = ("cluster", "grid")
# csrc/plan/formula_persistent.h: from which compute capability on their teams have several blocks.
CLUSTER_CAPABILITY, GRID_CAPABILITY = 90, 80
_persistent: set[tuple[tuple[str, int, int], str]] = set()  # formula, dtype and capability; family that has been prepared
_loaded: set[tuple[tuple[str, int, int], str]] = set()  # and of which the kernels are loaded
FOLDERS = ("core", "plan", "cuda/device", "cuda/step", "cuda/formula", "cuda/formula/rtc")  # of headers


@functools.cache
def _headers_digest() -> str:
    digest = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((build.headers_directory() / folder).iterdir()):
            if path.suffix in (".h", ".cuh", ""):
                digest.update(path.name.encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


@functools.cache
def _host_digest() -> str:
    """Of the code that launches the kernels."""
    path = getattr(extension, "__file__", None)
    return "" if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def file_name(
    cell: Cell, dtype: torch.dtype, capability: int, compiler: Nvcc | Nvrtc, families: Sequence[str] = ("step",)
) -> str:
    """The kernels' name in the cache. What their code, and the comparison with ``step``, depend on is in its hash."""
    made_by = (_headers_digest(), _host_digest(), build.generator_digest(), compiler.identity)
    facts = (cell.identity, *made_by, *families)
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


def persistent_families() -> tuple[str, ...]:
    """Those that FUSED_RNN_PLAN lets serve. They have not run on a GPU yet and wait to be asked for."""
    setting = _settings.value("FUSED_RNN_PLAN")
    return tuple(family for family in PERSISTENT if setting in (family, "cheapest"))


def prepare_on(formula: str, dtype: torch.dtype, capability: int, device: torch.device) -> None:
    """The same on devices of one compute capability; ``device`` is one of them."""
    _prepare_steps(formula, dtype, capability, device)
    for family in persistent_families():
        _prepare_persistent((formula, ops.dtype_number(dtype), capability), family, dtype, device)


Key = tuple[str, int, int]  # formula, dtype and capability


@contextlib.contextmanager
def _verifying(key: Key, family: str) -> Iterator[Callable[[int], None]]:
    """While a family's kernels are compared with ``step``; then they serve, unless an exception says otherwise.

    Gives a function that lets the family serve wherever it can, with so many blocks of a team.
    """
    assert extension is not None
    set_family = functools.partial(extension.set_formula_family, *key, family)
    try:
        yield functools.partial(set_family, 1)
    except BaseException:
        set_family(0)
        raise
    set_family(2)


def _does_not_serve(key: Key, family: str, why: Exception) -> None:
    cell = type(ops.cell_of(key[0])).__name__
    warnings.warn(
        f"fused_rnn: kernel family {family} of {cell} does not serve: {why}; family step does", RuntimeWarning, stacklevel=2
    )


def _kept_or_compiled(
    formula: str, dtype: torch.dtype, capability: int, families: Sequence[str], use: Callable[[Path, bool], bool]
) -> None:
    """Calls use(file of kernels, whether it was kept on disk), first with the file that was kept if there is one.

    use raises RuntimeError where a file is damaged, and says of a new one whether it is to be kept.
    """
    if not (build.headers_directory() / "cuda" / "formula" / "formula_kernels.cuh").exists():
        raise build.BuildError(f"the headers of the kernels are missing ({build.headers_directory()})")
    cell, compiler = ops.cell_of(formula), find_compiler()
    name = file_name(cell, dtype, capability, compiler, families)
    kept = store.find(name, SUFFIX)
    if kept is not None:
        try:
            use(kept, True)
            return
        except RuntimeError:  # it is made anew
            store.remove(kept)
    with store.work_directory() as folder:
        kernels, source = compile_kernels(cell, dtype, capability, compiler, Path(folder), families)
        if use(kernels, False):
            store.keep(name, kernels, source)


def _prepare_steps(formula: str, dtype: torch.dtype, capability: int, device: torch.device) -> None:
    """Families ``step`` and ``single``, which serve by default. They are compared before their file is kept; where
    ``single`` alone differs it does not serve, and the file is not kept."""
    assert extension is not None
    key, cell = (formula, ops.dtype_number(dtype), capability), ops.cell_of(formula)
    if extension.has_formula_on_device(*key):
        return
    for prepared in (_persistent, _loaded):
        prepared.difference_update({(key, family) for family in PERSISTENT})
    has_single = not cell.declaration.given_gates

    def use(kernels: Path, kept: bool) -> bool:
        assert extension is not None
        extension.register_formula_on_device(formula, str(kernels))
        if kept:
            if has_single:
                extension.set_formula_family(*key, "single", 2)
            return True
        try:
            for batch in batches_of(device):
                verify.check_kernels(cell, formula, dtype, device, batch)
        except BaseException:
            extension.forget_formula_on_device(*key)
            raise
        try:
            if has_single:
                with _verifying(key, "single") as force:
                    force(0)
                    for batch in batches_of(device):
                        verify.check_kernels(cell, formula, dtype, device, batch, steps=1)
        except RuntimeError as error:
            _does_not_serve(key, "single", error)
            return False
        return True

    _kept_or_compiled(formula, dtype, capability, ("step", "single"), use)


def _prepare_persistent(key: Key, family: str, dtype: torch.dtype, device: torch.device) -> None:
    """Compiles and loads the kernels of a persistent family and compares them, alone and in teams of several blocks; then
    they serve. Where they cannot be made, or differ and were not forced, ``step`` does."""
    if (key, family) in _persistent:
        return
    formula, _, capability = key

    def use(kernels: Path, kept: bool) -> bool:
        assert extension is not None
        extension.add_formula_on_device(formula, str(kernels))
        return True

    try:
        if (key, family) not in _loaded:
            _kept_or_compiled(formula, dtype, capability, (family,), use)
            _loaded.add((key, family))
        _compare_persistent(key, family, dtype, device)
    except build.BuildError as error:
        _does_not_serve(key, family, error)
    except RuntimeError as error:
        if _settings.value("FUSED_RNN_PLAN") == family:
            raise
        _does_not_serve(key, family, error)
    _persistent.add((key, family))


def _compare_persistent(key: Key, family: str, dtype: torch.dtype, device: torch.device) -> None:
    assert extension is not None
    cell = ops.cell_of(key[0])
    teams = 0
    with _verifying(key, family) as force:
        for ranks in range(1, 6):
            force(ranks)
            if verify.plans(cell, key[0], dtype, device, family):
                verify.check_kernels(cell, key[0], dtype, device, units=verify.UNITS_OF_TEAMS)
                teams += ranks > 1
        if teams == 0 and key[2] >= {"cluster": CLUSTER_CAPABILITY, "grid": GRID_CAPABILITY}[family]:
            raise RuntimeError(f"{type(cell).__name__}: {device} runs no team of several blocks, which could be compared")
