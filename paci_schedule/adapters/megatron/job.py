"""A Megatron-LM job: what its arguments say, and what its training loop does across stages in every iteration.

Nothing here imports Megatron-LM: with megatron-core alone there is no such job, nor is a training loop of one's own on
its initialize_megatron one.
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from paci_schedule.adapters.megatron.late import Late, fingerprint

__all__ = ["REBOUND", "current_args", "iteration", "keep_late", "make_local"]

logger = logging.getLogger(__name__)

REBOUND = ("reduce_max_stat_across_model_parallel_group", "logical_and_across_model_parallel_group", "save_checkpoint")
"""The names in megatron.training.training that get another meaning here."""


def current_args() -> Namespace | None:
    """Megatron-LM's arguments; None outside a Megatron-LM job."""
    args = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
    return args if hasattr(args, "curr_iteration") else None  # which its own train() alone sets


def iteration() -> int | None:
    """Iterations that the job has done; None outside a Megatron-LM job."""
    return getattr(current_args(), "curr_iteration", None)


def make_local(config: Any) -> None:
    """Keep what the training loop does in every iteration inside the stage.

    * Success of the update, gradient norm and learning rate are reduced over all model-parallel ranks, though every
      rank of a stage agrees on them already: no reduction.
    * The timer of the log line waits for the whole world: for the stage's tensor-parallel ranks alone.
    """
    training = sys.modules["megatron.training.training"]
    training.reduce_max_stat_across_model_parallel_group = _as_it_is
    training.logical_and_across_model_parallel_group = _as_it_is
    if config.timers is not None:
        config.timers("interval-time").set_barrier_group(parallel_state.get_tensor_model_parallel_group())


def keep_late(model: torch.nn.Module, late: Late, settle: Callable[[], bool], sharded: bool) -> None:
    """Save what is late by design beside every checkpoint, before it, and begin with what the loaded one has.

    Every rank of the job calls it at the same time: where one of them finds nothing, or what was saved with other
    weights (a checkpoint that a run of the stock schedule has written anew), all begin with nothing late, for the
    copies of a tied weight must apply the same sums.

    Args:
        model: this stage's, loaded.
        late: of this stage.
        settle: called before a save; whether the pipe is empty.
        sharded: whether data-parallel ranks hold different parts of the gradients.
    """
    args, training = current_args(), sys.modules["megatron.training.training"]
    stock_save = getattr(training.save_checkpoint, "stock", training.save_checkpoint)

    def path(folder: str, iteration: int) -> Path:
        return Path(folder, "paci_schedule", f"iter_{iteration:07d}", _rank_name(sharded))

    def save_checkpoint(iteration: int, *rest: Any, **options: Any) -> Any:
        empty = settle()
        if sharded or parallel_state.get_data_parallel_rank() == 0:
            file = path(args.save, iteration)
            file.parent.mkdir(parents=True, exist_ok=True)
            state = late.state() if empty else {**late.state(), "norms": []}
            torch.save({**state, "weights": fingerprint(model)}, file)
        return stock_save(iteration, *rest, **options)

    save_checkpoint.stock = stock_save
    training.save_checkpoint = save_checkpoint
    if args.load and args.iteration:
        file = path(args.load, args.iteration)
        state = torch.load(file, weights_only=True, map_location="cpu") if file.is_file() else {}
        found: list[tuple[bool, bool]] = [(False, False)] * dist.get_world_size()
        dist.all_gather_object(found, (bool(state), bool(state) and state.get("weights") == fingerprint(model)))
        there, fits = map(sum, zip(*found, strict=True))
        if fits == len(found):
            late.load_state(state)
        elif dist.get_rank() == 0:
            logger.warning(
                "%s holds what a run under 'paci' learns late for %d of the %d ranks of this topology, for %d of them "
                "with the weights of this checkpoint: this run begins with nothing late",
                file.parent,
                there,
                len(found),
                fits,
            )


def _rank_name(sharded: bool) -> str:
    """Of this rank's file.  It names the topology, for in another one the file means nothing."""
    state = parallel_state
    name = f"stage{state.get_pipeline_model_parallel_rank()}of{state.get_pipeline_model_parallel_world_size()}"
    name += f"-tensor{state.get_tensor_model_parallel_rank()}of{state.get_tensor_model_parallel_world_size()}"
    if sharded:
        name += f"-shard{state.get_data_parallel_rank()}of{state.get_data_parallel_world_size()}"
    return f"{name}.pt"


def _as_it_is(value: Any, group: Any = None) -> Any:
    return value
