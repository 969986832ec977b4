"""What PACI refuses on torch.distributed.pipelining before training starts: the value, the rule, the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.distributed.tensor import DTensor

from paci_schedule.adapters.refusal import launch_blocking
from paci_schedule.adapters.torch.options import PaciOptions
from paci_schedule.core.staleness import interval_of
from paci_schedule.errors import UnsupportedError
from paci_schedule.predict import check

__all__ = ["HEADING", "job_reasons", "optimizer_reasons"]

HEADING = "SchedulePaci cannot run this job; change what follows, or use Schedule1F1B"


def job_reasons(stage: _PipelineStageBase, tied: Sequence[torch.nn.Parameter], options: PaciOptions) -> Iterator[str]:
    """Why this rank's stage cannot run under PACI."""
    if stage.group_size != stage.num_stages or stage.group_rank != stage.stage_index:
        yield (
            f"stage {stage.stage_index} of {stage.num_stages} on rank {stage.group_rank} of a group of "
            f"{stage.group_size}: PACI has one stage a rank, in the order of the ranks, and no bubble to fill with "
            "more; cut the model into as many stages as the group has ranks"
        )
    if stage.dw_builder is not None:
        yield "PipelineStage(dw_builder=...): PACI does not split the backward; leave it out"
    if tied and isinstance(stage.submod, FSDPModule):
        yield "tied weights in a module that fully_shard has wrapped: not tried; use DistributedDataParallel"
    if options.early_receives:
        yield from launch_blocking("SchedulePaci(early_receives=True)")


def optimizer_reasons(optimizers: Sequence[Any], options: PaciOptions) -> Iterator[str]:
    """Why the weights of these optimizers cannot be predicted, where the options ask for it."""
    if interval_of(options.prediction) is None:
        return
    option = f"SchedulePaci(prediction={options.prediction!r})"
    for optimizer in optimizers:
        try:
            check(optimizer, options.prediction_reach)
        except UnsupportedError as error:
            yield f"{option} with {error}"
        if any(isinstance(weight, DTensor) for group in optimizer.param_groups for weight in group["params"]):
            yield f"{option} with weights that are DTensors (FSDP, tensor parallelism): not tried; use 'off'"
