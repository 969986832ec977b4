"""The hook into ``deepspeed.initialize``, which looks up its engines in ``deepspeed`` when it builds one."""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine as StockEngine

from paci_schedule.adapters.deepspeed.engine import PaciPipelineEngine
from paci_schedule.adapters.deepspeed.hooks import ENGINES, LATER_ENGINES, check_installed, warn_if_untested
from paci_schedule.adapters.deepspeed.options import read_schedule
from paci_schedule.errors import UnsupportedError

__all__ = ["install"]


class _StandIn(type(StockEngine)):
    """A class that constructs the engine that the config asks for; as a type it passes for DeepSpeed's own."""

    def __call__(cls, *args: Any, **kwargs: Any) -> deepspeed.DeepSpeedEngine:
        stock = cls._stock()
        if stock is None:
            return super().__call__(*args, **kwargs)
        return _chosen(stock, kwargs.get("config_class"), kwargs.get("model"))(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        stock = cls._stock()
        return super().__instancecheck__(instance) if stock is None else isinstance(instance, stock)

    def __subclasscheck__(cls, subclass: type) -> bool:
        stock = cls._stock()
        return super().__subclasscheck__(subclass) if stock is None else issubclass(subclass, stock)

    def _stock(cls) -> type | None:
        """The class that this one stands in for; None for a user's own engine that is derived from such a stand-in."""
        return vars(cls).get("stands_in_for")


def _chosen(stock: type, config: DeepSpeedConfig | None, model: object) -> type:
    name = "1f1b" if config is None else read_schedule(config._param_dict)
    if name == "1f1b":
        return stock
    if stock is not StockEngine:
        raise UnsupportedError(
            f'"pipeline_schedule": "{name}" with a model of class {type(model).__name__}, which DeepSpeed runs in a '
            f"{stock.__name__}: it schedules a PipelineEngine; make it a PipelineModule, or leave the key out"
        )
    return PaciPipelineEngine


def install() -> None:
    """Put the stand-ins in the place of DeepSpeed's engines.  Raises UnsupportedError if a hook is missing."""
    check_installed()
    if not isinstance(deepspeed.PipelineEngine, _StandIn):
        warn_if_untested()
    for name in (*ENGINES, *(later for later in LATER_ENGINES if hasattr(deepspeed, later))):
        stock = getattr(deepspeed, name)
        if not isinstance(stock, _StandIn):
            setattr(deepspeed, name, _StandIn(name, (stock,), {"__module__": __name__, "stands_in_for": stock}))
