"""Builds fused_rnn._C: the CPU kernels always, the CUDA kernels where torch has CUDA and a matching nvcc is found."""

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
os.chdir(ROOT)
sys.path.insert(0, str(ROOT / "build_support"))
from cuda_env import cuda_plan  # noqa: E402
from torch_env import import_torch  # noqa: E402
from unity import united  # noqa: E402

WARNINGS = ["-Wall", "-Wextra", "-Werror=switch"]


def sources(*patterns):
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extension(torch, cuda):
    """The one extension module. No -std (torch passes the one it needs) and no -march (the instruction set is chosen at run
    time). OpenMP is compiled in but not linked: its symbols come from the library that torch has loaded; so do CUDA's."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension, include_paths

    cxx = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", *WARNINGS]
    for folder in include_paths():  # a system header's warnings are not ours
        cxx += ["-isystem", folder]
    files = [name for name in sources("csrc/**/*.cpp") if not name.endswith("_cuda.cpp")]
    include_dirs = [str(ROOT / "csrc"), str(ROOT / "csrc" / "cuda" / "device")]
    if "skipped" in cuda:
        return CppExtension("fused_rnn._C", files, include_dirs=include_dirs, extra_compile_args={"cxx": cxx, "nvcc": []})
    # torch's headers ask for CUDA libraries' headers that a small toolkit lacks: those of the nvidia wheels come last.
    for folder in cuda["include_after"]:
        cxx += ["-idirafter", folder]
    undo = [
        f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
    ]
    result = CUDAExtension(
        "fused_rnn._C",
        # ninja starts them in this order: the persistent kernels take longest.
        sources("csrc/cuda/persistent/*.cu", "csrc/cuda/block/*.cu")
        + sources("csrc/cuda/*.cu", "csrc/cuda/step/*.cu", "csrc/cuda/gemm/*.cu", "csrc/torch/*_cuda.cpp")
        + files,
        include_dirs=include_dirs,
        define_macros=[("FUSED_RNN_WITH_CUDA", None)],
        # Of the code for the host; what nvcc writes itself has no warnings either.
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-Xcompiler", ",".join(WARNINGS), *undo]},
    )
    result.libraries.remove("cudart")
    return result


# What compiled formulas include (fused_rnn/formula/build.py, cuda_build.py).
HEADERS = ("core", "cpu/isa", "plan", "cuda/device", "cuda/step", "cuda/formula", "cuda/formula/rtc")


class BuildPackage(build_py):
    """Puts the headers into the package. A source tree, and an editable install, has them under csrc."""

    def run(self):
        super().run()
        for folder in () if self.editable_mode else HEADERS:
            target = Path(self.build_lib) / "fused_rnn" / "include" / folder
            target.mkdir(parents=True, exist_ok=True)
            for path in (ROOT / "csrc" / folder).iterdir():
                if path.is_file() and path.suffix in (".h", ".cuh", ""):  # without a suffix: names of the C++ library's
                    shutil.copyfile(path, target / path.name)


def build_options(torch):
    cuda = cuda_plan(torch)
    if "skipped" not in cuda:  # Both are read by torch.utils.cpp_extension: CUDA_HOME at its import.
        os.environ["CUDA_HOME"] = cuda["home"]
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda["architectures"]
    from torch.utils.cpp_extension import BuildExtension

    record = {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "nvcc": cuda.get("nvcc"),
        "cuda_architectures": cuda.get("architectures", "").replace(" ", ";").split(";") if "nvcc" in cuda else [],
        "cuda_skipped": cuda.get("skipped"),
        "cuda_mend": cuda.get("mend"),
    }

    class Build(BuildExtension):
        """Always runs ninja, in one folder per torch: it knows every header and flag and compiles only what changed. Writes
        what was built next to the module, where it can be read without loading it."""

        def finalize_options(self):
            super().finalize_options()
            self.force = True
            self.build_temp = str(ROOT / "build" / f"temp.{sys.implementation.cache_tag}-torch{torch.__version__}")

        def build_extensions(self):
            """Unites the files of csrc/torch. Not in `extension`: what is generated would be in the source distribution."""
            for one in self.extensions:
                alone = [name for name in one.sources if not (name.startswith("csrc/torch/") and name.endswith(".cpp"))]
                of_torch = [name for name in one.sources if name not in alone]
                kernels = [name for name in alone if name.endswith(".cu")]  # they take longest
                others = [name for name in alone if name not in kernels]
                folder = Path(os.path.relpath(self.build_temp, ROOT)) / "united"
                one.sources = kernels + united(of_torch, folder) + others
            super().build_extensions()

        def run(self):
            super().run()
            module = Path(self.get_ext_fullpath("fused_rnn._C"))
            module.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")

    return {"ext_modules": [extension(torch, cuda)], "cmdclass": {"build_ext": Build}}


torch = import_torch()
if torch is None and {"bdist_wheel", "editable_wheel", "build_ext", "develop", "install", "build"} & set(sys.argv):
    raise SystemExit("fused_rnn is compiled against torch >= 2.11, which is not installed here. Run: pip install torch")
if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None and os.environ.get("FUSED_RNN_CUDA") != "1":
    print("fused_rnn: no C++ compiler was found, so nothing is compiled: the Python reference will run", file=sys.stderr)
    torch = None
options = build_options(torch) if torch is not None else {}
setup(**{**options, "cmdclass": {**options.get("cmdclass", {}), "build_py": BuildPackage}})
