"""The reference with replicas: as many single-process pipelines as a stage has data-parallel ranks, in lockstep.

Every replica is a `Reference` of its own, with its own data, in its own thread; at every update a stage's replicas meet
and each goes on with the mean of their gradients.  What else depends on the replicas is ZeRO's: `ZeroUpdater` is the
arithmetic of DeepSpeed's ZeRO stage 1 where it is not BF16_Optimizer's.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from integration_tests import jobs
from integration_tests.jobs import Job
from integration_tests.oracle import Moment, Reference

__all__ = ["APART", "ZeroUpdater", "replica_job", "run"]

APART = 1_000
"""Micro-batches between the data of one replica and the next."""


def replica_job(job: Job, replica: int) -> Job:
    """The job as one replica does it: with data of its own."""
    return dataclasses.replace(job, first_micro_batch=job.first_micro_batch + replica * APART)


def run(
    job: Job, replicas: int = 1, *, kind: type[Reference] = Reference, zero: bool = False, **arithmetic: Any
) -> list[Moment]:
    """Carry out a job's script with data-parallel replicas; one moment per action.

    Args:
        job: what a replica does.
        replicas: of every stage.
        kind: of a replica's pipeline.
        zero: ZeRO stage 1 with gradients accumulated in the parameters' own dtype.
        arithmetic: for `ZeroUpdater`.
    """
    references = [kind(replica_job(job, replica)) for replica in range(replicas)]
    if "fp16" in job.config:
        for stage in itertools.chain.from_iterable(reference.stages for reference in references):
            stage.module.half()
    for number in range(job.stages):
        meeting = _Meeting(replicas)
        for replica, reference in enumerate(references):
            stage = reference.stages[number]
            if zero:
                stage._updater = ZeroUpdater(job, stage.module, meeting, replica, **arithmetic)
            else:
                stage._updater.reduce = _Reduce(stage._updater, meeting, replica)
    with ThreadPoolExecutor(replicas, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        histories = list(pool.map(Reference.run, references))
    return [_together(moments) for moments in zip(*histories, strict=True)]


def _together(moments: tuple[Moment, ...]) -> Moment:
    """One moment of all replicas: their common weights, the mean of their losses."""
    first = moments[0]
    for other in moments[1:]:
        for mine, theirs in zip(first.weights, other.weights, strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    losses = [math.fsum(losses) / len(losses) for losses in zip(*(moment.loss for moment in moments), strict=True)]
    return dataclasses.replace(first, loss=losses)


class _Meeting:
    """Where the replicas of a stage average their gradients."""

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas
        self._barrier = threading.Barrier(replicas, timeout=60)
        self._brought: list[list[torch.Tensor]] = [[] for _ in range(replicas)]

    def average(self, replica: int, gradients: list[torch.Tensor], dtype: torch.dtype) -> None:
        """Make every gradient the mean over the replicas, in place; the sum is taken and rounded in `dtype`."""
        self._brought[replica] = gradients
        self._barrier.wait()
        means = [
            sum(gradient.to(dtype) for gradient in same).mul(1.0 / self.replicas)
            for same in zip(*self._brought, strict=True)
        ]
        self._barrier.wait()
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean)


class _Reduce:
    """Takes the place of an updater's `reduce`."""

    def __init__(self, updater: Any, meeting: _Meeting, replica: int) -> None:
        self._updater, self._meeting, self._replica = updater, meeting, replica

    def __call__(self) -> None:
        wire = getattr(self._updater, "_wire_dtype", torch.float32)
        self._meeting.average(self._replica, self._updater.gradients(), wire)


class ZeroUpdater:
    """ZeRO stage 1: gradients accumulated in the parameters' dtype, fp32 master weights, clipped in fp32.

    The norm is taken piece by piece in fp64, a piece being what one rank's partition holds of a parameter; the sum over
    a partition is rounded to fp32, and so is the sum over the ranks.  Gradients are averaged in their own dtype, cast
    to fp32, and only then multiplied by 1 / max(1, (norm + 1e-6) / clip).

    Args:
        job: of which the clip, optimizer and schedule count.
        module: the stage.
        meeting: of the stage's replicas.
        replica: which one.
        norm_dtype: of the pieces' norms; ZeRO's is fp64.
        scale_dtype: in which the gradients are multiplied; ZeRO's is fp32.
        reciprocal: multiply by 1 / (norm / clip), as ZeRO does, not by clip / norm.
        loss_scale: what the loss was multiplied with before its backward; 1 unless in fp16.
    """

    def __init__(
        self,
        job: Job,
        module: nn.Module,
        meeting: _Meeting,
        replica: int,
        *,
        norm_dtype: torch.dtype = torch.float64,
        scale_dtype: torch.dtype = torch.float32,
        reciprocal: bool = True,
        loss_scale: float = 1.0,
    ) -> None:
        self._meeting, self._replica, self._clip = meeting, replica, job.clip
        self._norm_dtype, self._scale_dtype, self._reciprocal = norm_dtype, scale_dtype, reciprocal
        self._loss_scale = loss_scale
        self.factors: list[float] = []
        self._flat: list[tuple[list[nn.Parameter], torch.Tensor]] = []
        groups = jobs.parameter_groups(job, list(module.parameters()))
        for group in groups:
            parameters = group["params"]
            master = torch.cat([parameter.detach().flatten() for parameter in parameters]).float().requires_grad_()
            self._flat.append((parameters, master))
            group["params"] = [master]
        self.optimizer = jobs.optimizer(job)(groups)
        self.schedule = jobs.schedule(job)(self.optimizer) if job.warmup else None

    def accumulate(self) -> None:
        """Gradients pile up in `.grad`."""

    def step(self) -> None:
        """Average, clip, update, round the weights, forget the gradients."""
        gradients = [parameter.grad for parameters, _ in self._flat for parameter in parameters]
        self._meeting.average(self._replica, gradients, gradients[0].dtype)
        flat = [torch.cat([parameter.grad.flatten() for parameter in parameters]) for parameters, _ in self._flat]
        if self._clip:
            norm = torch.stack([self._norm(number, total) for number, total in enumerate(flat)]).norm() + 1e-6
            factor = 1.0 / torch.clamp(norm / self._clip, min=1.0) if self._reciprocal else self._clip / norm
            self.factors.append((self._clip / norm).item())
            flat = [total.to(self._scale_dtype).mul_(torch.clamp(factor, max=1.0)) for total in flat]
        for (_, master), total in zip(self._flat, flat, strict=True):
            master.grad = total.float().mul_(1.0 / self._loss_scale)
        self.optimizer.step()
        for parameters, master in self._flat:
            pieces = master.detach().split([parameter.numel() for parameter in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.data.copy_(piece.view_as(parameter))
                parameter.grad = None
        if self.schedule:
            self.schedule.step()

    def _norm(self, group: int, total: torch.Tensor) -> torch.Tensor:
        """The norm of one group's gradient."""
        parameters, _ = self._flat[group]
        even = 2 * self._meeting.replicas
        size = -(-total.numel() // even) * even // self._meeting.replicas
        bounds, squares = [0], []
        for parameter in parameters:
            bounds.append(bounds[-1] + parameter.numel())
        for start in range(0, size * self._meeting.replicas, size):
            cuts = [(max(start, low), min(start + size, high)) for low, high in itertools.pairwise(bounds)]
            norms = [total[low:high].to(self._norm_dtype).norm() for low, high in cuts if low < high]
            squares.append(torch.stack(norms).square().sum().float())
        return sum(squares).sqrt()
