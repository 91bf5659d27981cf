"""Builds fused_rnn._C with the CUDA ops compiled for CPU tensors, the simulator in the place of the device."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import builder  # noqa: E402

sys.path.insert(0, str(builder.ROOT / "build_support"))
from unity import united  # noqa: E402

# Files of csrc that have another of their name here: the ops for CUDA tensors are then those for CPU tensors.
REPLACED = ("torch/device.h", "torch/ops_cpu.cpp", "cuda/formula/driver.cpp")
CUBLAS = HERE.parent / "kernels" / "cublas.cu"  # the products of cublas.cpp
# Files of this folder that include torch's headers: compiled together with those of csrc/torch.
WITH_TORCH = ("cublas.cpp", "cudnn.cpp", "ops_cpu.cpp")


def formula_source() -> Path:
    """The kernels of the formula that the library has; beside it lies what the loader reads, <name>.kernels.

    tests/simt/formulas.py's everything_with_options, or Everything where TORCH_HOST_FORMULA is "plain".
    """
    path = os.pathsep.join([str(builder.ROOT), str(builder.ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(HERE.parent / "formulas.py"), os.environ.get("TORCH_HOST_FORMULA", "with options")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path})
    return Path(done.stdout.strip())


def load() -> ModuleType:
    """The extension, as fused_rnn._C; fused_rnn must not have been imported yet."""
    folder = builder.CACHE / "torch_host"
    copy = folder / "csrc"
    wanted = set()
    for source in [*(builder.ROOT / "csrc").rglob("*.h"), *(builder.ROOT / "csrc").rglob("*.cpp")]:
        if source.relative_to(builder.ROOT / "csrc").as_posix() in REPLACED:
            continue
        text = source.read_text()
        target = copy / source.relative_to(builder.ROOT / "csrc")
        if source.suffix == ".cpp":  # objects are called by the names of their sources alone
            target = target.with_stem("_".join(target.relative_to(copy).with_suffix("").parts))
        wanted.add(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
    for left in [path for path in copy.rglob("*") if path.is_file() and path not in wanted]:
        left.unlink()  # of sources that were there when the copy was made before
    formula = formula_source()
    scan = builder.ROOT / "csrc" / "cuda" / "formula" / "scan.cpp"
    os.environ["FUSED_RNN_SIMT_LIBRARY"] = str(builder.build(more=[formula, CUBLAS], host=[scan]))
    # Torch's headers of these names, which want CUDA's, come later on the include path.
    shutil.copytree(HERE / "include", folder / "include", dirs_exist_ok=True, copy_function=_copy_if_changed)
    from torch.utils import cpp_extension

    sources = [*map(str, sorted(HERE.glob("*.cpp"))), *map(str, sorted(copy.rglob("*.cpp")))]
    of_torch = [s for s in sources if Path(s).parent == copy / "torch" or Path(s).name in WITH_TORCH]
    sources = [*united(of_torch, folder / "united", groups=2), *(s for s in sources if s not in of_torch)]
    # This takes 72 s of one core to compile, and CI's part of the checks 99 s; with -O1 and in four parts: 136 s and 95 s.
    flags = ["-O0", "-g0", "-fopenmp", "-fvisibility=hidden", "-w", "-DFUSED_RNN_WITH_CUDA"]
    module = cpp_extension.load(
        "_C", sources, extra_cflags=flags, extra_ldflags=["-ldl"],
        extra_include_paths=[str(folder / "include"), str(copy)], build_directory=str(folder),
    )  # fmt: skip
    sys.modules["fused_rnn._C"] = module
    return module


def _copy_if_changed(source: str, target: str) -> None:
    if not Path(target).exists() or Path(target).read_bytes() != Path(source).read_bytes():
        shutil.copy2(source, target)
