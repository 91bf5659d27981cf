"""From a cell to compiled kernels: the C++ compiler of the machine makes a library of the cell's struct for one instruction
set and one dtype. The library is compared with ``step`` in float64 before it serves, and kept on disk (store.py).
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from fused_rnn._backend import extension
from fused_rnn.formula import ops, store
from fused_rnn.formula.language import Cell

SECONDS = 120  # a compiler that takes longer is stopped
_STORAGES = {torch.float64: "double", torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
_DTYPE_NAMES = {torch.float64: "kFloat64", torch.float32: "kFloat32", torch.float16: "kFloat16", torch.bfloat16: "kBFloat16"}
_AVX512 = ("vec_avx512.h", "avx512", ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"))
# Of each instruction set the header and the namespace of its vectors, and the flags of the compiler.
_VECTORS = {
    "portable": ("vec_portable.h", "portable", ()),
    "avx2": ("vec_avx2.h", "avx2", ("-mavx2", "-mfma", "-mf16c")),
    "avx512": _AVX512,
    "avx512_bf16": _AVX512,
    "amx": _AVX512,
}
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-fvisibility=hidden")


class BuildError(Exception):
    """Why a formula has no kernels, as a clause."""


def headers_directory() -> Path:
    """Where csrc's headers lie: beside the package in a source tree, inside of it where it was installed."""
    inside = Path(__file__).parent.parent / "include"
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "csrc"


@functools.cache
def _headers_digest() -> str:
    digest = hashlib.sha256()
    for folder in ("core", "cpu/isa"):
        for path in sorted((headers_directory() / folder).glob("*.h")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def generator_digest() -> str:
    """Of what makes C++ of a formula: this package, and torch, whose derivatives and decompositions it takes."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _compiler() -> list[str]:
    """The C++ compiler's command: CXX, else c++ or g++.

    Raises:
        BuildError: there is none.
    """
    chosen = os.environ.get("CXX", "").split()
    for command in [chosen] if chosen else [["c++"], ["g++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler was found (CXX={' '.join(chosen)})" if chosen else "no C++ compiler was found")


def _compiler_identity(command: list[str]) -> str:
    path = os.path.realpath(shutil.which(command[0]) or command[0])
    status = os.stat(path)
    return f"{path} {status.st_size} {status.st_mtime_ns} {command[1:]}"


def library_name(cell: Cell, dtype: torch.dtype, instruction_set: str, compiler: list[str]) -> str:
    """The library's name in the cache: everything that its contents depend on is in its hash."""
    makers = (_headers_digest(), generator_digest())
    facts = (cell.identity, makers, _compiler_identity(compiler), _FLAGS, _VECTORS[instruction_set])
    return entry_name(cell, dtype, instruction_set, repr(facts))


def entry_name(cell: Cell, dtype: torch.dtype, target: str, facts: str) -> str:
    """A name in the cache, readable, with the hash of these facts."""
    digest = hashlib.sha256(facts.encode()).hexdigest()[:20]
    letters = "".join(letter for letter in type(cell).__name__ if letter.isalnum() and letter.isascii()) or "cell"
    return f"{letters}-{str(dtype).removeprefix('torch.')}-{target}-{digest}"


def translation_unit(cell: Cell, dtype: torch.dtype, instruction_set: str) -> str:
    """The C++ of a library: the cell's struct and its table."""
    from fused_rnn.formula.plan import make_plan  # networkx and torch's decompositions take a second to import
    from fused_rnn.formula.writer import source_of_plan, struct_name

    header, space, flags = _VECTORS[instruction_set]
    vector = "VecD" if dtype == torch.float64 else "VecF"
    storage = _STORAGES[dtype] if dtype in (torch.float32, torch.float64) else f"fused_rnn::cpu::{_STORAGES[dtype]}"
    arguments = f"fused_rnn::cpu::{space}::{vector}, fused_rnn::formula::{struct_name(cell)}, {storage}"
    return "\n".join(
        [
            "#include <immintrin.h>" if flags else "",
            "#include <cmath>",
            "#include <cstring>",
            f'#include "cpu/isa/{header}"',
            '#include "cpu/isa/formula_pointwise.h"',
            "",
            "namespace fused_rnn::formula {",
            "",
            source_of_plan(make_plan(cell)),
            "}  // namespace fused_rnn::formula",
            "",
            'extern "C" __attribute__((visibility("default"))) const fused_rnn::cpu::FormulaLibrary* fused_rnn_formula() {',
            f"  using fused_rnn::DType;\n  static const auto library = fused_rnn::cpu::make_formula_library<{arguments}>"
            f"(DType::{_DTYPE_NAMES[dtype]});",
            "  return &library;",
            "}",
            "",
        ]
    )


def compile_library(cell: Cell, dtype: torch.dtype, instruction_set: str, folder: Path) -> tuple[Path, Path]:
    """(library, source) in the folder.

    Raises:
        BuildError: the compiler fails, or the step has no C++.
    """
    source, library = folder / "cell.cpp", folder / "cell.so"
    try:
        source.write_text(translation_unit(cell, dtype, instruction_set))
    except NotImplementedError as error:
        raise BuildError(str(error)) from error
    except OSError as error:
        raise BuildError(f"nothing can be written to {folder} ({error})") from error
    command = [*_compiler(), *_FLAGS, *_VECTORS[instruction_set][2], "-I", str(headers_directory())]
    what = f"{type(cell).__name__} for {dtype} on {instruction_set}"
    run_compiler([*command, str(source), "-o", str(library)], what, "the C++ compiler")
    return library, source


def run_compiler(command: list[str], what: str, name: str) -> None:
    """Runs a compiler of this name; a line on the terminal says so where it takes more than a second.

    Raises:
        BuildError: it fails, or takes too long.
    """
    began = time.monotonic()
    try:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise BuildError(f"{name} could not be started ({error})") from error
    shown = False
    while True:
        try:
            _, errors = process.communicate(timeout=1.0)
            break
        except subprocess.TimeoutExpired:
            if not shown and sys.stderr.isatty():
                print(f"fused_rnn: compiling {what}", file=sys.stderr, flush=True)
            shown = True
            if time.monotonic() - began > SECONDS:
                process.kill()
                process.communicate()
                raise BuildError(f"{name} took more than {SECONDS} s") from None
    if process.returncode != 0:
        first = next((line for line in errors.splitlines() if "error" in line), errors.strip()[:200])
        raise BuildError(f"{name} failed with status {process.returncode}: {first}")


def prepare(formula: str, dtype: torch.dtype) -> None:
    """Makes the kernels of a cell (its name: ops.remember) for the dtype and the instruction set in use ready.

    Raises:
        BuildError: they cannot be made.
        RuntimeError: they are there, but disagree with ``step``.
    """
    assert extension is not None
    cell = ops.cell_of(formula)
    instruction_set = extension.build_info()["cpu_instruction_set"]
    if extension.has_formula(formula, ops.dtype_number(dtype)):
        return
    if not (headers_directory() / "cpu" / "isa" / "formula.h").exists():
        raise BuildError(f"the headers of the kernels are missing ({headers_directory()})")
    name = library_name(cell, dtype, instruction_set, _compiler())
    kept = store.find(name)
    if kept is not None:
        try:
            extension.register_formula(formula, str(kept))
            return
        except RuntimeError:  # damaged: it is made anew
            store.remove(kept)
    from fused_rnn.formula import verify

    with store.work_directory() as folder:
        library, source = compile_library(cell, dtype, instruction_set, Path(folder))
        extension.register_formula(formula, str(library))
        try:
            verify.check_kernels(cell, formula, dtype)
        except BaseException:
            extension.forget_formula(formula, ops.dtype_number(dtype))
            raise
        store.keep(name, library, source)
