"""Checkpoints that Megatron-LM loads at the start of a job: no rank waits for another one longer than the timeout."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

from megatron.core import parallel_state

from paci_schedule.adapters.megatron.dispatch import registered_options
from paci_schedule.adapters.megatron.hooks import replace, stock_of
from paci_schedule.runtime.waiting import together

__all__ = ["watch_loading"]


def watch_loading() -> None:
    """Let a load that one rank does not come to the end of raise LinkError on the others.

    Nothing happens where Megatron-LM's training loop has not been imported.
    """
    training: Any = sys.modules.get("megatron.training.training")
    if not hasattr(training, "load_checkpoint"):
        return
    stock = stock_of(training, "load_checkpoint")
    timeout = timedelta(seconds=registered_options().timeout)

    def load_checkpoint(*values: Any, **options: Any) -> Any:
        with together(parallel_state.get_pipeline_model_parallel_rank(), "loaded a checkpoint", timeout):
            return stock(*values, **options)

    replace(training, "load_checkpoint", load_checkpoint)
