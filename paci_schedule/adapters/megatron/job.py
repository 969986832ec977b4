"""A Megatron-LM job: its arguments, and what its training loop does across stages in every iteration.

Nothing here imports Megatron-LM.  A programme that uses only megatron-core, or a training loop of its own, is no such
job.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

from paci_schedule.adapters.megatron import groups
from paci_schedule.adapters.megatron.hooks import loaded

__all__ = ["REBOUND", "current_args", "iteration", "make_local"]

REBOUND = ("reduce_max_stat_across_model_parallel_group", "logical_and_across_model_parallel_group", "save_checkpoint")
"""The names in megatron.training.training that get another meaning here."""


def current_args() -> Namespace | None:
    """Megatron-LM's arguments; None outside a Megatron-LM job."""
    args = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
    return args if hasattr(args, "curr_iteration") else None  # which only its own train() sets


def iteration() -> int | None:
    """Iterations that the job has done; None outside a Megatron-LM job."""
    return getattr(current_args(), "curr_iteration", None)


def make_local(config: Any) -> None:
    """Keep what the training loop does in every iteration inside the stage.

    * Success of the update, gradient norm and learning rate are reduced over all model-parallel ranks, though every
      rank of a stage agrees on them already: no reduction.
    * The timer of the log line waits for the whole world: now only for the stage's tensor-parallel ranks.
    """
    training = loaded("megatron.training.training")
    training.reduce_max_stat_across_model_parallel_group = _as_it_is
    training.logical_and_across_model_parallel_group = _as_it_is
    if config.timers is not None:
        config.timers("interval-time").set_barrier_group(groups.tensor_parallel())


def _as_it_is(value: Any, group: Any = None) -> Any:
    return value
