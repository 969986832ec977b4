"""Carry out a job with torch.distributed.pipelining: what one rank does, in the terms of `testing.deepspeed_job`."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from testing import jobs, ranks
from testing.jobs import Job, Shared

__all__ = ["act", "build", "moment", "run_all", "train", "whole_batch"]


class _Layers(nn.Sequential):
    """Layers that take what the stage before hands on as one argument."""

    def forward(self, *args: Any) -> Any:
        return super().forward(args[0] if len(args) == 1 else args)


def build(job: Job, *, replicas: int = 1, wrap: Any = None) -> tuple[Any, dict[str, nn.Parameter]]:
    """The schedule of this rank, and the stage's weights by the names of the reference.

    Args:
        job: what to train.
        replicas: of every stage; rank r is stage r % P.
        wrap: what makes the module that is trained, given the layers and the group of the stage's replicas.
    """
    from paci_schedule.adapters.torch import SchedulePaci

    stages = job.stages
    pipelines = [dist.new_group(range(first, first + stages)) for first in range(0, stages * replicas, stages)]
    copies = [dist.new_group(range(stage, stages * replicas, stages)) for stage in range(stages)]
    number = dist.get_rank() % stages
    layers = jobs.layers(job.model)
    module = _Layers(*(layers[layer] for layer in job.stage_layers(number)))
    names = [
        f"tied_modules.{each.key}.{name}" if isinstance(each, Shared) else f"{layer}.{name}"
        for layer, each in zip(job.stage_layers(number), module, strict=True)
        for name, _ in each.named_parameters()
    ]
    trained = module if wrap is None else wrap(module, copies[number])
    weights = dict(zip(names, trained.parameters(), strict=True))
    tied = {each.key: each.weight for each in module if isinstance(each, Shared)}
    parameters = [weight for weight in trained.parameters() if weight.requires_grad]
    stage = PipelineStage(trained, number, stages, torch.device("cpu"), group=pipelines[dist.get_rank() // stages])
    optimizers = [jobs.optimizer(job)(jobs.parameter_groups(job, parameters))] if parameters else []
    schedulers = [jobs.schedule(job)(each) for each in optimizers] if job.warmup else []
    schedule = SchedulePaci(
        stage,
        job.accumulation,
        jobs.loss,
        optimizers=optimizers,
        lr_schedulers=schedulers,
        max_norm=job.clip,
        tied=tied,
        **job.options,
    )
    return schedule, weights


def whole_batch(batches: list[tuple[Any, Any]]) -> tuple[tuple[Any, ...], Any]:
    """Micro-batches as one batch: the arguments of the model, and the target."""
    inputs, labels = zip(*batches, strict=True)
    return _joined(inputs) if isinstance(inputs[0], tuple) else (_joined(inputs),), _joined(labels)


def _joined(parts: Any) -> Any:
    if isinstance(parts[0], tuple):
        return tuple(_joined(same) for same in zip(*parts, strict=True))
    return torch.cat(parts)


def train(job: Job, replicas: int = 1, wrap: Any = None) -> dict[str, Any]:
    """What a rank does: build the schedule, and carry out the script; as `deepspeed_job.follow`."""
    schedule, weights = build(job, replicas=replicas, wrap=wrap)
    stage = dist.get_rank() % job.stages
    jobs.poison(job, stage, list(weights.values()))
    mine = job.of_replica(dist.get_rank() // job.stages)
    feed = jobs.data(job.model, mine.first_micro_batch)
    moments: list[dict[str, Any]] = []
    saved: dict[str, Any] = {}
    for action in job.actions():
        loss = act(schedule, job, stage, action, feed, saved)
        moments.append(moment(schedule, action, loss, weights))
    return {"moments": moments, "stage": stage}


def moment(schedule: Any, action: str, loss: float, weights: dict[str, nn.Parameter]) -> dict[str, Any]:
    """What a rank has come to after an action that told of this loss."""
    return {
        "action": action,
        "loss": loss,
        "weights": {name: _whole(weight.detach()).clone() for name, weight in weights.items()},
        "stats": schedule.stats(),
        "rate": next((each.param_groups[0]["lr"] for each in schedule._update._optimizers), math.nan),
        "norm": math.nan if schedule.norm is None else schedule.norm.item(),
    }


def _whole(weight: torch.Tensor) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def act(schedule: Any, job: Job, stage: int, action: str, feed: Any, saved: dict[str, Any]) -> float:
    """Do one action of a script; the loss that it tells of, NaN if none.  `saved` is what "save" and "load" share."""
    first, last = stage == 0, stage == job.stages - 1
    name, _, value = action.partition("=")
    if name == "train":
        args, target = whole_batch([next(feed) for _ in range(job.accumulation)])
        losses: list[torch.Tensor] = []
        outputs = schedule.step(*(args if first else ()), target=target if last else None, losses=losses)
        assert (outputs is not None) == last
        assert losses or not last
        return math.nan if schedule.loss is None else schedule.loss.item()
    if name == "eval":
        index = jobs.EVALUATION_DATA
        batches = [jobs.micro_batch(job.model, index + number) for number in range(job.accumulation)]
        args, target = whole_batch(batches)
        losses = []
        schedule.eval(*(args if first else ()), target=target if last else None, losses=losses)
        return torch.stack(losses).mean().item() if last else math.nan
    if name == "schedule":
        schedule.set_pipeline_schedule(value)
    elif name == "rate":
        for group in (group for each in schedule._update._optimizers for group in each.param_groups):
            group["lr"] = float(value)
    elif name in ("save", "load"):
        _checkpoint(schedule, name == "load", saved)
    else:
        schedule.drain()
    return math.nan


def _checkpoint(schedule: Any, loads: bool, saved: dict[str, Any]) -> None:
    """Save this stage in memory, or load it."""
    parts = {"schedule": schedule, "module": schedule._stage.submod}
    parts |= {f"optimizer{number}": each for number, each in enumerate(schedule._update._optimizers)}
    parts |= {f"rate{number}": each for number, each in enumerate(schedule._update._lr_schedulers)}
    for name, part in parts.items():
        if loads:
            part.load_state_dict(copy.deepcopy(saved[name]))
        else:
            saved[name] = copy.deepcopy(part.state_dict())


def run_all(
    *calls: tuple[Job, dict[str, Any]], replicas: int = 1, timeout: float = 280.0
) -> list[list[dict[str, Any]]]:
    """Carry out several jobs of equally many stages on the same ranks; for each, what `train` returned, by rank."""
    results = ranks.run_ranks(_train_all, calls[0][0].stages * replicas, (calls, replicas), timeout=timeout)
    return [list(by_rank) for by_rank in zip(*results, strict=True)]


def _train_all(calls: tuple[tuple[Job, dict[str, Any]], ...], replicas: int) -> list[dict[str, Any]]:
    return [train(job, replicas, **options) for job, options in calls]
