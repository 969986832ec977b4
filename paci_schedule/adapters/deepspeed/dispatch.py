"""The hooks by which DeepSpeed's engines follow the config's ``"pipeline_schedule"``.

They lie in the engine classes themselves, so that every way to an engine meets them: ``deepspeed.initialize``, a class
that was imported before registration, and a class that a job derives from DeepSpeed's.  No engine runs 1F1B where the
config names another schedule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine as StockEngine

from paci_schedule.adapters.deepspeed.engine import PaciPipelineEngine
from paci_schedule.adapters.deepspeed.hooks import check_installed, warn_if_untested
from paci_schedule.adapters.deepspeed.options import read_schedule
from paci_schedule.errors import UnsupportedError

__all__ = ["install"]


def install() -> None:
    """Put the hooks into DeepSpeed's engines.  Raises UnsupportedError if what they rely on is missing."""
    check_installed()
    if DeepSpeedEngine.__new__ is not _new:
        warn_if_untested()
        DeepSpeedEngine.__new__ = staticmethod(_new)
        StockEngine._exec_schedule = _refusing(StockEngine._exec_schedule)


def _new(
    cls: type[DeepSpeedEngine],
    *_: Any,
    config_class: DeepSpeedConfig | None = None,
    model: object = None,
    **__: Any,
) -> DeepSpeedEngine:
    """An engine of the class that the config asks for; Python calls the constructor of what this returns."""
    name = "1f1b" if config_class is None else read_schedule(config_class._param_dict)
    if cls is StockEngine and name != "1f1b":
        cls = PaciPipelineEngine
    elif name != "1f1b" and not issubclass(cls, PaciPipelineEngine):
        raise UnsupportedError(_why_not(cls, name, model))
    return object.__new__(cls)


def _refusing(execute: Callable[..., None]) -> Callable[..., None]:
    """DeepSpeed's executor of its own schedules, for engines whose config asks for no other."""

    @functools.wraps(execute)
    def _exec_schedule(self: StockEngine, pipe_schedule: Any) -> None:
        config: Any = self._config  # DeepSpeed declares that it may be None
        name = config._param_dict.get("pipeline_schedule", "1f1b")
        if name != "1f1b" and not isinstance(self, PaciPipelineEngine):
            raise UnsupportedError(_why_not(type(self), name, self.module))
        execute(self, pipe_schedule)

    return _exec_schedule


def _why_not(cls: type[DeepSpeedEngine], name: str, model: object) -> str:
    key = f'"pipeline_schedule": "{name}"'
    if cls is StockEngine:
        return (
            f"{key}, but the engine was built before paci_schedule was registered, and runs DeepSpeed's 1F1B: call "
            "paci_schedule.register() before the engine is built, or start the script with `-m paci_schedule.launch`"
        )
    if issubclass(cls, StockEngine) and not cls.__module__.startswith("deepspeed."):
        return (
            f"{key} with the engine class {cls.__module__}.{cls.__qualname__}, which is derived from DeepSpeed's "
            "PipelineEngine and would run its 1F1B: derive it from paci_schedule.adapters.deepspeed."
            "PaciPipelineEngine, or leave the key out"
        )
    return (
        f"{key} with a model of class {type(model).__name__}, which DeepSpeed runs in a {cls.__name__}: it schedules a "
        "PipelineEngine; make it a PipelineModule, or leave the key out"
    )
