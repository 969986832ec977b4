"""Weights that stages share, and the deferred sums of their gradients.

A ``PipelineStage`` knows nothing of shared weights, so the user of the schedule names them: every stage that holds a
copy gives it under the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError
from paci_schedule.runtime.deferred.tied import TiedGradient, drop_overflow
from paci_schedule.runtime.waiting import waiting

__all__ = ["Ties"]


class Ties:
    """The tied weights of one stage.  Every rank of the job constructs its own at the same time.

    Args:
        weights: this stage's copies, by the name that all copies have.
        pipelines: for every pipeline of the job its ranks in stage order.
        spec: the pipeline.
        timeout: how long the other stages that hold a copy may take.

    Attributes:
        weights: this stage's copies, by name, sorted.
        gradients: their gradients, likewise.

    Raises:
        ConfigError: on every rank, if a weight has one copy only, or copies of different shapes.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.nn.Parameter],
        pipelines: Sequence[Sequence[int]],
        spec: PipelineSpec,
        timeout: timedelta,
    ) -> None:
        self.weights = {name: weights[name] for name in sorted(weights)}
        self.gradients: dict[str, TiedGradient] = {}
        everyone: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, {name: tuple(weight.shape) for name, weight in self.weights.items()})
        for ranks in pipelines:
            for name in sorted({name for rank in ranks for name in everyone[rank]}):
                stages = [stage for stage, rank in enumerate(ranks) if name in everyone[rank]]
                holders = [ranks[stage] for stage in stages]
                shapes = {everyone[rank][name] for rank in holders}
                if len(stages) < 2 or len(shapes) > 1:
                    raise ConfigError(
                        f"SchedulePaci(tied={{{name!r}: ...}}): stages {stages} give a copy, in the shapes "
                        f"{sorted(shapes)}; all stages that share a weight, two at least, must give it, in one shape"
                    )
                group = dist.new_group(holders, timeout=timeout)
                if dist.get_rank() in holders:
                    assert isinstance(group, dist.ProcessGroup), "this rank is in the group"
                    self.gradients[name] = TiedGradient(group, stages, spec, timeout)
        self._timeout = timeout
        self._stage = next(ranks.index(dist.get_rank()) for ranks in pipelines if dist.get_rank() in ranks)

    @property
    def stages(self) -> list[Sequence[int]]:
        """For each of the weights the stages that hold a copy."""
        return [gradient.stages for gradient in self.gradients.values()]

    def counted_elsewhere(self) -> list[torch.nn.Parameter]:
        """The copies whose gradient counts in the norm of an earlier stage: that of the first copy."""
        return [self.weights[name] for name, each in self.gradients.items() if each.stages[0] != self._stage]

    def exchange(self, at: object, now: bool) -> None:
        """Put in place of this update's gradients the sums that the update is to apply; what is not finite becomes 0.

        Args:
            at: the op that runs, for the error of a stage that does not answer.
            now: the sums are those of this update, which the stage waits for, and all that are pending.
        """
        for name, weight in self.weights.items():
            if weight.requires_grad:
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
                tied = self.gradients[name]
                doing = f"summed ({at}) the gradients of {name!r}, a tied weight, over"
                with waiting(self._stage, doing, "the stages that hold it", tied.ranks, self._timeout):
                    tied.exchange_now(weight.grad) if now else tied.exchange(weight.grad)
        if self.weights:  # a stage with a copy never skips an update (`runtime.deferred.tied`)
            drop_overflow(weight.grad for weight in self.weights.values() if weight.grad is not None)

    def post_sum(self, number: int) -> None:
        """Start the next sum of the weight with this number, unless it is frozen."""
        name = list(self.weights)[number]
        if self.weights[name].requires_grad:
            self.gradients[name].post()
