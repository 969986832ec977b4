"""A Megatron-LM job: its arguments, and what its training loop does across stages in every iteration.

Nothing here imports Megatron-LM.  A programme that uses only megatron-core, or a training loop of its own, is no such
job.
"""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from paci_schedule.adapters.megatron import groups
from paci_schedule.adapters.megatron.hooks import loaded, replace, stock_of
from paci_schedule.adapters.megatron.stage_local import chains, optimizers
from paci_schedule.runtime.deferred.reports import CarriedReports, ReportGroup

__all__ = ["REBOUND", "current_args", "iteration", "make_local", "reports", "write_figures"]

REBOUND = (
    "reduce_max_stat_across_model_parallel_group",
    "logical_and_across_model_parallel_group",
    "save_checkpoint",
    "calc_params_l2_norm",
    "training_log",
    "maybe_finalize_async_save",
)
"""The names in megatron.training.training that get another meaning here."""

_METRICS = 8  # that a mixture of experts reports of every layer, at most


def current_args() -> Namespace | None:
    """Megatron-LM's arguments; None outside a Megatron-LM job."""
    args = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
    return args if hasattr(args, "curr_iteration") else None  # which only its own train() sets


def iteration() -> int | None:
    """Iterations that the job has done; None outside a Megatron-LM job."""
    return getattr(current_args(), "curr_iteration", None)


def reports(args: Namespace, device: torch.device) -> CarriedReports | None:
    """What carries the sums that the job's log line has of all stages; None where it has none."""
    layers = (args.num_layers or 0) + (getattr(args, "mtp_num_layers", None) or 0)
    size = bool(args.log_params_norm) + (_METRICS * layers if args.num_experts else 0)
    return CarriedReports(size, device) if size else None


def write_figures(figures: Callable[[], Sequence[Mapping[str, float] | None]]) -> None:
    """Write what is known of all stages to TensorBoard and W&B, on the rank where the job has such a writer.

    Args:
        figures: gives the newest figures of every stage; asked only on that rank.
    """
    args = current_args()
    if args is None or args.curr_iteration % args.tensorboard_log_interval:
        return
    variables = loaded("megatron.training.global_vars")
    board, wandb = variables.get_tensorboard_writer(), variables.get_wandb_writer()
    if not (board or wandb):
        return
    told = {
        f"stage-{stage}/{name.replace('_', '-')}": value
        for stage, newest in enumerate(figures())
        for name, value in (newest or {}).items()
        if name != "loss"
    }
    for name, value in told.items() if board else ():
        board.add_scalar(name, value, args.curr_iteration)
    if wandb and told:
        wandb.log(told, args.curr_iteration)


def make_local(args: Namespace, config: Any, carried: CarriedReports | None) -> None:
    """Keep what the training loop does in every iteration inside the stage.

    * Success of the update, gradient norm and learning rate are reduced over all model-parallel ranks, though every
      rank of a stage agrees on them already: no reduction.
    * The timer of the log line waits for the whole world: now only for the stage's tensor-parallel ranks.  Other timers
      wait for nobody, and each rank reports its own times.
    * Sums over all stages in the log line are carried with the messages.
    """
    training = loaded("megatron.training.training")
    training.reduce_max_stat_across_model_parallel_group = _as_it_is
    training.logical_and_across_model_parallel_group = _as_it_is
    settings: Any
    for settings in (args, config, *(each.config for each in (*optimizers(config), *chains(config)))):
        settings.barrier_with_L1_time = False
    if config.timers is not None:
        config.timers("interval-time").set_barrier_group(groups.tensor_parallel())
        config.timers._get_elapsed_time_all_ranks = partial(_own_times, config.timers)
    if carried is not None:
        _carry(training, carried)


def _as_it_is(value: Any, group: Any = None) -> Any:
    return value


def _own_times(timers: Any, names: list[str], reset: bool, barrier: bool) -> torch.Tensor | None:
    """Stands in for `Timers._get_elapsed_time_all_ranks`: float32[world, n] with the times of this rank alone.  A zero
    means to Megatron-core that a rank has no time to report."""
    if not names:
        return None
    times = torch.zeros(dist.get_world_size(), len(names))
    for place, name in enumerate(names):
        if name in timers._timers:
            times[dist.get_rank(), place] = timers._timers[name].elapsed(reset=reset)
    return times


def _carry(training: Any, carried: CarriedReports) -> None:
    """Let the norm of the parameters and the metrics of the log line be summed over the stages by what is carried."""
    state: Any = parallel_state
    norm = {
        "_MODEL_PARALLEL_GROUP": ReportGroup(carried, state.get_model_parallel_group(), groups.tensor_parallel()),
        "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": ReportGroup(
            carried, state.get_expert_tensor_model_pipeline_parallel_group(), groups.experts()
        ),
    }
    metrics = {"_PIPELINE_MODEL_PARALLEL_GROUP": ReportGroup(carried, groups.pipeline(), None)}
    for name, standing_in in (("calc_params_l2_norm", norm), ("training_log", metrics)):
        replace(training, name, partial(_with_groups, standing_in, stock_of(training, name)))


def _with_groups(
    standing_in: dict[str, ReportGroup],
    stock: Callable[..., Any],
    *values: Any,
    pg_collection: Any = None,
    **named: Any,
) -> Any:
    """Call `stock` with other groups in the place of Megatron-core's."""
    state: Any = parallel_state
    real = {name: getattr(state, name) for name in standing_in}
    if pg_collection is not None:
        pg_collection = copy.copy(pg_collection)
        pg_collection.pp = standing_in.get("_PIPELINE_MODEL_PARALLEL_GROUP", pg_collection.pp)
        named["pg_collection"] = pg_collection
    vars(state).update(standing_in)
    try:
        return stock(*values, **named)
    finally:
        vars(state).update(real)
