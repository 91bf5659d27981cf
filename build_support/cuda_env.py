"""Decides whether the CUDA kernels are built, with which nvcc and for which architectures."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Without a visible GPU: Ampere and Hopper, and PTX that newer GPUs compile when they load it.
# (PTX of 9.0a would run on 9.0 alone, so the PTX is that of 8.0.)
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a"
# Architectures whose own instructions need the suffix.
_ARCHITECTURE_NAMES = {(9, 0): "9.0a", (10, 0): "10.0a"}


def _wheel_roots(major):
    """CUDA folders of the nvidia wheels: one for all from CUDA 13 on, one a component before."""
    roots = [Path(entry, "nvidia") for entry in sys.path if entry]
    return [path for root in roots for path in ([root / f"cu{major}"] if major >= 13 else sorted(root.glob("cu*")))]


def _nvcc_version(home):
    try:
        out = subprocess.run([str(home / "bin" / "nvcc"), "--version"], check=True, stdout=subprocess.PIPE, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"release (\d+)\.(\d+)", out.stdout)
    return match and (int(match[1]), int(match[2]))


def _find_nvcc(cuda_major):
    """(CUDA home, "major.minor") of the nvcc to use; (None, the reason) where none fits."""
    on_path = shutil.which("nvcc")
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes += [Path(on_path).resolve().parent.parent] if on_path else []
    homes += [Path("/usr/local/cuda"), Path(f"/usr/local/cuda-{cuda_major}"), *_wheel_roots(cuda_major)]
    found = [(home, version) for home in dict.fromkeys(homes) if (version := _nvcc_version(home))]
    fitting = [(home, version) for home, version in found if version[0] == cuda_major]
    # An nvcc on PATH may be a wrapper script: prefer a home that has the headers.
    fitting.sort(key=lambda item: not (item[0] / "include" / "cuda_runtime_api.h").exists())
    if fitting:
        home, version = fitting[0]
        return home, "{}.{}".format(*version)
    if found:
        listing = ", ".join("{} at {}".format(".".join(map(str, version)), home) for home, version in found)
        return None, f"torch was built with CUDA {cuda_major} but nvcc is {listing}"
    return None, f"torch was built with CUDA {cuda_major} but no nvcc was found"


def _nvcc_command(cuda_version):
    """The command that installs an nvcc for this CUDA version. NVIDIA's wheels have it from CUDA 13 on."""
    if int(cuda_version.split(".")[0]) < 13:
        return f"export CUDA_HOME=<the folder of an installed CUDA {cuda_version} toolkit>"
    parts = ("nvcc", "crt", "cccl")
    names = [f"nvidia-cuda-{part}=={cuda_version}.*" for part in parts] + [f"nvidia-nvvm=={cuda_version}.*"]
    return "pip install " + " ".join(f'"{name}"' for name in names)


def _architectures(torch):
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if listed and listed != "native":
        return listed
    count = torch.cuda.device_count()
    capabilities = sorted({torch.cuda.get_device_capability(index) for index in range(count)})
    names = [_ARCHITECTURE_NAMES.get(capability, "{}.{}".format(*capability)) for capability in capabilities]
    return ";".join(names) or DEFAULT_ARCHITECTURES


def cuda_plan(torch):
    """{"skipped": reason, "mend": what to do before a new build} or {"home", "nvcc", "architectures", "include_after"}.

    Raises where FUSED_RNN_CUDA=1 demands CUDA and a piece is missing."""
    wanted = os.environ.get("FUSED_RNN_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"FUSED_RNN_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return {"skipped": "FUSED_RNN_CUDA=0 was set", "mend": "unset FUSED_RNN_CUDA"}
    if torch.version.cuda is None:
        home, reason, mend = None, "torch was built without CUDA", "pip install --force-reinstall torch  (its CUDA build)"
    else:
        home, reason = _find_nvcc(int(torch.version.cuda.split(".")[0]))
        mend = _nvcc_command(torch.version.cuda)
    if home is None:
        if wanted == "1":
            raise SystemExit(f"FUSED_RNN_CUDA=1, but {reason}. This may mend it: {mend}")
        return {"skipped": reason, "mend": mend}
    includes = [root / "include" for root in _wheel_roots(int(torch.version.cuda.split(".")[0]))]
    return {
        "home": str(home),
        "nvcc": reason,
        "architectures": _architectures(torch),
        "include_after": [str(path) for path in includes if path.is_dir()],
    }
