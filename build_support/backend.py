"""PEP 517 backend: setuptools, plus torch as a build requirement where the environment has none.

A fixed `requires = ["torch"]` would make an isolated build compile against the newest torch instead of the one it will be
used with. So an installed torch is found first (see torch_env), and only a missing one is required.
"""

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)
from torch_env import torch_requirement


def get_requires_for_build_wheel(config_settings=None):
    return _setuptools.get_requires_for_build_wheel(config_settings) + torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return _setuptools.get_requires_for_build_editable(config_settings) + torch_requirement()
