"""Tied weights without a flush: the sum of the copies' gradients is applied a fixed number of updates later.

Every copy's gradient of update k is summed over the stages that hold a copy, asynchronously.  All of them post that sum
at the same moment of the stream (`core.sums`); a stage that has its part earlier holds it until then.  So no kernel of
the sum runs for long, and a stage that waits for its device never waits for a call that another stage has yet to begin.

Update k applies the sum of update k - j, with j = ceil((d_first - d_last) / a), the newest that the last of these
stages has in steady state without waiting: j = ceil((P - 1) / a) between the first and the last stage.  All copies
apply the same sum at the same update, so they stay identical, version by version.  Precisely:

* updates 0 to j - 1 of a run that begins without pending sums apply a gradient of zero;
* a drain changes nothing: the j newest sums stay pending, are saved with a checkpoint, and the next updates apply them;
* an update under a flush (1F1B) applies its own sum at once, and whatever was pending with it: no gradient is lost;
* where j shrinks (more micro-batches to an update), the next update applies all sums that are then due.

An optimizer that skips an update with an overflow would make the copies differ: one stage would keep its weights and
its learning rate, another would apply the sum, and neither would know in time.  So a stage with a copy never skips:
what overflows in its gradients, or in a sum, counts as zero (`drop_overflow`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.runtime.waiting import begun

__all__ = ["TiedGradient", "drop_overflow"]

_LARGEST = 1e13  # the squares of 1e12 such numbers still add up to a finite float32


def drop_overflow(gradients: Iterable[torch.Tensor]) -> None:
    """Make zero, in place, every element that is not finite, or so large that a sum of its kind might not be.

    Element by element, so that ranks that hold the same numbers make the same of them without asking each other.
    """
    for gradient in gradients:
        values = gradient._values() if gradient.is_sparse else gradient
        limit = min(_LARGEST, torch.finfo(values.dtype).max / 2)
        values.masked_fill_(~(values.abs() < limit), 0.0)


class TiedGradient:
    """The gradient of this stage's copy of one tied weight.

    Args:
        group: the ranks that hold a copy.
        stages: the stages that hold a copy.
        spec: the pipeline.
        timeout: how long the other stages may take under a flush, and where the pipe is empty.  Else a sum may be under
            way for as long as the training loop does something else, and the timeout holds that the group had when the
            sum was posted.

    Attributes:
        ranks: of the group.
        stages: the stages that hold a copy.
        delay: j, in updates.
    """

    def __init__(self, group: dist.ProcessGroup, stages: Sequence[int], spec: PipelineSpec, timeout: timedelta) -> None:
        self.stages = stages
        self.respec(spec)
        self.ranks = dist.get_process_group_ranks(group)
        self._group, self._timeout = group, timeout
        self._held: deque[torch.Tensor] = deque()
        self._pending: deque[tuple[torch.Tensor, dist.Work | None]] = deque()
        self._due = 0  # postings asked for, beyond those done

    def respec(self, spec: PipelineSpec) -> None:
        """Go on with another spec, from an empty pipe."""
        ahead = spec.look_ahead(min(self.stages)) - spec.look_ahead(max(self.stages))
        self.delay = -(-ahead // spec.accumulation)

    def exchange(self, gradient: torch.Tensor) -> None:
        """Hand in this update's gradient, and replace it in place by the sum that the update is to apply."""
        if len(self.ranks) == 1:  # one stage holds all copies, as one weight
            return
        self._held.append(gradient.clone())
        self._post_due()
        gradient.zero_()
        while len(self._pending) + len(self._held) > self.delay:
            gradient.add_(self._pop())

    def post(self) -> None:
        """Start the sum of the oldest gradient that is held; where none is, of the next one when it is handed in."""
        self._due += 1
        self._post_due()

    def exchange_now(self, gradient: torch.Tensor) -> None:
        """As `exchange`, under a flush: apply this update's sum and all that are pending."""
        if len(self.ranks) > 1:
            begun(dist.all_reduce(gradient, group=self._group, async_op=True)).wait(self._timeout)
        while self._pending:
            gradient.add_(self._pop())

    def pending(self) -> list[torch.Tensor]:
        """The sums that wait to be applied, oldest first; to be read and changed in place.

        All copies ask for them at the same point between two calls, where they hold the same parts: these are posted.
        """
        self._due -= len(self._held)
        self._post(len(self._held))
        for _, work in self._pending:
            if work is not None:
                work.wait(self._timeout)
        self._pending = deque((total, None) for total, _ in self._pending)
        return [total for total, _ in self._pending]

    def load_pending(self, sums: list[torch.Tensor]) -> None:
        """Go on with these sums pending, oldest first."""
        self._pending = deque((total, None) for total in sums)

    def _post_due(self) -> None:
        count = min(self._due, len(self._held))
        if count > 0:
            self._due -= count
            self._post(count)

    def _post(self, count: int) -> None:
        for _ in range(count):
            mine = self._held.popleft()
            self._pending.append((mine, dist.all_reduce(mine, group=self._group, async_op=True)))

    def _pop(self) -> torch.Tensor:
        total, work = self._pending.popleft()
        if work is not None:
            work.wait()
        return total
