"""Global gradient clipping without a flush: a stage's own norm is fresh, the others' norms are of earlier updates.

A stage's update needs the norm over all stages' gradients.  Waiting for it would be a flush, so squared norms travel
with the messages that are sent anyway, and an update takes the newest that its stage has received.  The schedule
determines which ones these are.  At update v of stage s, with d the look-ahead and a the micro-batches to an update,
stage r contributes its squared norm of update

* v, for r = s;
* v - 1, for r > s: it came up with the first gradient of the window;
* v - ceil((d_r - d_s + 1) / a), for r < s: it came down with an activation;

or of update E - 1, the last before the pipe was last empty, where that is newer: a drain tells every stage every norm.
Updates before the first count as zero.  In a drain no activation comes after the last one,
n - 1, so the update of r < s is E + floor(max(0, n - 1 - d_r) / a) - 1 from then on.

Stages that share a tied weight must scale its gradient by the same factor, bit for bit.  With `agrees`, all stages and
this one contribute update v - J, with J = ceil((d_0 + 1) / a), the newest that every stage has at its update v.

The norms in a message are kept as the message brought them, and put together when an update asks for them.  So the
number of kernels for a message does not grow with the pipeline.

A norm that is not finite counts as zero elsewhere: a stage that overflows skips its own update only.  One with a tied
weight does not skip, and its norm is finite (`runtime.deferred.tied`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.runtime.deferred.stand_in import StandIn, order
from paci_schedule.runtime.waiting import begun, waiting

__all__ = ["CarriedNorms", "NormGroup"]


class CarriedNorms:
    """Squared gradient norms of all stages, as far as this stage knows them.

    Args:
        spec: the pipeline.
        stage: this rank's.
        pipeline: process group of all stages of this pipeline; only `exchange` uses it.
        device: where the norms live.
        agrees: this stage holds a weight that is tied across stages.
        timeout: how long the other stages may take to come to `exchange`.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        stage: int,
        pipeline: dist.ProcessGroup,
        device: torch.device,
        *,
        agrees: bool,
        timeout: timedelta,
    ) -> None:
        self._spec, self._stage, self._pipeline, self._device, self._agrees = spec, stage, pipeline, device, agrees
        self._timeout = timeout
        self._update = self._since_empty = 0
        self._newest = [-1] * spec.stages
        self._unknown = self._zeros()
        self._known: dict[int, list[torch.Tensor]] = {}  # update -> for each stage the float32[P] that has its norm
        self._own: torch.Tensor | None = None
        self._down, self._up = self._zeros(), self._zeros()

    @property
    def stages(self) -> int:
        """P, the number of stages."""
        return self._spec.stages

    @property
    def delay(self) -> int:
        """J, in updates."""
        return -(-self._spec.in_flight(0) // self._spec.accumulation)

    @property
    def memory(self) -> int:
        """For how many updates norms are kept: the largest J that another number of micro-batches an update makes."""
        return self._spec.in_flight(0)

    def respec(self, spec: PipelineSpec) -> None:
        """Go on with another spec, from an empty pipe."""
        self._spec = spec

    def complete(self, square: torch.Tensor) -> None:
        """Make `square`, part of this stage's squared norm, in place part of the squared norm over all stages.

        An optimizer with several parameter groups asks for each of them; the other stages are added to the first.
        """
        first = self._own is None
        self.add_own(square)
        if self._agrees:
            square.copy_(self._row(self._update - self.delay).sum()) if first else square.zero_()
        elif first:
            others = [stage for stage in range(self._spec.stages) if stage != self._stage]
            square.add_(self._squares(others, [self._newest[stage] for stage in others]).sum())

    def add_own(self, square: torch.Tensor) -> None:
        """Count `square` as part of this stage's squared norm."""
        own = square.detach().reshape(()).float()
        self._own = own.clone() if self._own is None else self._own + own

    def close_update(self) -> None:
        """The update is done; the parts that it asked for make up this stage's norm."""
        if self._own is not None:
            self._put(self._update, self._stage, self._own.expand(self._spec.stages))
            self._down[self._stage] = self._up[self._stage] = self._own
        self._own = None
        self._update += 1
        self._known.pop(self._update - self.memory - 1, None)

    def exchange(self) -> None:
        """Learn every stage's norms; a collective of the pipeline, for an empty pipe.

        Raises:
            LinkError: a stage did not come to it in time.
        """
        updates = range(self._update - self.memory, self._update)
        own = torch.cat([self._squares([self._stage], [update]) for update in updates])
        gathered = [torch.empty_like(own) for _ in range(self._spec.stages)]
        doing, ranks = "has drained and waited for the gradient norms of", dist.get_process_group_ranks(self._pipeline)
        with waiting(self._stage, doing, "the other stages", ranks, self._timeout):
            begun(dist.all_gather(gathered, own, group=self._pipeline, async_op=True)).wait(self._timeout)
        self._begin_at(self._update, torch.stack(gathered, dim=1).unbind())

    def going_down(self) -> torch.Tensor:
        """float32[P]: the squared norms of this stage and of those before it, for the next activation to carry."""
        return self._down.clone()

    def going_up(self) -> torch.Tensor:
        """float32[P]: the squared norms of this stage and of those after it, for the next gradient to carry."""
        return self._up.clone()

    def came_down(self, micro_batch: int, squares: torch.Tensor) -> None:
        """Take in the norms of the stages before this one that an activation carried."""
        self._down[: self._stage] = squares[: self._stage]
        for stage in range(self._stage):
            behind = max(0, micro_batch - self._spec.look_ahead(stage))
            self._learn(stage, behind // self._spec.accumulation, squares)

    def came_up(self, micro_batch: int, squares: torch.Tensor) -> None:
        """Take in the norms of the stages after this one that a gradient carried."""
        self._up[self._stage + 1 :] = squares[self._stage + 1 :]
        for stage in range(self._stage + 1, self._spec.stages):
            self._learn(stage, micro_batch // self._spec.accumulation, squares)

    def state(self) -> list[list[float]]:
        """The squared norms of the last `memory` updates at an empty pipe, oldest first, a row of P each."""
        return [self._row(update).tolist() for update in range(self._update - self.memory, self._update)]

    def load_state(self, state: list[list[float]]) -> None:
        """Go on as the pipeline that gave `state`; zeros for what it does not hold."""
        self._begin_at(len(state), [torch.tensor(row, device=self._device) for row in state])

    def _begin_at(self, update: int, rows: Sequence[torch.Tensor]) -> None:
        """The pipe is empty after so many updates; `rows` are the newest of them, float32[P] each."""
        self._update = self._since_empty = update
        self._newest = [update - 1] * self._spec.stages
        self._known = {update - len(rows) + at: [row] * self._spec.stages for at, row in enumerate(rows)}

    def _learn(self, stage: int, updates: int, squares: torch.Tensor) -> None:
        if updates:  # else the last exchange has brought it already
            self._newest[stage] = self._since_empty + updates - 1
            self._put(self._newest[stage], stage, squares)

    def _put(self, update: int, stage: int, squares: torch.Tensor) -> None:
        self._known.setdefault(update, [self._unknown] * self._spec.stages)[stage] = squares

    def _row(self, update: int) -> torch.Tensor:
        return self._squares(range(self._spec.stages), [update] * self._spec.stages)

    def _squares(self, stages: Sequence[int], updates: list[int]) -> torch.Tensor:
        """float32[n]: the squared norm of each of the stages at its update, as far as it is known and finite."""
        parts: list[tuple[torch.Tensor, int, int]] = []  # of which tensor, from where to where
        for stage, update in zip(stages, updates, strict=True):
            known = self._known[update][stage] if update in self._known else self._unknown
            if parts and parts[-1][0] is known and parts[-1][2] == stage:
                parts[-1] = known, parts[-1][1], stage + 1
            else:
                parts.append((known, stage, stage + 1))
        joined = torch.cat([known[begin:end] for known, begin, end in parts])
        return torch.nan_to_num(joined, nan=0.0, posinf=0.0)

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(self._spec.stages, device=self._device)


class NormGroup(StandIn):
    """The model-parallel group as a stage's optimizer should see it: a sum over it completes the stage's own part.

    Optimizers sum squared gradient norms, and take the maximum of overflow flags, over the group of all model-parallel
    ranks.  Over this one, a sum is reduced over the stage's tensor-parallel ranks and completed with the carried norms;
    a maximum stays in the stage.  While `flushing`, it is the group that it stands in for, but for its ranks, which are
    always the tensor-parallel ones.

    Args:
        norms: of this stage.
        tensor_parallel: group of the ranks that share this stage's layers.
        model_parallel: group of all ranks of this pipeline.
        least: what a completed sum is at least, for an optimizer that takes no 0.
    """

    def __init__(
        self,
        norms: CarriedNorms,
        tensor_parallel: dist.ProcessGroup,
        model_parallel: dist.ProcessGroup,
        least: float = 0.0,
    ) -> None:
        super().__init__(model_parallel, dist.get_process_group_ranks(tensor_parallel))
        self.flushing = False
        self._norms, self._least = norms, least
        self._tensor_parallel, self._model_parallel = tensor_parallel, model_parallel

    def getBackendName(self) -> str:
        return "carried-norms"

    def allreduce(  # pyright: ignore[reportIncompatibleMethodOverride]: torch calls it by position, and NCCL gives None
        self, tensors: list[torch.Tensor], options: dist.AllreduceOptions
    ) -> dist.Work | None:
        is_sum = options.reduceOp == dist.ReduceOp.SUM  # pyright: ignore[reportUnnecessaryComparison]: torch compares them
        if self.flushing:
            if is_sum:
                own = tensors[0].clone()
                order(self._tensor_parallel.allreduce([own], options))
                self._norms.add_own(own)
            return self._model_parallel.allreduce(tensors, options)
        work = self._tensor_parallel.allreduce(tensors, options)
        if is_sum:
            order(work)
            self._norms.complete(tensors[0])
            if self._least:
                tensors[0].clamp_(min=self._least)
        return work
