"""A stage's own update: its gradients are reduced over its replicas, summed with tied copies, clipped and applied."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.distributed.tensor import DTensor

from paci_schedule.adapters.torch.ties import Ties
from paci_schedule.predict import Prediction, clip_factor
from paci_schedule.runtime.deferred.norms import CarriedNorms
from paci_schedule.runtime.deferred.tied import drop_overflow
from paci_schedule.runtime.finite import may_step
from paci_schedule.runtime.waiting import begun, waiting

__all__ = ["StageUpdate"]


class StageUpdate:
    """What the schedule does between the last backward of an update and the next one.

    Args:
        stage: whose module is trained.
        pipeline: process group of all stages.
        optimizers, lr_schedulers: of the stage.
        max_norm: that gradients are clipped to; 0 for no clipping.
        norms: of the other stages; None where each stage clips by its own norm, or not at all.
        ties: the tied weights of the stage.
        prediction: of the stage's weights; None for none.
        timeout: how long the other stages may take under a flush.
        skips: the replicas of the stage, where an update is to be left out whose gradient is not finite, or of a tied
            stage's gradient what is not finite; None to leave out nothing.

    Attributes:
        norm: that the latest update was clipped by, float32[]; None before the first, or without clipping.
    """

    def __init__(
        self,
        stage: _PipelineStageBase,
        pipeline: dist.ProcessGroup,
        optimizers: Sequence[Any],
        lr_schedulers: Sequence[Any],
        max_norm: float,
        norms: CarriedNorms | None,
        ties: Ties,
        prediction: Prediction | None,
        timeout: timedelta,
        skips: dist.ProcessGroup | None,
    ) -> None:
        self.norm: torch.Tensor | None = None
        self._stage, self._pipeline, self._ties, self._prediction = stage, pipeline, ties, prediction
        self._optimizers, self._lr_schedulers = optimizers, lr_schedulers
        self._max_norm, self._norms, self._timeout, self._skips = max_norm, norms, timeout, skips

    def apply(self, at: object, flushing: bool) -> None:
        """Update the weights, and drop the gradients.

        Args:
            at: the op that runs, for errors.
            flushing: every stage is at the same update, and waits for what the others know of it.
        """
        self._stage.perform_reduce_grad(1)  # FSDP's; the loss has been scaled already
        parameters = [each for each in self._stage.submod.parameters() if each.requires_grad]  # its shards from here on
        self._ties.exchange(at, now=flushing)
        if self._ties.weights and (self._max_norm or self._skips is not None):
            drop_overflow([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self._max_norm:
            self._clip(parameters, at, flushing)
        if self._skips is None or self._may_step(parameters, flushing):
            self._step(parameters)
        for parameter in parameters:
            parameter.grad = None

    def _step(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        # The micro-batches in flight go on backward through these parameters: that is PACI, not a mistake.
        with torch.autograd._unsafe_preserve_version_counter(tuple(parameters)):
            for optimizer in self._optimizers:
                optimizer.step()
        for scheduler in self._lr_schedulers:
            scheduler.step()

    def _may_step(self, parameters: Sequence[torch.nn.Parameter], flushing: bool) -> bool:
        looked = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if flushing and self._norms is not None and self.norm is not None:  # that of all stages: all decide alike
            looked = [self.norm]
        return may_step(self._stage.stage_index, looked, torch.device(self._stage.device), self._skips)

    def _clip(self, parameters: Sequence[torch.nn.Parameter], at: object, flushing: bool) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        elsewhere = self._ties.counted_elsewhere()
        counted = [
            parameter.grad
            for parameter in parameters
            if parameter.grad is not None and all(parameter is not each for each in elsewhere)
        ]
        square = self._square(counted)
        if self._norms is not None and flushing:
            self._norms.add_own(square)
            ranks, doing = dist.get_process_group_ranks(self._pipeline), f"summed ({at}) the gradient norm over"
            with waiting(self._stage.stage_index, doing, "the other stages", ranks, self._timeout):
                begun(dist.all_reduce(square, group=self._pipeline, async_op=True)).wait(self._timeout)
        elif self._norms is not None:
            self._norms.complete(square)
        self.norm = square.sqrt()
        factor = clip_factor(self._max_norm, self.norm)
        if self._prediction is not None:
            self._prediction.factor = factor
        if gradients:
            torch._foreach_mul_(gradients, factor)

    def _square(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The squared norm of gradients, float32[]; of those that replicas hold in shards, of all shards."""
        if not gradients:
            return torch.zeros((), device=self._stage.device)
        total = torch.stack(torch._foreach_norm(gradients)).float().square().sum()
        return total.full_tensor() if isinstance(total, DTensor) else total
