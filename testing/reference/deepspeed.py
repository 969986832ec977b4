"""What a DeepSpeed job must give: its script, carried out in one process."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from testing import jobs
from testing.jobs import Job
from testing.reference import rules
from testing.reference.pipeline import Pipeline
from testing.reference.torch_stage import TorchStage
from testing.reference.updaters import ZeroArithmetic

__all__ = ["Moment", "Reference", "run"]


@dataclass
class Moment:
    """What the reference, or an engine, has come to after one action of the script.

    Attributes:
        action: which one.
        loss: by stage; what the action returned: for "train" the mean over the micro-batches whose backward the stage
            has finished in the call, or in the newest one that finished any, or before there is one the mean over the
            batch; for "eval" the mean over all.
        version: by stage, updates applied so far.
        rate: by stage, the learning rate of its next update.
        norm: by stage, the norm that the latest update was clipped by; NaN before the first.
        drift: by stage, drift of every micro-batch whose backward is finished, in order, since the start.
        live: by stage, micro-batches between forward and backward.
        peak: by stage, the most of them at any time.
        weights: by stage, name -> parameter, by layer number.
    """

    action: str
    loss: list[float] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    drift: list[list[int]] = field(default_factory=list)
    live: list[int] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)


def run(job: Job, replicas: int = 1, **options: Any) -> list[Moment]:
    """Carry out a job's script; one moment per action.  The arguments are those of `Reference`."""
    return Reference(job, replicas, **options).run()


class Reference:
    """A job in one process.

    Args:
        job: what a replica does; the others do the same with data of their own.
        replicas: of every stage.
        layers: of the model; None for those that the job names.
        zero: how ZeRO computes, where the job has it.

    Attributes:
        stages: its stages, first to last.
        pipeline: what runs them.
        data: for each replica, the micro-batches that come next.
    """

    def __init__(
        self,
        job: Job,
        replicas: int = 1,
        *,
        layers: list[nn.Module] | None = None,
        zero: ZeroArithmetic | None = None,
    ) -> None:
        self.job, options = job, job.options
        layers = jobs.layers(job.model) if layers is None else layers
        self.stages = [
            TorchStage(job, number, layers, replicas, zero or ZeroArithmetic()) for number in range(job.stages)
        ]
        trained = {key for stage in self.stages for key in stage.tied}
        self.pipeline = Pipeline(
            self.stages,
            job.accumulation,
            rules.look_aheads(job.stages, options.get("extra_in_flight", 0)),
            replicas=replicas,
            ties={key: job.holders(key) for key in jobs.TIES.get(job.model, {}) if key in trained},
            global_norm=bool(job.clip) and options.get("clip", "global") == "global",
            agreed={number for number, stage in enumerate(self.stages) if stage.tied},
            prediction=options.get("prediction", "off"),
        )
        self.data: list[Iterator[Any]] = [
            jobs.data(job.model, job.of_replica(replica).first_micro_batch, job.shapes) for replica in range(replicas)
        ]
        self._schedule, self._samples = "paci", 3  # in a micro-batch, at the start
        self._saved: tuple[list[TorchStage], Pipeline, list[float]] | None = None
        self._newest = [math.nan] * job.stages

    def run(self) -> list[Moment]:
        """Carry out the script from where the pipeline stands; one moment per action."""
        return [self.act(action) for action in self.job.actions()]

    def act(self, action: str) -> Moment:
        """Carry out one action."""
        name, _, value = action.partition("=")
        pipeline = self.pipeline
        losses = [math.nan] * len(self.stages)
        if name == "train":
            batches = [[next(data) for data in self.data] for _ in range(pipeline.accumulation)]
            finished = pipeline.train(batches, flush=self._flushes())
            losses = self._newest = self._known(finished, _mean(finished[-1]))
        elif name in ("drain", "drained"):
            self._newest = self._known(pipeline.drain(), math.nan)
        elif name == "rate":
            self._set_rate(float(value))
        elif name == "reset" or action in (f"accumulate={pipeline.accumulation}", f"samples={self._samples}"):
            pass
        else:  # whatever else a training loop does comes to an empty pipe
            pipeline.empty()
            if name == "eval":
                losses = [self._evaluate()] * len(self.stages)
            elif name == "accumulate":
                pipeline.accumulation = int(value)
            elif name == "schedule":
                self._schedule = value
            elif name == "save":
                if "load" in self.job.actions():  # not every model can be copied
                    self._saved = copy.deepcopy((self.stages, pipeline, self._newest))
            elif name == "load":
                pipeline = self._load()
            elif name == "samples":
                self._samples = int(value)
            else:
                raise ValueError(f"{action!r} is no action")
        return Moment(
            action,
            loss=losses,
            version=[run.version for run in pipeline.runs],
            rate=[stage.rate() for stage in self.stages],
            norm=[stage.norm for stage in self.stages],
            drift=[list(run.drift) for run in pipeline.runs],
            live=[len(run.born) for run in pipeline.runs],
            peak=[run.peak for run in pipeline.runs],
            weights=[
                dict(zip(stage.names(), (value.detach().clone() for value in run.values()), strict=True))
                for stage, run in zip(self.stages, pipeline.runs, strict=True)
            ],
        )

    def forget_losses(self) -> None:
        """Know no loss of an earlier call, as an engine does that has only loaded the rest."""
        self.pipeline.drain()  # takes what an emptied pipe has not told of
        self._newest = [math.nan] * len(self.stages)

    def factors(self) -> list[float]:
        """clip / norm, for all stages and updates that clip."""
        return [factor for stage in self.stages for factor in stage.updater.factors]

    def window_losses(self) -> list[list[float]]:
        """The mean loss of the micro-batches of each update, by stage."""
        return [[math.fsum(window) / len(window) for window in run.windows] for run in self.pipeline.runs]

    def _load(self) -> Pipeline:
        """Go on with what was saved; what is counted since the start goes on, and the settings stay."""
        assert self._saved is not None, "a script saves before it loads"
        before = self.pipeline
        self.stages, self.pipeline, self._newest = copy.deepcopy(self._saved)
        self.pipeline.accumulation = before.accumulation
        for run, old in zip(self.pipeline.runs, before.runs, strict=True):
            run.drift, run.peak = old.drift, old.peak
        return self.pipeline

    def _set_rate(self, rate: float) -> None:
        for stage in self.stages:
            for group in stage.updater.optimizer.param_groups if stage.updater.optimizer else ():
                group["lr"] = rate

    def _flushes(self) -> bool:
        """Whether the next batch is flushed: it is decided where the pipe is empty."""
        pipeline = self.pipeline
        warm_up = self.job.options.get("flush_warmup_steps", 0)
        return not pipeline.taken and (self._schedule == "1f1b" or pipeline.emptied < warm_up)

    def _known(self, finished: list[list[list[float]]], otherwise: float) -> list[float]:
        """By stage, the mean loss of what it has finished; if nothing, what it knew; if nothing, `otherwise`."""
        found = zip(map(_mean, finished), self._newest, strict=True)
        return [next((loss for loss in known if not math.isnan(loss)), otherwise) for known in found]

    def _evaluate(self) -> float:
        losses = []
        for index in range(self.pipeline.accumulation):
            batch = jobs.micro_batch(self.job.model, jobs.EVALUATION_DATA + index)
            passed = None
            with torch.no_grad():
                for stage in self.stages:
                    passed = stage.compute(batch, passed)
            losses.append(passed.item())
        return math.fsum(losses) / len(losses)


def _mean(losses: list[list[float]]) -> float:
    """Over the replicas, of the mean over their micro-batches; NaN if there are none."""
    if not losses:
        return math.nan
    means = [math.fsum(replica) / len(replica) for replica in zip(*losses, strict=True)]
    return math.fsum(means) / len(means)
