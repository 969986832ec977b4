"""Has the loss jumped?  Then the pipe is emptied, and the updates that follow run 1F1B, where no weight is stale.

Every stage of a pipeline hears the same losses, each when its own update is done, and every one judges an update at the
same call: so late that the first stage has done it too.  So all of them decide alike, and nobody asks or waits.
Replicas sum their losses as whole numbers, for which every order gives the same bits.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.runtime.host_copy import HostCopy
from paci_schedule.runtime.waiting import waiting

__all__ = ["NOTHING_JUDGED", "WINDOW", "SpikeGuard", "judging_delay"]

logger = logging.getLogger(__name__)

WINDOW = 32
"""Updates whose median a loss is compared with.  Until there are so many, nothing is judged."""

NOTHING_JUDGED: Mapping[str, Any] = {"left": 0, "before": (), "open": ()}
"""The state of a guard that has heard nothing."""

_UNIT = 2.0**-20  # of the whole numbers
_LARGEST = 1e9  # a loss beyond it, or one that is not finite, counts as this


def judging_delay(spec: PipelineSpec) -> int:
    """The batches that are taken in after an update's own until the update is judged.

    The first stage has done the update one batch earlier, so that nobody waits for the device either.
    """
    return 1 - (-spec.look_ahead(0) // spec.accumulation)


class SpikeGuard:
    """Judges the losses of the updates that ran under PACI.

    Args:
        rise: a loss that is so much above the median of the updates before it is a spike.
        updates: that run under a flush after one.
        spec: the pipeline.
        stage: this rank's.
        replicas: the process group of this stage's replicas.
        timeout: how long a replica may take to answer.
        loss: the loss, of the numbers that an update tells.
    """

    def __init__(
        self,
        rise: float,
        updates: int,
        spec: PipelineSpec,
        stage: int,
        replicas: dist.ProcessGroup,
        timeout: timedelta,
        loss: Callable[[Sequence[float]], float],
    ) -> None:
        self._rise, self._updates, self._stage = rise, updates, stage
        self._replicas, self._timeout, self._loss = replicas, timeout, loss
        self._before: deque[float] = deque(maxlen=WINDOW)
        self._noted: deque[HostCopy] = deque()
        self._open = 0  # batches taken in whose updates are not judged yet
        self._left = 0
        self.respec(spec)

    def respec(self, spec: PipelineSpec) -> None:
        """Go on with another spec, from an empty pipe."""
        self._delay = judging_delay(spec)

    def note(self, losses: torch.Tensor) -> None:
        """Take in the mean losses of an update that ran under PACI, float32[n]; its replicas do the same."""
        numbers = torch.nan_to_num(losses.detach().double(), *[_LARGEST] * 3).clamp(-_LARGEST, _LARGEST)
        whole = (numbers / _UNIT).round().long()
        count = self._replicas.size()
        if count > 1:
            ranks = dist.get_process_group_ranks(self._replicas)
            doing = "compared the losses of an update with"
            with waiting(self._stage, doing, "the replicas of this stage", ranks, self._timeout):
                dist.all_reduce(whole, group=self._replicas)
        self._noted.append(HostCopy(whole.double() * (_UNIT / count)))

    def wants_flush(self) -> bool:
        """Whether the batch to come shall run under a flush; asked before every batch, on every stage."""
        while self._open > self._delay:
            self._open -= 1
            loss = self._loss(self._noted.popleft().numbers())
            if len(self._before) == WINDOW and not self._left:
                self._judge(loss, median(self._before))
            self._before.append(loss)
        return self._left > 0

    def took_batch(self, flushed: bool) -> None:
        """A batch is taken in, under a flush or not."""
        if flushed:
            self._left = max(0, self._left - 1)
        else:
            self._open += 1

    def state(self) -> dict[str, Any]:
        """The state at an empty pipe, for a checkpoint.

        Returns:
            left: updates that are still to run under a flush; before: the losses of the newest updates that are judged,
            oldest first; open: what the others told.
        """
        return {"left": self._left, "before": [*self._before], "open": [copy.numbers() for copy in self._noted]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on as the guard that gave `state`."""
        self._left = min(state["left"], self._updates)
        self._before = deque(state["before"], maxlen=WINDOW)
        self._noted = deque(HostCopy(torch.tensor(numbers, dtype=torch.float64)) for numbers in state["open"])
        self._open = len(self._noted)

    def _judge(self, loss: float, usual: float) -> None:
        if loss - usual <= self._rise:
            return
        self._left = self._updates
        if dist.get_rank() == 0:
            logger.warning(
                "the loss of an update, %.4g, is more than %g above %.4g, the median of the %d updates before it: the "
                'pipe is emptied, %d updates run under "1f1b", and then PACI goes on',
                loss,
                self._rise,
                usual,
                WINDOW,
                self._updates,
            )
