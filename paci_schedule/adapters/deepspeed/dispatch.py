"""The hook into ``deepspeed.initialize``, which looks up ``deepspeed.PipelineEngine`` when it builds an engine."""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed.runtime.pipe.engine import PipelineEngine as StockEngine

from paci_schedule.adapters.deepspeed.engine import PaciPipelineEngine
from paci_schedule.adapters.deepspeed.hooks import check_installed
from paci_schedule.adapters.deepspeed.options import read_schedule

__all__ = ["install"]

_ENGINES = {"1f1b": StockEngine, "paci": PaciPipelineEngine}


class _ChooseByConfig(type(StockEngine)):
    """Constructing the class constructs the engine that the config asks for; as a type it is DeepSpeed's own."""

    def __call__(cls, *args: Any, **kwargs: Any) -> StockEngine:
        if cls is not PipelineEngine:  # somebody's own engine, derived from this one
            return super().__call__(*args, **kwargs)
        return _ENGINES[read_schedule(kwargs["config_class"]._param_dict)](*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, StockEngine) if cls is PipelineEngine else super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, StockEngine) if cls is PipelineEngine else super().__subclasscheck__(subclass)


class PipelineEngine(StockEngine, metaclass=_ChooseByConfig):
    """Stands in for ``deepspeed.PipelineEngine``."""


def install() -> None:
    """Put the choice in DeepSpeed's place.  Raises UnsupportedError if this DeepSpeed cannot carry it."""
    check_installed()
    deepspeed.PipelineEngine = PipelineEngine
