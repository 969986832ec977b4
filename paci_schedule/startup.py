"""Register in processes that no launcher reaches, such as the workers of Ray, when their environment asks for it.

Beside the installed package lies `paci_schedule.pth`, a copy of `startup.pth`.  By it Python calls `begin` at the start
of every process whose environment names a schedule in PACI_PIPELINE_SCHEDULE.  As soon as a framework has been
imported, the schedule is registered with it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from paci_schedule import ConfigError, register

__all__ = ["OPTIONS", "SWITCH", "begin"]

SWITCH = "PACI_PIPELINE_SCHEDULE"
"""The schedule of Megatron's models whose config names none.  DeepSpeed's engines read theirs from their config."""

OPTIONS = "PACI_OPTIONS"
"""The options of Megatron's models whose config has no `paci`, in JSON."""

_FRAMEWORKS = {"megatron.core": "megatron", "deepspeed": "deepspeed"}


def begin() -> None:
    """Wait for a framework to be imported, if the environment names a schedule.

    What is wrong with the name or the options is an error of this import: one at Python's start would stop nothing.
    """
    if os.environ.get(SWITCH):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the frameworks where others find them, and lets them be registered with."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _FRAMEWORKS:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """Loads a framework as `loader` does, and then registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None, "it has been found"
        module.__spec__.loader = module.__loader__ = self._loader  # whoever asks later, for the source or its data
        self._loader.exec_module(module)
        _register(module.__name__)


def _register(package: str) -> None:
    framework = _FRAMEWORKS[package]
    register(framework)
    if framework == "megatron":
        import_module("paci_schedule.adapters.megatron").register(os.environ[SWITCH], _options())


def _options() -> object:
    text = os.environ.get(OPTIONS)
    try:
        return json.loads(text) if text else None
    except json.JSONDecodeError as error:
        raise ConfigError(f'{OPTIONS}={text}: must be JSON, such as {{"timeout": 600}} ({error})') from None
