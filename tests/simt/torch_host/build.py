"""Builds fused_rnn._C with the CUDA ops compiled for CPU tensors, the simulator in the place of the device."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import builder  # noqa: E402

# What makes the ops for CUDA tensors those for CPU tensors: file, text, what takes its place.
CHANGES = [
    ("ops_cuda.cpp", "TORCH_LIBRARY_IMPL(fused_rnn, CUDA, m)", "TORCH_LIBRARY_IMPL(fused_rnn, CPU, m)"),
    ("stack_cuda.cpp", "t.is_cuda() && is_plain(t)", "t.is_cpu() && is_plain(t)"),
    ("ops.cpp", 'TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {\n  m.impl("layer", fused_rnn::layer_cpu);\n  '
     'm.impl("layer_backward", fused_rnn::layer_backward_cpu);\n}', ""),
    ("ops.cpp", "  if (!nothing_intercepts() || at::hasCallbacks()) return false;", "  return false;"),
    ("ops.cpp", "if (!integers || integers->device() == input.device()) return", "if (!integers) return"),
    ("ops.cpp", "from_host = input.is_cuda()", "from_host = input.is_cpu()"),
]  # fmt: skip


def load() -> ModuleType:
    """The extension, as fused_rnn._C; fused_rnn must not have been imported yet."""
    folder = builder.CACHE / "torch_host"
    copy = folder / "csrc"
    for source in [*(builder.ROOT / "csrc").rglob("*.h"), *(builder.ROOT / "csrc").rglob("*.cpp")]:
        text = source.read_text()
        for file, before, after in CHANGES:
            if file == source.name and source.parent.name == "torch":
                assert text.count(before) == 1, f"{file} has no or several {before!r}"
                text = text.replace(before, after)
        target = copy / source.relative_to(builder.ROOT / "csrc")
        if source.suffix == ".cpp":  # objects are called by the names of their sources alone
            target = target.with_stem("_".join(target.relative_to(copy).with_suffix("").parts))
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
    os.environ["FUSED_RNN_SIMT_LIBRARY"] = str(builder.build())
    # Torch's headers of these names, which want CUDA's, come later on the include path.
    shutil.copytree(HERE / "include", folder / "include", dirs_exist_ok=True, copy_function=_copy_if_changed)
    from torch.utils import cpp_extension

    sources = [HERE / "backend.cpp", *sorted(copy.rglob("*.cpp"))]
    flags = ["-O1", "-g0", "-fopenmp", "-fvisibility=hidden", "-w", "-DFUSED_RNN_WITH_CUDA"]
    module = cpp_extension.load(
        "_C", [str(s) for s in sources], extra_cflags=flags, extra_ldflags=["-ldl"],
        extra_include_paths=[str(folder / "include"), str(copy)], build_directory=str(folder),
    )  # fmt: skip
    sys.modules["fused_rnn._C"] = module
    return module


def _copy_if_changed(source: str, target: str) -> None:
    if not Path(target).exists() or Path(target).read_bytes() != Path(source).read_bytes():
        shutil.copy2(source, target)
