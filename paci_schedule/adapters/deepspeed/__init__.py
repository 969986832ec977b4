"""DeepSpeed: ``"pipeline_schedule": "paci"`` in the config of ``deepspeed.initialize``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paci_schedule.adapters.deepspeed.hooks import probe

if TYPE_CHECKING:
    from paci_schedule.adapters.deepspeed.engine import PaciPipelineEngine
    from paci_schedule.adapters.deepspeed.partition import CutPipelineModule, balanced_cut, layer_costs

__all__ = ["CutPipelineModule", "PaciPipelineEngine", "balanced_cut", "layer_costs", "probe", "register"]


def register() -> None:
    """Let ``deepspeed.initialize`` choose the engine by the config's ``"pipeline_schedule"``.  Idempotent.

    Raises:
        UnsupportedError: a hook that we rely on is gone.  (A version outside the tested range is a warning.)
    """
    from paci_schedule.adapters.deepspeed.dispatch import install

    install()


def __getattr__(name: str) -> object:
    if name == "PaciPipelineEngine":
        from paci_schedule.adapters.deepspeed.engine import PaciPipelineEngine

        return PaciPipelineEngine
    if name in __all__:
        from paci_schedule.adapters.deepspeed import partition

        return getattr(partition, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
