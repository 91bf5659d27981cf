"""Finds the torch that the extension is built against.

pip's build isolation hides the environment through PYTHONPATH alone: the same interpreter, started without it, still sees
what is installed. `torch_path` asks it.
"""

import json
import os
import re
import subprocess
import sys

MINIMUM = (2, 11)
_PROBE = """
import importlib.metadata, json, sys
try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    version = None
print(json.dumps([version, sys.path[1:]]))
"""


def _is_recent(version):
    match = re.match(r"(\d+)\.(\d+)", version or "")
    return bool(match) and (int(match[1]), int(match[2])) >= MINIMUM


def installed_torch():
    """(version, sys.path) of the interpreter outside build isolation; version is None if it has no torch."""
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    # From a directory without torch: sys.path[0] is the working directory, which the probe leaves out.
    out = subprocess.run([sys.executable, "-c", _PROBE], env=env, check=True, stdout=subprocess.PIPE, text=True)
    version, path = json.loads(out.stdout.splitlines()[-1])
    return version, path


def torch_requirement():
    """What the build needs beyond pyproject.toml's list: nothing where a torch that is new enough is installed."""
    return [] if _is_recent(installed_torch()[0]) else ["torch>={}.{}".format(*MINIMUM)]


def import_torch():
    """The torch to build against: this environment's own (an isolated build has one only if it had to require it), else the
    installed one. None where there is none, so that an sdist can be made without torch."""
    try:
        import torch
    except ModuleNotFoundError:
        version, path = installed_torch()
        if not _is_recent(version):
            return None
        sys.path.extend(entry for entry in path if entry not in sys.path)
        import torch
    return torch
