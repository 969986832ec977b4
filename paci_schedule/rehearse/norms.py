"""Global gradient norms as the engines see them: exact under a flush, otherwise as old as their way to the stage.

The squared norms of every stage are kept, and for each stage the newest one that has reached it is looked up.  At
update v of stage s, with look-ahead d and a micro-batches in an update, stage r contributes its squared norm of update

* v, for r = s, and under a flush for every r;
* v - 1, for r > s: that norm came up with the first gradient of the window;
* floor(max(0, m - d_r) / a) - 1, for r < s: that norm came down with activation m, which is the last forward of stage s
  before the update.  That is v - ceil((d_r - d_s + 1) / a) until the pipe is drained.

Updates before the first count as zero, and so do norms of other stages that are not finite.  Where the first updates
run under a flush, m counts from its end, and the norms of its last update are known everywhere.
"""

from __future__ import annotations

import torch

from paci_schedule.core.spec import PipelineSpec

__all__ = ["Norms"]


class Norms:
    """Squared gradient norms, by stage and update.

    Args:
        spec: the pipeline; its accumulation is that of the updates.
        flushed: the number of updates under a flush, in which every stage waits for the norms of all others; None for
            all.
    """

    def __init__(self, spec: PipelineSpec, flushed: int | None) -> None:
        self._spec, self._flushed = spec, flushed
        self._squares: list[dict[int, torch.Tensor]] = [{} for _ in range(spec.stages)]

    def put(self, stage: int, update: int, square: torch.Tensor) -> None:
        """Keep a squared norm, fp32[]."""
        self._squares[stage][update] = square
        self._squares[stage].pop(update - self._spec.in_flight(0) - 1, None)

    def has(self, stage: int, update: int) -> bool:
        """Whether the stage's norm of the update is known."""
        return update in self._squares[stage]

    def is_complete(self, update: int) -> bool:
        """Whether a stage may go on with its update."""
        return not self._is_exact(update) or all(update in squares for squares in self._squares)

    def total(self, stage: int, update: int, last_forward: int) -> torch.Tensor:
        """The squared norm over all stages that the stage's update is clipped by, fp32[]."""
        if self._is_exact(update):  # in one order, so that all stages scale by the same factor
            return torch.stack([squares[update] for squares in self._squares]).sum()
        own = self._squares[stage][update]
        others = [
            self._squares[other].get(self._newest(stage, update, other, last_forward), torch.zeros_like(own))
            for other in range(self._spec.stages)
            if other != stage
        ]
        return own + torch.nan_to_num(torch.stack(others), nan=0.0, posinf=0.0).sum() if others else own

    def _newest(self, stage: int, update: int, other: int, last_forward: int) -> int:
        """The newest update of another stage whose norm has reached this stage."""
        if other > stage:
            return update - 1
        began = (self._flushed or 0) * self._spec.accumulation
        return max(began, last_forward - self._spec.look_ahead(other)) // self._spec.accumulation - 1

    def _is_exact(self, update: int) -> bool:
        return self._flushed is None or update < self._flushed
